"""`asyncrl doctor --cluster`: what every node of a Ray cluster has, side by side, and whether a run could live on them.

One actor on each node tells of it; together they sum a tensor, over gloo and, where each node has a free GPU, over NCCL.
"""

import argparse
import contextlib
import json
import os
import platform
import secrets
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from asyncrl.cluster.resources import ask_driver
from asyncrl.disk import as_size, existing
from asyncrl.errors import ConfigError
from asyncrl.report.findings import installed_version
from asyncrl.rundir import redact
from asyncrl.scratch import SHM

_PACKAGES = ("asyncrl", "torch", "ray", "transformers", "sglang")
_SAME = ("python", "asyncrl", "torch", "ray", "transformers")  # that must be the same; sglang only where it is
MIN_SHM_BYTES = 1 << 30  # Ray's objects live there; containers often give 64 MiB
_MAX_SKEW_S = 1.0  # of clocks, beyond what the round trip leaves open: rates, logs and leases are told by them
_ASKED = 5  # times for the clock: the fastest counts
_START_S, _CALL_S, _GPU_S = 120.0, 90.0, 30.0


class NodeFacts(Struct, frozen=True, kw_only=True):
    """What a node is, or why it can't be told."""

    node: str  # host name and address
    versions: dict[str, str] = {}  # of a package that is not there, empty
    devices: str = ""
    shm_free_bytes: int = 0
    reach: str = ""  # why the runs directory is not that of the driver; empty: it is
    skew_s: float = 0.0  # its clock less the driver's
    skew_within_s: float = 0.0
    gloo: str = ""  # why not; empty: it works
    nccl: str = ""
    error: str = ""


class Probe:
    """Tells of the node on which it runs; an actor."""

    def facts(self, runs_dir: str, mark: str) -> NodeFacts:
        gpus = ask_driver("--query-gpu=name", "--format=csv,noheader")
        space = os.statvfs(SHM)
        return NodeFacts(
            node=socket.gethostname(),
            versions={"python": platform.python_version(), **{name: installed_version(name) for name in _PACKAGES}},
            devices=", ".join([f"{len(os.sched_getaffinity(0))} CPUs", *(f"{n} × {of}" for of, n in Counter(gpus).items())]),
            shm_free_bytes=space.f_frsize * space.f_bavail,
            reach=self._reach(Path(runs_dir), mark),
        )

    def _reach(self, runs_dir: Path, mark: str) -> str:
        """Reads what the driver wrote, and writes beside it."""
        try:
            if (runs_dir / mark).read_text() != mark:
                return "another file is there"
            (runs_dir / f"{mark}.{os.getpid()}").touch()
            (runs_dir / f"{mark}.{os.getpid()}").unlink()
        except OSError as error:
            return f"{error.strerror}: {error.filename}"
        return ""

    def now(self) -> float:
        return time.time()

    def meeting(self) -> tuple[str, int]:
        """An address of this node, with a port that was free just now."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return address, free.getsockname()[1]

    def all_reduce(self, backend: str, meeting: tuple[str, int], rank: int, size: int) -> None:
        """Sums a tensor with the other nodes. Raises RuntimeError if that does not work, or gives another sum."""
        import torch
        import torch.distributed as dist

        device = "cuda" if backend == "nccl" else "cpu"
        options: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=_CALL_S / 3)}
        dist.init_process_group(backend, init_method=f"tcp://{meeting[0]}:{meeting[1]}", **options)
        try:
            value = torch.full((1 << 20,), rank + 1.0, device=device)
            dist.all_reduce(value)
            if value[-1].item() != size * (size + 1) / 2:
                raise RuntimeError(f"the sum is {value[-1].item()}, not {size * (size + 1) / 2}")
        finally:
            dist.destroy_process_group()


def check_cluster(args: argparse.Namespace) -> int:
    """Prints the table, or with --json one object; exit status 1 if something would stop a run."""
    found = examine_cluster(args.address or os.environ.get("RAY_ADDRESS") or "auto", Path(args.runs_dir))
    problems = list(cluster_problems(found))
    if args.json:
        print(json.dumps({"ok": not problems, "nodes": to_builtins(found), "problems": problems}))
    else:
        print("\n".join(_table(found)))
        print("\n".join(["", *problems] if problems else ["", "a run could live on all nodes"]))
    return 1 if problems else 0


def examine_cluster(address: str, runs_dir: Path) -> list[NodeFacts]:
    """Of each living node. Raises Unavailable if no cluster answers, ConfigError for a folder that is not to write in."""
    import ray

    from asyncrl.cluster.session import join_or_start

    folder, mark = existing(runs_dir.expanduser().absolute()), f".asyncrl-reach-{secrets.token_hex(8)}"
    try:
        (folder / mark).write_text(mark)
    except OSError as error:
        raise ConfigError(f"--runs-dir {runs_dir}: {folder} can't be written to ({error.strerror}); name another") from error
    with contextlib.ExitStack() as ending:
        ending.callback((folder / mark).unlink)
        if not ray.is_initialized():
            ending.callback(ray.shutdown)
            join_or_start(address, {})
        nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerAddress"]))
        probes = [_probe(node) for node in nodes]
        for probe in probes:
            ending.callback(ray.kill, probe)
        found = _outcomes([probe.facts.remote(str(folder), mark) for probe in probes], _START_S)
        facts = [_named(node, of) for node, of in zip(nodes, found, strict=True)]
        living = [place for place, of in enumerate(facts) if not of.error]
        for place in living:
            skew, within = _skew(probes[place])
            facts[place] = replace(facts[place], skew_s=skew, skew_within_s=within)
        for place, why in zip(living, _together("gloo", [probes[p] for p in living]), strict=True):
            facts[place] = replace(facts[place], gloo=why)
        if living and all(node["Resources"].get("GPU", 0) >= 1 for node in nodes):
            on_gpus = [_probe(nodes[place], num_gpus=1) for place in living]
            for probe in on_gpus:
                ending.callback(ray.kill, probe)
            for place, why in zip(living, _over_gpus(on_gpus), strict=True):
                facts[place] = replace(facts[place], nccl=why)
        return facts


def _probe(node: dict[str, Any], **options: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(Probe).options(num_cpus=0, scheduling_strategy=there, **options).remote()


def _outcomes(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    """What each call returned or, as an exception, why it did not."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    found: list[Any] = []
    for ref in refs:
        try:
            found.append(ray.get(ref, timeout=0))
        except GetTimeoutError:
            found.append(TimeoutError(f"no answer within {timeout_s:g} s"))
        except RayTaskError as error:
            found.append(error.cause or error)
        except RayError as error:
            found.append(error)
    return found


def _named(node: dict[str, Any], told: Any) -> NodeFacts:
    name = f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}"
    return NodeFacts(node=name, error=_brief(told)) if isinstance(told, Exception) else replace(told, node=name)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text: str = redact(f"{type(error).__name__}: {lines[-1] if lines else 'no message'}")
    return text


def _skew(probe: Any) -> tuple[float, float]:
    """A node's clock less this one's in seconds, and how far off that may be: half of the round trip."""
    import ray

    readings = []
    for _ in range(_ASKED):
        before, began = time.time(), time.monotonic()
        there = ray.get(probe.now.remote(), timeout=_CALL_S)
        half = (time.monotonic() - began) / 2
        readings.append((half, there - before - half))
    within, skew = min(readings)
    return skew, within


def _together(backend: str, probes: Sequence[Any], start_s: float = _CALL_S) -> list[str]:
    """Of each, why it can't sum a tensor with the others; empty if it can."""
    if not probes:
        return []
    (meeting,) = _outcomes([probes[0].meeting.remote()], start_s)
    if isinstance(meeting, Exception):
        return [_brief(meeting)] * len(probes)
    size = len(probes)
    ended = _outcomes([probe.all_reduce.remote(backend, meeting, rank, size) for rank, probe in enumerate(probes)], _CALL_S)
    return [_brief(of) if isinstance(of, Exception) else "" for of in ended]


def _over_gpus(probes: Sequence[Any]) -> list[str]:
    """As `_together` over NCCL, where a GPU is free on each node."""
    free = _outcomes([probe.now.remote() for probe in probes], _GPU_S)
    if any(isinstance(of, Exception) for of in free):
        return ["not tried: its GPUs are in use" if isinstance(of, Exception) else "not tried" for of in free]
    return _together("nccl", probes)


# ---------------------------------------------------------------------------------------------- what is said of it


def odd_versions(found: Sequence[NodeFacts]) -> dict[str, str]:
    """Packages of which nodes have different versions, and the one that most of them have."""
    odd = {}
    for name in ("python", *_PACKAGES):
        versions = [of.versions[name] for of in found if not of.error and (name in _SAME or of.versions[name])]
        if len(set(versions)) > 1:
            odd[name] = statistics.mode(versions)
    return odd


def cluster_problems(found: Sequence[NodeFacts]) -> Iterator[str]:
    """What would stop a run, with its fix."""
    odd = odd_versions(found)
    for of in found:
        if of.error:
            yield f"{of.node}: {of.error}: install there what the other nodes have"
            continue
        for name, usual in odd.items():
            if of.versions[name] != usual and (name in _SAME or of.versions[name]):
                has = of.versions[name] or "no"
                yield f"{of.node}: it has {has} {name}, and others have {usual or 'none'}: install the same everywhere"
        if of.reach:
            yield f"{of.node}: does not reach the runs directory ({of.reach}): name one that all nodes share, with --runs-dir"
        if of.shm_free_bytes < MIN_SHM_BYTES:
            yield f"{of.node}: {as_size(of.shm_free_bytes)} free in {SHM}, of {as_size(MIN_SHM_BYTES)} needed: make it larger"
        if abs(of.skew_s) - of.skew_within_s > _MAX_SKEW_S:
            yield f"{of.node}: its clock is {of.skew_s:+.1f} s off (± {of.skew_within_s:.3f} s): start chronyd or ntpd there"
        for backend, why in (("gloo", of.gloo), ("nccl", of.nccl)):
            if why and not why.startswith("not tried"):
                variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
                yield f"{of.node}: {backend}: {why}: open ports between the nodes, or name the interface in {variable}"


def _table(found: Sequence[NodeFacts]) -> Iterator[str]:
    """A column for each node would be too wide: a row; what differs from most is marked with !."""
    odd = odd_versions(found)
    head = ["node", "devices", *(("python", *_PACKAGES)), "runs dir", "shm free", "clock", "gloo", "nccl"]
    rows = [head]
    for of in found:
        if of.error:
            rows.append([of.node, of.error])
            continue
        differs = {name for name, usual in odd.items() if of.versions[name] != usual and (name in _SAME or of.versions[name])}
        marked = [(version or "–") + "!" * (name in differs) for name, version in of.versions.items()]
        clock = f"{of.skew_s * 1000:+.0f} ± {of.skew_within_s * 1000:.0f} ms"
        works = ["no" if why else "ok" for why in (of.reach, of.gloo)]
        gpu = "×" in of.devices
        nccl = "–" if not gpu or of.nccl.startswith("not tried") else "no" if of.nccl else "ok"
        rows.append([of.node, of.devices, *marked, works[0], as_size(of.shm_free_bytes), clock, works[1], nccl])
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()
