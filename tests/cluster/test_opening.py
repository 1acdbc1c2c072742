"""Whom a run asks before its first update, in which order, and what becomes of those who fail at it."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from msgspec.structs import replace

from asyncrl.cluster.opening import Opening
from asyncrl.cluster.plan import RunPlan
from asyncrl.config import Deployment, JudgeSpec, RewardSpec, RewardTerm
from asyncrl.errors import Closed, ConfigError
from asyncrl.types import Prompt, Report, Rollout, Score, Span, Version

pytestmark = pytest.mark.ray
ANSWER = Rollout(
    group=-1,
    rollout=0,
    attempt=0,
    prompt=Prompt(row=0, ids=(1, 2), data_source="sums"),
    response_ids=[5, 6],
    logprobs=[-1.0, -2.0],
    kept_logmass=None,
    loss_mask=[1, 1],
    turns=(0,),
    spans=(Span(Version(1, 0), 2),),
    finish_reason="stop",
    worker="generator-0",
    times={},
)
VERDICT = Score(group=-1, rollout=0, attempt=0, status="ok", reward=0.5)


@ray.remote
def failing(error: Exception) -> None:
    raise error


class Scripted:
    """A member whose actor replies as told: a value, or an error."""

    def __init__(self, role: str, phase: str, **replies: Any) -> None:
        self.name, self.role, self.phase, self.replies, self.asked = f"{role}-0", role, phase, replies, []
        self.restart_count = 0
        self.replies.setdefault("where", ("here", Report(name=role, role=role, seconds={}, gauges={"policy_bytes": 4.0})))
        self.handle = SimpleNamespace(
            **{name: SimpleNamespace(remote=self._call(name)) for name in ("answer_first", "ask", "where")}
        )

    def _call(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            what = arguments[0] if name == "ask" else name
            self.asked.append(what)
            reply = self.replies[what]
            return failing.remote(reply) if isinstance(reply, Exception) else ray.put(reply)

        return remote


def members(learner: Any = None, verdict: Any = VERDICT) -> list[Scripted]:
    if learner is None:
        learner = [-1.0, -2.0]
    return [
        Scripted("generator", "running", answer_first=ANSWER),
        Scripted("learner", "idle", logprobs_of=learner),
        Scripted("reward", "running", verdict=verdict),
    ]


@pytest.fixture
def plan(tiny_recipe: Any, tmp_path: Any) -> RunPlan:
    made = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path / "run"), started=1, loopback=True)
    made.paths.create()
    return made


def looked(opening: Opening, rounds: int = 6, committed: int = 0) -> list[Any]:
    failed = []
    for _ in range(rounds):
        failed += opening.look(committed)
        if opening.done:
            break
        ray.wait(opening.refs, num_returns=len(opening.refs), timeout=20)
    return failed


def test_the_answer_goes_to_the_learner_and_a_reward_and_the_facts_are_kept(local_ray: None, plan: RunPlan) -> None:
    _generator, _learner, _reward = of = members()
    opening = Opening(plan, of)
    assert looked(opening) == []
    assert opening.done
    assert [one.asked for one in of] == [["answer_first", "where"], ["logprobs_of", "where"], ["verdict", "where"]]
    facts = json.loads(plan.paths.facts.read_text())
    assert (facts["agreement"]["mean"], facts["agreement"]["bound"], facts["verdict"]["reward"]) == (0.0, 1e-4, 0.5)
    assert [actor["holds"] for actor in facts["actors"]] == [{"policy_bytes": 4.0}] * 3


def test_an_answer_of_other_weights_is_asked_for_again(local_ray: None, plan: RunPlan) -> None:
    """The learner fell back to a checkpoint, and the generator has not heard of it yet."""
    generator, *_ = of = members()
    opening = Opening(plan, of)
    assert looked(opening, rounds=4, committed=3) == []
    assert set(generator.asked) == {"answer_first"}
    assert len(generator.asked) == 4
    assert not opening.done
    assert looked(opening) == []
    assert opening.done


def test_what_an_earlier_actor_failed_at_is_not_counted_again(local_ray: None, plan: RunPlan) -> None:
    _generator, learner, _reward = of = members(learner=ValueError("it was killed for that already"))
    opening = Opening(plan, of)
    looked(opening, rounds=2)
    assert learner.asked == ["logprobs_of", "where"]
    learner.restart_count = 1
    learner.replies["logprobs_of"] = [-1.0, -2.0]
    assert looked(opening) == []
    assert opening.done


def test_nobody_is_waited_for_who_is_not_up(local_ray: None, plan: RunPlan) -> None:
    generator, _learner, reward = of = members()
    generator.phase = "starting"
    opening = Opening(plan, of)
    assert (opening.look(0), opening.refs, opening.done) == ([], [], False)
    generator.phase, reward.phase = "running", "starting"
    assert looked(opening, rounds=3) == []
    assert not opening.done
    reward.phase = "running"
    looked(opening)
    assert opening.done


def test_a_gap_beyond_the_bound_ends_the_run_unless_any_is_allowed(local_ray: None, plan: RunPlan) -> None:
    opening = Opening(plan, members(learner=[-1.5, -2.0]))
    with pytest.raises(ConfigError, match=r"0\.25 nats apart on average, of 0\.0001 allowed"):
        looked(opening)
    assert json.loads(plan.paths.facts.read_text())["agreement"]["worst"] == 0.5, "kept for whoever looks"
    deployment = replace(plan.deployment, generators=replace(plan.deployment.generators, max_gap=None))
    opening = Opening(replace(plan, deployment=deployment), members(learner=[-1.5, -2.0]))
    assert looked(opening) == []
    assert opening.done


def test_a_reward_that_fails_on_it_is_a_warning(local_ray: None, plan: RunPlan, caplog: Any) -> None:
    opening = Opening(plan, members(verdict=replace(VERDICT, status="invalid", reward=None, error="ValueError: nine")))
    assert looked(opening) == []
    assert opening.done
    assert "the reward failed on the first answer (invalid): ValueError: nine" in caplog.text


def test_rewards_of_groups_and_episodes_are_not_given_a_single_answer(local_ray: None, plan: RunPlan) -> None:
    judge = JudgeSpec(prompt="judge.txt", url="http://127.0.0.1:1", served_name="m", pairwise=True)
    recipe = replace(plan.recipe, reward=RewardSpec(functions=(RewardTerm(judge=judge),)))
    *_, reward = of = members()
    opening = Opening(replace(plan, recipe=recipe), of)
    looked(opening)
    assert opening.done
    assert "verdict" not in reward.asked


def test_who_fails_is_named_and_who_ends_is_asked_again(local_ray: None, plan: RunPlan) -> None:
    _generator, learner, reward = of = members(learner=RuntimeError("no memory"), verdict=Closed("it ended"))
    opening = Opening(plan, of)
    ((member, error),) = looked(opening, rounds=3)
    assert member is learner
    assert "no memory" in str(error)
    learner.replies["logprobs_of"], reward.replies["verdict"] = [-1.0, -2.0], VERDICT
    assert looked(opening) == []
    assert opening.done
    assert reward.asked.count("verdict") == 2
