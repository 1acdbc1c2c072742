import pytest

from asyncrl.types import Version
from asyncrl.weights.messages import Manifest
from asyncrl.weights.shelf import FETCH_IDLE_S, FETCH_MAX_S, Live, Receiver, Shelf


def live(update: int) -> Live:
    manifest = Manifest(version=Version(1, update), tensors=(), total_bytes=0, bucket_bytes=1, checksums=())
    return Live(manifest=manifest, data=memoryview(b""))


def updates(shelf: Shelf) -> list[int]:
    return [u for u in range(10) if shelf.find(Version(1, u))]


@pytest.fixture
def shelf() -> Shelf:
    """Versions 1 and 2; 1 was superseded at time 100."""
    made = Shelf()
    made.add(live(1), 50.0)
    made.add(live(2), 100.0)
    return made


def puller(heard_at: float) -> Receiver:
    return Receiver(name="g", pulling=Version(1, 1), heard_at=heard_at)


def test_the_first_two_versions_both_stay(shelf: Shelf) -> None:
    assert updates(shelf) == [1, 2]
    assert shelf.newest is not None
    assert shelf.newest.version == Version(1, 2)


@pytest.mark.parametrize(
    ("receivers", "now", "left"),
    [
        ([], 101.0, [2]),  # nobody pulls: the older goes
        ([puller(101.0)], 101.0, [1]),  # the older is being pulled: the one between is given up
        ([puller(101.0 - FETCH_IDLE_S)], 101.0, [2]),  # its puller stalled
        ([puller(100.0 + FETCH_MAX_S)], 100.0 + FETCH_MAX_S, [2]),  # its puller takes for ever
        ([Receiver(name="g", holds=Version(1, 1), heard_at=101.0)], 101.0, [2]),  # holding isn't pulling
    ],
)
def test_making_room(shelf: Shelf, receivers: list[Receiver], now: float, left: list[int]) -> None:
    shelf.make_room(receivers, now)
    assert updates(shelf) == left


def test_a_slow_pull_ends_however_fast_versions_come(shelf: Shelf) -> None:
    for update in range(3, 9):
        shelf.make_room([puller(101.0)], 101.0)
        shelf.add(live(update), 101.0)
        assert len(shelf) == 2
        assert updates(shelf) == [1, update]
