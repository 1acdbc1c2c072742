import math

import pytest
import torch

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.learn.corrections import CORRECTIONS, decoupled, interpolated_proximal, tis_sequence, uncorrected

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
    logp = torch.full((4,), -3.0, dtype=torch.float64, requires_grad=True)
    found = interpolated_proximal(logp, torch.full((4,), -1.0, dtype=torch.float64), torch.tensor([0, 1, 2, 4]))
    assert found.tolist() == pytest.approx([-1.0, -1.0, -2.0, -2.5])
    assert not found.requires_grad


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
