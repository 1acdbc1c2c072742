"""Bytes on their way to receivers: how many there may be, for each of them and in all."""

from collections import deque

EACH_BYTES = 64 << 20
TOTAL_BYTES = 256 << 20
STALLED_S = 30.0


class _Way:
    """What is on its way to one receiver: the number and size of every frame."""

    def __init__(self) -> None:
        self.frames: deque[tuple[int, int]] = deque()
        self.last = 0  # number of the last frame
        self.nbytes = 0
        self.moved_at = 0.0
        self.stalled = False


class Flight:
    """Counts what was sent to each receiver and is not yet confirmed. Not thread-safe.

    Half of the total is for receivers with nothing on their way, so that those with much can't take it all. One that confirms
    nothing for STALLED_S gets nothing more until it does, and no longer counts: the connection is then broken, and its bytes
    with it, or it trickles. It holds `each_bytes` at most.
    """

    def __init__(self, each_bytes: int = EACH_BYTES, total_bytes: int = TOTAL_BYTES) -> None:
        self._each_bytes, self._total_bytes = each_bytes, total_bytes
        self._ways: dict[bytes, _Way] = {}
        self.nbytes = 0  # in all

    def allows(self, peer: bytes, nbytes: int) -> bool:
        """Whether a frame of so many bytes may go to a receiver now."""
        way = self._ways.get(peer)
        if way is None or not way.nbytes:
            return self.nbytes + nbytes <= self._total_bytes
        within = way.nbytes + nbytes <= self._each_bytes and self.nbytes + nbytes <= self._total_bytes // 2
        return within and not way.stalled

    def next_number(self, peer: bytes) -> int:
        """The number of the next frame to a receiver; they rise from 1."""
        return self._ways.setdefault(peer, _Way()).last + 1

    def send(self, peer: bytes, nbytes: int, now: float) -> None:
        """Counts the frame with `next_number`."""
        way = self._ways.setdefault(peer, _Way())
        if not way.frames:
            way.moved_at = now
        way.last += 1
        way.frames.append((way.last, nbytes))
        way.nbytes += nbytes
        self.nbytes += nbytes

    def confirm(self, peer: bytes, number: int, now: float) -> None:
        """The receiver has frame `number`, and so all before it; one that was never sent is of another connection."""
        way = self._ways.get(peer)
        if way is None or not way.frames or not way.frames[0][0] <= number <= way.last:
            return
        if way.stalled:
            way.stalled = False
            self.nbytes += way.nbytes
        while way.frames and way.frames[0][0] <= number:
            nbytes = way.frames.popleft()[1]
            way.nbytes -= nbytes
            self.nbytes -= nbytes
        way.moved_at = now

    def forget(self, peer: bytes) -> None:
        """The receiver's connection is gone, and what was on its way with it."""
        way = self._ways.pop(peer, None)
        if way is not None and not way.stalled:
            self.nbytes -= way.nbytes

    def look(self, now: float) -> None:
        """Finds out who stalled. Call it now and then."""
        for way in self._ways.values():
            if way.frames and not way.stalled and now - way.moved_at >= STALLED_S:
                way.stalled = True
                self.nbytes -= way.nbytes
