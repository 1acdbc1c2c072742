"""A member's silence, on a clock that the test sets. The reply that never comes is a reference that nobody fills."""

from types import SimpleNamespace

import pytest
import ray

from asyncrl.cluster.members import Member
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.transport import ANSWERS
from asyncrl.config import Deployment, LimitsSpec, PlaceSpec
from asyncrl.errors import PlacementError, Unavailable
from asyncrl.report.timing import AwakeClock

pytestmark = pytest.mark.ray


class NeverAnswers:
    """An actor's handle: its report never comes."""

    def __init__(self) -> None:
        self.report = self

    def remote(self) -> ray.ObjectRef:
        return ray.ObjectRef.from_random()


def test_an_actor_is_silent_for_as_long_as_the_supervisor_was_awake_to_hear_it(local_ray: None) -> None:
    now = 0.0
    member = Member("reward", "reward-0", PlaceSpec(), LimitsSpec(), AwakeClock(lambda: now, 2.0))
    member.phase, member.handle = "running", NeverAnswers()
    member.ask_report()
    now += 3600.0  # Ctrl-Z, and an hour later fg
    assert member.poll_report(60.0) is None
    for _ in range(57):
        now += 1.0
        assert member.poll_report(60.0) is None
    now += 2.0
    with pytest.raises(Unavailable, match=r"reward-0 \(pid 0\) has not answered for 61 s"):
        member.poll_report(60.0)


def test_failures_of_slow_starts_count_together(local_ray: None) -> None:
    """An actor counts as up while its SGLang server starts, for longer than the window if it may."""
    now = 0.0
    limits = LimitsSpec(max_restarts=3, restart_window_s=3600.0, start_timeout_s=2000.0)
    member = Member("generator", "generator-0", PlaceSpec(), limits, lambda: now)
    for failures in (1, 2, 3, 4):
        member.budget.up()
        now += 1990.0
        assert len(member.budget.failed("no server")) == failures


@pytest.mark.parametrize(
    ("ready", "error", "told"),
    [
        (True, Unavailable, "learner-1 did not start within limits.start_timeout_s"),
        (
            False,
            PlacementError,
            r"learner fits nowhere in the cluster:\n  CPU +demanded 512 by the largest of 2 ranks, available",
        ),
    ],
)
def test_who_has_lost_its_place_says_what_there_is_no_room_for(local_ray: None, ready, error, told) -> None:
    place, limits = PlaceSpec(cpus=512), LimitsSpec()
    rank = Member("rank", "learner-1", place, limits, lambda: 0.0)
    lead = Member("learner", "learner", place, limits, lambda: 0.0, [rank])
    lead._placement = SimpleNamespace(ready=ready)
    with pytest.raises(error, match=told):
        raise rank.late()


def test_a_model_that_is_asked_more_than_it_has_room_for_still_reports(local_ray: None, tiny_recipe, monkeypatch) -> None:
    monkeypatch.setattr("asyncrl.cluster.members.QUESTIONS", 2)
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir="/r", started=1, loopback=True)
    model = Member("model", "judge-0", PlaceSpec(), LimitsSpec(), lambda: 0.0)
    model._create(plan, {}, {"num_cpus": 0})
    try:
        ask = model.handle.ask.options(concurrency_group=ANSWERS)
        waiting = [ask.remote("answer", "x") for _ in range(40)]  # until it has started, which it never does
        stacks = ray.get(model.handle.stacks.remote(), timeout=60)
        assert 1 <= stacks.count(" in ask") <= 2
        assert ray.wait(waiting, timeout=0)[0] == []
    finally:
        model.kill()
