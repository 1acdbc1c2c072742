import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import (
    ESTIMATORS,
    advantages,
    estimator,
    gae,
    gpg,
    grpo,
    grpo_no_std,
    grpo_passk,
    opo,
    rloo,
)
from asyncrl.algorithms.rewards import Outcomes
from asyncrl.config import ESTIMATOR_NAMES, AlgorithmSpec
from asyncrl.errors import ConfigError

REWARDS = torch.tensor([1.0, 5.0, 0.0, 2.0, 5.0, 0.5], dtype=torch.float64)
GROUPS = torch.tensor([7, 3, 7, 7, 3, 9])  # 7: 1, 0, 2 with mean 1 and std 1; 3: equal rewards; 9: a group of one
LENGTHS = torch.tensor([1, 4, 1, 2, 9, 3])


def by_group(kind: str, rewards: list[float], groups: list[int], lengths: list[int]) -> list[float]:
    """Each estimator as its paper writes it, one rollout at a time."""
    found = []
    for i, group in enumerate(groups):
        members = [k for k in range(len(groups)) if groups[k] == group]
        own = [rewards[k] for k in members]
        others = [rewards[k] for k in members if k != i]
        if kind == "grpo":
            found.append((rewards[i] - statistics.fmean(own)) / ((statistics.stdev(own) if others else 0.0) + 1e-6))
        elif kind == "grpo_no_std":
            found.append(rewards[i] - statistics.fmean(own))
        elif kind == "rloo":
            found.append(rewards[i] - statistics.fmean(others) if others else 0.0)
        elif kind == "grpo_passk":
            lead = max(0.0, rewards[i] - max(others)) if others else 0.0
            found.append(lead / ((statistics.stdev(own) if others else 0.0) + 1e-6))
        elif kind == "gpg":
            varied = [
                k for k in range(len(groups)) if len({rewards[m] for m in range(len(groups)) if groups[m] == groups[k]}) > 1
            ]
            found.append((rewards[i] - statistics.fmean(own)) * len(groups) / len(varied) if i in varied else 0.0)
        else:
            found.append(rewards[i] - sum(lengths[k] * rewards[k] for k in members) / sum(lengths[k] for k in members))
    return found


ALL = {
    "grpo": lambda rewards, groups, lengths: grpo(rewards, groups),
    "grpo_no_std": lambda rewards, groups, lengths: grpo_no_std(rewards, groups),
    "grpo_passk": lambda rewards, groups, lengths: grpo_passk(rewards, groups),
    "gpg": lambda rewards, groups, lengths: gpg(rewards, groups),
    "rloo": lambda rewards, groups, lengths: rloo(rewards, groups),
    "opo": opo,
}


def test_grpo_by_hand() -> None:
    assert grpo(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -1, 1, 0, 0], abs=2e-6)


def test_without_std_by_hand() -> None:
    assert grpo_no_std(2 * REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -2, 2, 0, 0])


def test_leave_one_out_by_hand() -> None:
    assert rloo(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -1.5, 1.5, 0, 0])  # 0 − (1 + 2)/2; 2 − (1 + 0)/2


def test_only_what_beats_the_second_best_adds_to_pass_at_k() -> None:
    assert grpo_passk(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, 0, 1, 0, 0], abs=2e-6)  # (2 − 1) / 1; 3: both best
    twice = torch.tensor([4.0, 4.0, 0.0], dtype=torch.float64)
    assert grpo_passk(twice, torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_gpg_makes_up_for_groups_that_teach_nothing() -> None:
    # Three of six rollouts are in a group whose rewards vary: twice the centered rewards.
    assert gpg(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -2, 2, 0, 0])


def test_the_optimal_baseline_weighs_by_length() -> None:
    # Group 7: (1·1 + 0·1 + 2·2) / 4 = 1.25.
    assert opo(REWARDS, GROUPS, LENGTHS).tolist() == pytest.approx([-0.25, 0, -1.25, 0.75, 0, 0])


def test_a_group_without_tokens_has_the_plain_mean_and_no_nan() -> None:
    assert opo(REWARDS, GROUPS, torch.zeros(6)).tolist() == pytest.approx(grpo_no_std(REWARDS, GROUPS).tolist())


@pytest.mark.parametrize("kind", ALL)
def test_no_rollouts_at_all(kind: str) -> None:
    nothing = torch.empty(0, dtype=torch.float64)
    assert len(ALL[kind](nothing, nothing.long(), nothing.long())) == 0


@pytest.mark.parametrize("kind", ALL)
@settings(deadline=None)  # the first call of torch.testing imports for long
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10), st.integers(1, 50)), min_size=1, max_size=20), st.randoms())
def test_equals_the_plain_form_and_order_is_irrelevant(kind: str, items: list[tuple[int, float, int]], shuffler) -> None:
    """Groups are of any size, so this holds for what evictions leave of them as well."""
    groups, rewards, lengths = (list(column) for column in zip(*items, strict=True))
    columns = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), torch.tensor(lengths)
    found = ALL[kind](*columns)
    assert found.dtype == torch.float64
    # Division by a spread of almost 0 enlarges rounding errors of the mean by 1e6.
    assert found.tolist() == pytest.approx(by_group(kind, rewards, groups, lengths), rel=1e-9, abs=1e-7)
    order = list(range(len(items)))
    shuffler.shuffle(order)
    torch.testing.assert_close(ALL[kind](*(c[order] for c in columns)), found[order], atol=1e-7, rtol=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_equal_rewards_and_groups_of_one_teach_nothing(kind: str) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0], dtype=torch.float64)
    found = ALL[kind](rewards, torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 3, 4]))
    assert found.tolist() == pytest.approx([0.0] * 4, abs=1e-9)


# ------------------------------------------------------------------------------------------------- tokens

Sequences = list[list[tuple[float, float]]]  # (reward, value) per token
SEQUENCES = st.lists(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), max_size=6), max_size=6)


def flat(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and sequence of each token; sequences without tokens leave a gap in the numbers."""
    tokens = [(reward, value, i) for i, sequence in enumerate(sequences) for reward, value in sequence]
    columns = list(zip(*tokens, strict=True)) or [(), (), ()]
    return (
        torch.tensor(columns[0], dtype=torch.float64),
        torch.tensor(columns[1], dtype=torch.float64),
        torch.tensor(columns[2], dtype=torch.int64),
    )


def plain_gae(sequences: Sequences, gamma: float, lam: float) -> list[float]:
    found = []
    for sequence in sequences:
        backwards = []
        following_value = following = 0.0
        for reward, value in reversed(sequence):
            following = reward + gamma * following_value - value + gamma * lam * following
            following_value = value
            backwards.insert(0, following)
        found += backwards
    return found


def test_gae_by_hand() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    found = gae(rewards, values, torch.tensor([0, 0, 4]), gamma=0.5, lam=0.5)
    # δ = −0.375, 0.75 | 1; A = −0.375 + 0.25·0.75, 0.75 | 1
    assert found.tolist() == pytest.approx([-0.1875, 0.75, 1.0])


@given(SEQUENCES, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_recursion(sequences: Sequences, gamma: float, lam: float) -> None:
    rewards, values, index = flat(sequences)
    found = gae(rewards, values, index, gamma=gamma, lam=lam)
    assert found.tolist() == pytest.approx(plain_gae(sequences, gamma, lam), abs=1e-9)


@given(SEQUENCES, st.floats(0, 1))
def test_gae_at_its_end(sequences: Sequences, gamma: float) -> None:
    """λ = 1: the discounted return, of the own sequence alone, minus the value."""
    rewards, values, index = flat(sequences)
    found = gae(rewards, values, index, gamma=gamma, lam=1.0)
    expected = [
        sum(gamma**t * reward for t, (reward, _) in enumerate(sequence[k:])) - sequence[k][1]
        for sequence in sequences
        for k in range(len(sequence))
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def of_tokens(name: str, rewards: torch.Tensor, earned: torch.Tensor, index: torch.Tensor, **columns) -> torch.Tensor:
    """Advantages of rollouts of one group, with token-level rewards, by the named estimator; `gamma` is the recipe's."""
    nothing = torch.zeros_like(rewards)
    spec = AlgorithmSpec(adv_estimator=name, gamma=columns.pop("gamma", 1.0))
    return advantages(spec, Outcomes(rewards, nothing.long(), nothing.long(), index, earned, nothing, nothing, **columns))[0]


@given(SEQUENCES, st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_reinforce_plus_plus_equals_its_plain_form(sequences: Sequences, gamma: float) -> None:
    earned, _, index = flat(sequences)
    ends = torch.tensor([0.5 * i for i in range(len(sequences))], dtype=torch.float64)
    returns = [
        gamma ** (len(sequence) - 1 - k) * 0.5 * i + sum(gamma**t * reward for t, (reward, _) in enumerate(sequence[k:]))
        for i, sequence in enumerate(sequences)
        for k in range(len(sequence))
    ]
    found = of_tokens("reinforce_plus_plus", ends, earned, index, gamma=gamma)
    variance = statistics.variance(returns) if len(returns) > 1 else 0.0
    mean = statistics.fmean(returns) if returns else 0.0
    assert found.tolist() == pytest.approx([(r - mean) / (variance + 1e-8) ** 0.5 for r in returns], abs=1e-7)


@given(SEQUENCES, st.floats(-3, 3))
def test_remax_equals_its_dense_form(sequences: Sequences, baseline: float) -> None:
    """verl's layout: rewards in a rectangle, the rollout's own at its last token, summed from the right."""
    earned, _, index = flat(sequences)
    ends = [0.5 * i for i in range(len(sequences))]
    dense = np.zeros((len(sequences), 7))
    for i, sequence in enumerate(sequences):
        dense[i, : len(sequence)] = [reward for reward, _ in sequence]
        dense[i, max(0, len(sequence) - 1)] += ends[i]
    returns = dense[:, ::-1].cumsum(1)[:, ::-1] - baseline
    expected = [returns[i, t] for i, sequence in enumerate(sequences) for t in range(len(sequence))]
    baselines = torch.full((len(ends),), baseline, dtype=torch.float64)
    found = of_tokens("remax", torch.tensor(ends, dtype=torch.float64), earned, index, baselines_s=baselines)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_the_baseline_form_counts_tokens_not_rollouts() -> None:
    """Centered rewards 1 and −1, on three tokens and one: mean 0.5, variance 1."""
    rewards, index = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([0, 0, 0, 2])
    found = of_tokens("reinforce_plus_plus_baseline", rewards, torch.zeros(4, dtype=torch.float64), index)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5])


# ------------------------------------------------------------------------------------------------ by name

# Group 0: rewards 3 and 1; group 1 alone, evicted but for it. Rollout 1 has no trained token.
OUTCOMES = Outcomes(
    rewards_s=torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64),
    groups_s=torch.tensor([0, 0, 1]),
    lengths_s=torch.tensor([3, 1, 2]),
    sequence_n=torch.tensor([0, 0, 2]),
    token_rewards_n=torch.zeros(3, dtype=torch.float64),
    before_s=torch.zeros(3, dtype=torch.float64),
    ranked_s=torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64),
    baselines_s=torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64),
)
EARNING = OUTCOMES._replace(token_rewards_n=torch.tensor([-0.25, -0.75, -1.0], dtype=torch.float64))
VALUES = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)


def by_name(name: str, outcomes: Outcomes) -> torch.Tensor:
    return advantages(AlgorithmSpec(adv_estimator=name), outcomes)[0]


def test_the_recipe_and_the_learner_know_the_same_names() -> None:
    assert set(ESTIMATORS) == set(ESTIMATOR_NAMES)


@pytest.mark.parametrize(
    ("name", "plain", "shaped"),
    [
        ("grpo", [2**-0.5, 2**-0.5, 0], [2**-0.5, 2**-0.5, 0]),  # std of 3, 1 is √2; of 2, 1 is √½
        ("grpo_no_std", [1, 1, 0], [0.5, 0.5, 0]),
        ("dr_grpo", [1, 1, 0], [0.5, 0.5, 0]),
        ("grpo_passk", [2**0.5, 2**0.5, 0], [2**0.5, 2**0.5, 0]),  # 2 / √2; 1 / √½
        ("gpg", [1.5, 1.5, 0], [0.75, 0.75, 0]),  # two of three are in a group that varies
        ("rloo", [2, 2, 0], [1, 1, 0]),
        ("opo", [0.5, 0.5, 0], [0.25, 0.25, 0]),  # (3·3 + 1·1) / 4 = 2.5; (3·2 + 1·1) / 4 = 1.75
        ("reinforce_plus_plus", [-(3**-0.5), -(3**-0.5), 2 * 3**-0.5], None),  # tokens 3, 3, 4: mean 10/3, variance 1/3
        ("reinforce_plus_plus_baseline", [3**-0.5, 3**-0.5, -2 * 3**-0.5], None),  # tokens 1, 1, 0
        ("remax", [1, 1, -1], [0, 0.25, -2]),  # returns 3 − 1, 3 − 0.75 and 4 − 1 against 2, 2 and 5
    ],
)
def test_tokens_get_the_advantage_of_their_rollout(name: str, plain: list[float], shaped: list[float] | None) -> None:
    assert by_name(name, OUTCOMES).tolist() == pytest.approx(plain, abs=1e-5)
    if shaped is not None:  # the KL of a rollout's tokens in sum
        assert by_name(name, EARNING).tolist() == pytest.approx(shaped, abs=1e-5)


def test_a_token_of_reinforce_plus_plus_pays_only_for_what_follows() -> None:
    # Returns: 3 − 1, 3 − 0.75, 4 − 1; mean 2.41667.
    returns = torch.tensor([2.0, 2.25, 3.0], dtype=torch.float64)
    expected = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    torch.testing.assert_close(by_name("reinforce_plus_plus", EARNING), expected)


def test_generalized_advantages_by_hand() -> None:
    # Rollouts 0 (two tokens, reward 3) and 2 (one, reward 4); rollout 1 has none, and its reward goes nowhere.
    # earned: −0.25, 3 − 0.75 | 4 − 1; δ: −0.25 + 0.5·0.25 − 0.5, 2.25 − 0.25 | 3 − 1; A: −0.625 + 0.25·2, 2 | 2
    spec = AlgorithmSpec(adv_estimator="gae", gamma=0.5, lam=0.5)
    found, returns = advantages(spec, EARNING._replace(values_n=VALUES))
    raw = torch.tensor([-0.125, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(returns, raw + VALUES)
    torch.testing.assert_close(found, (raw - raw.mean()) / (raw.var() + 1e-8).sqrt())
    # γ = λ = 1 and no token-level rewards: the reward less the value
    _, returns = advantages(AlgorithmSpec(adv_estimator="gae"), OUTCOMES._replace(values_n=VALUES))
    assert returns.tolist() == [3.0, 3.0, 4.0]
    assert OUTCOMES.rewards_s.tolist() == [3.0, 1.0, 4.0]
    assert EARNING.token_rewards_n.tolist() == [-0.25, -0.75, -1.0]  # arguments stay as they were


def test_a_rollout_that_was_cut_is_worth_what_its_end_is() -> None:
    """As the textbook has it: after the last token comes the value of the end in place of 0."""
    ends = torch.tensor([8.0, 0.0, 0.0], dtype=torch.float64)  # rollout 0, of two trained tokens, was cut
    spec = AlgorithmSpec(adv_estimator="gae", gamma=0.5, lam=0.5, bootstrap_truncated=True)
    _, returns = advantages(spec, EARNING._replace(values_n=VALUES, ends_s=ends))
    # earned −0.25, 3 − 0.75 | 4 − 1; δ: −0.25 + 0.5·0.25 − 0.5, 2.25 + 0.5·8 − 0.25 | 3 − 1; A: −0.625 + 0.25·6, 6 | 2
    torch.testing.assert_close(returns, torch.tensor([0.875, 6.0, 2.0], dtype=torch.float64) + VALUES)
    assert EARNING.rewards_s.tolist() == [3.0, 1.0, 4.0]


def test_returns_are_for_a_critic_only() -> None:
    assert advantages(AlgorithmSpec(), OUTCOMES)[1] is None
    with pytest.raises(AssertionError, match="values that were not made"):
        advantages(AlgorithmSpec(adv_estimator="gae"), OUTCOMES)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_batches_without_tokens_or_rollouts(name: str) -> None:
    nothing, none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    assert len(by_name(name, OUTCOMES._replace(sequence_n=nothing, token_rewards_n=none, values_n=none))) == 0
    assert len(by_name(name, Outcomes(none, nothing, nothing, nothing, none, none, none, none, none))) == 0


def test_what_was_earned_before_the_first_trained_token_counts_for_the_rollout_only() -> None:
    """Rollout 1 has no trained token: all it earned, 2, is before. Rollout 0 earned 1 before its first trained one."""
    early = EARNING._replace(before_s=torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert early.total_s().tolist() == [3.0, 3.0, 3.0]
    assert by_name("grpo_no_std", early).tolist() == [0.0, 0.0, 0.0]
    for name in ("reinforce_plus_plus", "remax"):
        assert by_name(name, early).equal(by_name(name, EARNING))


def test_remax_without_baselines_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"without a baseline: .*StorePlan\(baseline=True\)"):
        by_name("remax", OUTCOMES._replace(baselines_s=None))


def test_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def halved(rewards_s, groups_s): return rewards_s / 2\ndef wrong(r, g): return r[:1]\n")
    assert by_name(f"{tmp_path}/own.py:halved", OUTCOMES).tolist() == [1.5, 1.5, 2.0]
    assert by_name("asyncrl.algorithms.advantages:grpo", OUTCOMES).equal(grpo(*OUTCOMES[:2])[OUTCOMES.sequence_n])
    with pytest.raises(ConfigError, match=r"own\.py:wrong' returned \(1,\) for 3 rollouts: .* shape \(3,\)"):
        by_name(f"{tmp_path}/own.py:wrong", OUTCOMES)
    with pytest.raises(ConfigError, match="has no 'halfed'; did you mean 'halved'"):
        estimator(f"{tmp_path}/own.py:halfed")
