import pytest

from asyncrl.cluster.placement import demand, reserve
from asyncrl.config import PlaceSpec
from asyncrl.errors import PlacementError


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (PlaceSpec(), {}),
        (PlaceSpec(threads=4), {}),
        (PlaceSpec(cpus=2, gpus=0.5), {"CPU": 2, "GPU": 0.5}),
        (PlaceSpec(resources={"rack_a": 1.0}), {"rack_a": 1.0}),
    ],
)
def test_demand(place, expected):
    assert demand(place) == expected


@pytest.mark.ray
def test_a_helper_reserves_nothing(local_ray):
    placement = reserve("reward-0", [PlaceSpec()], timeout_s=1.0)
    assert (placement.options, placement.group) == (({"num_cpus": 0},), None)


@pytest.mark.ray
def test_a_group_is_reserved_and_given_back(local_ray):
    for _ in range(3):  # the local Ray has two CPUs: without release the second round would not fit
        placement = reserve("learner", [PlaceSpec(cpus=2)], timeout_s=30.0)
        assert placement.options[0]["num_cpus"] == 2
        placement.release()


@pytest.mark.ray
def test_a_group_of_ranks_gets_a_place_each_or_a_refusal_with_figures(local_ray):
    placement = reserve("learner", [PlaceSpec(cpus=0.1)] * 4, timeout_s=30.0)
    at = [options["scheduling_strategy"].placement_group_bundle_index for options in placement.options]
    assert (at, {options["num_cpus"] for options in placement.options}) == ([0, 1, 2, 3], {0.1})
    placement.release()
    fits_nowhere = r"learner fits nowhere(.|\n)*CPU +demanded 1 by the largest of 3 ranks(.|\n)*free nodes have room for 2"
    with pytest.raises(PlacementError, match=fits_nowhere):  # at once
        reserve("learner", [PlaceSpec(cpus=1)] * 3, timeout_s=600.0)


@pytest.mark.ray
def test_what_fits_nowhere_is_refused_at_once_with_figures(local_ray):
    with pytest.raises(PlacementError, match=r"generator-0 fits nowhere(.|\n)*GPU +demanded 8, available 0 of 0"):
        reserve("generator-0", [PlaceSpec(cpus=1, gpus=8)], timeout_s=600.0)
