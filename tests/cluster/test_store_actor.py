"""The store behind real Ray actors: a crowd of generators that waits holds up nobody, and is answered at once."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from asyncrl.cluster.actors import StoreActor
from asyncrl.cluster.members import STORE_GROUPS
from asyncrl.cluster.transport import call_store
from asyncrl.config import SamplingSpec
from asyncrl.errors import Closed
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.replay.store import ReplayStore
from asyncrl.staleness import Staleness
from asyncrl.types import Key, Prompt, Sampling, Version

pytestmark = pytest.mark.ray
V, CROWD = Version(1, 0), 1100


class Store(StoreActor):
    """With a plan of the test's own."""

    async def open(self, folder: str) -> None:
        prompts = [Prompt(row=i, ids=(1, 2), data_source="") for i in range(2400)]
        sampled = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(0,))
        source = Source(prompts=prompts, sampling=sampled)
        rule, sampling = Staleness(max_lag=0, batch_groups=1200), SamplingSpec(n=2, min_valid=1)
        self._store = ReplayStore(StorePlan(rule=rule, source=source, sampling=sampling), Path(folder))

    async def waiting(self) -> tuple[int, float]:
        """How many calls wait, and the seconds of CPU until now."""
        return len(self._store._waiters.get("all", ())), time.process_time()


def test_more_generators_wait_than_anybody_has_and_each_is_answered_at_once(local_ray: None, tmp_path: Path) -> None:
    store: Any = ray.remote(concurrency_groups=STORE_GROUPS)(Store).options(num_cpus=0).remote(None)
    ray.get(store.open.remote(str(tmp_path)))

    def ask(verb: str, *arguments: Any, worker: str, sequence: int = 1) -> Any:
        return call_store(store, verb, *arguments, key=Key(worker, 1, sequence, 1))

    def crowd(count: int) -> None:
        while (now := ray.get(store.waiting.remote()))[0] != count:
            assert time.monotonic() < until, now

    until = time.monotonic() + 60.0
    ray.get(ask("fence", 0, worker="learner"))
    tickets = ray.get(ask("reserve", 1200, V, (), 1.0, worker="gone")).tickets
    waits = [ask("reserve", 1, V, (), 60.0, worker=f"g{i}") for i in range(CROWD)]
    crowd(CROWD)
    assert ray.get(ask("recall", worker="g0", sequence=2)) is None  # of the same group of calls as those that wait
    assert ray.get(waits[0]).waiting_for == "bound full"
    _, before = ray.get(store.waiting.remote())
    ray.get(ask("forget", "gone", 1, worker="supervisor"))
    assert sorted(t.group for reserved in ray.get(waits[1:]) for t in reserved.tickets) == [
        t.group for t in tickets[: CROWD - 1]
    ]
    waiting, after = ray.get(store.waiting.remote())
    assert waiting == 0
    print(f"{CROWD - 1} lost groups to as many who waited: {1e3 * (after - before):.0f} ms of CPU")
    left = [ask("reserve", 0, V, (), 60.0, worker=f"h{i}") for i in range(50)]
    crowd(50)
    ray.get(store.stop.remote())
    for wait in left:
        with pytest.raises(Closed):
            ray.get(wait)
