"""Sequence losses by hand, and against a reference that writes each paper's sum over sequences with plain loops."""

import math
from collections.abc import Callable

import pytest
import torch

from asyncrl.learn.sequence_losses import gmpo, gspo

LOSSES: dict[str, Callable] = {"gspo": gspo, "gmpo": gmpo}
BOUNDS = {"clip_low": 0.15, "clip_high": 0.2}


def test_gspo_by_hand() -> None:
    """Log-ratios 0.1 and 0.3: s = exp(0.2), beyond 1.2. The other sequence: s = exp(−0.1)."""
    old = torch.tensor([-1.0, -2.0, -1.0], dtype=torch.float64)
    logp = (old + torch.tensor([0.1, -0.1, 0.3], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    loss, figures = gspo(logp, old, advantages, torch.tensor([0, 1, 0]), **BOUNDS)
    assert loss.tolist() == pytest.approx([-1.2, -2 * math.exp(-0.1), -1.2])
    assert figures["pg_clipfrac"].tolist() == [True, False, True]
    assert torch.autograd.grad(loss.sum(), logp)[0].tolist() == pytest.approx([0.0, -2 * math.exp(-0.1), 0.0])


def test_gmpo_by_hand() -> None:
    """Log-ratios 0.1 and 0.4 (held at 0.2): the mean is 0.15, and only the first token has a gradient."""
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    logp = (old + torch.tensor([0.1, 0.4], dtype=torch.float64)).requires_grad_()
    loss, figures = gmpo(logp, old, torch.tensor([2.0, 2.0], dtype=torch.float64), torch.tensor([0, 0]), **BOUNDS)
    assert loss.tolist() == pytest.approx([-2 * math.exp(0.15)] * 2)
    assert figures["pg_clipfrac"].tolist() == [False, True]
    mean = torch.autograd.grad(loss.mean(), logp)[0]
    assert mean.tolist() == pytest.approx([-2 * math.exp(0.15) / 2, 0.0])


def plain(name: str, logp: list[float], old: list[float], advantage: float) -> tuple[float, list[float]]:
    """One sequence: its loss, and the derivative in each logp. The paper's own form, so advantages don't vary within."""
    deltas, length = [a - b for a, b in zip(logp, old, strict=True)], len(logp)
    if name == "gspo":
        ratio = math.exp(sum(deltas) / length)
        surrogate, bounded = ratio * advantage, min(max(ratio, 0.85), 1.2) * advantage
        return (-surrogate, [-surrogate / length] * length) if surrogate <= bounded else (-bounded, [0.0] * length)
    held = [min(d, 0.2) if advantage > 0 else max(d, -0.15) for d in deltas]
    ratio = math.exp(sum(held) / length)
    return -ratio * advantage, [-ratio * advantage / length if h == d else 0.0 for h, d in zip(held, deltas, strict=True)]


def random_columns() -> tuple[torch.Tensor, ...]:
    """Sequences of 1 to 12 tokens, tokens of different sequences mixed."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(1, 13).repeat(4)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    old = -2 + torch.randn(len(sequences), dtype=torch.float64, generator=generator)
    shift = 0.3 * torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    logp = old + shift[sequences] + 0.2 * torch.randn(len(sequences), dtype=torch.float64, generator=generator)
    advantages = torch.randn(len(lengths), dtype=torch.float64, generator=generator)[sequences]
    order = torch.randperm(len(sequences), generator=generator)
    return tuple(column[order] for column in (logp, old, advantages, sequences))


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_of_the_mean_over_sequences(name: str) -> None:
    """With seq-mean-token-mean the token form is the paper's (1/S)·Σ over sequences."""
    logp, old, advantages, sequences = random_columns()
    logp.requires_grad_()
    loss, figures = LOSSES[name](logp, old, advantages, sequences, **BOUNDS)
    count = int(sequences.max()) + 1
    lengths = torch.bincount(sequences)
    total = (loss / (count * lengths[sequences])).sum()
    (gradient,) = torch.autograd.grad(total, logp)
    value, slopes = 0.0, torch.zeros_like(logp)
    for i in range(count):
        members = (sequences == i).nonzero()[:, 0]
        own, derivatives = plain(name, logp[members].tolist(), old[members].tolist(), advantages[members[0]].item())
        value += own / count
        slopes[members] = torch.tensor(derivatives, dtype=torch.float64) / count
    assert total.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(gradient, slopes, atol=1e-12, rtol=1e-12)
    assert 0 < figures["pg_clipfrac"].sum() < len(logp)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_of_one_token_and_an_empty_pack(name: str) -> None:
    one = torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([7])
    assert LOSSES[name](*one, **BOUNDS)[0].tolist() == [-2.0]
    nothing = torch.empty(0)
    assert len(LOSSES[name](nothing, nothing, nothing, nothing.long(), **BOUNDS)[0]) == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("distance", [-500.0, 500.0])
def test_policies_far_apart_stay_finite(name: str, distance: float) -> None:
    logp = torch.tensor([distance, 0.0], requires_grad=True)
    loss, _ = LOSSES[name](logp, torch.zeros(2), torch.tensor([-1.0, -1.0]), torch.tensor([0, 0]), **BOUNDS)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), logp)[0].isfinite().all()
