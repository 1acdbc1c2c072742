"""Whether the engine that a deployment names can be started; found out without torch and without importing SGLang."""

import os
from collections.abc import Callable, Mapping
from importlib import metadata

from asyncrl.config import Deployment, SGLangSpec
from asyncrl.errors import ConfigError
from asyncrl.generate.sglang.process import require_command

GPU_FIX = "pip install 'asyncrl[sglang]'"
CPU_FIX = "deploy/sglang-cpu/install"
CPU_COMMAND = "sglang-cpu-server"
KERNELS = "sglang-kernel"  # the package of SGLang's CUDA kernels: the CPU engine does without


def check_engine(
    deployment: Deployment,
    environ: Mapping[str, str] = os.environ,
    installed: Callable[[str], str] | None = None,
) -> str:
    """One sentence of the plan. Raises ConfigError if this machine is to launch servers and can't.

    On a cluster the generators' machines are others than the driver's, so nothing is checked here: they refuse by
    themselves. installed: version by package name, empty if it is not there.
    """
    engine, count = deployment.generators.engine, deployment.generators.count
    updates = f"{engine.update_mode} updates"
    if engine.kind == "torch":
        return f"torch: embedded, {updates}"
    sglang = engine.sglang
    if sglang.urls:
        return f"sglang: attached to {', '.join(sglang.urls)}; {updates}"
    program = " ".join(sglang.command)
    plan = f"sglang: {count} × {sglang.servers} servers, tensor parallel {sglang.tp_size}, by `{program}`; {updates}"
    if address := deployment.ray_address or environ.get("RAY_ADDRESS", ""):
        return f"{plan}; the generators' nodes of the Ray at {address} must have it"
    require_command(sglang.command)
    if sglang.command == SGLangSpec().command:
        _require_gpu_engine(installed or installed_version)
    return plan


def installed_version(package: str) -> str:
    """Of a package in this environment, by its metadata; empty if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _require_gpu_engine(installed: Callable[[str], str]) -> None:
    version = installed("sglang")
    if version and installed(KERNELS):
        return
    found = f"sglang {version} is here without its CUDA kernels" if version else "sglang is not installed here"
    raise ConfigError(
        f"generators.engine.kind='sglang': {found}, so `{' '.join(SGLangSpec().command)}` could not start a server; with GPUs "
        f"{GPU_FIX}; on a CPU run {CPU_FIX} and set deploy.generators.engine.sglang.command=[{CPU_COMMAND}]"
    )
