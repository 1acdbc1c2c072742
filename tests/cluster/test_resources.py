"""Demanded against available, for machines described by a folder of device nodes and an environment."""

from pathlib import Path

import pytest

from asyncrl.cluster.resources import check_placement, count_gpus
from asyncrl.config import Deployment, GeneratorsSpec, PlaceSpec, RanksSpec
from asyncrl.errors import ConfigError


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Four GPUs, and the driver's other nodes."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 1),  # CUDA stops at the first invalid one
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5ae1,GPU-77c0"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2,MIG-3,MIG-4,MIG-5"}, 5),  # slices: more than devices
    ],
)
def test_visible_gpus(dev: Path, environ: dict[str, str], count: int) -> None:
    assert count_gpus(environ, dev) == count


def deployment(generators: int = 1, **each: float) -> Deployment:
    place = PlaceSpec(**each)
    return Deployment(num_cpus=4, generators=GeneratorsSpec(count=generators, place=place), learner=RanksSpec(place=place))


def test_what_fits_is_told(dev: Path) -> None:
    assert check_placement(deployment(cpus=1.0), {}, dev) == "4 actors on this machine ask for 2 of 4 CPUs"
    assert check_placement(Deployment(num_cpus=0), {}, dev) == "4 actors on this machine ask for 0 of 0 CPUs"


def test_every_rank_of_the_learner_counts(dev: Path) -> None:
    learner = RanksSpec(ranks=3, place=PlaceSpec(cpus=1.0, gpus=1.0))
    told = check_placement(Deployment(num_cpus=4, learner=learner), {"RAY_ADDRESS": "10.0.0.1:6379"}, dev)
    assert told.startswith("6 actors ask for 3 CPUs, 3 GPUs; ")
    assert told.endswith("; the learner's ranks are learner, learner-1, learner-2")
    with pytest.raises(ConfigError, match=r"learner +3 +1 +1\n(.|\n)*demanded +3 +3\n.*available +2 +4"):
        check_placement(Deployment(num_cpus=2, learner=learner), {}, dev)


def test_what_does_not_fit_is_a_table_by_group(dev: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_placement(deployment(generators=4, gpus=1.0, cpus=0.5), {}, dev)
    rows = [line.split() for line in str(caught.value).splitlines()[1:-1]]
    assert rows == [
        ["group", "actors", "CPUs", "each", "GPUs", "each"],
        ["generators", "4", "0.5", "1"],
        ["rewards", "1", "0", "0"],
        ["learner", "1", "0.5", "1"],
        ["store", "1", "0", "0"],
        ["demanded", "2.5", "5"],
        ["available", "4", "4"],
    ]


def test_cpus_and_custom_resources_count_too(dev: Path) -> None:
    with pytest.raises(ConfigError, match=r"demanded +6 "):
        check_placement(deployment(cpus=3.0), {}, dev)
    fast = Deployment(learner=RanksSpec(place=PlaceSpec(resources={"fast": 1.0})))
    with pytest.raises(ConfigError, match=r"resources fast: a local Ray has none"):
        check_placement(fast, {}, dev)


@pytest.mark.parametrize("environ", [{"RAY_ADDRESS": "10.0.0.1:6379"}, {}])
def test_a_cluster_is_asked_when_it_is_joined(dev: Path, environ: dict[str, str]) -> None:
    asked = deployment(gpus=100.0)
    if not environ:
        asked = Deployment(ray_address="10.0.0.1:6379", generators=asked.generators, learner=asked.learner)
    assert check_placement(asked, environ, dev) == (
        "4 actors ask for 0 CPUs, 200 GPUs; the Ray at 10.0.0.1:6379 is asked when it is joined"
    )
