"""Several ranks that stage a version against one: `python tests/bench/bench_staging.py [MB]`, float32 weights under FSDP2.

ms: from rank 0's call to the sealed memory, median. peak: what a rank's own memory rose by at most, the worst rank; a version
itself lies in memory that all share. gathered: what is not done here, every tensor made whole on all ranks, and staged by one.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from asyncrl.config import Layout
from asyncrl.models.memory import FlatTensors, Place
from asyncrl.models.pieces import named_tensors
from asyncrl.models.ranks import Ranks, join
from asyncrl.models.staging import Staging

ROUNDS = 7


def peak_mb() -> float:
    """What this process has in memory at most since the last call, in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return int(status["VmHWM"].split()[0]) / 1024


def write(staging: Staging, place: Place) -> None:
    """Has all ranks write, the others being told where."""
    encoded = msgspec.json.encode(place)
    told = torch.tensor([*encoded, *b" " * (256 - len(encoded))], dtype=torch.uint8)
    dist.broadcast(told, 0)
    staging.write(msgspec.json.decode(bytes(told.tolist()), type=Place))
    dist.barrier()


def gathered(model: torch.nn.Module, ranks: Ranks, dtype: torch.dtype | None) -> None:
    whole = {}
    for name, tensor in named_tensors(model).items():
        tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        whole[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if ranks.first:
        FlatTensors.copy_of(whole, "weights")


def stage(model: torch.nn.Module, ranks: Ranks, way: str, dtype: torch.dtype | None) -> list[tuple[float, float]]:
    """Seconds and MB of every round."""
    node = ranks.index // 2 if way == "two nodes" else 0
    staging, figures = Staging(model, ranks, dtype=dtype, where=f"node {node}"), []
    for _ in range(ROUNDS):
        if ranks.grouped:
            dist.barrier()
        peak_mb()
        before, begin = peak_mb(), time.perf_counter()
        if way == "gathered":
            gathered(model, ranks, dtype)
        elif ranks.first:
            staging.staged("weights", partial(write, staging) if ranks.grouped else None)
        else:
            write(staging, Place("", "", b""))
        figures.append((time.perf_counter() - begin, peak_mb() - before))
    return figures


def rank(index: int, layout: Layout, store: str, megabytes: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    ranks = Ranks()
    if layout.ranks > 1:
        ranks = join(dist.FileStore(store, layout.ranks), index, layout, device="cpu", timeout_s=120)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(megabytes // 4)))
    if ranks.grouped:
        for layer in model:
            fully_shard(layer, mesh=ranks.fsdp_mesh)
        fully_shard(model, mesh=ranks.fsdp_mesh)
    ways = ("one node", "two nodes", "gathered") if ranks.grouped else ("alone",)
    pipe.send({(way, dtype): stage(model, ranks, way, dtype) for way in ways for dtype in (None, torch.bfloat16)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="?", type=int, default=256)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(f"{'ranks':>5} {'way':<10} {'sent as':<9} {'ms':>8} {'peak MB':>8}")
    for count in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            pipes = [spawn.Pipe() for _ in range(count)]
            fixed = (Layout(shard=count), f"{folder}/store", args.megabytes)
            ranks = [spawn.Process(target=rank, args=(index, *fixed, pipe)) for index, (_, pipe) in enumerate(pipes)]
            for process in ranks:
                process.start()
            found = [ours.recv() for ours, _ in pipes]
            for process in ranks:
                process.join()
        for way, dtype in found[0]:
            ms = 1e3 * statistics.median(seconds for seconds, _ in found[0][way, dtype][1:])
            peak = max(mb for figures in found for _, mb in figures[way, dtype])
            print(f"{count:>5} {way:<10} {'bfloat16' if dtype else 'float32':<9} {ms:>8.0f} {peak:>8.0f}")


if __name__ == "__main__":
    main()
