import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.corrections import (
    CORRECTIONS,
    Columns,
    decoupled,
    geometric,
    icepop,
    icepop_sequence,
    interpolated_proximal,
    kpop,
    m2po,
    off_policy_sequence,
    rejection_mask,
    tis_sequence,
    uncorrected,
)
from asyncrl.config import AlgorithmSpec

PROXIMAL = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
BEHAVIOUR = torch.tensor([-1.0, -1.0 + math.log(2), -1.0 - math.log(3), -1.0 - math.log(8)], dtype=torch.float64)
SEQUENCES = torch.tensor([4, 0, 4, 0])


def test_decoupled_weights_by_hand() -> None:
    weights, capped = decoupled(PROXIMAL, BEHAVIOUR, 5.0)
    assert weights.tolist() == pytest.approx([1.0, 0.5, 3.0, 5.0])  # the last would be 8
    assert capped.tolist() == [False, False, False, True]


def test_a_sequence_has_the_product_of_its_ratios() -> None:
    weights, capped = tis_sequence(PROXIMAL, BEHAVIOUR, SEQUENCES, 3.5)
    assert weights.tolist() == pytest.approx([3.0, 3.5, 3.0, 3.5])  # 1 · 3; ½ · 8, capped
    assert capped.tolist() == [False, True, False, True]


def test_none_weighs_every_token_alike() -> None:
    weights, capped = uncorrected(PROXIMAL)
    assert weights.tolist() == [1.0] * 4
    assert not capped.any()


def test_the_interpolated_policy_goes_from_behaviour_to_current_with_age() -> None:
    """Behaviour is `lag` versions before the proximal policy, the current one a version after it: α = 0, 1/2, 2/3, 4/5."""
    logp = torch.full((4,), -4.0, dtype=torch.float64, requires_grad=True)
    found = interpolated_proximal(logp, torch.full((4,), -1.0, dtype=torch.float64), torch.tensor([0, 1, 2, 4]))
    assert found.tolist() == pytest.approx([-1.0, -2.5, -3.0, -3.4])
    assert not found.requires_grad


@pytest.mark.parametrize("lag", [0, 1, 2, 7])
def test_the_interpolated_policy_is_the_proximal_one_where_logprobs_move_evenly(lag: int) -> None:
    """A token whose logprob falls by 0.3 a version: exact at every lag."""
    behaviour, step = torch.tensor([-1.0], dtype=torch.float64), -0.3
    current = behaviour + step * (lag + 1)
    found = interpolated_proximal(current, behaviour, torch.tensor([lag]))
    assert found.item() == pytest.approx(-1.0 + step * lag)


def test_tis_has_a_cap_of_its_own() -> None:
    spec = AlgorithmSpec(correction="tis", behaviour_cap=5.0, tis_cap=2.0)
    assert CORRECTIONS["tis"](spec, PROXIMAL, BEHAVIOUR, SEQUENCES).weights_t.tolist() == pytest.approx([1.0, 0.5, 2.0, 2.0])
    spec = AlgorithmSpec(correction="tis_sequence", tis_cap=3.5)
    expected = tis_sequence(PROXIMAL, BEHAVIOUR, SEQUENCES, 3.5)
    assert CORRECTIONS["tis_sequence"](spec, PROXIMAL, BEHAVIOUR, SEQUENCES).weights_t.equal(expected.weights_t)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_carry_no_gradient_and_stay_finite(name: str) -> None:
    proximal = torch.tensor([0.0, -900.0], requires_grad=True)
    columns = (proximal, torch.tensor([-900.0, 0.0]), torch.tensor([0, 1]))
    weights, _ = CORRECTIONS[name](AlgorithmSpec(correction=name), *columns)
    assert not weights.requires_grad
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_an_empty_pack(name: str) -> None:
    nothing = torch.empty(0)
    weights, capped = CORRECTIONS[name](AlgorithmSpec(correction=name), nothing, nothing, nothing.long())
    assert len(weights) == len(capped) == 0


# ----------------------------------------------------------------------------------------------- masks


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([math.log(ratio) for ratio in ratios], dtype=torch.float64)


def test_icepop_by_hand() -> None:
    assert icepop(logs(0.49, 0.51, 1, 4.9, 5.1), 0.5, 5.0).tolist() == [False, True, True, True, False]
    assert icepop(torch.tensor([-900.0, 900.0]), 0.5, 5.0).tolist() == [False, False]


def test_a_sequence_stays_or_goes_as_a_whole() -> None:
    delta = torch.tensor([0.2, -0.19, 0.02, 0.02, 0.02], dtype=torch.float64)  # means 0.005 and 0.02
    kept = geometric(delta, torch.tensor([3, 3, 1, 1, 1]), 0.99, 1.01)
    assert kept.tolist() == [True, True, False, False, False]


def test_a_sequence_stays_by_the_product_of_its_ratios() -> None:
    delta, sequences = logs(2, 2, 3, 1, 1), torch.tensor([3, 1, 3, 1, 1])  # 6 and 2
    assert icepop_sequence(delta, sequences, 0.5, 5.0).tolist() == [False, True, False, True, True]
    assert icepop_sequence(-delta, sequences, 0.2, 5.0).tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("p", "q", "kept"),
    [
        (0.5, 0.5, True),
        (0.9, 0.5, True),  # 0.9·ln 1.8 + 0.1·ln 0.2 = 0.368; 0.5·ln(5/9) + 0.5·ln 5 = 0.511
        (0.95, 0.5, False),  # 0.495, and the other way 0.830
        (0.5, 0.95, False),
        (1e-6, 1e-3, True),  # a thousand times as likely, and still rare: IcePop would mask it
        (1.0, 0.5, False),
        (1.0, 1.0, True),
    ],
)
def test_kpop_takes_the_larger_of_both_kls(p: float, q: float, kept: bool) -> None:
    columns = (torch.tensor([x], dtype=torch.float32).log() for x in (p, q))  # 1 − 1e-8 is 1 in float32
    assert kpop(*columns, 0.6).tolist() == [kept]


def test_only_bad_tokens_of_sequences_that_drifted_are_left_out() -> None:
    drift = torch.tensor([0.9, 0.3, 0.9, 0.0], dtype=torch.float64)  # means 0.6 and 0.45
    sequences, advantages = torch.tensor([0, 0, 1, 1]), torch.tensor([-1.0, 1.0, -1.0, -1.0])
    assert off_policy_sequence(drift, advantages, sequences, 0.5).tolist() == [False, True, True, True]
    assert off_policy_sequence(-drift, advantages, sequences, 0.5).all()  # what became likelier is to be pushed down
    assert off_policy_sequence(drift, torch.zeros(4), sequences, 0.5).all()


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
    behaviour, nothing = torch.full_like(delta, -3.0), torch.zeros_like(delta)
    seen = Columns(nothing, torch.tensor([1.0, -1.0, -1.0, 1.0]), behaviour, behaviour + delta, sequences, nothing)
    spec = AlgorithmSpec(masks=("icepop", "geometric"), geometric_bounds=(0.6, 1.1))
    assert rejection_mask(spec, seen, behaviour - 1.0).tolist() == [True, False, False, False]
    assert rejection_mask(AlgorithmSpec(masks=("icepop",)), seen, behaviour - 1.0).tolist() == [True, False, True, True]
    spec = AlgorithmSpec(masks=("icepop", "off_policy_sequence"))
    assert rejection_mask(spec, seen, behaviour - 1.0).tolist() == [True, False, False, True]
    # m2po sees the minibatch, not the pack
    assert rejection_mask(AlgorithmSpec(masks=("m2po",)), seen, behaviour - 1.0).all()
    assert rejection_mask(AlgorithmSpec(), seen, behaviour - 1.0).all()
