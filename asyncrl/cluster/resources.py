"""What the actors of a run ask for, against what this machine has; found out without torch and without starting Ray."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from asyncrl.config import Deployment
from asyncrl.errors import ConfigError


def check_placement(
    deployment: Deployment, environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev"), *, served: int = 0
) -> str:
    """One sentence of the plan. Raises ConfigError with demanded against available, by group. served: models of rewards.

    Only a local Ray can be judged beforehand; a cluster answers when it is joined (`PlacementError`).
    """
    groups = [
        ("generators", deployment.generators.least, deployment.generators.place),
        ("rewards", deployment.rewards.least, deployment.rewards.place),
        *([("models", served * (models := deployment.rewards.models).count, models.place)] if served else []),
        *((group, of.ranks, of.place) for group, of in deployment.groups.items()),
        ("store", 1, deployment.store.place),
    ]
    ranks = deployment.ranks
    named = f"; the learner's ranks are {', '.join(ranks)}" if len(ranks) > 1 else ""
    actors = sum(count for _, count, _ in groups)
    cpus = sum(count * place.cpus for _, count, place in groups)
    gpus = sum(count * place.gpus for _, count, place in groups)
    if address := named_cluster(deployment, environ):
        return f"{actors} actors ask for {cpus:g} CPUs, {gpus:g} GPUs; the Ray at {address} is asked when it is joined{named}"
    have_cpus = deployment.num_cpus if deployment.num_cpus is not None else len(os.sched_getaffinity(0))
    have_gpus = count_gpus(environ, dev) if gpus else 0
    custom = sorted({name for _, _, place in groups for name in place.resources})
    if cpus > have_cpus or gpus > have_gpus or custom:
        rows = [("group", "actors", "CPUs each", "GPUs each")]
        rows += [(name, f"{count}", f"{place.cpus:g}", f"{place.gpus:g}") for name, count, place in groups]
        rows += [("demanded", "", f"{cpus:g}", f"{gpus:g}"), ("available", "", f"{have_cpus:g}", f"{have_gpus:g}")]
        lines = ["the deployment asks for more than this machine has: its actors could never start"]
        lines += [f"  {name:<12}{count:>6}{each_cpus:>12}{each_gpus:>12}" for name, count, each_cpus, each_gpus in rows]
        if custom:
            lines.append(f"  resources {', '.join(custom)}: a local Ray has none; only a cluster's nodes can offer them")
        lines.append("  lower `place` (or `count`) of a group in the deployment, or name a cluster in ray_address")
        raise ConfigError("\n".join(lines))
    if gpus and (build := metadata.version("torch")).endswith("+cpu"):
        raise ConfigError(
            f"the deployment asks for {gpus:g} GPUs, but torch {build} is built without CUDA: no actor could use one; "
            f"pip install --force-reinstall torch=={build.partition('+')[0]}"
        )
    offered = f", {gpus:g} of {have_gpus} GPUs" if gpus else ""
    return f"{actors} actors on this machine ask for {cpus:g} of {have_cpus} CPUs{offered}{named}"


def named_cluster(deployment: Deployment, environ: Mapping[str, str] = os.environ) -> str:
    """The address of the cluster that a run joins; empty: it starts a Ray of its own, here."""
    return deployment.ray_address or environ.get("RAY_ADDRESS", "")


def count_gpus(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """CUDA devices that a local Ray would offer: those of the machine that CUDA_VISIBLE_DEVICES leaves visible."""
    found = len([path for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    # Under WSL and some container runtimes a device has no node of its own.
    found = found or sum(line.startswith("GPU ") for line in ask_driver("-L"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if "-1" in names:
        names = names[: names.index("-1")]  # CUDA ignores what follows an invalid device
    return min(found, len(names)) if not any(name.startswith("MIG-") for name in names) else len(names)


def gpu_bytes(environ: Mapping[str, str] = os.environ) -> int | None:
    """Memory of the smallest GPU that this process may use; None where the driver does not tell."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    listed = ask_driver("--query-gpu=memory.total", "--format=csv,noheader,nounits", *([f"--id={visible}"] if visible else []))
    sizes = [int(line) << 20 for line in listed if line.strip().isdecimal()]
    return min(sizes, default=None)


def ask_driver(*arguments: str) -> list[str]:
    """Lines of nvidia-smi; none where there is none, or no driver that answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=5, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
