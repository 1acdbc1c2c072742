"""How any process speaks to the one that leads a run: by files in the run directory, which need no address and no token.

    asker ── requests/ID.json ───► leader, once a round; it renames it to ID.taken and does what is asked
    asker ◄─ requests/ID.answer ── leader; the asker removes it

Who begins to lead a run first removes what was asked before: a request is done by the leader that it was made to, or by nobody.
"""

import contextlib
import functools
import logging
import operator
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from asyncrl.errors import AsyncRLError, ConfigError, DiskFull, Unavailable
from asyncrl.rundir import RunDir, redact, write_atomic

log = logging.getLogger(__name__)
ANSWER_S = 120.0  # a file may take a minute to be seen on another node of a network file system
_LOOK_S = 0.1


class Stop(Struct, frozen=True, tag="stop", forbid_unknown_fields=True):
    """End in order: the update under way is made and saved. at_once: it is not, and actors are killed."""

    at_once: bool = False


class Scale(Struct, frozen=True, kw_only=True, tag="scale", forbid_unknown_fields=True):
    """So many of each from now on, of the learner's policy ranks; None: as before."""

    generators: int | None = None
    rewards: int | None = None
    learner: int | None = None

    def said(self) -> str:
        """Only what is to change."""
        return ", ".join(f"{name}={count}" for name, count in msgspec.structs.asdict(self).items() if count is not None)


class Answered(Struct, frozen=True):
    """What became of a request."""

    done: bool
    text: str


class Leader(NamedTuple):
    """Who leads a run."""

    pid: int
    host: str
    since: float  # seconds since the epoch

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def leader(paths: RunDir) -> Leader | None:
    """Who holds the run's lock; None: nobody, as far as can be seen from this machine."""
    try:
        with (paths.path / ".lock").open() as lock:
            holder, since = lock.read(), os.fstat(lock.fileno()).st_mtime
    except OSError:
        return None
    named = re.match(r"pid (\d+) on (.*)", holder)
    if named is None or (named[2] == socket.gethostname() and not Path(f"/proc/{named[1]}").exists()):
        return None
    return Leader(int(named[1]), named[2], since)


def ask(paths: RunDir, request: Stop | Scale, timeout_s: float = ANSWER_S) -> str:
    """Waits until the leader has answered, and returns what it says. Raises ConfigError where it refuses, or nobody leads the
    run; Unavailable where it does not answer in time, or ends before: it says whether anything may have been done."""
    first = leader(paths)
    if first is None:
        raise ConfigError(f"nobody leads the run in {paths.path}: there is no one to ask; `asyncrl status` says how it ended")
    base = paths.requests / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    asked, answer = base.with_suffix(".json"), base.with_suffix(".answer")
    try:
        write_atomic(asked, msgspec.json.encode(request))
    except PermissionError as error:
        raise ConfigError(
            f"{paths.requests}: {error.strerror}: only who may write there can ask; run it as {first}'s user"
        ) from error
    deadline = time.monotonic() + timeout_s
    try:
        while not answer.exists() and leader(paths) == first and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if answer.exists():
            told = msgspec.json.decode(answer.read_bytes(), type=Answered)
            if not told.done:
                raise ConfigError(told.text)
            return told.text
        why = f"{first}, which leads it, has not answered for {timeout_s:g} s: it may be preparing, or held up: its log says"
        if leader(paths) != first:
            why = f"{first}, which led it, has ended"
        try:
            asked.unlink()  # from now on nobody takes it
        except FileNotFoundError:
            raise Unavailable(f"{paths.path}: {why}; it had begun with what was asked: look at `asyncrl status`") from None
        raise Unavailable(f"{paths.path}: nothing was done: {why}")
    finally:
        asked.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)


class Requests:
    """The leader's end. Made when it has the run's lock; `look` is called once a round."""

    def __init__(self, paths: RunDir, handlers: Mapping[type, Callable[[Any], str]]) -> None:
        """handlers: for each kind of request what does it, and returns what to answer; an AsyncRLError is the answer too."""
        self._folder, self._handlers = paths.requests, handlers
        kinds: Any = functools.reduce(operator.or_, handlers)
        self._decode = msgspec.json.Decoder(kinds).decode
        for name in self._names():
            if not name.startswith("."):
                (self._folder / name).unlink(missing_ok=True)

    def look(self) -> None:
        """Does what was asked, in order, and answers. Waits for nothing, and raises nothing that is the asker's fault."""
        for name in sorted(self._names()):
            if name.startswith(".") or not name.endswith(".json"):
                continue
            asked, taken = self._folder / name, (self._folder / name).with_suffix(".taken")
            with contextlib.suppress(OSError, DiskFull):  # whoever asked gave up, or the folder went away
                asked.rename(taken)
                answer = self._answer(taken.read_bytes())
                write_atomic(taken.with_suffix(".answer"), msgspec.json.encode(answer))
                taken.unlink()

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except OSError:  # mostly: nobody has ever asked
            return []

    def _answer(self, content: bytes) -> Answered:
        try:
            request = self._decode(content)
            return Answered(True, self._handlers[type(request)](request))
        except msgspec.MsgspecError as error:
            known = ", ".join(kind.__name__.lower() for kind in self._handlers)
            return Answered(False, f"no request that this run knows ({error}); it knows {known}: is it of the same asyncrl?")
        except Exception as error:
            if not isinstance(error, AsyncRLError):
                log.exception("a request could not be done")
            return Answered(False, redact(str(error)) or type(error).__name__)


class Stopping:
    """What a leader was asked about its end."""

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def take(self, request: Stop) -> str:
        """Notes it, and returns what to answer."""
        self.asked, self.at_once = True, self.at_once or request.at_once
        log.warning("asked to stop%s", " at once" if self.at_once else "")
        if self.at_once:
            return "the run ends at once; the updates since its newest checkpoint will be made again from the log"
        return "the update under way is made and saved, then the run ends; --now ends it at once"
