import math

import pytest
import torch

from asyncrl.algorithms.kl import KL_ESTIMATORS, adapted, k1, k2, k3, k3_unbiased, token_kl


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


def test_the_unbiased_one_is_the_exact_kl_in_value_and_gradient_whoever_sampled() -> None:
    """Its expectation under another policy, that which sampled, is the KL of the present one; so is its gradient."""
    logits = torch.tensor([1.0, 0.3, -1.0, -4.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-3.0, 0.5, 0.1, 2.0], dtype=torch.float64).log_softmax(-1)
    behaviour = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - reference)).sum()
    sampled = (behaviour.exp() * token_kl("k3_unbiased", logp, reference, behaviour)).sum()
    torch.testing.assert_close(sampled, exact)
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(sampled, logits, retain_graph=True)[0], wanted)
    biased = (behaviour.exp() * token_kl("k3", logp, reference, behaviour)).sum()
    assert not torch.allclose(torch.autograd.grad(biased, logits)[0], wanted, rtol=0.1)


def test_the_unbiased_one_has_the_gradient_of_its_formula_and_a_bounded_one_for_what_became_rare() -> None:
    columns = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logp, (reference, behaviour) = columns[0].clone().requires_grad_(), columns[1:]
    ratio, delta = (logp - behaviour).exp(), logp - reference
    plain = ratio * ((-delta).exp() - 1 + delta)  # TRL's, differentiated by torch
    found = k3_unbiased(logp, reference, behaviour)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logp), torch.autograd.grad(plain.sum(), logp))
    rare = torch.tensor([-300.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(k3_unbiased(rare, torch.tensor([-1.0]), torch.tensor([-1.0])).sum(), rare)
    assert -1e-6 < gradient.item() < 0  # towards the reference, whatever was clamped


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
