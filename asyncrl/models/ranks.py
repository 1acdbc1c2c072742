"""Where a process stands among those that train one model together.

    ranks = replicate × shard × sp × tp, tp innermost
            └ packs are dealt ┘   │    └ split every matrix, and compute the same tokens
                                  └ share the tokens of each pack

Weights are sharded over shard × sp. After a forward pass all ranks of a share know all columns of its pack: with sp, each
scores a part of it, and `whole` puts these together, so that a loss may couple all tokens of a sequence. What belongs to a
whole batch, columns and totals, one rank of each share tells all others: they then hold the same bits, and decide alike.

A critic and a reference model may have ranks of their own: groups side by side in the same process group, the learner's first.
Each divides its model as above; what its model made of a batch, `spread_` gives to the others.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from asyncrl.config import Group, Layout

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


Layouts = Layout | Mapping[Group, Layout]  # of the learner's ranks; or of all groups, the learner's first


def join(store: dist.Store, rank: int, layouts: Layouts, *, device: str, timeout_s: float) -> "Ranks":
    """Joins as `rank`, of all groups. Waits for all others, and so does every collective, for `timeout_s` at most."""
    backend, count = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", sum(of.ranks for of in _by_group(layouts).values())
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout_s))
    return Ranks(layouts, device, store.clone())  # type: ignore[attr-defined]


def leave() -> None:
    """Leaves the process group, if this process is in one. Waits for nobody."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """This rank of the process group, and of one of the groups in it; `Ranks()` is the only one: then nothing communicates."""

    def __init__(self, layouts: Layouts | None = None, device: str = "cpu", store: dist.Store | None = None) -> None:
        """layouts: of the process group that this process has joined, by `store`; one rank needs neither."""
        self.layouts = by_group = _by_group(layouts or Layout())
        self._starts: dict[Group, int] = {}  # index of each group's first rank; what has no group is the learner's
        self.count = 0  # ranks of all groups
        for group, layout in by_group.items():
            self._starts[group], self.count = self.count, self.count + layout.ranks
        self.index = dist.get_rank() if self.count > 1 else 0  # among them
        self.first = self.index == 0  # whether this is the rank that writes what is written once
        group = max((group for group, start in self._starts.items() if start <= self.index), key=self._starts.__getitem__)
        self.layout, self.start = by_group[group], self._starts[group]
        self.leads = self.index == self.start  # whether this is the first rank of its group
        layout = self.layout
        self.grouped = layout.ranks > 1  # with others that hold the same model
        self._beside = self.count > layout.ranks  # whether there are other groups
        self._store = store
        self.require_others: Callable[[], None] = lambda: None  # raises if another rank has ended; for who waits for one
        own = self.index - self.start
        self.dealt = layout.replicate * layout.shard  # shares into which packs are dealt
        self.share = own // (layout.sp * layout.tp)  # which of them is this rank's
        self.place = own // layout.tp % layout.sp  # of this rank among those that share its packs' tokens
        self._tells = own % (layout.sp * layout.tp) == 0  # for its share
        # None where no other rank is in it. fsdp: one dimension, after one of copies if there are several.
        self.fsdp_mesh: DeviceMesh | None = None
        self.tp_mesh: DeviceMesh | None = None
        self.sp_group: dist.ProcessGroup | None = None
        self.process_group: dist.ProcessGroup | None = None  # of the group
        for group, layout in by_group.items():  # every rank takes part in making all of them
            if layout.ranks > 1:
                self._join(self._starts[group], layout, device)

    def _join(self, start: int, layout: Layout, device: str) -> None:
        """Makes the process groups of a group of ranks; keeps them if it is this rank's own."""
        ranks = torch.arange(start, start + layout.ranks)
        process_group = dist.new_group(ranks.tolist()) if layout.ranks < self.count else None
        sides = layout.replicate, layout.shard * layout.sp, layout.tp
        mesh = DeviceMesh(device, ranks.view(sides), mesh_dim_names=("copy", "fsdp", "tp"))
        shares = layout.replicate * layout.shard, layout.sp, layout.tp
        by_place = DeviceMesh(device, ranks.view(shares), mesh_dim_names=("share", "sp", "tp")) if layout.sp > 1 else None
        if start == self.start:
            self.process_group = process_group
            self.fsdp_mesh = mesh["copy", "fsdp"] if layout.replicate > 1 else mesh["fsdp"]
            self.tp_mesh = mesh["tp"] if layout.tp > 1 else None
            self.sp_group = by_place["sp"].get_group() if by_place is not None else None

    def holds(self, model: Group) -> bool:
        """Whether this rank has a part of that model (`learner`: the policy)."""
        return self._starts.get(model, 0) == self.start

    def spread_(self, made: torch.Tensor, of: Group) -> torch.Tensor:
        """Overwrites a tensor in place by that of the ranks that hold a model. All of all groups must call it."""
        if self._beside:
            dist.broadcast(made, self._starts.get(of, 0))
        return made

    def spread_text(self, said: str, of: Group) -> str:
        """The same of a text."""
        return _sent(said, partial(self.spread_, of=of)) if self._beside else said

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the shares, in place. All ranks of the group must call it, and get the same bits."""
        if self.grouped:
            dist.all_reduce(tensor if self._tells else tensor.zero_(), group=self.process_group)
        return tensor

    def most(self, values: list[float]) -> list[float]:
        """The largest that a rank says of each, of all groups. All of them must call it."""
        if self.count == 1:
            return values
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

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

    def lead_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites a tensor in place by that of the first rank of the group. All ranks of the group must call it."""
        if self.grouped:
            dist.broadcast(tensor, self.start, group=self.process_group)
        return tensor

    def lead_text(self, said: str) -> str:
        """The same of a text."""
        return _sent(said, self.lead_) if self.grouped else said

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
            except RuntimeError as error:  # nothing is there yet, in the words of each kind of store; or it is gone itself
                if isinstance(error, dist.DistNetworkError) or time.monotonic() >= deadline:
                    raise
            self.require_others()


def _by_group(layouts: Layouts) -> Mapping[Group, Layout]:
    return {"learner": layouts} if isinstance(layouts, Layout) else layouts


def _sent(said: str, send: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """A text, by what sends a tensor."""
    content = said.encode()
    size = int(send(torch.tensor(len(content))))
    told = send(torch.frombuffer(bytearray(content.ljust(size)[:size]), dtype=torch.uint8))
    return told.numpy().tobytes().decode()


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
