"""Where a process stands among those that train one model together.

    ranks = replicate × shard × sp × tp, tp innermost
            └ packs are dealt ┘   │    └ split every matrix, and compute the same tokens
                                  └ share the tokens of each pack

Weights are sharded over shard × sp. After a forward pass all ranks of a share know all columns of its pack: with sp, each
scores a part of it, and `whole` puts these together, so that a loss may couple all tokens of a sequence. What belongs to a
whole batch, columns and totals, one rank of each share tells all others: they then hold the same bits, and decide alike.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from asyncrl.config import Layout

LOOK_S = 1.0  # how often who waits for another rank looks whether it is still there
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def open_rendezvous(host: str) -> dist.TCPStore:
    """Where the ranks of a group find each other, on a free port of `host` alone. Rank 0 opens it, and keeps it."""
    with socket.create_server((host, 0)) as server:  # by itself TCPStore would listen on every address of the node
        port = server.getsockname()[1]
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())


def reach_rendezvous(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The same, as the other ranks see it. Waits for it no longer than that."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def talk_over(host: str) -> None:
    """Has this process's collectives use the network interface with this IPv4 address, unless the environment names others.

    By itself gloo takes what the node's name resolves to, which may be an interface that no other node reaches.
    """
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):  # it has no address
            found = fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))[20:24]
            if socket.inet_ntoa(found) == host:
                for backend in ("GLOO", "NCCL"):
                    os.environ.setdefault(f"{backend}_SOCKET_IFNAME", name)


def join(store: dist.Store, rank: int, layout: Layout, *, device: str, timeout_s: float) -> "Ranks":
    """Joins the group as `rank`. Waits for all others, and so does every collective, for `timeout_s` at most."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.ranks, timeout=timedelta(seconds=timeout_s))
    return Ranks(layout, device, store.clone())  # type: ignore[attr-defined]


def leave() -> None:
    """Leaves the process group, if this process is in one. Waits for nobody."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """This rank of the process group; `Ranks()` is the only one, without a group: then nothing here communicates."""

    def __init__(self, layout: Layout | None = None, device: str = "cpu", store: dist.Store | None = None) -> None:
        """layout: of the process group that this process has joined, by `store`; one rank needs neither group nor store."""
        self.layout = layout = layout or Layout()
        self.grouped = layout.ranks > 1
        self.index = dist.get_rank() if self.grouped else 0
        self._store = store
        self.require_others: Callable[[], None] = lambda: None  # raises if another rank has ended; for who waits for one
        self.dealt = layout.replicate * layout.shard  # shares into which packs are dealt
        self.share = self.index // (layout.sp * layout.tp)  # which of them is this rank's
        self.place = self.index // layout.tp % layout.sp  # of this rank among those that share its packs' tokens
        # None where there is no group, or no other rank in it. fsdp: one dimension, after one of copies if there are several.
        self.fsdp_mesh: DeviceMesh | None = None
        self.tp_mesh: DeviceMesh | None = None
        self.sp_group: dist.ProcessGroup | None = None
        self._tells = self.index % (layout.sp * layout.tp) == 0  # for its share
        if not self.grouped:
            return
        copies, sharded = layout.replicate, layout.shard * layout.sp
        mesh = init_device_mesh(device, (copies, sharded, layout.tp), mesh_dim_names=("copy", "fsdp", "tp"))
        self.fsdp_mesh = mesh["copy", "fsdp"] if copies > 1 else mesh["fsdp"]
        if layout.tp > 1:
            self.tp_mesh = mesh["tp"]
        if layout.sp > 1:
            by_place = init_device_mesh(device, (self.dealt, layout.sp, layout.tp), mesh_dim_names=("share", "sp", "tp"))
            self.sp_group = by_place["sp"].get_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.index == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the shares, in place. All ranks must call it, and get the same bits."""
        if self.grouped:
            dist.all_reduce(tensor if self._tells else tensor.zero_())
        return tensor

    def merge_(self, column: torch.Tensor) -> torch.Tensor:
        """Fills a column [N] in place, each value from the share that knows it; where none does (NaN) it stays so."""
        if self.grouped:
            known = column.isfinite()
            parts = self.sum_(torch.stack((torch.where(known, column, 0), known.to(column.dtype))))
            column.copy_(torch.where(parts[1] > 0, parts[0], torch.nan))
        return column

    def whole(self, part: torch.Tensor, where: torch.Tensor, size: int) -> torch.Tensor:
        """What the ranks of a share made of their parts of a pack, put together: [size, …] on each of them.

        part [t, …]: this rank's, whose rows belong at where [t]. All ranks of the share must call it. Each makes the whole loss
        of it: the gradient of its own part is all that comes back, and no rank waits for another in the backward pass.
        """
        return part if self.sp_group is None else _Whole.apply(part, where, size, self.sp_group)

    def tell(self, about: str, said: str) -> None:
        """Tells all other ranks something, from any thread, beside whatever they compute; waits for nobody."""
        if self._store is not None:
            self._store.set(f"{about}/{self.index}", said)

    def heard(self, about: str, index: int, timeout_s: float) -> str:
        """What rank `index` tells about something. Waits until it does; raises what `require_others` does, or torch's DistError
        after `timeout_s`."""
        assert self._store is not None, "the only rank waits for nobody"
        key, deadline = f"{about}/{index}", time.monotonic() + timeout_s
        while True:
            try:
                self._store.wait([key], timedelta(seconds=LOOK_S))
                return self._store.get(key).decode()
            except dist.DistStoreError:
                if time.monotonic() >= deadline:
                    raise
            self.require_others()


class _Whole(torch.autograd.Function):
    """Ranks.whole."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, where: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.save_for_backward(where)
        whole = part.new_zeros(size, *part.shape[1:]).index_copy_(0, where, part)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        return grad[where], None, None, None
