import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import grpo
from asyncrl.algorithms.estimators import ESTIMATORS, Outcomes, RewardNormalizer, credited, estimator, gae_advantages, merged
from asyncrl.config import ESTIMATOR_NAMES
from asyncrl.errors import ConfigError
from asyncrl.staleness import Staleness

# Group 0: rewards 3 and 1; group 1 alone, evicted but for it. Rollout 1 has no trained token.
OUTCOMES = Outcomes(
    rewards_s=torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64),
    groups_s=torch.tensor([0, 0, 1]),
    lengths_s=torch.tensor([3, 1, 2]),
    sequence_n=torch.tensor([0, 0, 2]),
    baselines_s=torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64),
)
SHAPED = OUTCOMES._replace(shaping_n=torch.tensor([-0.25, -0.75, -1.0], dtype=torch.float64))


def test_the_recipe_and_the_learner_know_the_same_names() -> None:
    assert set(ESTIMATORS) == set(ESTIMATOR_NAMES)


@pytest.mark.parametrize(
    ("name", "plain", "shaped"),
    [
        ("grpo", [2**-0.5, 2**-0.5, 0], [2**-0.5, 2**-0.5, 0]),  # std of 3, 1 is √2; of 2, 1 is √½
        ("grpo_no_std", [1, 1, 0], [0.5, 0.5, 0]),
        ("dr_grpo", [1, 1, 0], [0.5, 0.5, 0]),
        ("rloo", [2, 2, 0], [1, 1, 0]),
        ("opo", [0.5, 0.5, 0], [0.25, 0.25, 0]),  # (3·3 + 1·1) / 4 = 2.5; (3·2 + 1·1) / 4 = 1.75
        ("reinforce_plus_plus", [-(3**-0.5), -(3**-0.5), 2 * 3**-0.5], None),  # tokens 3, 3, 4: mean 10/3, variance 1/3
        ("reinforce_plus_plus_baseline", [3**-0.5, 3**-0.5, -2 * 3**-0.5], None),  # tokens 1, 1, 0
        ("remax", [1, 1, -1], [0, 0.25, -2]),  # returns 3 − 1, 3 − 0.75 and 4 − 1 against 2, 2 and 5
    ],
)
def test_tokens_get_the_advantage_of_their_rollout(name: str, plain: list[float], shaped: list[float] | None) -> None:
    assert estimator(name)(OUTCOMES).tolist() == pytest.approx(plain, abs=1e-5)
    if shaped is not None:  # the KL of a rollout's tokens in sum
        assert estimator(name)(SHAPED).tolist() == pytest.approx(shaped, abs=1e-5)


def test_a_token_of_reinforce_plus_plus_pays_only_for_what_follows() -> None:
    # Returns: 3 − 1, 3 − 0.75, 4 − 1; mean 2.41667.
    returns = torch.tensor([2.0, 2.25, 3.0], dtype=torch.float64)
    expected = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    torch.testing.assert_close(estimator("reinforce_plus_plus")(SHAPED), expected)


def test_generalized_advantages_by_hand() -> None:
    values = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    # Rollouts 0 (two tokens, reward 3) and 2 (one, reward 4); rollout 1 has none, and its reward goes nowhere.
    # earned: −0.25, 3 − 0.75 | 4 − 1; δ: −0.25 + 0.5·0.25 − 0.5, 2.25 − 0.25 | 3 − 1; A: −0.625 + 0.25·2, 2 | 2
    advantages, returns = gae_advantages(SHAPED, values, gamma=0.5, lam=0.5)
    raw = torch.tensor([-0.125, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(returns, raw + values)
    torch.testing.assert_close(advantages, (raw - raw.mean()) / (raw.var() + 1e-8).sqrt())
    # γ = λ = 1 and no shaping: the reward less the value
    advantages, returns = gae_advantages(OUTCOMES, values, gamma=1.0, lam=1.0)
    assert returns.tolist() == [3.0, 3.0, 4.0]
    assert OUTCOMES.rewards_s.tolist() == [3.0, 1.0, 4.0]
    assert SHAPED.shaping_n is not None
    assert SHAPED.shaping_n.tolist() == [-0.25, -0.75, -1.0]  # arguments stay as they were


def test_generalized_advantages_without_tokens() -> None:
    nothing = OUTCOMES._replace(sequence_n=torch.empty(0, dtype=torch.int64))
    assert [len(part) for part in gae_advantages(nothing, torch.empty(0).double(), gamma=1.0, lam=1.0)] == [0, 0]


def test_gae_has_no_advantages_before_values_are_known() -> None:
    assert estimator("gae")(OUTCOMES).isnan().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_batches_without_tokens_or_rollouts(name: str) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert len(estimator(name)(OUTCOMES._replace(sequence_n=nothing))) == 0
    assert len(estimator(name)(Outcomes(nothing.double(), nothing, nothing, nothing, baselines_s=nothing.double()))) == 0


def test_what_was_earned_before_the_first_trained_token_counts_for_the_rollout_only() -> None:
    """Rollout 1 has no trained token: all it earned, 2, is before. Rollout 0 earned 1 before its first trained one."""
    early = SHAPED._replace(before_s=torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert early.shaped_s().tolist() == [3.0, 3.0, 3.0]
    assert estimator("grpo_no_std")(early).tolist() == [0.0, 0.0, 0.0]
    for name in ("reinforce_plus_plus", "remax"):
        assert estimator(name)(early).equal(estimator(name)(SHAPED))


def test_shaping_adds_up() -> None:
    more = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert OUTCOMES.with_shaping(more).shaping_n.tolist() == [1.0, 2.0, 3.0]
    assert SHAPED.with_shaping(more).shaping_n.tolist() == [0.75, 1.25, 2.0]


def test_remax_without_baselines_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"without a baseline: .*Grouping\(baseline=True\)"):
        estimator("remax")(OUTCOMES._replace(baselines_s=None))


def test_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def halved(rewards_s, groups_s): return rewards_s / 2\ndef wrong(r, g): return r[:1]\n")
    assert estimator(f"{tmp_path}/own.py:halved")(OUTCOMES).tolist() == [1.5, 1.5, 2.0]
    assert estimator("asyncrl.algorithms.advantages:grpo")(OUTCOMES).equal(grpo(*OUTCOMES[:2])[OUTCOMES.sequence_n])
    with pytest.raises(ConfigError, match=r"own\.py:wrong' returned \(1,\) for 3 rollouts: .* shape \(3,\)"):
        estimator(f"{tmp_path}/own.py:wrong")(OUTCOMES)
    with pytest.raises(ConfigError, match="has no 'halfed'; did you mean 'halved'"):
        estimator(f"{tmp_path}/own.py:halfed")


# --------------------------------------------------------------------------------------- token rewards
#

BOUND = Staleness(max_lag=2, batch_groups=2)


@pytest.mark.parametrize(
    ("trained", "earned", "before"),
    [
        ([1, 1, 1, 1], [1, 2, 4, 8], 0),
        ([1, 0, 0, 1], [7, 8], 0),  # what a tool's tokens earned belongs to the token that called it
        ([0, 1, 1, 0], [2, 12], 1),  # a stale token's reward is nobody's; the last one is due after the end of the loss
        ([0, 0, 0, 0], [], 15),
    ],
)
def test_rewards_go_to_the_last_trained_token_before_them(trained: list[int], earned: list[float], before: float) -> None:
    found, rest = credited(np.array([1.0, 2.0, 4.0, 8.0]), np.array(trained, dtype=bool))
    assert (found.tolist(), rest) == (earned, before)
    assert found.dtype == np.float64


@given(st.lists(st.tuples(st.integers(-64, 64), st.booleans()), max_size=12))
def test_nothing_vanishes(tokens: list[tuple[int, bool]]) -> None:
    rewards = np.array([reward for reward, _ in tokens], dtype=np.float64)
    trained = np.array([mask for _, mask in tokens], dtype=bool)
    earned, before = credited(rewards, trained)
    assert len(earned) == trained.sum()
    assert earned.sum() + before == rewards.sum()
    for k, place in enumerate(np.flatnonzero(trained)):  # returns from a trained token on are those of all tokens
        assert earned[k:].sum() == rewards[place:].sum()


# -------------------------------------------------------------------------------- reward normalization
# Rewards on one scale: by hand, and running moments as if all rewards had come at once.


def column(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float64)


def test_none_leaves_rewards_alone_and_keeps_nothing() -> None:
    state: dict[str, float] = {}
    rewards = column(3.0, 5.0)
    assert RewardNormalizer("none", state)(rewards) is rewards
    assert state == {}


def test_reward_normalization_a_batch_by_hand() -> None:
    state: dict[str, float] = {}
    normalized = RewardNormalizer("batch", state)
    assert normalized(column(1.0, 2.0, 3.0)).tolist() == pytest.approx([-1, 0, 1])  # unbiased variance 1
    assert normalized(column(10.0, 30.0)).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])  # knows nothing of the one before
    assert normalized(column(4.0, 4.0)).tolist() == [0, 0]
    assert normalized(column()).tolist() == []
    assert state == {}


def test_running_by_hand() -> None:
    state: dict[str, float] = {}
    normalized = RewardNormalizer("running", state)
    assert normalized(column(1.0, 2.0, 3.0)).tolist() == pytest.approx([-1, 0, 1])  # the first batch: as `batch`
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3.
    assert normalized(column(6.0)).tolist() == pytest.approx([3 / (14 / 3) ** 0.5])
    assert state == pytest.approx({"reward_count": 4, "reward_mean": 3, "reward_m2": 14})
    assert normalized(column()).tolist() == []
    assert state["reward_count"] == 4


def test_equal_rewards_from_the_start_give_zero() -> None:
    normalized = RewardNormalizer("running", {})
    assert normalized(column(4.0)).tolist() == [0]
    assert normalized(column(4.0, 4.0)).tolist() == [0, 0]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=6))
def test_moments_are_those_of_all_rewards_at_once(batches: list[list[float]]) -> None:
    moments = (0.0, 0.0, 0.0)
    for batch in batches:
        mean = statistics.fmean(batch)
        moments = merged(moments, (len(batch), mean, sum((x - mean) ** 2 for x in batch)))
    together = [x for batch in batches for x in batch]
    mean = statistics.fmean(together)
    assert moments == pytest.approx((len(together), mean, sum((x - mean) ** 2 for x in together)), rel=1e-9, abs=1e-6)
