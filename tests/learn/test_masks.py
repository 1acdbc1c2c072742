import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.learn.masks import geometric, icepop, m2po, pack_mask


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([math.log(ratio) for ratio in ratios], dtype=torch.float64)


def test_icepop_by_hand() -> None:
    assert icepop(logs(0.49, 0.51, 1, 4.9, 5.1), 0.5, 5.0).tolist() == [False, True, True, True, False]
    assert icepop(torch.tensor([-900.0, 900.0]), 0.5, 5.0).tolist() == [False, False]


def test_a_sequence_stays_or_goes_as_a_whole() -> None:
    delta = torch.tensor([0.2, -0.19, 0.02, 0.02, 0.02], dtype=torch.float64)  # means 0.005 and 0.02
    kept = geometric(delta, torch.tensor([3, 3, 1, 1, 1]), 0.99, 1.01)
    assert kept.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("delta", "bound", "kept"),
    [
        ([0.1, 0.1], 0.04, [True, True]),  # mean 0.01
        ([0.1, -0.5, 0.1], 0.04, [True, False, True]),  # 0.27 / 3 is too much, 0.02 / 2 is not
        ([0.1, 0.3, -0.3, 0.1], 0.04, [True, False, False, True]),  # one of 0.09 could stay: both are at the edge
        ([1.0, 2.0], 0.04, [False, False]),
        ([0.2], 0.0400001, [True]),
        ([], 0.04, []),
    ],
)
def test_m2po_by_hand(delta: list[float], bound: float, kept: list[bool]) -> None:
    assert m2po(torch.tensor(delta, dtype=torch.float64), bound).tolist() == kept


@given(st.lists(st.floats(-1, 1), max_size=12), st.floats(0.01, 0.3), st.randoms())
def test_m2po_drops_no_more_than_needed_in_any_order(delta: list[float], bound: float, shuffler: random.Random) -> None:
    def plain(values: list[float]) -> float:
        """The largest delta² that stays, dropping one after the other; all ties with the last one dropped go too."""
        squares, dropped = sorted(v * v for v in values), math.inf
        while squares and not sum(squares) / len(squares) < bound:
            dropped = squares.pop()
        return max((s for s in squares if s < dropped), default=-1.0)

    edge = plain(delta)
    assert m2po(torch.tensor(delta, dtype=torch.float64), bound).tolist() == [v * v <= edge for v in delta]
    order = list(range(len(delta)))
    shuffler.shuffle(order)
    values = torch.tensor(delta, dtype=torch.float64)
    assert m2po(values[order], bound).tolist() == m2po(values, bound)[order].tolist()


def test_a_token_must_pass_all_masks() -> None:
    delta, sequences = logs(1.0, 0.4, 1.4, 1.4), torch.tensor([0, 0, 1, 1])
    spec = AlgorithmSpec(masks=("icepop", "geometric"), geometric_bounds=(0.6, 1.1))
    assert pack_mask(spec, delta, sequences).tolist() == [True, False, False, False]
    assert pack_mask(AlgorithmSpec(masks=("icepop",)), delta, sequences).tolist() == [True, False, True, True]
    assert pack_mask(AlgorithmSpec(masks=("m2po",)), delta, sequences) is None  # sees the minibatch, not the pack
    assert pack_mask(AlgorithmSpec(), delta, sequences) is None
