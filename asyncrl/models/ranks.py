"""Where a process stands among those that train one model together.

    ranks = replicate × shard × sp × tp, tp innermost
            └ packs are dealt ┘   │    └ split every matrix, and compute the same tokens
                                  └ share the tokens of each pack

Weights are sharded over shard × sp. What belongs to tokens, columns and totals, is summed over all but tp.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from asyncrl.config import Layout


def open_rendezvous(host: str) -> dist.TCPStore:
    """Where the ranks of a group find each other, on a free port of `host`. Rank 0 opens it, and keeps it."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


def join(store: dist.Store, rank: int, layout: Layout, *, device: str, timeout_s: float) -> "Ranks":
    """Joins the group as `rank`. Waits for all others, and so does every collective, for `timeout_s` at most."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.ranks, timeout=timedelta(seconds=timeout_s))
    return Ranks(layout, device)


class Ranks:
    """This rank of the process group; `Ranks()` is the only one, without a group: then nothing here communicates."""

    def __init__(self, layout: Layout | None = None, device: str = "cpu") -> None:
        """layout: of the process group that this process has joined."""
        self.grouped = layout is not None
        self.layout = layout = layout or Layout()
        self.index = dist.get_rank() if self.grouped else 0
        self.dealt = layout.replicate * layout.shard  # shares into which packs are dealt
        self.share = self.index // (layout.sp * layout.tp)  # which of them is this rank's
        self.place = self.index // layout.tp % layout.sp  # of this rank among those that share its packs' tokens
        # None where there is no group, or no other rank in it. fsdp: one dimension, after one of copies if there are several.
        self.fsdp_mesh: DeviceMesh | None = None
        self.tp_mesh: DeviceMesh | None = None
        self.sp_group: dist.ProcessGroup | None = None
        self._tokens: dist.ProcessGroup | None = None
        if not self.grouped:
            return
        copies, sharded = layout.replicate, layout.shard * layout.sp
        mesh = init_device_mesh(device, (copies, sharded, layout.tp), mesh_dim_names=("copy", "fsdp", "tp"))
        self.fsdp_mesh = mesh["copy", "fsdp"] if copies > 1 else mesh["fsdp"]
        if layout.tp > 1:
            self.tp_mesh = mesh["tp"]
        if copies * sharded > 1:
            by_tokens = init_device_mesh(device, (copies * sharded, layout.tp), mesh_dim_names=("tokens", "tp"))
            self._tokens = by_tokens["tokens"].get_group()
        if layout.sp > 1:
            by_place = init_device_mesh(device, (self.dealt, layout.sp, layout.tp), mesh_dim_names=("share", "sp", "tp"))
            self.sp_group = by_place["sp"].get_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.index == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks that compute different tokens, in place. All of them must call it."""
        if self._tokens is not None:
            dist.all_reduce(tensor, group=self._tokens)
        return tensor

    def merge_(self, column: torch.Tensor) -> torch.Tensor:
        """Fills a column [N] in place from the ranks that know each value; where none does (NaN) it stays so."""
        if self._tokens is not None:
            known = column.isfinite()
            parts = torch.stack((torch.where(known, column, 0), known.to(column.dtype)))
            dist.all_reduce(parts, group=self._tokens)
            column.copy_(torch.where(parts[1] > 0, parts[0], torch.nan))
        return column
