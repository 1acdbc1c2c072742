import pytest
import torch

from asyncrl.learn.aggregate import AGGREGATIONS

LOSSES = [[1.0, 2.0, 3.0], [10.0]]  # two sequences, 3 and 1 trained tokens


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token-mean", 16 / 4),
        ("seq-mean-token-sum", (6 + 10) / 2),
        ("seq-mean-token-mean", (2 + 10) / 2),
    ],
)
def test_by_hand(name: str, expected: float) -> None:
    coefficients = AGGREGATIONS[name](torch.tensor([3.0, 1.0])).tolist()
    assert sum(c * sum(values) for c, values in zip(coefficients, LOSSES, strict=True)) == pytest.approx(expected)
