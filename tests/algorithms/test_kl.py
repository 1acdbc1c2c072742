import math

import pytest
import torch

from asyncrl.algorithms.kl import KL_ESTIMATORS, adapted, k1, k2, k3


def value_and_gradient(estimator, delta: float) -> tuple[float, float]:
    logp = torch.tensor([delta - 2.0], dtype=torch.float64, requires_grad=True)
    value = estimator(logp, torch.tensor([-2.0], dtype=torch.float64))
    value.sum().backward()
    return value.item(), logp.grad.item()


@pytest.mark.parametrize("delta", [0.7, -0.7, 0.0])
def test_values_and_gradients_by_hand(delta: float) -> None:
    assert value_and_gradient(k1, delta) == pytest.approx((delta, delta))  # its value, but k2's gradient
    assert value_and_gradient(k2, delta) == pytest.approx((delta**2 / 2, delta))
    assert value_and_gradient(k3, delta) == pytest.approx((math.exp(-delta) - 1 + delta, 1 - math.exp(-delta)))


@pytest.mark.parametrize(
    ("delta", "value", "gradient"),
    [
        (20.0, math.exp(-20) + 19, 1 - math.exp(-20)),
        (-2.5, math.exp(2.5) - 3.5, 1 - math.exp(2.5)),
        (-3.0, math.exp(3) - 4, 1 - math.exp(3)),  # 16.1, where the tangent begins
        (-4.0, (math.exp(3) - 4) + (math.exp(3) - 1), 1 - math.exp(3)),  # exp alone has 51.6
        (-20.0, (math.exp(3) - 4) + 17 * (math.exp(3) - 1), 1 - math.exp(3)),  # 341; exp alone has 4.85e8
        (-30.0, (math.exp(3) - 4) + 17 * (math.exp(3) - 1), 0.0),  # the clamp of every estimator
    ],
)
def test_k3_is_bounded_where_the_policy_gave_a_token_up_and_still_draws_it_back(
    delta: float, value: float, gradient: float
) -> None:
    assert value_and_gradient(k3, delta) == pytest.approx((value, gradient))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_minimizing_pulls_the_policy_to_the_reference(name: str) -> None:
    """Expected gradient over the policy's own samples points from the policy to the reference."""
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64).log_softmax(-1)

    def kl() -> float:
        logp = logits.log_softmax(-1).detach()
        return float((logp.exp() * (logp - reference)).sum())

    before = kl()
    optimizer = torch.optim.SGD([logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        logp = logits.log_softmax(-1)
        (logp.exp().detach() * KL_ESTIMATORS[name](logp, reference)).sum().backward()
        optimizer.step()
    assert kl() < 0.02 * before


def test_on_policy_k2_gradient_is_that_of_the_exact_kl() -> None:
    logits = torch.tensor([1.0, 0.3, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    for estimator in (k1, k2):
        (sampled,) = torch.autograd.grad((logp.exp().detach() * estimator(logp, reference)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(sampled, exact)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("delta", [-300.0, 300.0])
def test_far_apart_policies_stay_finite(name: str, delta: float) -> None:
    value, gradient = value_and_gradient(KL_ESTIMATORS[name], delta)
    assert math.isfinite(value)
    assert gradient == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.1, 0.5),  # at the target
        (0.11, 0.5 * (1 + 0.1 * 64 / 1000)),
        (9.0, 0.5 * (1 + 0.2 * 64 / 1000)),  # at most 20 % an epoch of `horizon` rollouts
        (0.0, 0.5 * (1 - 0.2 * 64 / 1000)),
        (-5.0, 0.5 * (1 - 0.2 * 64 / 1000)),  # k1 may be negative
    ],
)
def test_the_coefficient_nears_the_target(kl: float, expected: float) -> None:
    assert adapted(0.5, kl, target=0.1, horizon=1000, rollouts=64) == pytest.approx(expected)
