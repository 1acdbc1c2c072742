"""From a reward function that rewards turns and tokens to the advantages of trained tokens, by hand, without Ray."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from asyncrl.algorithms.advantages import advantages
from asyncrl.algorithms.rewards import Outcomes
from asyncrl.config import AlgorithmSpec, RewardSpec, RewardTerm, SamplingSpec
from asyncrl.learn.batch import make_batch
from asyncrl.learn.metrics import rollout_metrics
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.replay.store import LocalTransport, ReplayStore
from asyncrl.reward.functions import load_judge
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample
from asyncrl.reward.worker import RewardWorker
from asyncrl.staleness import Staleness
from asyncrl.types import Episode, Prompt, Rollout, Sampling, Span, Ticket, TrainRollout, Version

REWARDS = """
def right(solution_str, ground_truth, turns):
    return {"score": 1.0, "turn_rewards": [1.0, 4.0][: len(turns)]}

def brief(solution_str, ground_truth, response_ids):
    return {"score": 0.0, "token_rewards": [-0.25] * len(response_ids)}
"""


def rollout(ticket: Ticket, index: int, ids: list[int], *updates: int, mask: list[int], turns: tuple[int, ...]) -> Rollout:
    spans = [Span(Version(1, update), 1) for update in updates]
    return Rollout(
        group=ticket.group,
        rollout=index,
        attempt=ticket.attempt,
        prompt=ticket.prompt,
        response_ids=ids,
        logprobs=[-1.0] * len(ids),
        kept_logmass=None,
        loss_mask=mask,
        turns=turns,
        spans=tuple(spans),
        finish_reason="stop",
        worker="generator",
        times={},
        baseline=index == ticket.baseline,
    )


@pytest.fixture
def trained(tmp_path: Any) -> list[TrainRollout]:
    """Two rollouts as the learner gets them, of five tokens in two turns and of two in one; their baseline had one token."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    terms = RewardSpec(
        functions=(
            RewardTerm(function=f"{tmp_path}/rewards.py:right", weight=2.0),
            RewardTerm(function=f"{tmp_path}/rewards.py:brief"),
        )
    ).terms()
    prompts = [Prompt(row=i, ids=(1, 2), data_source="test") for i in range(4)]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=())
    plan = StorePlan(
        rule=Staleness(max_lag=1, batch_groups=1),
        source=Source(prompts=prompts, sampling=sampling),
        sampling=SamplingSpec(n=2, min_valid=2, max_attempts=1),
        baseline=True,
    )
    store = LocalTransport(ReplayStore(plan, tmp_path / "replay"))
    client = ReplayClient(store, "all", 1)
    client.fence(0)
    worker = RewardWorker(ReplayClient(store, "reward", 1), RewardPool(terms), name="reward", poll_s=1.0)
    scoring = threading.Thread(target=worker.run)
    scoring.start()
    first, second = client.reserve(2, Version(1, 0), [], 5.0).tickets
    client.submit([rollout(first, i, [3], 0, mask=[1], turns=(0,)) for i in range(3)])
    client.commit(client.lease_batch(0, 30.0).lease, Version(1, 1), {})
    client.submit(
        [
            rollout(second, 0, [3, 4, 5, 6, 7], 0, 1, 1, 1, 1, mask=[1, 1, 0, 1, 1], turns=(0, 3)),  # 5 is a tool's
            rollout(second, 1, [3, 4], 1, 1, mask=[1, 1], turns=(0,)),
            rollout(second, 2, [3], 0, mask=[1], turns=(0,)),
        ]
    )
    found = client.rows(client.lease_batch(1, 30.0).groups)
    client.finish()
    scoring.join(30)
    store.close()
    return found


def outcomes_of(trained: list[TrainRollout], committed: int) -> Outcomes:
    """With a bound of 0."""
    return make_batch(trained, Staleness(max_lag=0, batch_groups=1), committed).outcomes


def test_token_rewards_from_the_function_to_the_advantages(trained: list[TrainRollout]) -> None:
    first, second = trained
    assert (first.reward, second.reward) == (2.0, 2.0)  # 2·1 + 0, due at the end
    assert first.token_rewards is not None
    assert second.token_rewards is not None
    # Turns earn 2·1 and 2·4 at their last tokens, each token −0.25.
    assert first.token_rewards.tolist() == [-0.25, -0.25, 1.75, -0.25, 7.75]
    assert second.token_rewards.tolist() == [-0.25, 1.75]
    assert first.baseline == second.baseline == 2.0 + 1.75
    assert first.parts == {"right": 1.0, "brief": 0.0}
    assert rollout_metrics(trained)["reward/token_sum"] == (8.75 + 1.5) / 2

    # Trained are tokens 1, 3, 4 | 0, 1. The tool's 1.75 belongs to token 1; the stale token's −0.25 to the rollout alone.
    found = outcomes_of(trained, committed=1)  # the first token of the first rollout is too old
    assert found.token_rewards_n.tolist() == [1.5, -0.25, 7.75, -0.25, 1.75]
    whole, _ = advantages(AlgorithmSpec(adv_estimator="grpo_no_std"), found)
    assert whole.tolist() == [3.625] * 3 + [-3.625] * 2  # 10.75 and 3.5
    # Returns: 2 + 9, 2 + 7.5, 2 + 7.75 | 2 + 1.5, 2 + 1.75, less 3.75.
    remax, _ = advantages(AlgorithmSpec(adv_estimator="remax"), found)
    assert remax.tolist() == [7.25, 5.75, 6.0, -0.25, 0.0]


def test_what_the_turns_of_an_episode_earned_reaches_gae_at_their_ends() -> None:
    """Three turns, with what was read between them; what the first two earned stands at their last tokens."""
    term = RewardTerm(function="asyncrl.reward.verify:episode", arguments={"by_turn": True})
    episode = Episode(reward=1.75, turn_rewards=(0.5, 0.25, 1.0))
    mask, turns, ids = [1, 1, 0, 1, 0, 1, 1], (0, 3, 5), [3, 4, 9, 5, 9, 6, 7]
    verdict = load_judge(term)(Sample("test", "", "null", "null", "{}", ids, turns, episode.for_rewards("train")))
    assert (verdict.status, verdict.reward) == ("ok", 1.0)
    assert verdict.token_rewards == [0.0, 0.0, 0.5, 0.0, 0.25, 0.0, 0.0]
    row = TrainRollout(
        group=0,
        rollout=0,
        attempt=0,
        data_source="test",
        prompt_ids=np.array([1, 2]),
        response_ids=np.array(ids),
        loss_mask=np.array(mask, dtype=bool),
        logprobs=np.full(7, -1.0, dtype=np.float32),
        kept_logmass=None,
        updates=np.zeros(7, dtype=np.int64),
        reward=verdict.reward,
        parts={},
        finish_reason="stop",
        token_rewards=np.array(verdict.token_rewards),
    )
    found = outcomes_of([row], committed=0)
    assert found.token_rewards_n.tolist() == [0.0, 0.5, 0.25, 0.0, 0.0]  # of the trained tokens: those before what was read
    values_n = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    _, returns_n = advantages(AlgorithmSpec(adv_estimator="gae", lam=0.5), found._replace(values_n=values_n))
    # δ = r + V' − V: 0.1, 0.6, 0.35, 0.1, 0.5; A = δ + A'/2: 0.53125, 0.8625, 0.525, 0.35, 0.5; returns are A + V.
    assert returns_n is not None
    assert returns_n.tolist() == pytest.approx([0.63125, 1.0625, 0.825, 0.75, 1.0])
