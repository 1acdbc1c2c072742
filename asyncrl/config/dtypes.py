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
    compute: str = recipe.learner.precision.compute
    if compute == "auto":
        compute = "bfloat16" if deployment.learner.place.gpus else recipe.model.dtype
    engine: str = deployment.generators.engine.dtype
    if engine == "auto":
        engine = "bfloat16" if recipe.model.dtype == "bfloat16" else compute
    bus = deployment.bus.dtype
    return Dtypes(compute, engine, engine if bus == "auto" else bus)
