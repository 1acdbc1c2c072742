"""The Ray shells, called as the plain objects that they are."""

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from asyncrl.cluster.actors import StoreActor, end_with_node
from asyncrl.cluster.plan import RunPlan
from asyncrl.config import Deployment


class OnAFullDisk:
    async def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_store_that_can_not_hand_its_log_to_the_disk_ends_all_the_same(tiny_recipe: Any) -> None:
    async def scenario() -> None:
        actor = StoreActor(RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir="/r", started=1, loopback=True))
        actor._store = OnAFullDisk()
        running = asyncio.ensure_future(actor.run())
        with pytest.raises(OSError, match="No space left"):
            await actor.stop()
        await running  # else the run's end would wait for it

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_worker_ends_with_its_raylet_whatever_the_clock_says() -> None:
    code = "from asyncrl.cluster.actors import end_with_node; end_with_node(); print('up', flush=True); input()"
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as raylet:
        environment = os.environ | {"RAY_RAYLET_PID": str(raylet.pid)}
        command = [sys.executable, "-c", code]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        with worker:
            assert worker.stdout.readline() == "up\n"
            assert worker.poll() is None
            raylet.kill()
            assert worker.wait(60) == 1


@pytest.mark.parametrize("raylet", [None, "2147483647"])
def test_a_worker_that_can_not_see_its_raylet_goes_on(monkeypatch: pytest.MonkeyPatch, raylet: str | None) -> None:
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    if raylet is not None:
        monkeypatch.setenv("RAY_RAYLET_PID", raylet)
    end_with_node()
