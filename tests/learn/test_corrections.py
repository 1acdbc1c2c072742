import math

import pytest
import torch

from asyncrl.learn.corrections import CORRECTIONS, decoupled, uncorrected

PROXIMAL = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
BEHAVIOUR = torch.tensor([-1.0, -1.0 + math.log(2), -1.0 - math.log(3), -1.0 - math.log(8)], dtype=torch.float64)


def test_decoupled_weights_by_hand() -> None:
    weights, capped = decoupled(PROXIMAL, BEHAVIOUR, 5.0)
    assert weights.tolist() == pytest.approx([1.0, 0.5, 3.0, 5.0])  # the last would be 8
    assert capped.tolist() == [False, False, False, True]


def test_none_weighs_every_token_alike() -> None:
    weights, capped = uncorrected(PROXIMAL, BEHAVIOUR, 5.0)
    assert weights.tolist() == [1.0] * 4
    assert not capped.any()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_carry_no_gradient_and_stay_finite(name: str) -> None:
    proximal = torch.tensor([0.0, -900.0], requires_grad=True)
    weights, _ = CORRECTIONS[name](proximal, torch.tensor([-900.0, 0.0]), 5.0)
    assert not weights.requires_grad
    assert weights.isfinite().all()
