import pytest
import torch

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.learn.aggregate import aggregation

LOSSES = [[1.0, 2.0, 3.0], [10.0]]  # two sequences, 3 and 1 trained tokens


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("token-mean", None, 16 / 4),
        ("seq-mean-token-sum", None, (6 + 10) / 2),
        ("seq-mean-token-mean", None, (2 + 10) / 2),
        ("seq-mean-token-sum-norm", 8, (6 / 8 + 10 / 8) / 2),
    ],
)
def test_by_hand(name: str, scale: int | None, expected: float) -> None:
    spec = AlgorithmSpec(loss_agg=name, loss_scale_factor=scale)
    coefficients = aggregation(spec)(torch.tensor([3.0, 1.0])).tolist()
    assert sum(c * sum(values) for c, values in zip(coefficients, LOSSES, strict=True)) == pytest.approx(expected)
