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


def max_gap(recipe: Recipe, deployment: Deployment) -> float | None:
    """What `generators.max_gap` comes to, in nats; None: any is allowed.

    Two programs that compute the same in float32 differ by some 1e-6 of a log-probability, or 1e-5 where kernels differ. In
    bfloat16 they differ by some hundredths, on the unlikeliest tokens by more; another policy differs by some tenths.
    """
    generators = deployment.generators
    if generators.max_gap != "auto":
        return generators.max_gap
    dtypes = run_dtypes(recipe, deployment)
    if {*dtypes} != {"float32"} or recipe.learner.precision.tf32:
        return 0.1
    return 1e-3 if generators.engine.kind == "sglang" else 1e-4
