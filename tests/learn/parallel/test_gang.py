"""Rank 0's view of all ranks, and how the others serve it: in threads, with ranks that only note what they were asked for."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asyncrl.config import Layout
from asyncrl.errors import Closed, NonFinite, Unavailable
from asyncrl.learn.parallel.gang import Follower, Gang
from asyncrl.learn.parallel.pulse import Pulse
from asyncrl.models.ranks import Ranks
from asyncrl.types import Version


class Noting:
    """A rank whose verbs meet those of the others, as collectives do, and note what they got."""

    def __init__(self, name: str, meet: threading.Barrier) -> None:
        self.name, self.meet, self.calls = name, meet, []
        self.pulse, self.holds = Pulse(lambda: len(self.calls)), {"policy_bytes": 8.0}
        self.count = 1
        self.fails: Exception | None = None

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def make(*arguments: Any) -> Any:
            if self.fails:
                raise self.fails
            self.meet.wait(10)
            self.calls.append((verb, *arguments))
            return {"by": self.name, "thread": threading.current_thread().name}

        return make


class Group:
    """Three ranks; the followers' stages run in threads of their own."""

    def __init__(self) -> None:
        meet = threading.Barrier(3)
        self.ranks = [Noting(name, meet) for name in ("learner", "learner-1", "learner-2")]
        self.pool = ThreadPoolExecutor(8)
        self.followers = [Follower(rank.name, lambda *where, rank=rank: self.built(rank, where)) for rank in self.ranks[1:]]
        self.where: list[Any] = []
        self.ends = [self.pool.submit(self.run, follower) for follower in self.followers]
        self.ask("build", "127.0.0.1", 1234)()
        self.gang = Gang(self.ranks[0], self.ask)

    def run(self, follower: Follower) -> None:
        threading.current_thread().name = follower.report().name
        follower.run()

    def built(self, rank: Noting, where: tuple[Any, ...]) -> Noting:
        self.where.append(where)
        return rank

    def ask(self, verb: str, *arguments: Any) -> Callable[[], list[Any]]:
        asked = [self.pool.submit(follower.serve, verb, *arguments) for follower in self.followers]
        return lambda: [future.result(10) for future in asked]


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    for follower in made.followers:
        follower.stop()
    made.pool.shutdown()


def test_every_verb_is_made_by_all_ranks_at_once_and_answered_by_the_first(group: Group) -> None:
    assert group.where == [("127.0.0.1", 1234)] * 2
    assert group.gang.update(["rollouts"], 4)["by"] == "learner"
    group.gang.save(Version(1, 5))
    group.gang.load(5)
    group.gang.export("out")
    asked = [("update", ["rollouts"], 4), ("save", Version(1, 5), False), ("load", 5), ("export", "out")]
    assert [rank.calls for rank in group.ranks] == [asked] * 3
    assert [follower.report().role for follower in group.followers] == ["rank", "rank"]
    assert all({"busy", "wait:learner"} <= follower.report().seconds.keys() for follower in group.followers)


@pytest.mark.parametrize("who", [0, 2])
def test_an_error_of_one_rank_is_raised_where_it_was_and_leaves_the_group_of_no_use(group: Group, who: int) -> None:
    group.ranks[who].fails = NonFinite("the loss is nan")
    group.ranks[who].meet.abort()  # as a process group is, when one of its processes ends
    with pytest.raises((NonFinite, threading.BrokenBarrierError)):
        group.gang.update([], 0)
    if who:
        with pytest.raises(NonFinite, match="the loss is nan"):
            group.ends[who - 1].result(10)  # its stage ends: whoever runs it sees its own error
    with pytest.raises(Unavailable, match=r"save after a rank failed at update: its ranks have to be built anew"):
        group.gang.save(Version(1, 1))


def test_a_follower_ends_after_what_it_was_asked_for(group: Group) -> None:
    group.gang.load(3)
    for follower in group.followers:
        follower.stop()
    assert [end.result(10) for end in group.ends] == [None, None]
    with pytest.raises(Closed, match="learner-1 has ended, and makes no update"):
        group.followers[0].serve("update", [], 3)


def waits(ranks: Ranks) -> tuple[str, str, list[int]]:
    """What the second rank is seen to do while it waits for the first, before and after; what it has done, each time."""
    beside, pulse, seen = dist.new_group(), Pulse(lambda: 0), []
    before, done = pulse.doing, [pulse.progress]

    def watch() -> None:
        deadline = time.monotonic() + 30
        while "sum_" not in pulse.doing and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(pulse.doing)
        dist.barrier(beside)  # which lets the first one go on

    if ranks.index == 0:
        dist.barrier(beside)
        ranks.sum_(torch.zeros(1))
        return "", "", []
    other = threading.Thread(target=watch)
    other.start()
    with pulse.during("update"):
        ranks.sum_(torch.zeros(1))
    other.join()
    return before + pulse.doing, seen[0], [*done, pulse.progress]


def test_a_pulse_tells_what_its_rank_waits_for(gang: Any) -> None:
    _, (idle, seen, done) = gang(Layout(shard=2), waits)
    assert idle == ""
    assert seen == "update for 0 s, in all_reduce of Ranks.sum_"
    assert done[1] > done[0]
