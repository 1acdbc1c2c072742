"""The versions that a publisher can serve right now: at most two, the one being staged included."""

from msgspec import Struct

from asyncrl.types import Version
from asyncrl.weights.messages import Manifest
from asyncrl.weights.shm import VersionFile

FETCH_IDLE_S = 5.0  # a receiver silent for longer holds nothing back
FETCH_MAX_S = 60.0  # nor does one that pulls a superseded version for longer than this


class Live(Struct, frozen=True, kw_only=True):
    """One whole, immutable version. data: all its bytes. file: where they lie in shared memory, or None."""

    manifest: Manifest
    data: memoryview
    file: VersionFile | None = None

    @property
    def version(self) -> Version:
        return self.manifest.version


class Receiver(Struct, kw_only=True):
    """A subscriber as the publisher sees it. pulling: the version that it takes over the socket, if any."""

    name: str
    holds: Version | None = None
    pulling: Version | None = None
    heard_at: float = 0.0


class Shelf:
    """Keeps the newest version, and one older while it is being pulled. Not thread-safe: its owner locks.

    Progress: if receivers pull slower than the learner publishes, the older version stays until its pull is done, and the one
    between is given up. Otherwise each publish would take the bytes from under every pull, and none would ever end.
    """

    def __init__(self) -> None:
        self._live: list[Live] = []
        self._superseded_at = 0.0

    @property
    def newest(self) -> Live | None:
        return self._live[-1] if self._live else None

    def __len__(self) -> int:
        return len(self._live)

    def find(self, version: Version) -> Live | None:
        return next((live for live in self._live if live.version == version), None)

    def make_room(self, receivers: list[Receiver], now: float) -> None:
        """Before staging: leaves at most one version live."""
        if len(self._live) < 2:
            return
        older = self._live[0]
        pulled = any(r.pulling == older.version and now - r.heard_at < FETCH_IDLE_S for r in receivers)
        keep_older = pulled and now - self._superseded_at < FETCH_MAX_S
        self._drop(1 if keep_older else 0)

    def add(self, live: Live, now: float) -> None:
        """Makes a version visible as the newest. Asks for `make_room` first."""
        if len(self._live) == 1:
            self._superseded_at = now
        self._live.append(live)

    def clear(self) -> None:
        while self._live:
            self._drop(0)

    def _drop(self, index: int) -> None:
        file = self._live.pop(index).file
        if file is not None:
            file.close()
