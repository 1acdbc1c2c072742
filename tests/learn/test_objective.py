"""The composed loss against a reference of its own, written token by token in float64."""

import math

import pytest
import torch

from asyncrl.config import AlgorithmSpec
from asyncrl.learn.objective import Columns, metrics, objective


def random_columns(tokens: int = 40) -> tuple[Columns, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return -2 + torch.randn(tokens, dtype=torch.float64, generator=generator)

    columns = Columns(draw().abs() / tokens, draw() + 2, draw(), draw(), draw())
    logp = (columns.proximal_t + 0.3 * (draw() + 2)).requires_grad_()
    return columns, logp, draw().abs().requires_grad_()


def by_token(spec: AlgorithmSpec, columns: Columns, logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    high = spec.clip_ratio_high or spec.clip_ratio
    for i, advantage in enumerate(columns.advantages_t.tolist()):
        ratio = math.e ** (logp[i] - columns.proximal_t[i])
        bounded = min(max(ratio.item(), 1 - spec.clip_ratio), 1 + high)
        surrogate = min(ratio.item() * advantage, bounded * advantage)
        policy = -ratio * advantage if surrogate == ratio.item() * advantage else torch.tensor(-surrogate)
        if spec.correction == "decoupled":
            policy = policy * min(math.exp(columns.proximal_t[i] - columns.behaviour_t[i]), spec.behaviour_cap)
        delta = logp[i] - columns.reference_t[i]
        kl = {"k2": delta**2 / 2, "k3": torch.exp(-delta) - 1 + delta}[spec.kl_estimator]
        total = total + columns.coefficients_t[i] * (policy + spec.kl_coef * kl - spec.entropy_coef * entropy[i])
    return total


@pytest.mark.parametrize(
    "spec",
    [
        AlgorithmSpec(kl_coef=0.1, entropy_coef=0.01),
        AlgorithmSpec(kl_coef=0.1, kl_estimator="k2", correction="none", clip_ratio_high=0.4),
        AlgorithmSpec(behaviour_cap=1.5),
    ],
)
def test_value_and_gradient_equal_the_token_by_token_reference(spec: AlgorithmSpec) -> None:
    columns, logp, entropy = random_columns()
    loss, _ = objective(spec, columns, logp, entropy)
    expected = by_token(spec, columns, logp, entropy)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (logp, entropy), allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, (logp, entropy), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted)


def test_a_pack_split_in_two_has_the_same_loss() -> None:
    spec = AlgorithmSpec(kl_coef=0.1, entropy_coef=0.01)
    columns, logp, entropy = random_columns()
    whole, _ = objective(spec, columns, logp, entropy)
    halves = [
        objective(spec, Columns(*(c[part] for c in columns)), logp[part], entropy[part])[0]
        for part in (slice(13), slice(13, 40))
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_metrics_by_hand() -> None:
    values = [torch.tensor(v) for v in ([0.5, 0.5], [1.0, 1.0], [-1.0, -1.0 - math.log(9)], [-1.0, -1.0])]
    columns = Columns(*values, reference_t=None)
    _, sums = objective(AlgorithmSpec(), columns, torch.tensor([-1.0, -1.0 + math.log(2)]), torch.tensor([0.2, 0.4]))
    found = metrics({**{k: float(v) for k, v in sums.items()}, "grad_norm": 3.0}, 1)
    assert found["actor/pg_loss"] == pytest.approx(0.5 * -1.0 + 0.5 * 5 * -1.2)  # second: weight 9 capped at 5, ratio 2 at 1.2
    assert found["actor/entropy"] == pytest.approx(0.3)
    assert found["actor/ppo_kl"] == pytest.approx(-math.log(2) / 2)
    assert found["actor/pg_clipfrac"] == found["correction/cap_share"] == 0.5
    assert found["correction/ess"] == pytest.approx(36 / (2 * 26))  # (1 + 5)² / (n · (1 + 25))
    assert found["actor/grad_norm"] == 3.0
    assert metrics({}, 0) == {}
