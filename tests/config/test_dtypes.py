"""Who computes in which dtype, where nobody says."""

from typing import Any

import pytest

from asyncrl.config import (
    BusSpec,
    DataSpec,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    ModelSpec,
    PlaceSpec,
    PrecisionSpec,
    RanksSpec,
    Recipe,
    RewardSpec,
    run_dtypes,
)

F32, BF16 = "float32", "bfloat16"


@pytest.mark.parametrize(
    ("model", "compute", "gpus", "engine", "bus", "found"),
    [
        (F32, "auto", 0, "auto", "auto", (F32, F32, F32)),
        (F32, "auto", 1, "auto", "auto", (BF16, BF16, BF16)),
        (F32, F32, 1, "auto", "auto", (F32, F32, F32)),
        (F32, BF16, 0, "auto", "auto", (BF16, BF16, BF16)),
        (BF16, "auto", 0, "auto", "auto", (BF16, BF16, BF16)),
        (BF16, F32, 0, "auto", "auto", (F32, BF16, BF16)),  # weights that were bfloat16 lose nothing
        (F32, "auto", 1, F32, "auto", (BF16, F32, F32)),
        (F32, "auto", 1, "float16", "auto", (BF16, "float16", "float16")),
        (F32, "auto", 1, "auto", F32, (BF16, BF16, F32)),
    ],
)
def test_what_is_auto_follows_the_learner(
    model: Any, compute: Any, gpus: float, engine: Any, bus: Any, found: tuple[str, str, str]
) -> None:
    recipe = Recipe(
        name="r",
        model=ModelSpec(path="m", dtype=model),
        data=DataSpec(files=("f",)),
        reward=RewardSpec(function="m:f"),
        learner=LearnerSpec(precision=PrecisionSpec(compute=compute)),
        total_steps=1,
    )
    deployment = Deployment(
        learner=RanksSpec(place=PlaceSpec(gpus=gpus)),
        generators=GeneratorsSpec(engine=EngineSpec(dtype=engine)),
        bus=BusSpec(dtype=bus),
    )
    assert run_dtypes(recipe, deployment) == found
