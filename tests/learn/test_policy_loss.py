from pathlib import Path

import pytest
import torch

from asyncrl.algorithm import LOSS_NAMES, AlgorithmSpec
from asyncrl.errors import ConfigError
from asyncrl.learn.losses import clipped_ppo
from asyncrl.learn.policy_loss import POLICY_LOSSES, policy_loss

LOGP, OLD, ADVANTAGES = torch.tensor([[-1.0, -2.0, -0.1], [-1.5, -1.0, -3.0], [1.0, -1.0, -2.0]], dtype=torch.float64)
COLUMNS = (LOGP, OLD, ADVANTAGES, torch.tensor([0, 0, 1]))


def test_the_recipe_and_the_learner_know_the_same_names() -> None:
    assert set(POLICY_LOSSES) == set(LOSS_NAMES)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_name_gives_a_loss_per_token(name: str) -> None:
    loss, figures = policy_loss(AlgorithmSpec(policy_loss=name))(*COLUMNS)
    assert loss.shape == LOGP.shape
    assert all(values.shape == LOGP.shape for values in figures.values())


def test_the_recipes_bounds_arrive() -> None:
    spec = AlgorithmSpec(clip_ratio=0.1, clip_ratio_high=0.4, clip_ratio_c=1.5)
    expected = clipped_ppo(*COLUMNS[:3], clip_low=0.1, clip_high=0.4, dual=1.5)
    assert policy_loss(spec)(*COLUMNS)[0].equal(expected[0])
    narrow, wide = (policy_loss(AlgorithmSpec(policy_loss="cispo", clip_ratio_high=high))(*COLUMNS)[0] for high in (0.1, 0.5))
    assert (wide / narrow)[0].item() == pytest.approx(1.5 / 1.1)
    sharp = AlgorithmSpec(policy_loss="sapo", sapo_tau_positive=4.0)
    assert policy_loss(sharp)(OLD, *COLUMNS[1:])[0][0].item() == pytest.approx(-0.5)  # −(2/τ)·A at r = 1


def test_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def reinforce(logp_t, old_t, advantages_t, sequence_t):\n"
        "    return -advantages_t * logp_t, {'good': (advantages_t > 0).double()}\n"
        "def summed(logp_t, old_t, advantages_t, sequence_t):\n"
        "    return -(advantages_t * logp_t).sum(), {}\n"
    )
    loss, figures = policy_loss(AlgorithmSpec(policy_loss=f"{tmp_path}/own.py:reinforce"))(*COLUMNS)
    assert loss.tolist() == pytest.approx([1.0, -2.0, -0.2])
    assert figures["good"].tolist() == [1, 0, 0]
    with pytest.raises(ConfigError, match=r"own\.py:summed' did not return \(loss_t, figures\) with one loss for each of 3"):
        policy_loss(AlgorithmSpec(policy_loss=f"{tmp_path}/own.py:summed"))(*COLUMNS)
