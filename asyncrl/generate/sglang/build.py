"""From an engine's spec to an SGLangEngine: what each server is started with, or where it is, and how its weights get in."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from asyncrl.config import EngineSpec, ModelSpec, PlaceSpec, SGLangSpec
from asyncrl.config.deployment import argument_name
from asyncrl.errors import ConfigError
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.sglang.engine import SGLangEngine
from asyncrl.generate.sglang.keys import RunningServer, running_servers
from asyncrl.generate.sglang.process import OWN_PACKAGES, require_command
from asyncrl.generate.sglang.server import LaunchCommand, SGLangServer
from asyncrl.generate.sglang.transfer import SharedMemory, Transfer
from asyncrl.models.loading import context

HEADROOM = 16  # tokens of context that SGLang keeps for itself


def sglang_engine(site: EngineSite) -> SGLangEngine:
    """Builds an engine that is not yet started. Raises ConfigError if its command is not here, or its transfer can't work.

    The GPUs of the site are those of its servers, which compute with the place's `threads` on a CPU.
    """
    spec, place = site.generators.engine, site.generators.place
    if not spec.sglang.urls:
        require_command(spec.sglang.launcher)
    vocabulary, positions = context(site.model)
    max_length = min(spec.max_length, positions or spec.max_length)
    where: list[LaunchCommand | RunningServer] = [*running_servers(spec.sglang)] or [
        launch_command(spec, site.model, place, index, max_length, log=site.logs / f"{site.name}.sglang-{index}.log")
        for index in range(spec.sglang.servers)
    ]
    transfer = _transfer(spec.sglang, host=site.host, gpus=place.gpus)
    servers = [partial(SGLangServer, at, transfer) for at in where]
    return SGLangEngine(servers, spec, site.limits, max_length=max_length, vocabulary=vocabulary)


def launch_command(
    spec: EngineSpec, model: ModelSpec, place: PlaceSpec, index: int, max_length: int, *, log: Path
) -> LaunchCommand:
    """How to start server number `index` of a generator. `sglang.args` come last, so they win over what asyncrl sets."""
    sglang = spec.sglang
    arguments: dict[str, str | int | float | bool] = {
        "model-path": model.path,
        "trust-remote-code": model.trust_remote_code,
        "revision": model.revision or False,
        "json-model-override-args": json.dumps(model.override_config) if model.override_config else False,
        "dtype": model.dtype,
        "host": "127.0.0.1",
        "context-length": max_length + HEADROOM,
        "max-running-requests": spec.slots,
        "tensor-parallel-size": sglang.tp_size,
        "skip-tokenizer-init": True,  # token ids in, token ids out
        "incremental-streaming-output": True,
        "disable-radix-cache": not sglang.prefix_cache,
        # Without a gap in its schedule, the step in flight would be labelled with the weights that come after it.
        "disable-overlap-schedule": spec.update_mode == "keep_kv",
        "log-level": "warning",
    }
    if place.gpus:  # on a CPU, SGLang takes it for a NUMA node
        arguments["base-gpu-id"] = index * sglang.tp_size
    if sglang.mem_fraction is not None:
        arguments["mem-fraction-static"] = sglang.mem_fraction
    flags: list[str] = []
    for name, value in (arguments | {argument_name(name): value for name, value in sglang.args.items()}).items():
        if value is not False:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    # More threads than cores to themselves wait for each other in spin loops; and HEADROOM may pass the model's positions.
    env = {"OMP_NUM_THREADS": str(place.threads), "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    env |= {**(OWN_PACKAGES if sglang.python else {}), **sglang.env}
    return LaunchCommand((*sglang.launcher, *flags), env, log)


def _transfer(sglang: SGLangSpec, *, host: str, gpus: float) -> Callable[[int], Transfer]:
    """What makes a server's way in, given its tensor-parallel size."""
    kind = sglang.transfer
    if kind == "auto":
        kind = "distributed" if sglang.urls else "cuda_ipc" if gpus else "shared"
    if kind == "cuda_ipc" and not gpus:
        raise ConfigError(
            "engine.sglang.transfer='cuda_ipc', but the generator has no GPU (generators.place.gpus=0): there is no memory "
            "that it could share; give it the servers' GPUs, or use transfer: shared or distributed"
        )
    if kind == "distributed":
        from asyncrl.generate.sglang.distributed import Distributed

        return partial(Distributed, host, "nccl" if gpus else "gloo")
    return partial(SharedMemory, device="cuda" if kind == "cuda_ipc" else "cpu")
