"""What the supervisor does when an actor cannot go on; recovery from a kill is in tests/runs/test_recovery.py."""

import json
import logging
from contextlib import nullcontext

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfDiskError, RayActorError, RayTaskError

from asyncrl import launch
from asyncrl.cluster.members import Member
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.supervisor import Supervisor
from asyncrl.cluster.watchdog import StallWatch
from asyncrl.config import (
    AlgorithmSpec,
    Deployment,
    GeneratorsSpec,
    LearnerSpec,
    LimitsSpec,
    PlaceSpec,
    RanksSpec,
    RewardSpec,
    RewardsSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.errors import AsyncRLError, ConfigError, DiskFull, PlacementError, Unavailable
from asyncrl.report.summary import RunSummary
from asyncrl.types import GroupCounts, Report, RewardFailures, StoreReport

pytestmark = pytest.mark.ray


def test_a_prompt_that_was_given_up_is_named_once(local_ray, tiny_recipe, tmp_path, caplog):
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    supervisor = Supervisor(plan, RunSummary(name="tiny", total_steps=5), lambda records: None)
    (generator,) = (member for member in supervisor._members if member.role == "generator")
    for _ in range(3):
        generator.budget.failed("it died of that prompt")
    for said in ((), ("the prompt in row 7",), ("the prompt in row 7",), ("the prompt in row 7", "the prompt in row 9")):
        report = StoreReport(
            records=(), committed=0, counts=GroupCounts(), evals_pending=0, activity=0, gauges={}, given_up=said
        )
        supervisor._store.poll_report = lambda timeout_s, report=report: report
        supervisor._tick()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["the prompt in row 7", "the prompt in row 9"]
    assert generator.budget.failed("of something else") == ["of something else"], "explained deaths cost no restarts"


def test_a_reward_that_fails_is_named_once_and_one_that_is_broken_ends_the_run(local_ray, tiny_recipe, tmp_path, caplog):
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    summary, seen = RunSummary(name="tiny", total_steps=5), []
    supervisor = Supervisor(plan, summary, lambda records: seen.append(summary.failures.invalid))
    first = "reward f failed on its first sample"
    for invalid, broken in ((0, ""), (1, ""), (2, ""), (16, "it never works")):
        failures = RewardFailures(invalid=invalid, first=first * (invalid > 0), broken=broken)
        report = StoreReport(
            records=(), committed=0, counts=GroupCounts(), evals_pending=0, activity=0, gauges={}, failures=failures
        )
        supervisor._store.poll_report = lambda timeout_s, report=report: report
        with pytest.raises(ConfigError, match="it never works") if broken else nullcontext():
            supervisor._tick()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [first]
    assert seen == [0, 1, 2, 16], "it is shown before it ends the run"


def test_the_store_is_told_of_deaths_while_it_was_down_once_it_is_up(local_ray, tiny_recipe, tmp_path, monkeypatch):
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    plan.paths.create()
    supervisor, told = Supervisor(plan, RunSummary(name="tiny", total_steps=5), lambda records: None), []
    monkeypatch.setattr("asyncrl.cluster.supervisor.call_store", lambda handle, *call: told.append(call))
    for member in supervisor._members:
        member.spawn = member.kill = lambda *arguments: None
    store, (generator,) = supervisor._store, (m for m in supervisor._members if m.role == "generator")
    generator.restart_count = 0
    for phase in ("starting", "running"):
        store.phase = phase
        supervisor._failed(generator, Unavailable("it died"))
        assert told == {"starting": [], "running": [("forget", generator.name, plan.incarnation(0), False)] * 2}[phase]


def test_ranks_of_which_none_moves_start_anew_and_are_named_with_what_they_wait_for(tiny_recipe, tmp_path, monkeypatch, caplog):
    deployment = Deployment(learner=RanksSpec(ranks=2))
    plan = RunPlan(recipe=tiny_recipe(), deployment=deployment, run_dir=str(tmp_path), started=1, loopback=True)
    plan.paths.create()
    summary, now, begun = RunSummary(name="tiny", total_steps=5, committed=6), 0.0, []
    supervisor = Supervisor(plan, summary, lambda records: None)
    lead, rank = supervisor._learner.gang
    monkeypatch.setattr(lead, "spawn", lambda *arguments: begun.append(lead.name))
    supervisor._gang_stall = StallWatch(300.0, lambda: now)
    lead.phase = rank.phase = "running"

    def look(progress: int, doing: str = "update for 9 s, in all_reduce of Ranks.sum_") -> None:
        for name, role, done, what in (("learner", "learner", 7, doing), ("learner-1", "rank", progress, doing and "update")):
            summary.reports[name] = Report(name=name, role=role, seconds={}, gauges={}, progress=done, doing=what)
        supervisor._watch_gang()

    look(1)
    for progress in (1, 2, 3):  # one of them gets on
        now += 299.0
        look(progress)
    now = 2000.0
    look(3, doing="")  # they are asked for nothing
    assert not begun
    look(3)
    now = 2301.0
    look(3)
    assert begun == ["learner"]
    assert lead.restarts == 1
    assert (
        "learner died and is restarted: no rank of it has moved for limits.stall_timeout_s=300 s; all ranks start anew. After "
        "update 6 they were last heard at: learner update for 9 s, in all_reduce of Ranks.sum_, learner-1 update"
    ) in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DiskFull("no room for runs/tiny/replay"), "no room for runs/tiny/replay"),
        (
            OSError(28, "No space left on device", "server.log"),
            "store: [Errno 28] No space left on device: 'server.log': make room",
        ),
        (OutOfDiskError("spilling failed"), "store: spilling failed"),
    ],
    ids=["named", "by the system", "by Ray"],
)
def test_a_full_disk_ends_the_run_without_a_restart(tiny_recipe, tmp_path, monkeypatch, error, told):
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    supervisor = Supervisor(plan, RunSummary(name="tiny", total_steps=5), lambda records: None)
    store = supervisor._store
    # what is left of an actor's error by the time the supervisor sees it; its own note of it finds no room either
    monkeypatch.setattr("asyncrl.cluster.supervisor.write_atomic", lambda *of: (_ for _ in ()).throw(DiskFull("no room")))
    with pytest.raises(DiskFull) as caught:
        supervisor._failed(store, RayTaskError("run", "Traceback …", error))
    assert str(caught.value).startswith(told)
    assert "Traceback" not in str(caught.value)
    assert (store.restarts, store.phase) == (0, "ended")


def test_nothing_moving_ends_the_run_with_a_dump(local_ray, tiny_recipe, hold_after, tmp_path):
    recipe = tiny_recipe(algorithm=hold_after(0).algorithm)  # the first pack never ends
    with pytest.raises(
        AsyncRLError, match=r"nothing has moved for .*=5 s: generator-0 wait:store, learner busy, reward-0 wait:"
    ):
        launch(recipe, Deployment(limits=LimitsSpec(stall_timeout_s=5.0, stop_timeout_s=1.0, poll_s=0.5)), runs_dir=tmp_path)
    dump = json.loads((tmp_path / "tiny" / "logs" / "stall.json").read_text())
    assert dump.keys() == {"store", "learner", "generator-0", "reward-0"}
    assert "held.py" in dump["learner"], "the stack shows where the learner hangs"
    assert "worker.py" in dump["reward-0"]


SLOW_LOSS = """
import time

def loss(logp_t, old_t, advantages_t, sequence_t):
    time.sleep(1.2)
    return -(logp_t - old_t).exp() * advantages_t, {}
"""
SLOW_REWARD = """
import time

time.sleep(5.0)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(5.0)
    return len(solution_str)
"""


def test_a_run_whose_every_part_takes_longer_than_the_stall_timeout_is_healthy(local_ray, tiny_recipe, tmp_path):
    """The reward's file loads for 5 s, a sample takes 5 s, an update 7 s."""
    loss, reward = tmp_path / "loss.py", tmp_path / "reward.py"
    loss.write_text(SLOW_LOSS)
    reward.write_text(SLOW_REWARD)
    recipe = tiny_recipe(
        algorithm=AlgorithmSpec(policy_loss=f"{loss}:loss"),
        reward=RewardSpec(function=f"{reward}:compute_score", deadline_s=60.0),
        learner=LearnerSpec(batch_groups=1, ppo_epochs=6),
        sampling=SamplingSpec(n=2, max_response_length=6),
        staleness=StalenessSpec(max_lag=0),
        total_steps=1,
    )
    deployment = Deployment(rewards=RewardsSpec(processes=2), limits=LimitsSpec(stall_timeout_s=4.0, poll_s=0.5))
    assert launch(recipe, deployment, runs_dir=tmp_path).steps == 1


def test_an_error_that_would_come_again_is_not_retried(local_ray, tiny_recipe, tmp_path):
    missing = tmp_path / "raises.py"
    missing.write_text("def compute_score(*arguments): return 0.0\n\nraise RuntimeError('licence expired')\n")
    recipe = tiny_recipe(reward=RewardSpec(function=f"{missing}:compute_score"))
    with pytest.raises(ConfigError, match=r"reward-0: (.|\n)*licence expired"):
        launch(recipe, runs_dir=tmp_path)
    assert "licence expired" in (tmp_path / "tiny" / "logs" / "reward-0.error").read_text()


def test_a_generator_that_fits_nowhere_is_named(local_ray, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "a cluster, so that only joining it can tell")
    deployment = Deployment(generators=GeneratorsSpec(place=PlaceSpec(cpus=512)))
    with pytest.raises(PlacementError, match="generator-0 fits nowhere"):
        launch(tiny_recipe(), deployment, runs_dir=tmp_path)


class Unreached:
    """An actor's handle, and the answers to come: errors to be raised, and reports. Silent when there are no more."""

    def __init__(self, *answers: object) -> None:
        self.report, self.answers = self, list(answers)

    def remote(self) -> "Unreached":
        return self

    def wait(self, refs: list[object], **how: object) -> tuple[list[object], list[object]]:
        return ([], refs) if not self.answers else (refs, [])

    def get(self, ref: object) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def gone(text: str) -> ActorDiedError:
    error = ActorDiedError("")
    RayActorError.__init__(error, "1", text, False, False)
    return error


AWAY = ActorUnavailableError("its connection is lost", None)
NODE, PROCESS = gone("The actor died because its node has died."), gone("its worker process has died")


@pytest.mark.parametrize("role", ["generator", "reward", "model"])
@pytest.mark.parametrize(
    ("answers", "known_s", "failure"),
    [
        ([AWAY, AWAY, NODE], 6.0, ""),
        ([NODE], 2.0, ""),
        ([AWAY, PROCESS], 4.0, "the process died (ActorDiedError)"),
        ([AWAY, Report(name="", role="", seconds={}, gauges={})], 4.0, "was out of reach for a while, and what it does since"),
        ([AWAY] * 40, 62.0, "the process died (ActorUnavailableError)"),
        ([AWAY], 64.0, "has not answered for 62 s"),
    ],
)
def test_who_is_out_of_reach_is_asked_until_it_is_known_whether_its_node_died(
    tiny_recipe, tmp_path, monkeypatch, role, answers, known_s, failure
):
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    plan.paths.create()
    summary, now, begun, calls = RunSummary(name="tiny", total_steps=5), 0.0, [], []
    supervisor = Supervisor(plan, summary, lambda records: None)
    supervisor._members.append(Member("model", "model-0", PlaceSpec(), plan.deployment.limits, lambda: now))
    (member,) = (member for member in supervisor._members if member.role == role)
    monkeypatch.setattr(Member, "spawn", lambda member, *of: begun.append(member.name))
    monkeypatch.setattr(Member, "kill", lambda member: None)
    monkeypatch.setattr("asyncrl.cluster.supervisor.call_store", lambda handle, *call: calls.append(call))
    member._clock, member.phase, member.restart_count, member.handle = (lambda: now), "running", 0, Unreached(*answers)
    monkeypatch.setattr("asyncrl.cluster.members.ray", member.handle)
    monkeypatch.setattr("asyncrl.cluster.supervisor.ray.wait", lambda refs, **how: ([], refs))
    supervisor._limit, supervisor._store.phase = (supervisor._plan.staleness.most_outstanding, -1), "running"
    supervisor._store.poll_report = lambda timeout_s: None
    supervisor._failed(member, AWAY)
    while not begun and now < 100.0:
        now += 2.0
        supervisor._look({})
    assert (begun, now) == ([member.name], known_s)
    assert calls == [("forget", member.name, plan.incarnation(0), not failure)]
    assert supervisor._fleet.preemptions == ({} if failure else {member.name: 1})
    assert supervisor._fleet.restarts == ({member.name: 1} if failure else {})
    if failure:
        assert failure in (plan.paths.logs / f"{member.name}.error").read_text()


def test_ranks_that_fail_of_each_other_are_in_no_doubt(tiny_recipe, tmp_path):
    plan = RunPlan(
        recipe=tiny_recipe(), deployment=Deployment(learner=RanksSpec(ranks=2)), run_dir="/r", started=1, loopback=True
    )
    members = Supervisor(plan, RunSummary(name="tiny", total_steps=5), lambda records: None)._members
    for member in members:
        member.handle = Unreached()
    assert {member.name for member in members if member.doubts(AWAY, 60.0)} == {"generator-0", "reward-0"}
