"""What the doctor finds out of devices: whether collectives work over them, which kernels run, which versions don't match."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from asyncrl.processes import OwnedProcess
from asyncrl.report.findings import Finding, installed_version

DEADLINE_S = 60.0  # for processes to import torch, find each other, and sum a tensor
# A rank of the group that is tried; the file is where all meet.
_RANK = """
import datetime, os, sys, torch, torch.distributed as dist
backend, rank, size, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(
    backend, store=dist.FileStore(file, size), rank=rank, world_size=size, timeout=datetime.timedelta(seconds=30),
    device_id=device if backend == "nccl" else None,
)
value = torch.full((1 << 20,), rank + 1.0, device=device)
dist.all_reduce(value)
dist.barrier()
print(value[-1].item(), flush=True)
os._exit(0)  # what the threads of a backend say at an interpreter's end is not asked
"""
# By the major version of CUDA that torch is built for: the oldest driver that runs it.
_DRIVERS = {"11": 450, "12": 525, "13": 580}
_PINNING = ("sglang", "flash-attn", "liger-kernel", "peft", "transformers", "ray")  # whose requirements are looked at


def all_reduce(backend: str, size: int, command: Sequence[str] = (sys.executable, "-c", _RANK)) -> Finding:
    """Sums a tensor over `size` processes, each with a GPU of its own for nccl. Waits DEADLINE_S at the most; none is left."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ranks:
        started = []
        for rank in range(size):
            log = ranks.enter_context(open(Path(folder) / f"{rank}.log", "w+b"))
            words = [*command, backend, str(rank), str(size), f"{folder}/meeting"]
            process = OwnedProcess(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            ranks.callback(process.kill)
            started.append((process, Path(log.name)))
        while any(process.exit_code() is None for process, _ in started) and time.monotonic() < began + DEADLINE_S:
            if any(process.exit_code() for process, _ in started):
                break  # the others would wait for it
            time.sleep(0.02)
        ends = [(process.exit_code(), (log.read_text(errors="replace").split("\n") or [""])) for process, log in started]
    expected = f"{size * (size + 1) / 2}"
    wrong = [(rank, code, told) for rank, (code, told) in enumerate(ends) if code != 0 or expected not in told]
    if not wrong:
        return Finding(detail=f"{backend}: {size} processes summed 4 MiB, {time.monotonic() - began:.1f} s with their start")
    rank, code, told = min(wrong, key=lambda end: end[1] is None)  # one that failed says more than those that waited for it
    said = next((line.strip() for line in reversed(told) if line.strip()), "no message")
    what = f"did not end within {DEADLINE_S:g} s" if code is None else f"ended with {code}"
    return Finding(
        status="broken",
        detail=f"{backend}: rank {rank} of {size} {what}: {said}",
        fix="NCCL_DEBUG=INFO asyncrl doctor" if backend == "nccl" else "export GLOO_SOCKET_IFNAME=lo   (or another interface)",
        required=backend != "nccl",
    )


def kernels() -> Finding:
    """What attention and the layers run with, here."""
    import torch

    gpu, liger, flash = torch.cuda.is_available(), installed_version("liger-kernel"), installed_version("flash-attn")
    attention = "torch's varlen flash attention in bfloat16, SDPA in float32" if gpu else "SDPA"
    layers = f"liger-kernel {liger}" if gpu and liger else "transformers' own"
    beside = [
        f"liger-kernel {liger or 'is not installed'}{', for GPUs' if liger else ''}" if not (gpu and liger) else "",
        f"flash-attn {flash or 'is not installed'}, and not needed",
    ]
    return Finding(detail=f"attention: {attention}; layers: {layers}; {'; '.join(filter(None, beside))}", required=False)


def matching() -> Finding:
    """Whether installed packages ask for versions that are not these, and whether the driver is new enough for torch's CUDA."""
    problems = [*_unmet(_PINNING), *_driver()]
    if not problems:
        return Finding(detail="what is installed asks for what is installed", required=False)
    detail, fixes = "; ".join(problem for problem, _ in problems), "; ".join(dict.fromkeys(fix for _, fix in problems))
    return Finding(status="broken", detail=detail, fix=fixes, required=False)


def _unmet(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What installed packages need and do not have, each with the command that fixes it."""
    from packaging.requirements import Requirement

    ours = {need.name: need.specifier for need in map(Requirement, metadata.requires("asyncrl") or ()) if not need.marker}
    for package in packages:
        if not installed_version(package):
            continue
        for need in map(Requirement, metadata.requires(package) or ()):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            found = installed_version(need.name)
            if found and not need.specifier.contains(found, prereleases=True):
                fix = f"pip install '{need.name}{need.specifier}'"
                if need.name in ours and not any(ours[need.name].contains(spec.version) for spec in need.specifier):
                    fix = f"pip uninstall {package}   (asyncrl needs {need.name}{ours[need.name]}: give {package} another venv)"
                yield f"{package} {installed_version(package)} needs {need.name}{need.specifier}, and {found} is installed", fix


def _driver() -> Iterator[tuple[str, str]]:
    import torch

    from asyncrl.cluster.resources import ask_driver

    listed = ask_driver("--query-gpu=driver_version", "--format=csv,noheader")
    built, driver = torch.version.cuda or "", re.match(r"\d+", listed[0]) if listed else None
    least = _DRIVERS.get(built.partition(".")[0], 0)
    if driver and int(driver[0]) < least:
        needs = f"torch is built for CUDA {built}, which needs a driver >= {least}, and this is {listed[0]}"
        yield needs, "pip install 'torch' built for an older CUDA (pytorch.org lists them), or a newer driver"
