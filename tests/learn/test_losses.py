import math

import pytest
import torch

from asyncrl.learn.losses import clipped_ppo


def ppo(ratio: float, advantage: float, low: float = 0.2, high: float = 0.3) -> tuple[float, float, bool]:
    """Loss, its gradient in logp, and whether it was clipped, in float64."""
    logp = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_ppo(
        logp,
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=low,
        clip_high=high,
    )
    loss.sum().backward()
    return loss.item(), logp.grad.item(), bool(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),  # on-policy: −A, gradient −r·A
        (1.2, 2.0, -2.4, -2.4, False),  # inside the range
        (1.5, 2.0, -2.6, 0.0, True),  # gain held at 1 + 0.3
        (0.5, 2.0, -1.0, -1.0, False),  # a good token that became rare is always pulled back
        (0.5, -2.0, 1.6, 0.0, True),  # a bad token is not pushed below 1 − 0.2
        (1.5, -2.0, 3.0, 3.0, False),  # a bad token that became likely is always pushed down
    ],
)
def test_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    found = ppo(ratio, advantage)
    assert found[:2] == pytest.approx((loss, gradient))
    assert found[2] is clipped


def test_huge_ratios_stay_finite() -> None:
    loss, gradient, _ = ppo(math.exp(500), -1.0)
    assert math.isfinite(loss)
    assert gradient == 0.0


def test_unclipped_gradient_is_that_of_the_plain_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, proximal, advantages = torch.randn(3, 50, dtype=torch.float64, generator=generator).unbind()
    logp.requires_grad_()
    loss, clipped = clipped_ppo(logp, proximal, advantages, clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    expected = -(logp - proximal).exp() * advantages
    torch.testing.assert_close(gradient, torch.where(clipped, 0.0, expected.detach()))
    assert 0 < clipped.sum() < 50
