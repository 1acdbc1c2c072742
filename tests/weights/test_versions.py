"""Which versions the publisher holds, and what receivers get of them: all of it under a clock that the tests move."""

import heapq
import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.models.memory import Place, WeightMemory
from asyncrl.types import Version
from asyncrl.weights.messages import Manifest
from asyncrl.weights.versions import IDLE_S, PATIENCE, PATIENCE_S, Live, Receiver, VersionCache

HELLO_S = 0.5  # how often receivers of the simulation say hello


class Bench:
    """A cache, its receivers, and a clock."""

    def __init__(self) -> None:
        self.cache, self.now = VersionCache(), 0.0
        self.memory = WeightMemory.create(0, "weights")
        self.receivers: dict[str, Receiver] = {}

    def publish(self, update: int, here: str = "") -> None:
        self.cache.make_room()
        assert len(self.cache.live()) <= 2  # the one being staged is the third
        place = Place(here, "/proc/0/fd/0", b"") if here else None
        manifest = Manifest(version=Version(1, update), tensors=(), total_bytes=0, bucket_bytes=1, place=place)
        self.cache.add(Live(manifest=manifest, memory=self.memory), self.now)
        self.advance()

    def advance(self) -> None:
        self.cache.advance(self.receivers.values(), self.now)
        assert len(self.cache.live()) <= 3

    def says(self, name: str, holds: int | None = None, pulling: int | None = None) -> None:
        receiver = self.receivers.setdefault(name, Receiver(name=name))
        versions = [None if update is None else Version(1, update) for update in (holds, pulling)]
        self.cache.hear(receiver, versions[0], versions[1], self.now)
        self.advance()

    def offered(self, name: str) -> int | None:
        found = self.cache.offered(self.receivers[name])
        return found.version.update if found else None

    def updates(self) -> list[int]:
        return sorted(found.version.update for found in self.cache.live())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_without_pulls_the_newest_alone_stays(bench: Bench) -> None:
    for update in range(5):
        bench.publish(update)
        assert bench.updates() == [update]


def test_a_pull_of_the_newest_ends_however_many_versions_come(bench: Bench) -> None:
    bench.publish(1)
    bench.says("g", None, pulling=1)
    for update in range(2, 30):
        bench.publish(update)
        assert bench.updates() == [1, update]
    bench.says("g", holds=1)
    assert bench.offered("g") == 29
    assert bench.updates() == [29]


def test_a_version_that_has_waited_is_the_last_not_the_first(bench: Bench) -> None:
    bench.publish(1)
    bench.says("g", None, pulling=1)
    bench.publish(2)
    bench.cache.make_room()
    assert bench.updates() == [1]  # nobody had begun 2: its memory goes to 3


def test_receivers_of_the_node_get_the_newest_at_once(bench: Bench) -> None:
    bench.says("near")
    bench.receivers["near"].here = "here"
    bench.publish(1, "here")
    bench.says("far", None, pulling=1)
    bench.publish(2, "here")
    assert (bench.offered("near"), bench.offered("far")) == (2, 1)


def test_who_is_late_goes_on_in_the_slow_round_and_nobody_waits(bench: Bench) -> None:
    bench.publish(1)
    bench.says("slow", None, pulling=1)
    bench.says("fast", None, pulling=1)
    bench.publish(2)
    bench.now = 3.0
    bench.says("slow", None, pulling=1)
    assert (bench.offered("fast"), bench.updates()) == (1, [1, 2])
    bench.says("fast", holds=1)
    for update in range(2, 30):
        if update > 2:
            bench.publish(update)
        assert (bench.offered("fast"), bench.updates()) == (update, [1, update])
        bench.says("fast", holds=1, pulling=update)
        bench.says("slow", None, pulling=1)
        bench.now += 1.0
        bench.says("fast", holds=update)
    bench.says("slow", holds=1)
    assert (bench.offered("slow"), bench.updates()) == (29, [29])


def test_while_the_slow_round_is_taken_the_fast_one_waits_for_nobody_beyond_its_patience(bench: Bench) -> None:
    for update, name in ((1, "stuck"), (2, "slow")):
        bench.publish(update)
        bench.says(name, update - 1, pulling=update)
        bench.says("fast", update - 1, pulling=update)
        bench.now += 10.0
        for other in bench.receivers.values():
            other.heard_at = bench.now
        bench.says("fast", holds=update)
    bench.publish(3)
    assert bench.updates() == [1, 2, 3]
    assert bench.offered("fast") == 2  # 3 waits: `slow` may be done any moment
    bench.now += PATIENCE * 10.0
    for other in bench.receivers.values():
        other.heard_at = bench.now
    bench.advance()
    assert (bench.offered("fast"), bench.updates()) == (3, [1, 3])
    assert bench.receivers["slow"].slow


def test_versions_that_take_many_minutes_arrive(bench: Bench) -> None:
    bench.publish(0)
    for name in ("g0", "g1", "g2"):
        bench.says(name, None, pulling=0)
    for second in range(1, 1900):  # a version every second; they take 10, 11 and 31 minutes
        bench.now = float(second)
        bench.publish(second)
        for minutes, receiver in zip((10, 11, 31), bench.receivers.values(), strict=True):
            done = receiver.holds is not None or second >= 60 * minutes
            bench.says(receiver.name, 0 if done else None, None if done else 0)
    assert [receiver.holds for receiver in bench.receivers.values()] == [Version(1, 0)] * 3
    assert bench.updates() == [1899]


def test_a_silent_receiver_is_not_waited_for(bench: Bench) -> None:
    bench.publish(1)
    bench.says("dead", None, pulling=1)
    bench.says("g", 0)
    bench.publish(2)
    assert (bench.offered("g"), bench.updates()) == (1, [1, 2])
    bench.now = IDLE_S
    bench.advance()
    assert (bench.offered("g"), bench.updates()) == (2, [2])


def test_slow_receivers_go_together_and_the_slowest_does_not_hold_up_the_others(bench: Bench) -> None:
    bench.publish(1)
    for name in ("fast", "slow", "stuck"):
        bench.says(name, None, pulling=1)
    bench.now = 0.1
    bench.says("fast", holds=1)
    bench.publish(2)
    seen: dict[int, int] = {}
    for step in range(1, 100):  # every second; `slow` takes 10 s a version, `stuck` for ever
        bench.now = float(step)
        for name, seconds in (("slow", 10.0), ("stuck", 1e9)):
            receiver = bench.receivers[name]
            held, pulling = receiver.holds, receiver.pulling
            assert pulling is not None
            if bench.cache.find(pulling) is None:
                pulling = None
            elif bench.now - receiver.began_at >= seconds:
                held, pulling = pulling, None
                seen[step] = held.update
            bench.says(name, held and held.update, pulling and pulling.update)
            offered = bench.offered(name)
            if pulling is None and offered is not None and (held is None or offered > held.update):
                bench.says(name, held and held.update, offered)
        bench.says("fast", holds=step)
        bench.publish(step + 2)
    assert len(seen) >= 5  # of 9 that it could take alone


def test_a_receiver_that_was_slow_once_is_not_slow_for_ever(bench: Bench) -> None:
    bench.publish(1)
    bench.says("g", None, pulling=1)
    bench.says("fast", None, pulling=1)
    bench.now = 1.0
    bench.says("fast", holds=1)
    bench.publish(2)
    bench.now = 5.0
    bench.says("g", holds=1)
    assert bench.receivers["g"].slow
    bench.says("g", holds=1, pulling=2)
    bench.now = 6.0
    bench.says("g", holds=2)
    assert not bench.receivers["g"].slow


# ------------------------------------------------------------------------------------------------ any intervals, any speeds


class Peer:
    """Takes versions in `seconds` each, bucket by bucket; for `pause_s` it is away after each."""

    def __init__(self, name: str, seconds: float, pause_s: float, buckets: int = 10) -> None:
        self.name, self.seconds, self.pause_s, self.buckets = name, seconds, pause_s, buckets
        self.holds: int | None = None
        self.pulling: int | None = None
        self.left = 0
        self.got: list[float] = []

    def turn(self, bench: Bench) -> float:
        """Does what is next; returns seconds to its next turn."""
        if self.pulling is not None:
            self.left -= 1
            if bench.cache.find(Version(1, self.pulling)) is None:
                self.pulling = None  # Gone
            elif self.left == 0:
                self.holds, self.pulling = self.pulling, None
                self.got.append(bench.now)
                bench.says(self.name, self.holds)
                return self.pause_s
        offered = bench.offered(self.name) if self.name in bench.receivers else None
        if self.pulling is None and offered is not None and (self.holds is None or offered > self.holds):
            self.pulling, self.left = offered, self.buckets
        bench.says(self.name, self.holds, self.pulling)
        bucket_s = self.seconds / self.buckets
        return min(bucket_s, HELLO_S) if self.pulling is None else bucket_s


def simulate(peers: list[Peer], intervals: Iterator[float], horizon_s: float) -> list[float]:
    """Runs a publisher and receivers; returns when versions were published."""
    bench, order, published = Bench(), itertools.count(), []
    agenda: list[tuple[float, int, Peer | None]] = [(0.0, next(order), None)]
    agenda += [(0.001 * index, next(order), peer) for index, peer in enumerate(peers, 1)]
    while True:
        bench.now, _, peer = heapq.heappop(agenda)
        if bench.now > horizon_s:
            return published
        if peer is None:
            bench.publish(len(published))
            published.append(bench.now)
            delay = next(intervals)
        else:
            delay = peer.turn(bench)
        heapq.heappush(agenda, (bench.now + max(delay, 1e-3), next(order), peer))


SPEEDS = st.floats(0.1, 40.0)  # seconds for a version: between two buckets of the slowest there is less than IDLE_S


@settings(deadline=None, max_examples=30)
@given(st.lists(SPEEDS, min_size=1, max_size=6), st.floats(0.05, 30.0), st.integers(0, 1 << 30))
def test_the_fast_get_fresh_versions_as_often_as_their_own_speed_allows(speeds: list[float], mean_s: float, seed: int) -> None:
    rng = random.Random(seed)
    peers = [Peer(f"g{index}", seconds, rng.choice([0.0, rng.uniform(0, 2)])) for index, seconds in enumerate(speeds)]
    longest = 2 * mean_s
    horizon_s = 20 * (min(speeds) + longest + 2.0)
    simulate(peers, (rng.uniform(0.0, longest) for _ in itertools.count()), horizon_s)
    for peer in peers:
        if peer.seconds <= max(PATIENCE * min(speeds), PATIENCE_S) / 1.5:
            # It waits for a version, for the others of its round (which wait for it in turn), and takes it: twice where it
            # came late to a round. Nothing here depends on how slow the others are.
            own = max(PATIENCE * peer.seconds, PATIENCE_S)
            longest_wait = 2 * (longest + own + peer.seconds) + peer.pause_s + 2 * HELLO_S
            waits = [later - earlier for earlier, later in itertools.pairwise([0.0, *peer.got, horizon_s])]
            assert max(waits) <= longest_wait, (peer.seconds, waits)


@pytest.mark.parametrize("slow_s", [1.5, 6.0, 20.0, 40.0])
def test_one_slow_receiver_costs_nobody_anything(slow_s: float) -> None:
    def fresh(*others: float, interval_s: float) -> int:
        peers = [Peer("g0", 1.0, 0.0), *(Peer(f"s{index}", seconds, 0.0) for index, seconds in enumerate(others))]
        simulate(peers, itertools.repeat(interval_s), 600.0)
        return len(peers[0].got)

    for interval_s in (0.3, 1.2, 2.0, 5.0):  # shorter and longer than the pull of the one that is watched
        assert fresh(slow_s, interval_s=interval_s) >= fresh(interval_s=interval_s) - 4


def test_the_slow_get_versions_too_however_fast_they_come() -> None:
    peers = [Peer("fast", 0.1, 0.0), Peer("slow", 10.0, 0.0), Peer("slower", 25.0, 0.0)]
    simulate(peers, itertools.repeat(0.2), 600.0)
    assert [len(peer.got) >= least for peer, least in zip(peers, (500, 10, 5), strict=True)] == [True] * 3


@pytest.mark.parametrize("slow_s", [240.0, 300.0, 600.0])
def test_one_that_takes_longer_than_any_patience_gets_versions_too(slow_s: float) -> None:
    peers = [Peer("fast", 5.0, 0.0), Peer("slow", slow_s, 0.0, buckets=300)]
    simulate(peers, itertools.repeat(10.0), 6000.0)
    assert len(peers[0].got) >= 500
    assert len(peers[1].got) >= 5


def test_a_version_that_is_not_ready_is_for_receivers_of_the_node_alone(bench: Bench) -> None:
    bench.publish(0, here="learner")
    bench.receivers["near"] = Receiver(name="near", here="learner")
    bench.says("near", holds=0)
    bench.says("far", holds=0)
    bench.cache.make_room()
    manifest = Manifest(
        version=Version(1, 1), tensors=(), total_bytes=0, bucket_bytes=1, place=Place("learner", "/proc/0/fd/0", b"")
    )
    for ready, far in ((False, 0), (True, 1)):
        bench.cache.add(Live(manifest=manifest, memory=bench.memory), bench.now, ready)
        bench.advance()
        assert (bench.offered("near"), bench.offered("far")) == (1, far)
