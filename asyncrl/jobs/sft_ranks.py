"""The ranks of a warm start on several devices of this machine. This process is the first one, and starts the others.

They end with it, however it ends. What one of them has to say goes to `rank-<number>.log`.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from asyncrl.config import SFTSpec
from asyncrl.config.parallel import layouts
from asyncrl.errors import ActorFailed
from asyncrl.processes import OwnedProcess, end_with_owner
from asyncrl.rundir import RunDir, set_up_logging

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from asyncrl.models.ranks import Ranks

HOST = "127.0.0.1"
LOOK_S = 0.1  # between two looks for ranks that start
TIMEOUT_S = 1800.0  # for which a rank waits for another: a model may have to be loaded


@contextlib.contextmanager
def together(spec: SFTSpec, work: RunDir) -> Iterator["Ranks"]:
    """This process among spec.ranks, all of which train while the block runs.

    Where another one dies, or fails alone, the block ends at once: raises ActorFailed, which names its log.
    """
    from asyncrl.models.ranks import Ranks, leave, open_rendezvous

    others: dict[int, OwnedProcess] = {}
    try:
        if spec.ranks == 1:
            yield Ranks(layouts(spec.parallel, 1)[0])
            return
        rendezvous = open_rendezvous(HOST)
        for rank in range(1, spec.ranks):
            with _log(work, rank).open("wb") as log:
                command = [sys.executable, "-m", __name__, str(work.path), str(rank), str(rendezvous.port)]
                others[rank] = OwnedProcess(command, stdout=log, stderr=log)
        while not rendezvous.check([f"here/{rank}" for rank in others]):  # then all of them will join
            _require_alive(others, work)
            time.sleep(LOOK_S)
        yield _join(spec, 0, rendezvous)
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


def _join(spec: SFTSpec, rank: int, rendezvous: "TCPStore") -> "Ranks":
    """Makes this process a rank, with its device and its share of the machine's cores. Waits for the others."""
    import torch

    from asyncrl.models.loading import use_threads
    from asyncrl.models.ranks import join, talk_over

    talk_over(HOST)
    use_threads(max(1, len(os.sched_getaffinity(0)) // spec.ranks))
    device = device_of(spec)
    if device == "cuda":
        torch.cuda.set_device(rank)
    return join(rendezvous, rank, layouts(spec.parallel, spec.ranks)[0], device=device, timeout_s=TIMEOUT_S)


def device_of(spec: SFTSpec) -> str:
    """The kind of device that it is trained on."""
    import torch

    return spec.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _follow(folder: str, rank: int, port: int) -> None:
    """What a process that `together` started does."""
    from asyncrl.jobs.sft import start_of, train_rank
    from asyncrl.models.ranks import reach_rendezvous

    work = RunDir(Path(folder))
    spec = msgspec.json.decode((work.path / "sft.json").read_bytes(), type=SFTSpec)
    rendezvous = reach_rendezvous(HOST, port, TIMEOUT_S)
    rendezvous.set(f"here/{rank}", "")
    train_rank(spec, start_of(spec), work, _join(spec, rank, rendezvous))


if __name__ == "__main__":
    end_with_owner(int(sys.argv[4]))
    set_up_logging(logging.StreamHandler())
    _follow(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # the first rank may have left the group already: nothing here needs it any more
