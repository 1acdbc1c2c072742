"""Runs in simulated time, against what can be said without one."""

import itertools
from typing import Any

import pytest

from asyncrl.config import (
    DataSpec,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    ModelSpec,
    RanksSpec,
    Recipe,
    RewardSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.errors import ConfigError
from asyncrl.generate.generator import SUBMIT_EVERY_S
from asyncrl.simulate.costs import Costs
from asyncrl.simulate.simulation import simulate

FREE = dict.fromkeys(("row_s", "pause_s", "deliver_s", "update_s", "token_s", "publish_s", "score_s", "rows_s", "call_s"), 0.0)
SUBMIT_S = SUBMIT_EVERY_S / 2  # that a rollout waits for others to be submitted with
EVEN = [[10] * 4]  # every group: four rollouts of ten tokens
TAIL = [[1, 2, 3, 60], [2, 2, 2, 2], [1, 1, 5, 9], [3, 3, 3, 3], [4, 8, 15, 120]]


def recipe(batch: int = 4, n: int = 4, **staleness: Any) -> Recipe:
    return Recipe(
        name="r",
        model=ModelSpec(path="m"),
        data=DataSpec(files=("f",)),
        reward=RewardSpec(function="a:b"),
        sampling=SamplingSpec(n=n),
        staleness=StalenessSpec(**staleness),
        learner=LearnerSpec(batch_groups=batch),
        total_steps=1,
    )


def deployment(count: int = 1, slots: int = 16, ranks: int = 1) -> Deployment:
    engine = EngineSpec(slots=slots)
    return Deployment(generators=GeneratorsSpec(count=count, engine=engine), learner=RanksSpec(ranks=ranks))


def costs(**named: float) -> Costs:
    return Costs(**FREE | {"step_s": 0.01} | named)


def test_a_generator_alone_makes_as_many_rollouts_as_its_steps_allow() -> None:
    found = simulate(recipe(), deployment(slots=16), costs(), EVEN, 200)
    assert found["samples/s"] == pytest.approx(16 / (10 * 0.01), rel=0.01)
    assert found["generators idle"] == pytest.approx(0.0, abs=0.01)
    assert found["slots filled"] == pytest.approx(1.0, abs=0.01)
    assert found["learner idle"] == pytest.approx(1.0)
    assert found["lag"] <= 1.0  # a batch fills the slots once
    wider = simulate(recipe(), deployment(slots=16), costs(row_s=0.01 / 16), EVEN, 200)
    assert wider["samples/s"] == pytest.approx(found["samples/s"] / 2, rel=0.01)  # a row costs what 16 of them did together
    assert simulate(recipe(), deployment(count=3), costs(), EVEN, 200)["samples/s"] == pytest.approx(480, rel=0.02)


def test_a_learner_that_is_slower_sets_the_pace() -> None:
    one = simulate(recipe(), deployment(), costs(update_s=1.0, token_s=0.01), EVEN, 100)
    assert one["samples/s"] == pytest.approx(16 / (1.0 + 160 * 0.01), rel=0.01)
    assert one["learner idle"] == pytest.approx(0.0, abs=0.01)
    assert one["generators idle"] == pytest.approx(1 - 0.1 / 2.6, abs=0.01)
    two = simulate(recipe(), deployment(ranks=2), costs(update_s=1.0, token_s=0.01), EVEN, 100)
    assert two["samples/s"] == pytest.approx(16 / (1.0 + 80 * 0.01), rel=0.01)  # ranks share the tokens alone


def test_synchronously_one_works_at_a_time() -> None:
    found = simulate(recipe(max_lag=0), deployment(), costs(update_s=0.2), EVEN, 100)
    assert found["samples/s"] == pytest.approx(16 / (0.1 + 0.2 + SUBMIT_S), rel=0.01)
    assert found["learner idle"] == pytest.approx(1 - 0.2 / (0.3 + SUBMIT_S), abs=0.01)
    assert found["generators idle"] == pytest.approx(1 - 0.1 / (0.3 + SUBMIT_S), abs=0.01)
    assert (found["lag"], found["worst lag"]) == (0.0, 0)
    waits = {"pause_s": 0.05, "deliver_s": 0.1, "score_s": 0.15 / 16, "rows_s": 0.03}
    slower = simulate(recipe(max_lag=0), deployment(), costs(update_s=0.2, **waits), EVEN, 100)
    assert slower["samples/s"] == pytest.approx(16 / (0.1 + 0.2 + 0.05 + 0.1 + 0.15 + 0.03 + SUBMIT_S), rel=0.01)
    assert slower["rewards idle"] == pytest.approx(1 - 0.15 / 0.63, abs=0.01)


@pytest.mark.parametrize(("on_stale", "max_lag"), [*itertools.product(("hold", "wait", "mask", "drop"), (0, 1, 3))])
def test_the_production_rule_keeps_its_word(on_stale: str, max_lag: int) -> None:
    found = simulate(recipe(max_lag=max_lag, on_stale=on_stale), deployment(2), costs(update_s=0.05, pause_s=0.02), TAIL, 100)
    assert found["worst lag"] <= max_lag
    assert (found["masked"] > 0) == (on_stale == "mask" and max_lag > 0)
    assert (found["dropped"] > 0) == (on_stale == "drop" and max_lag > 0)


def test_what_is_dropped_leaves_its_slots() -> None:
    found = simulate(recipe(max_lag=1, on_stale="drop"), deployment(slots=64), costs(), [*EVEN * 5, [10, 10, 10, 3000]], 50)
    assert found["dropped"] > 0.1
    assert found["slots filled"] < 0.2  # half, if they went on


def test_reserve_ahead_is_how_stale_tokens_usually_are() -> None:
    """As notes of real runs say: more ahead is staler, and faster only until the slots are full."""
    few, auto, many = (
        simulate(recipe(max_lag=16, reserve_ahead=ahead), deployment(slots=32), costs(update_s=0.2), TAIL, 200)
        for ahead in (2, "auto", 12)
    )
    assert few["lag"] < auto["lag"] < many["lag"] <= 11
    assert few["samples/s"] < auto["samples/s"]
    assert many["samples/s"] == pytest.approx(auto["samples/s"], rel=0.05)


def test_a_simulation_comes_out_the_same_again() -> None:
    first, again = (simulate(recipe(), deployment(2), costs(update_s=0.1), TAIL, 50) for _ in range(2))
    assert first == again


def test_groups_that_are_filtered_are_generated_in_vain() -> None:
    found = simulate(recipe(), deployment(), costs(filtered_share=0.5), EVEN, 200)
    assert found["samples/s"] == pytest.approx(80, rel=0.1)


def test_lengths_are_cut_off_and_scatter_around_the_median() -> None:
    groups = Costs(length_median=50.0).lengths(8, 400)
    tokens = sorted(itertools.chain(*groups))
    assert tokens[len(tokens) // 2] == pytest.approx(50, rel=0.05)
    assert (tokens[0] >= 1, tokens[-1]) == (True, 400)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"step_s": -1.0}, r"costs.step_s=-1.0 is outside \[0, ∞\)"),
        ({"filtered_share": 1.0}, "costs.filtered_share=1.0 >= 1: nothing would be left"),
    ],
)
def test_costs_that_cannot_be_are_refused(named: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Costs(**named)
