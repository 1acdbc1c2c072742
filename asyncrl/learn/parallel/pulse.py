"""What a rank is doing, for another thread to tell: its own may wait in a collective for ever."""

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pulse:
    """Which verb a rank works on, since when, and what it waits for there. `during` is for its own thread, the rest for any."""

    def __init__(self, packs: Callable[[], int]) -> None:
        """packs: how many its models were given so far."""
        self._packs = packs
        self._ended = 0  # verbs
        self._verb: tuple[str, float, int] | None = None  # its name, when it began, and the thread that works on it

    @contextmanager
    def during(self, verb: str) -> Iterator[None]:
        """What happens inside is the work on a verb."""
        self._verb = verb, time.monotonic(), threading.get_ident()
        try:
            yield
        finally:
            self._verb, self._ended = None, self._ended + 1

    @property
    def progress(self) -> int:
        """Rises with every pack, every verb, and whatever is read from a disk or written to one, as checkpoints are."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return self._packs() + self._ended + usage.ru_inblock + usage.ru_oublock

    @property
    def doing(self) -> str:
        """`update 7 for 12 s, in all_reduce of Ranks.sum_`; empty between verbs."""
        if (working := self._verb) is None:
            return ""
        verb, since, thread = working
        return f"{verb} for {time.monotonic() - since:.0f} s, in {_where(thread)}"


def _where(thread: int) -> str:
    """The innermost function of asyncrl that a thread is in, and before it what this one called of torch.distributed."""
    frame, collective = sys._current_frames().get(thread), ""
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if module.startswith("torch.distributed"):
            collective = collective or name.rpartition(".")[2]
        elif module.startswith("asyncrl."):
            return f"{collective} of {name}" if collective else name
        frame = frame.f_back
    return collective or "nothing of asyncrl"
