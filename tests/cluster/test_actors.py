"""The Ray shells, called as the plain objects that they are."""

import asyncio
from typing import Any

import pytest

from asyncrl.cluster.actors import StoreActor
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
