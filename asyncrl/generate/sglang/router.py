"""Which server takes a batch of requests: least loaded, with session affinity. Pure; not thread-safe.

As in the cache-aware routing of SGLang's own router: a group's prompt is in the cache of the server that has seen it
last, so work of that group goes back there, as long as this costs no balance.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

# A cached prompt saves one prefill; a server that is busier by more than this share of its window costs more than that.
AFFINITY = 0.25


@dataclass
class _Replica:
    slots: int
    rows: int = 0  # in flight
    up: bool = False


class Router:
    """Replicas are 0 … len(windows)−1, all down until `up`. windows: slots of each, at least 1.

    remember: groups whose replica is remembered; the one asked for longest ago is forgotten first.
    """

    def __init__(self, windows: Sequence[int], *, remember: int = 4096) -> None:
        self._replicas = [_Replica(_window(index, slots)) for index, slots in enumerate(windows)]
        self._remember = remember
        self._served: OrderedDict[int, int] = OrderedDict()  # group -> replica, the latest last

    def pick(self, group: int, rows: int) -> int | None:
        """The replica for `rows` requests of `group`; None when none is up. Tell `began` once they are sent."""
        running = [index for index, replica in enumerate(self._replicas) if replica.up]
        if not running:
            return None
        best = min(running, key=lambda index: self._load(index, rows))  # ties: the first
        last = self._served.get(group)
        chosen = last if last is not None and self._is_as_good(last, best, rows) else best
        self._served[group] = chosen
        self._served.move_to_end(group)
        if len(self._served) > self._remember:
            self._served.popitem(last=False)
        return chosen

    def _is_as_good(self, last: int, best: int, rows: int) -> bool:
        """Whether affinity with `last` is worth it: up, not far busier than `best`, not beyond its window without need."""
        load, least = self._load(last, rows), self._load(best, rows)
        return self._replicas[last].up and load <= least + AFFINITY and (load <= 1.0 or least > 1.0)

    def _load(self, index: int, more: int) -> float:
        """Share of its window that a replica would use with `more` rows; above 1, the server queues them."""
        replica = self._replicas[index]
        return (replica.rows + more) / replica.slots

    def rows(self, replica: int) -> int:
        """Rows in flight there."""
        return self._replicas[replica].rows

    def began(self, replica: int, rows: int) -> None:
        self._replicas[replica].rows += rows

    def ended(self, replica: int, rows: int) -> None:
        """Rows that have left the replica: finished, failed, or moved elsewhere; also those of a replica that is down."""
        left = self._replicas[replica].rows - rows
        if left < 0:
            raise ValueError(
                f"{rows} rows ended at replica {replica}, which had {left + rows}: its load would be negative, and it would "
                "draw all work; tell `began` and `ended` of the same rows once each"
            )
        self._replicas[replica].rows = left

    def up(self, replica: int) -> None:
        self._replicas[replica].up = True

    def down(self, replica: int) -> None:
        """Nothing more goes there. Its rows count until they are told to have ended."""
        self._replicas[replica].up = False

    def set_window(self, replica: int, slots: int) -> None:
        """May be fewer than the rows in flight: the replica then gets work last."""
        self._replicas[replica].slots = _window(replica, slots)


def _window(replica: int, slots: int) -> int:
    if slots < 1:
        raise ValueError(f"window of replica {replica} = {slots} < 1: it could take nothing; use at least 1, or `down`")
    return slots
