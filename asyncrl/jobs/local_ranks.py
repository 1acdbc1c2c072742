"""Ranks that train together on this machine, without Ray. This process is the first one, and starts the others.

They end with it, however it ends. What one of them has to say goes to `rank-<number>.log`.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from asyncrl.config import Group, Layout, SFTSpec
from asyncrl.config.parallel import layouts
from asyncrl.errors import ActorFailed
from asyncrl.processes import OwnedProcess
from asyncrl.rundir import RunDir

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from asyncrl.models.ranks import Ranks

HOST = "127.0.0.1"
LOOK_S = 0.1  # between two looks for ranks that start
TIMEOUT_S = 1800.0  # for which a rank waits for another: a model may have to be loaded


class LocalRanks(Struct, frozen=True, kw_only=True):
    """Who they are. layouts: as `Ranks` takes them. threads: of each."""

    layouts: dict[Group, Layout]
    device: str
    threads: int

    @property
    def count(self) -> int:
        return sum(layout.ranks for layout in self.layouts.values())


def ranks_of(spec: SFTSpec) -> LocalRanks:
    """Those of a warm start: each has its device, and its share of the machine's cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // spec.ranks)
    return LocalRanks(layouts={"learner": layouts(spec.parallel, spec.ranks)[0]}, device=device_of(spec), threads=threads)


@contextlib.contextmanager
def together(local: LocalRanks, work: RunDir, module: str) -> Iterator["Ranks"]:
    """This process among the ranks, all of which train while the block runs.

    module: what the others run; it is given the working folder, the rank, the port to `join_at`, and a lifeline.
    Where one of them dies, or fails alone, the block ends at once: raises ActorFailed, which names its log.
    """
    from asyncrl.models.ranks import Ranks, leave, open_rendezvous

    others: dict[int, OwnedProcess] = {}
    try:
        if local.count == 1:
            yield Ranks(local.layouts)
            return
        rendezvous = open_rendezvous(HOST)
        for rank in range(1, local.count):
            with _log(work, rank).open("wb") as log:
                command = [sys.executable, "-m", module, str(work.path), str(rank), str(rendezvous.port)]
                others[rank] = OwnedProcess(command, stdout=log, stderr=log)
        while not rendezvous.check([f"here/{rank}" for rank in others]):  # then all of them will join
            _require_alive(others, work)
            time.sleep(LOOK_S)
        ranks = _join(local, 0, rendezvous)
        ranks.require_others = partial(_require_alive, others, work)
        yield ranks
    except RuntimeError:  # a collective's: it does not know who
        _require_alive(others, work)
        raise
    finally:
        for other in others.values():
            other.kill()
        leave()


def _require_alive(others: Mapping[int, OwnedProcess], work: RunDir) -> None:
    for rank, other in others.items():
        if (code := other.exit_code()) is not None:
            raise ActorFailed(f"rank {rank} ended with exit code {code}; its log is {_log(work, rank)}")


def _log(work: RunDir, rank: int) -> Path:
    return work.path / f"rank-{rank}.log"


def join_at(port: int, local: LocalRanks, rank: int) -> "Ranks":
    """Makes a process that `together` started the rank that it is. Waits for the others."""
    from asyncrl.models.ranks import reach_rendezvous

    rendezvous = reach_rendezvous(HOST, port, TIMEOUT_S)
    rendezvous.set(f"here/{rank}", "")
    return _join(local, rank, rendezvous)


def _join(local: LocalRanks, rank: int, rendezvous: "TCPStore") -> "Ranks":
    import torch

    from asyncrl.models.loading import use_threads
    from asyncrl.models.ranks import join, talk_over

    talk_over(HOST)
    use_threads(local.threads)
    if local.device == "cuda":
        torch.cuda.set_device(rank)
    return join(rendezvous, rank, local.layouts, device=local.device, timeout_s=TIMEOUT_S)


def device_of(spec: SFTSpec) -> str:
    """The kind of device that it is trained on."""
    import torch

    return spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
