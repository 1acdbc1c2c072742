"""In which dtype a run computes, sends and serves its weights. No torch."""

from typing import NamedTuple

from asyncrl.config.deployment import Deployment
from asyncrl.config.recipe import Recipe


class Dtypes(NamedTuple):
    """Names of torch's dtypes; none is `auto`."""

    compute: str  # of the learner's passes
    engine: str  # of an engine's weights and KV cache
    bus: str  # of the weights that travel


def run_dtypes(recipe: Recipe, deployment: Deployment) -> Dtypes:
    """What `precision.compute`, `engine.dtype` and `bus.dtype` come to where they are `auto`."""
    compute = recipe.learner.precision.compute_of(recipe.model.dtype, gpu=bool(deployment.learner.place.gpus))
    engine: str = deployment.generators.engine.dtype
    if engine == "auto":
        engine = "bfloat16" if recipe.model.dtype == "bfloat16" else compute
    bus = deployment.bus.dtype
    return Dtypes(compute, engine, engine if bus == "auto" else bus)
