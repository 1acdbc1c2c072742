import pytest
import torch

from asyncrl.learn.value_loss import clipped_value_loss, explained_variance


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient", "clipped"),
    [
        (0.5, 0.4, 1.0, 0.2, 0.125, -0.5, False),  # within the clip: ½·0.5², V − R
        (0.9, 0.4, 1.0, 0.2, 0.08, 0.0, True),  # moved towards R beyond 0.6: ½·(0.6 − 1)², no gradient
        (0.1, 0.4, 1.0, 0.2, 0.405, -0.9, False),  # moved away from R beyond 0.2: the larger loss is its own
        (1.5, 0.4, 1.0, 0.2, 0.125, 0.5, False),  # beyond R: 0.5² > 0.4², so it is drawn back
        (0.9, 0.4, 1.0, None, 0.005, -0.1, False),
        (0.0, 0.0, 0.0, 0.2, 0.0, 0.0, False),
    ],
)
def test_by_hand(value, old, target, clip, loss, gradient, clipped) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    found, mask = clipped_value_loss(values, torch.tensor([old]).double(), torch.tensor([target]).double(), clip)
    found.sum().backward()
    assert (found.item(), values.grad.item(), mask.item()) == (pytest.approx(loss), pytest.approx(gradient), clipped)


@pytest.mark.parametrize("clip", [0.05, 0.5, None])
def test_against_a_float64_reference(clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(500, generator=generator) for _ in range(3))
    values = (old + 0.5 * values).requires_grad_()
    found, clipped = clipped_value_loss(values, old, returns, clip)
    found.sum().backward()
    expected, gradients, shares = [], [], []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        held = v if clip is None else min(max(v, o - clip), o + clip)
        larger = (held - r) ** 2 > (v - r) ** 2
        expected.append(0.5 * max((v - r) ** 2, (held - r) ** 2))
        gradients.append(0.0 if larger else v - r)
        shares.append(larger)
    torch.testing.assert_close(found.detach(), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values.grad, torch.tensor(gradients), atol=1e-6, rtol=1e-5)
    assert clipped.tolist() == shares
    assert any(shares) == (clip is not None)


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 7, returns) == 1.0  # a constant offset is not seen
    assert explained_variance(torch.full((4,), 5.0), returns) == 0.0
    assert explained_variance(3 * returns, returns) == pytest.approx(-3.0)  # R − V = −2R: 1 − 4
    assert explained_variance(returns, torch.ones(4)) is None
    assert explained_variance(returns[:1], returns[:1]) is None
