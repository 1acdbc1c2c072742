"""Every token loss by hand, and against a reference of its own in plain Python: value and gradient, one token at a time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncrl.algorithms.losses import (
    POLICY_LOSSES,
    cispo,
    clipped_ppo,
    clipped_value_loss,
    dppo_kl,
    dppo_tv,
    explained_variance,
    gmpo,
    gspo,
    policy_gradient,
    policy_loss,
    sapo,
    sequence_mean,
    sequence_sum,
)
from asyncrl.config import LOSS_NAMES, AlgorithmSpec
from asyncrl.errors import ConfigError


def one(loss: Callable[..., tuple], ratio: float, advantage: float, old: float = -1.0, **bounds) -> tuple[float, float, dict]:
    """Loss, its gradient in logp, and figures of a single token, in float64."""
    logp = torch.tensor([math.log(ratio) + old], dtype=torch.float64, requires_grad=True)
    columns = (torch.tensor([old], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64))
    value, figures = loss(logp, *columns, **bounds)
    value.sum().backward()
    return value.item(), logp.grad.item(), {name: bool(flag) for name, flag in figures.items()}


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
def test_ppo_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    found = one(clipped_ppo, ratio, advantage, clip_low=0.2, clip_high=0.3)
    assert found[:2] == pytest.approx((loss, gradient))
    assert found[2] == {"pg_clipfrac": clipped}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "lower"),
    [
        (4.0, -2.0, 6.0, 0.0, True),  # 8 is held at 3·2
        (2.9, -2.0, 5.8, 5.8, False),
        (4.0, 2.0, -2.6, 0.0, False),  # good tokens are not its business
        (0.5, -2.0, 1.6, 0.0, False),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, lower: bool) -> None:
    found = one(clipped_ppo, ratio, advantage, clip_low=0.2, clip_high=0.3, dual=3.0)
    assert found[:2] == pytest.approx((loss, gradient))
    assert found[2]["pg_clipfrac_lower"] is lower


@pytest.mark.parametrize(
    ("ratio", "weight", "clipped"), [(1.0, 1.0, False), (1.3, 1.2, True), (0.1, 0.1, False), (1.1, 1.1, False)]
)
def test_cispo_clips_the_weight_and_keeps_the_gradient(ratio: float, weight: float, clipped: bool) -> None:
    loss, gradient, figures = one(cispo, ratio, 2.0, clip_high=0.2)
    assert gradient == pytest.approx(-weight * 2.0)
    assert loss == pytest.approx(-weight * 2.0 * (math.log(ratio) - 1.0))
    assert figures == {"pg_clipfrac": clipped}


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.5), (-2.0, 3.0)])
def test_sapo_by_hand(advantage: float, tau: float) -> None:
    taus = {"tau_positive": 1.5, "tau_negative": 3.0}
    assert one(sapo, 1.0, advantage, **taus)[:2] == pytest.approx((-2 / tau * advantage, -advantage))  # the gate's slope is 1
    gate = 1 / (1 + math.exp(-tau * 0.5))
    loss, gradient, figures = one(sapo, 1.5, advantage, **taus)
    assert loss == pytest.approx(-4 / tau * gate * advantage)
    assert gradient == pytest.approx(-4 * gate * (1 - gate) * 1.5 * advantage)
    assert figures == {}


def test_policy_gradient_by_hand() -> None:
    logp = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    loss, figures = policy_gradient(logp, torch.tensor([3.0, -1.0], dtype=torch.float64))
    assert loss.tolist() == [1.5, -2.0]
    assert torch.autograd.grad(loss.sum(), logp)[0].tolist() == [-3.0, 1.0]
    assert figures == {}


@pytest.mark.parametrize(
    ("old", "new", "advantage", "out"),
    [
        (0.5, 0.65, 1.0, True),  # a good token rose by 0.15 > 0.1
        (0.5, 0.58, 1.0, False),
        (0.5, 0.2, 1.0, False),  # it fell: to be pulled back
        (0.5, 0.38, -1.0, False),  # a bad token fell by 0.12 < 0.2
        (0.5, 0.25, -1.0, True),
        (0.001, 0.01, 1.0, False),  # ten times as likely, and still rare: PPO would have clipped it
    ],
)
def test_dppo_bounds_the_difference_of_probabilities(old: float, new: float, advantage: float, out: bool) -> None:
    loss, gradient, figures = one(dppo_tv, new / old, advantage, math.log(old), clip_low=0.2, clip_high=0.1, cap=20.0)
    expected = 0.0 if out else -new / old * advantage
    assert (loss, gradient) == pytest.approx((expected, expected))
    assert figures == {"pg_clipfrac": out, "pg_clipfrac_lower": False}


@pytest.mark.parametrize(
    ("old", "new", "advantage", "out"),
    [
        (0.5, 0.8, 1.0, True),  # KL 0.223
        (0.5, 0.6, 1.0, False),  # KL 0.0204
        (0.5, 0.2, 1.0, False),  # as far as 0.8, but in the other direction
        (0.5, 0.2, -1.0, True),
        (0.5, 0.8, -1.0, False),
    ],
)
def test_dppo_bounds_the_binary_kl(old: float, new: float, advantage: float, out: bool) -> None:
    loss, gradient, figures = one(dppo_kl, new / old, advantage, math.log(old), clip_low=0.1, clip_high=0.05, cap=20.0)
    expected = 0.0 if out else -new / old * advantage
    assert (loss, gradient) == pytest.approx((expected, expected))
    assert figures == {"pg_clipfrac": out, "pg_clipfrac_lower": False}


@pytest.mark.parametrize("loss", [dppo_tv, dppo_kl])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_dppo_caps_the_ratio_of_a_rare_token_and_keeps_its_direction(loss: Callable, advantage: float) -> None:
    """From 1e-7 to 1e-3 no bound notices a token, and its ratio is 10,000."""
    bounds = {"clip_low": 0.15, "clip_high": 0.15, "cap": 20.0}
    value, gradient, figures = one(loss, 1e4, advantage, math.log(1e-7), **bounds)
    assert (value, gradient) == pytest.approx((-20 * advantage, -20 * advantage))
    assert figures == {"pg_clipfrac": False, "pg_clipfrac_lower": True}
    assert one(loss, 19.0, advantage, math.log(1e-7), **bounds)[:2] == pytest.approx((-19 * advantage, -19 * advantage))
    assert one(loss, 1e4, 1.0, math.log(9e-5), **bounds)[2] == {"pg_clipfrac": True, "pg_clipfrac_lower": False}  # to 0.9


# ---------------------------------------------------------------------------------- against a plain reference


def plain(name: str, logp: float, old: float, advantage: float) -> tuple[float, float]:
    """Value and derivative in logp, from the papers' formulas. ε 0.2 and 0.3, dual 2, cap 1.5, τ 1 and 1.05."""
    ratio = math.exp(logp - old)
    if name == "ppo":
        surrogate, bounded = ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage
        value, slope = (-surrogate, -surrogate) if surrogate <= bounded else (-bounded, 0.0)
        return (-2 * advantage, 0.0) if advantage < 0 and value > -2 * advantage else (value, slope)
    if name == "cispo":
        weight = min(ratio, 1.3)
        return -weight * advantage * logp, -weight * advantage
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * ratio * advantage
    if name == "pg":
        return -advantage * logp, -advantage
    p, q = math.exp(logp), math.exp(old)
    apart = abs(p - q) if name == "dppo_tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    out = apart > (0.3 if advantage > 0 else 0.2) and (p - q) * advantage > 0
    return (0.0, 0.0) if out else (-min(ratio, 1.5) * advantage, -min(ratio, 1.5) * advantage)


LOSSES: dict[str, Callable] = {
    "ppo": lambda *columns: clipped_ppo(*columns, clip_low=0.2, clip_high=0.3, dual=2.0),
    "cispo": lambda *columns: cispo(*columns, clip_high=0.3),
    "sapo": lambda *columns: sapo(*columns, tau_positive=1.0, tau_negative=1.05),
    "pg": lambda logp, old, advantages: policy_gradient(logp, advantages),
    "dppo_tv": lambda *columns: dppo_tv(*columns, clip_low=0.2, clip_high=0.3, cap=1.5),
    "dppo_kl": lambda *columns: dppo_kl(*columns, clip_low=0.2, clip_high=0.3, cap=1.5),
}


def columns(tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(tokens, dtype=torch.float64, generator=generator).mul(3) - 0.05
    logp = (old + 0.7 * torch.randn(tokens, dtype=torch.float64, generator=generator)).clamp(max=-1e-3)
    return logp.requires_grad_(), old, torch.randn(tokens, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_plain_reference(name: str) -> None:
    logp, old, advantages = columns()
    loss, figures = LOSSES[name](logp, old, advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    expected = [plain(name, *token) for token in zip(logp.tolist(), old.tolist(), advantages.tolist(), strict=True)]
    values, slopes = torch.tensor(expected, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(loss.detach(), values, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, slopes, atol=1e-12, rtol=1e-12)
    assert all(0 < flags.sum() < len(logp) for flags in figures.values())  # both branches were met


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("distance", [-500.0, 500.0])
def test_policies_far_apart_stay_finite(name: str, advantage: float, distance: float) -> None:
    old = torch.tensor([-500.0 if distance > 0 else 0.0])
    logp = (old + distance).requires_grad_()
    loss, _ = LOSSES[name](logp, old, torch.tensor([advantage]))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_itself_has_the_plain_policy_gradient(name: str) -> None:
    """At r = 1 every loss is REINFORCE."""
    _, old, advantages = columns()
    logp = old.clone().requires_grad_()
    loss, _ = LOSSES[name](logp, old, advantages)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp)[0], -advantages)


# ------------------------------------------------------------------------------------- sequence losses
# Sequence losses by hand, and against a reference that writes each paper's sum over sequences with plain loops.

SEQUENCE_LOSSES: dict[str, Callable] = {"gspo": gspo, "gmpo": gmpo}
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


def plain_sequence_loss(name: str, logp: list[float], old: list[float], advantage: float) -> tuple[float, list[float]]:
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


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_value_and_gradient_of_the_mean_over_sequences(name: str) -> None:
    """With seq-mean-token-mean the token form is the paper's (1/S)·Σ over sequences."""
    logp, old, advantages, sequences = random_columns()
    logp.requires_grad_()
    loss, figures = SEQUENCE_LOSSES[name](logp, old, advantages, sequences, **BOUNDS)
    count = int(sequences.max()) + 1
    lengths = torch.bincount(sequences)
    total = (loss / (count * lengths[sequences])).sum()
    (gradient,) = torch.autograd.grad(total, logp)
    value, slopes = 0.0, torch.zeros_like(logp)
    for i in range(count):
        members = (sequences == i).nonzero()[:, 0]
        own, derivatives = plain_sequence_loss(
            name, logp[members].tolist(), old[members].tolist(), advantages[members[0]].item()
        )
        value += own / count
        slopes[members] = torch.tensor(derivatives, dtype=torch.float64) / count
    assert total.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(gradient, slopes, atol=1e-12, rtol=1e-12)
    assert 0 < figures["pg_clipfrac"].sum() < len(logp)


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_a_sequence_of_one_token_and_an_empty_pack(name: str) -> None:
    one = torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([7])
    assert SEQUENCE_LOSSES[name](*one, **BOUNDS)[0].tolist() == [-2.0]
    nothing = torch.empty(0)
    assert len(SEQUENCE_LOSSES[name](nothing, nothing, nothing, nothing.long(), **BOUNDS)[0]) == 0


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
@pytest.mark.parametrize("distance", [-500.0, 500.0])
def test_sequence_losses_of_policies_far_apart_stay_finite(name: str, distance: float) -> None:
    logp = torch.tensor([distance, 0.0], requires_grad=True)
    loss, _ = SEQUENCE_LOSSES[name](logp, torch.zeros(2), torch.tensor([-1.0, -1.0]), torch.tensor([0, 0]), **BOUNDS)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), logp)[0].isfinite().all()


# ------------------------------------------------------------------------------------------- sequences

VALUES = torch.tensor([1.0, 10.0, 2.0, 6.0], dtype=torch.float64)
SEQUENCES = torch.tensor([5, 0, 5, 5])  # any ids, in any order


def test_by_hand_and_back_to_the_tokens() -> None:
    assert sequence_sum(VALUES, SEQUENCES).tolist() == [9.0, 10.0, 9.0, 9.0]
    assert sequence_mean(VALUES, SEQUENCES).tolist() == pytest.approx([3.0, 10.0, 3.0, 3.0])
    assert len(sequence_mean(VALUES[:0], SEQUENCES[:0])) == 0


def test_gradients() -> None:
    values = VALUES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sequence_mean(v, SEQUENCES), (values,))
    assert torch.autograd.gradcheck(lambda v: sequence_sum(v.exp(), SEQUENCES), (values,))


# ------------------------------------------------------------------------------------------ value loss


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


# ------------------------------------------------------------------------------------------------ by name

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
    capped = AlgorithmSpec(policy_loss="dppo_tv", clip_ratio=0.9, clip_ratio_c=1.1)
    assert policy_loss(capped)(*COLUMNS)[0].tolist() == pytest.approx([-1.1, math.exp(-1.0), 2.2])  # r = e^0.5, 1/e, e^2.9
    sharp = AlgorithmSpec(policy_loss="sapo", sapo_tau_positive=4.0)
    assert policy_loss(sharp)(OLD, *COLUMNS[1:])[0][0].item() == pytest.approx(-0.5)  # −(2/τ)·A at r = 1


def test_a_loss_that_is_named_has_its_papers_bounds() -> None:
    """Of one token at the ratio 1.3 with A = 1: what of it each loss lets count."""
    logp, columns = torch.tensor([math.log(0.013)]).double(), (torch.tensor([math.log(0.01)]).double(), torch.ones(1).double())

    def loss(name: str, **fields: Any) -> float:
        return policy_loss(AlgorithmSpec(policy_loss=name, **fields))(logp, *columns, torch.zeros(1).long())[0].item()

    assert loss("ppo") == pytest.approx(-1.2)
    assert loss("gspo") == pytest.approx(-1.0004)
    assert loss("gmpo") == loss("dppo_tv") == loss("dppo_kl") == pytest.approx(-1.3)  # e^0.4 is 1.49; 0.003 is no distance
    assert loss("cispo") == pytest.approx(-1.3 * math.log(0.013))
    assert loss("gspo", clip_ratio=0.2) == pytest.approx(-1.2)  # also what ppo would have; both sides, as only one is given
    logp = torch.tensor([0.0]).double()  # the ratio 100, a distance of 0.99
    assert loss("cispo", clip_ratio_high=0.2) == 0.0
    assert loss("gmpo") == pytest.approx(-math.exp(0.4))
    assert loss("dppo_tv") == loss("dppo_kl") == 0.0
    columns = (torch.tensor([-9.0]).double(), columns[1])
    logp = torch.tensor([-2.0]).double()  # the ratio 1,097, a distance of 0.135; KL(p_old ‖ p) is 0.145
    assert loss("dppo_tv") == -20.0
    assert loss("dppo_kl") == 0.0
    assert loss("dppo_kl", clip_ratio=0.15) == -20.0
    assert loss("cispo") == pytest.approx(-5 * -2.0)  # a weight is at most 5


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


def test_the_users_own_never_sees_a_pack_without_a_token(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def longest(logp_t, old_t, advantages_t, sequence_t):\n"
        "    return -advantages_t * logp_t / (sequence_t.max() + 1), {'last': sequence_t.double()}\n"
    )
    logp_t, *columns = (column_t[:0] for column_t in COLUMNS)
    loss, figures = policy_loss(AlgorithmSpec(policy_loss=f"{tmp_path}/own.py:longest"))(logp_t.requires_grad_(), *columns)
    assert loss.shape == figures["last"].shape == (0,)
    loss.sum().backward()  # a rank without a pack makes its backward pass, too
