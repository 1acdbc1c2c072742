import pytest
import torch

from asyncrl.learn.sequences import sequence_mean, sequence_sum

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
