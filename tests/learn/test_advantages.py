import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learn.advantages import grpo, grpo_no_std

REWARDS = torch.tensor([1.0, 5.0, 0.0, 2.0, 5.0, 0.5], dtype=torch.float64)
GROUPS = torch.tensor([7, 3, 7, 7, 3, 9])  # 7: 1, 0, 2 with mean 1 and std 1; 3: equal rewards; 9: a group of one


def test_grpo_by_hand() -> None:
    assert grpo(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -1, 1, 0, 0], abs=2e-6)


def test_without_std_by_hand() -> None:
    assert grpo_no_std(2 * REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -2, 2, 0, 0])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10)), min_size=1, max_size=20), st.randoms())
def test_groups_sum_to_zero_and_order_is_irrelevant(items: list[tuple[int, float]], shuffler) -> None:
    order = list(range(len(items)))
    shuffler.shuffle(order)
    groups = torch.tensor([group for group, _ in items])
    rewards = torch.tensor([reward for _, reward in items], dtype=torch.float64)
    for estimator in (grpo, grpo_no_std):
        advantages = estimator(rewards, groups)
        for group in groups.unique():
            assert advantages[groups == group].sum().item() == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(estimator(rewards[order], groups[order]), advantages[order], atol=1e-6, rtol=1e-6)
