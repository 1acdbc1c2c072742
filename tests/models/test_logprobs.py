import math

import pytest
import torch

from asyncrl.models.logprobs import entropy, sampled_logprobs


def test_logprobs_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    found = sampled_logprobs(logits, torch.tensor([1, 0]), 1.0)
    assert found.tolist() == pytest.approx([math.log(0.75), math.log(0.5)])  # 3 / (1 + 3), 1 / 2


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[0.0, 2 * math.log(3.0)]])
    assert sampled_logprobs(logits, torch.tensor([0]), 2.0).item() == pytest.approx(math.log(0.25))


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert entropy(logits, 1.0).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    assert entropy(torch.tensor([[0.0, 2 * math.log(3.0)]]), 2.0).item() == pytest.approx(0.5623351)  # −¼ ln ¼ − ¾ ln ¾


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([0, 1, 2, 3])
    assert sampled_logprobs(logits, ids, 1.0).dtype == torch.float32
    expected = logits.double().log_softmax(-1)[torch.arange(4), ids]
    torch.testing.assert_close(sampled_logprobs(logits, ids, 1.0).double(), expected, atol=1e-5, rtol=0)


def test_gradient_is_one_hot_minus_softmax() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    sampled_logprobs(logits, torch.tensor([2]), 2.0).sum().backward()
    expected = (torch.tensor([[0.0, 0.0, 1.0]]) - (logits.detach() / 2).softmax(-1)) / 2
    torch.testing.assert_close(logits.grad, expected)
