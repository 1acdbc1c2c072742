"""How weights get into an SGLang server on any node: broadcasts in a torch.distributed group of this process and the server.

This process is rank 0, the server's tensor-parallel ranks follow. SGLang joins through its `init_custom_process_group`; both
sides must use the same keys in the group's store, hence the same (private) function of torch, and the same version of it.
"""

import asyncio
import concurrent.futures
import datetime
import functools
import os
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from asyncrl.errors import Unavailable
from asyncrl.generate.sglang.transfer import BUCKET_BYTES, Post, StagedWeights


class Distributed:
    """One server's group. host: an address of this node that the server reaches; the group's store listens on it alone.

    deadline_s: for joining, and again for each bucket. After Unavailable the group is gone: `open` makes a new one.
    """

    def __init__(
        self,
        host: str,
        backend: Literal["gloo", "nccl"],
        tp_size: int,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        deadline_s: float = 120.0,
    ) -> None:
        self._host, self._backend, self._world = host, backend, 1 + tp_size
        self._bucket_bytes, self._deadline_s = bucket_bytes, deadline_s
        self._device = "cuda" if backend == "nccl" else "cpu"
        # Longer than ours: we abort the group first. At its own timeout, NCCL's watchdog would end this process.
        self._timeout = datetime.timedelta(seconds=2 * deadline_s)
        self._name = ""
        self._group: dist.ProcessGroup | None = None

    async def open(self, post: Post) -> None:
        """Meets the server in a new group: our side waits for its ranks in a thread, while it answers the POST."""
        await self.close()
        self._name = f"asyncrl-{uuid.uuid4().hex}"
        store = self._listen()
        body = {
            "master_address": self._host,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": self._world,
            "group_name": self._name,
            "backend": self._backend,
        }
        join = functools.partial(self._join, store, self._name)
        _, self._group = await self._together(post("/init_weights_update_group", body), join, "joining a group")

    async def send(self, post: Post, staged: StagedWeights) -> None:
        for specs, label in staged.buckets(self._bucket_bytes):
            if self._group is None:
                raise Unavailable("the server's update group is not open, so it can't take weights; open the transfer first")
            body = {
                "names": [spec.name for spec in specs],
                "dtypes": [spec.dtype for spec in specs],
                "shapes": [spec.shape for spec in specs],
                "group_name": self._name,
                "flush_cache": False,
                **label,
            }
            broadcast = functools.partial(self._broadcast, self._group, [staged.tensors[spec.name] for spec in specs])
            await self._together(post("/update_weights_from_distributed", body), broadcast, "taking weights")

    async def close(self) -> None:
        """Destroys our side; the server sees closed connections."""
        group, self._group, self._name = self._group, None, ""
        if group is not None:
            group.abort()
            dist.destroy_process_group(group)

    async def _together(self, theirs: Awaitable[Any], ours: Callable[[], Any], doing: str) -> list[Any]:
        """Waits for both halves: the server's, which is a POST, and ours, in a thread. The first failure of either counts."""
        halves = [asyncio.ensure_future(theirs), _in_thread(ours)]
        try:
            async with asyncio.timeout(self._deadline_s):
                return list(await asyncio.gather(*halves))
        except (TimeoutError, RuntimeError) as error:  # RuntimeError: torch.distributed's errors
            cause = f"{type(error).__name__}: {error}" if str(error) else f"no end after {self._deadline_s:g} s"
            raise Unavailable(
                f"an SGLang server was lost while {doing} ({self._backend}, rank 0 at {self._host}): {cause}"
            ) from error
        finally:
            if any(not half.done() or half.cancelled() or half.exception() for half in halves):
                for half in halves:
                    half.cancel()
                await self.close()

    def _listen(self) -> dist.TCPStore:
        """The group's meeting point, on a free port. Our own socket, for the store itself would listen on every address."""
        listener = socket.create_server((self._host, 0))
        port = listener.getsockname()[1]
        return dist.TCPStore(
            self._host,
            port,
            self._world,
            is_master=True,
            timeout=self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def _join(self, store: dist.TCPStore, name: str) -> dist.ProcessGroup:
        if self._backend == "nccl":  # CleanUpOnly: a lost server must not take this process down, which is the default
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        # What SGLang's init_custom_process_group does once it has connected to the store; no default group is needed.
        prefixed = dist.PrefixStore(name, store)
        group, _ = c10d._new_process_group_helper(
            self._world, 0, [], dist.Backend(self._backend), prefixed, group_name=c10d.GroupName(name), timeout=self._timeout
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self._world)}
        if self._name != name:  # closed meanwhile
            dist.destroy_process_group(group)
            raise RuntimeError(f"group {name} came too late")
        return group

    def _broadcast(self, group: dist.ProcessGroup, tensors: Sequence[torch.Tensor]) -> None:
        """All at once, in the server's order."""
        sent = [tensor.to(self._device) for tensor in tensors]
        works = [group.broadcast(tensor, 0, timeout=self._timeout) for tensor in sent]
        for work in works:
            work.wait()
        if self._device == "cuda":
            torch.cuda.synchronize()  # `wait` orders streams only, and `sent` must outlive the copies


def _in_thread(work: Callable[[], Any]) -> "asyncio.Future[Any]":
    """Runs `work` in a daemon thread: after a server was lost it may stay in torch until its timeout, and holds up nobody."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # so that whoever stops waiting doesn't cancel it under the thread

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="weights to sglang", daemon=True).start()
    return asyncio.wrap_future(future)
