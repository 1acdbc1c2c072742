"""`asyncrl doctor`: what this machine has, what is missing or broken, and the exact command that fixes it."""

import argparse
import importlib
import json
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from msgspec import to_builtins
from msgspec.structs import replace

from asyncrl.cluster.resources import count_gpus
from asyncrl.config.deployment import ENGINES
from asyncrl.containment import NEWNET, SWITCH, refused
from asyncrl.disk import as_size, free_bytes
from asyncrl.errors import ConfigError
from asyncrl.generate.engines import engine_kind
from asyncrl.jobs.accelerators import all_reduce, kernels, matching
from asyncrl.jobs.cluster_check import MIN_SHM_BYTES, check_cluster
from asyncrl.report.findings import Finding, MachineCheck, installed_version
from asyncrl.scratch import SHM, Trace, traces

MIN_DISK_BYTES = 1 << 30
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

OPTIONAL = {
    "math-verify": ("the verifier math", "pip install 'asyncrl[math]'"),
    "pandas": ("reading metrics and the replay log", "pip install pandas"),
    "duckdb": ("querying the replay log", "pip install duckdb"),
    "pytest": ("asyncrl's own tests", "pip install 'pytest>=8' pytest-timeout hypothesis"),
}


def doctor_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl doctor`, and sets what runs."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--cluster", action="store_true", help="check every node of a Ray cluster instead, side by side")
    parser.add_argument("--address", metavar="A", help="of the cluster (default: RAY_ADDRESS, else one of this machine)")
    reached = "with --cluster: the folder of run directories that every node must reach (default: runs)"
    parser.add_argument("--runs-dir", default="runs", metavar="D", help=reached)
    parser.set_defaults(job=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    if args.cluster:
        return check_cluster(args)
    if args.address is not None:
        raise ConfigError(f"--address {args.address} without --cluster: only the nodes of a cluster have one; add --cluster")
    findings = []
    for finding in examine():
        findings.append(finding)
        if not args.json:
            print(lines(finding), flush=True)
    healthy = all(finding.status == "ok" for finding in findings if finding.required)
    if args.json:
        print(json.dumps({"ok": healthy, "findings": to_builtins(findings)}))
    else:
        print("\neverything required is there" if healthy else "\nsomething required is missing or broken: see the fixes above")
    return 0 if healthy else 1


def examine() -> Iterator[Finding]:
    """Every check, one after the other: last those that import for seconds. One that raises is broken, and hides no other."""
    checks: list[MachineCheck] = [
        ("python", python, ""),
        ("disk", disk, ""),
        ("shared memory", shared_memory, ""),
        ("large pages", large_pages, ""),
        ("leftovers", leftovers, ""),
        ("containment", containment, ""),
        *((name, partial(optional, name, use, fix), "") for name, (use, fix) in OPTIONAL.items()),
        ("zeromq", zeromq, "pyzmq"),
        ("arrow", lambda: package("pyarrow"), "pyarrow"),
        ("torch", torch_build, "torch"),
        ("devices", devices, "torch"),
        ("collectives", collectives, "torch"),
        ("kernels", kernels, "torch"),
        ("ray", lambda: package("ray"), "ray"),
        ("transformers", lambda: package("transformers"), "transformers"),
        ("versions", matching, "packaging"),
        *(check for kind in reversed(ENGINES) for check in engine_kind(kind).machine_checks()),
    ]
    return (guarded(*check) for check in checks)


def lines(finding: Finding) -> str:
    """A line for the finding, and its fix below it."""
    note = "" if finding.required or finding.status == "ok" else " (optional)"
    line = f"{finding.status:<8} {finding.name:<14} {finding.detail}{note}"
    return f"{line}\n{'':<23} fix: {finding.fix}" if finding.status != "ok" and finding.fix else line


def guarded(name: str, check: Callable[[], Finding], package: str) -> Finding:
    """The check's finding, or what it raised as one."""
    try:
        return replace(check(), name=name)
    except Exception as error:  # whatever is wrong with a package is the finding
        missing = isinstance(error, ModuleNotFoundError)
        why = str(error).strip().splitlines()
        return Finding(
            name=name,
            status="missing" if missing else "broken",
            detail=f"{type(error).__name__}: {why[0] if why else 'no message'}",
            fix=reinstall(package) if package else "",
        )


# --------------------------------------------------------------------------------------------- one per row


def python() -> Finding:
    found = platform.python_version()
    wanted = metadata.metadata("asyncrl")["Requires-Python"]
    if not _satisfies(found, wanted):
        return Finding(status="broken", detail=f"{found}, needs {wanted}", fix="python3.11 -m venv .venv")
    return Finding(detail=f"{found} ({sys.executable})")


def torch_build() -> Finding:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return versioned("torch", torch.__version__, cuda)


def package(name: str) -> Finding:
    """Imports a required package and compares its version with what asyncrl asks for."""
    return versioned(name, importlib.import_module(name).__version__)


def devices() -> Finding:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = f"{len(os.sched_getaffinity(0))} CPU cores, {as_size(memory)} memory"
    present = count_gpus()
    if present and not torch.cuda.is_available():
        why, fix = "torch finds no working driver", "nvidia-smi"
        if torch.version.cuda is None:
            why, fix = "torch is a CPU build", reinstall("torch")
        return Finding(status="broken", detail=f"{here}; {present} GPUs, but {why}", fix=fix, required=False)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    listing = ", ".join(f"{gpu.name} {as_size(gpu.total_memory)}" for gpu in gpus) or "no GPU"
    return Finding(detail=f"{here}; {listing}")


def collectives() -> Finding:
    """A real all-reduce: over gloo in two processes, and over NCCL with all GPUs."""
    import torch

    found, gpus = all_reduce("gloo", 2), torch.cuda.device_count()
    if found.status != "ok" or not gpus:
        return found if gpus else replace(found, detail=f"{found.detail}; no GPU to try nccl with")
    over_gpus = all_reduce("nccl", gpus)
    return replace(over_gpus, detail=f"{found.detail}; {over_gpus.detail}")


def zeromq() -> Finding:
    import zmq

    if not zmq.has("curve"):
        return Finding(
            status="broken",
            detail=f"libzmq {zmq.zmq_version()} without CURVE: weights between nodes could not be encrypted",
            fix="pip install --force-reinstall --only-binary=:all: pyzmq",
        )
    return versioned("pyzmq", zmq.pyzmq_version(), f"libzmq {zmq.zmq_version()}, CURVE")


def shared_memory(folder: Path = SHM, least_bytes: int = MIN_SHM_BYTES) -> Finding:
    """Ray passes rollouts and batches between the actors of one node through files here."""
    fix = "mount -o remount,size=8G /dev/shm   (container: docker run --shm-size=8g)"
    if not folder.is_dir():
        return Finding(status="missing", detail=f"no {folder}", fix=fix)
    space = os.statvfs(folder)
    size, free = space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail
    detail = f"{folder} {as_size(size)}, {as_size(free)} free"
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    if free < least_bytes:
        detail += f": below {as_size(least_bytes)}, larger models will not fit"
        return Finding(status="broken", detail=detail, fix=fix, required=False)
    return Finding(detail=f"{detail}, writable")


def large_pages(file: Path = LARGE_PAGES) -> Finding:
    """Weights pass through memory that the learner takes anew for each version: half of that time goes into pages of 4 KiB."""
    allowed = re.findall(r"\[(\w+)\]", file.read_text()) if file.is_file() else []
    if {*allowed} & {"never", "deny", "advise"}:
        return Finding(
            status="missing",
            detail=f"{file} says {allowed[0]}: weights take twice as long to the generators of their node",
            fix=f"echo within_size | sudo tee {file}",
            required=False,
        )
    return Finding(detail=f"{file} says {allowed[0]}" if allowed else f"no {file}")


def disk(folders: Iterable[Path] = (Path("runs"), Path(tempfile.gettempdir())), least_bytes: int = MIN_DISK_BYTES) -> Finding:
    """Where runs are kept unless --runs-dir says otherwise, and where Ray keeps its sessions."""
    free = {folder.absolute(): free_bytes(folder) for folder in folders}
    detail = ", ".join(f"{as_size(space)} free for {folder}" for folder, space in free.items())
    if min(free.values()) < least_bytes:
        detail += f": below {as_size(least_bytes)}, little can be saved"
        return Finding(status="broken", detail=detail, fix="make room, or choose another --runs-dir", required=False)
    return Finding(detail=detail)


def leftovers(found: Sequence[Trace] | None = None) -> Finding:
    """What dead runs left on this machine. found: None, what there is."""
    found = traces() if found is None else found
    left = [trace for trace in found if not trace.in_use]
    living = f"{len(found) - len(left)} in use by living runs"
    if not left:
        return Finding(detail=f"none; {living}")
    counts = Counter(trace.what for trace in left)
    size, kinds = as_size(sum(trace.size_bytes for trace in left)), ", ".join(f"{what} ({counts[what]})" for what in counts)
    return Finding(detail=f"dead runs left {size}: {kinds}; `asyncrl clean` lists and removes it; {living}")


def containment() -> Finding:
    """What keeps the processes of rewards and episodes together, so that nothing survives its kill."""
    if why := refused():
        detail = f"no PID namespaces ({why}): what rewards and episodes start dies with them, but sees the whole machine"
        fix = (
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0   (container: docker run --cap-add SYS_ADMIN --security-opt"
        )
        return Finding(status="missing", detail=detail, fix=f"{fix} apparmor=unconfined; not {SWITCH}=off)", required=False)
    network = "can't" if refused(NEWNET) else "can"
    return Finding(
        detail=f"a PID namespace for each process of rewards and episodes; network {network} be cut off here, and is not"
    )


def optional(name: str, use: str, fix: str) -> Finding:
    """An extra: found by its installed version, not imported."""
    if found := installed_version(name):
        return Finding(detail=f"{found}: {use}", required=False)
    return Finding(status="missing", detail=use, fix=fix, required=False)


# ---------------------------------------------------------------------------------------------- versions


def requirement(name: str) -> str:
    """asyncrl's own requirement of a package, e.g. `torch<2.14,>=2.13`; empty if it has none or is not installed."""
    try:
        requires = metadata.requires("asyncrl") or []
    except metadata.PackageNotFoundError:
        return ""
    found = (text for text in requires if ";" not in text and re.split(r"[\[<>=!~ ]", text)[0] == name)
    return next(found, "")


def reinstall(package: str) -> str:
    """The command that installs a package again, as asyncrl requires it."""
    return f"pip install --force-reinstall '{requirement(package) or package}'"


def versioned(package: str, found: str, detail: str = "") -> Finding:
    """A finding about an installed version, against asyncrl's requirement of that package."""
    wanted = requirement(package)
    bounds = re.sub(r"^[\w.-]+(\[[^]]*\])?", "", wanted)
    text = ", ".join(filter(None, (found, detail)))
    if bounds and not _satisfies(found, bounds):
        return Finding(status="broken", detail=f"{text}; asyncrl needs {wanted}", fix=f"pip install '{wanted}'")
    return Finding(detail=text)


def _satisfies(version: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(version, prereleases=True)
