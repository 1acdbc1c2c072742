"""Broadcasts into a group: what reaches the other side, and that a lost server is named in bounded time."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from asyncrl.errors import Unavailable
from asyncrl.generate.sglang.distributed import Distributed
from asyncrl.generate.sglang.transfer import StagedWeights
from asyncrl.types import Version

pytestmark = pytest.mark.slow

WAIT_S = 20.0
ONE = Version(1, 1)

# Joins a group as SGLang's init_custom_process_group does, prints the sum of what it receives, and waits for its stdin.
PEER = """
import datetime, sys, torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
port, world, name, shape = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], [int(n) for n in sys.argv[4].split(",")]
timeout = datetime.timedelta(seconds=20)
store, _, _ = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 1, world, timeout=timeout))
store = dist.PrefixStore(name, store)
group, _ = c10d._new_process_group_helper(world, 1, [], dist.Backend("gloo"), store, group_name=name, timeout=timeout)
print("joined", flush=True)
while sys.stdin.readline():
    tensor = torch.zeros(shape)
    group.broadcast(tensor, 0).wait()
    print(tensor.sum().item(), flush=True)
"""


@pytest.fixture
def staged() -> Iterator[StagedWeights]:
    staged = StagedWeights()
    yield staged
    staged.close()


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """No thread outlives its test: one that returns from torch while Python shuts down would abort the process."""
    yield
    for thread in threading.enumerate():
        if thread.name == "weights to sglang":
            thread.join(WAIT_S)
            assert not thread.is_alive()


class PeerPost:
    """A child process in place of a server's scheduler. on_update: what it does when weights come."""

    def __init__(self, shape: tuple[int, ...], on_update: str = "receive") -> None:
        self.labels: list[str | None] = []
        self.sums: list[float] = []
        self._shape, self._on_update = shape, on_update
        self.peer: asyncio.subprocess.Process

    async def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/init_weights_update_group":
            where = [str(body["master_port"]), str(body["world_size"]), body["group_name"], ",".join(map(str, self._shape))]
            self.peer = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PEER, *where, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert await self._line() == "joined"
            return {"success": True}
        assert path == "/update_weights_from_distributed"
        assert body["flush_cache"] is False
        if self._on_update == "refuse":
            raise Unavailable("no such parameter")
        if self._on_update == "die":
            self.peer.kill()
        if self._on_update != "receive":
            await asyncio.Event().wait()  # no answer ever comes
        for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True):
            assert tuple(shape) == self._shape
            assert dtype == "float32"
            assert self.peer.stdin is not None
            self.peer.stdin.write(b"next\n")
            self.sums.append(float(await self._line()))
        self.labels.append(body.get("weight_version"))
        return {"success": True}

    async def _line(self) -> str:
        assert self.peer.stdout is not None
        return (await asyncio.wait_for(self.peer.stdout.readline(), WAIT_S)).decode().strip()

    async def end(self) -> None:
        if self.peer.returncode is None:
            self.peer.kill()
        await self.peer.wait()


def test_broadcasts_reach_the_group_in_order_and_again_after_reopening(staged: StagedWeights) -> None:
    async def run() -> None:
        transfer = Distributed("127.0.0.1", "gloo", 1, bucket_bytes=128, deadline_s=WAIT_S)
        for _ in range(2):  # the second time as after a restart of the server
            post = PeerPost((4, 4))
            await transfer.open(post)
            staged.put(ONE, {"a": torch.full((4, 4), 1.0), "b": torch.full((4, 4), 2.0), "c": torch.full((4, 4), 3.0)})
            await transfer.send(post, staged)
            assert post.sums == [16.0, 32.0, 48.0]
            assert post.labels == [None, "1.1"]
            await post.end()
        await transfer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("on_update", "match"), [("die", "lost while taking weights"), ("refuse", "no such"), ("hang", "no end after 1 s")]
)
def test_a_server_lost_during_a_broadcast_is_named_before_the_deadline(
    staged: StagedWeights, on_update: str, match: str
) -> None:
    async def run() -> None:
        post = PeerPost((1000, 1000), on_update)
        staged.put(ONE, {"a": torch.ones(1000, 1000)})
        transfer = Distributed("127.0.0.1", "gloo", 1, deadline_s=WAIT_S)
        await transfer.open(post)
        transfer._deadline_s = 1.0 if on_update == "hang" else WAIT_S
        start = time.monotonic()
        with pytest.raises(Unavailable, match=match):
            await transfer.send(post, staged)
        assert time.monotonic() - start < WAIT_S / 2
        with pytest.raises(Unavailable, match="not open"):
            await transfer.send(post, staged)
        await post.end()

    asyncio.run(run())


def test_a_server_that_does_not_join_is_named_at_the_deadline() -> None:
    async def silent(path: str, body: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Unavailable, match=r"joining a group .* no end after 0\.5 s"):
        asyncio.run(Distributed("127.0.0.1", "gloo", 1, deadline_s=0.5).open(silent))
