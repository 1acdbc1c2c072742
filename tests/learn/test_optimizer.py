import math

import pytest
import torch

from asyncrl.config import CriticSpec, LearnerSpec
from asyncrl.learn.optimizer import Optimization, learning_rate, step


def one_weight(lr: float = 0.1, **fields) -> tuple[torch.nn.Linear, Optimization]:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    return module, Optimization(module, CriticSpec(lr=lr, **fields), 10, "critic.lr")


def test_a_step_clips_schedules_and_clears() -> None:
    module, optimization = one_weight(warmup_steps=4, eps=1.0, max_grad_norm=0.5)
    assert optimization.schedule(1) == pytest.approx(0.05)
    module.weight.grad = torch.tensor([[2.0]])
    assert step(1.0, optimization) == ([2.0], "")
    # Adam's first step is lr·g/(|g| + eps) with the clipped g: 0.05·0.5/1.5
    assert module.weight.item() == pytest.approx(1 - 0.05 / 3, rel=1e-5)
    assert module.weight.grad is None


@pytest.mark.parametrize(
    ("loss", "gradients", "cause"),
    [
        (math.nan, (1.0, 1.0), "the loss is nan"),
        (1.0, (math.inf, 1.0), "the gradient norm is inf"),
        (1.0, (1.0, math.nan), "the gradient norm is nan"),
    ],
)
def test_of_two_that_step_together_none_does_if_one_cannot(loss: float, gradients: tuple[float, float], cause: str) -> None:
    pairs = [one_weight(), one_weight()]
    for (module, _), gradient in zip(pairs, gradients, strict=True):
        module.weight.grad = torch.tensor([[gradient]])
    norms, found = step(loss, *(optimization for _, optimization in pairs))
    assert (found, len(norms)) == (cause, 2)
    assert [module.weight.item() for module, _ in pairs] == [1.0, 1.0]
    assert all(module.weight.grad is None and not optimization.adamw.state for module, optimization in pairs)


def test_no_clipping_at_zero_and_a_warning_for_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    module, optimization = one_weight(max_grad_norm=0.0)
    module.weight.grad = torch.tensor([[300.0]])
    assert (optimization.clip(), module.weight.grad.item()) == (300.0, 300.0)
    assert caplog.records == []
    Optimization(torch.nn.Linear(1, 1).bfloat16(), LearnerSpec(lr=1e-6), 10, "learner.lr")
    assert "learner.lr=1e-06 may train nothing" in caplog.text


# -------------------------------------------------------------------------------------------- schedule


def test_warmup_then_constant() -> None:
    spec = LearnerSpec(lr=1.0, warmup_steps=4)
    assert [learning_rate(spec, c, 100) for c in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_cosine_falls_to_its_floor_and_stays() -> None:
    spec = LearnerSpec(lr=2.0, warmup_steps=2, lr_schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(spec, c, 12) for c in (2, 7, 12, 30)]
    assert rates == pytest.approx([2.0, 1.1, 0.2, 0.2])  # half way: the mean of 2 and 0.2
