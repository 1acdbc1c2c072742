"""The Ray shells. A stage is a plain class with run/stop/report; here it becomes an actor, and only here."""

import asyncio
import faulthandler
import gc
import logging
import os
import select
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import ray

from asyncrl.cluster import wiring
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.transport import Peers
from asyncrl.rundir import set_up_logging
from asyncrl.types import Key, Report, Rollout

_YOUNG = 20_000  # objects that the garbage collector lets come before it looks at them; Python's own 700 are 30 rollouts


def _log_to(plan: RunPlan, name: str) -> None:
    """This process's log goes to `logs/<name>.log` of the run directory, which must be the one that the driver sees."""
    plan.check_reach()
    set_up_logging(logging.FileHandler(plan.paths.logs / f"{name}.log"))
    logger = logging.getLogger("asyncrl")
    logger.setLevel(min(logger.level, plan.log_level))


def end_with_node() -> None:
    """Ends this process, a Ray worker, as soon as the raylet of its node ends. Ray looks for that too, but by the wall clock:
    once it was set back by an hour, workers of a dead driver live for an hour, and a store keeps its log locked."""
    try:
        raylet = os.pidfd_open(int(os.environ["RAY_RAYLET_PID"]))
    except (KeyError, OSError):  # in a container of its own the raylet is not to be seen
        return

    def wait() -> None:
        select.select([raylet], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="raylet", daemon=True).start()


def _settle_memory() -> None:
    """What a start has built, stays: the garbage collector need not look through it again and again, for 0.2 s each time in a
    process that has imported torch and transformers; nor as often through rollouts, which make no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG)


class StageActor:
    """A generator, reward worker or learner as an actor. Threaded: `run` occupies one thread for the actor's life,
    the other calls are answered beside it."""

    def __init__(self, role: str, name: str, restart_count: int, plan: RunPlan, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is first imported, which is later
        self._role, self._name, self._restart_count, self._plan = role, name, restart_count, plan
        self._peers = Peers()
        self._stage: Any = None
        self._closers: tuple[Callable[[], None], ...] = ()
        self._started = threading.Event()
        self._running = threading.Lock()

    def connect(self, peer: str, restart_count: int, value: Any) -> None:
        """Tells where a peer is now."""
        self._peers.put(peer, restart_count, value)

    def start(self, *arguments: Any) -> tuple[int, str]:
        """Builds the stage: loads models, reaches peers. Returns its pid and its node."""
        end_with_node()
        _log_to(self._plan, self._name)
        known = self._role, self._name, self._restart_count, self._plan, self._peers
        self._stage, self._closers = wiring.build(*known, *arguments)
        _settle_memory()
        self._started.set()
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def run(self, *arguments: Any) -> None:
        with self._running:
            self._stage.run(*arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the stage: of a learner's between runs, of one of its ranks' once it is there."""
        self._started.wait()
        return getattr(self._stage, method)(*arguments)

    def answer_first(self, place: int) -> Rollout:
        """A generator's answer to the prompt at a place, which the store does not see."""
        self._started.wait()
        answer: Rollout = self._stage.answer(wiring.first_ticket(self._plan, place))
        return answer

    def where(self) -> tuple[str, Report]:
        """The node and device that it computes on, and its report."""
        device = f"{os.environ['OMP_NUM_THREADS']} CPU threads"
        if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_available():
            device = ", ".join(cuda.get_device_name(i) for i in range(cuda.device_count()))
        return f"{os.uname().nodename}, {device}", self.report()

    def report(self) -> Report:
        return self._stage.report()

    def stop(self) -> None:
        """Ends `run`, then closes what the stage used: sockets, shared memory, threads. Waits for both."""
        self._peers.close()
        if self._stage is not None:
            self._stage.stop()
        if self._running.acquire(timeout=self._plan.deployment.limits.stop_timeout_s):
            self._running.release()
        for close in self._closers:
            close()

    def stacks(self) -> str:
        """The stack of every thread, for the watchdog."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()


class StoreActor:
    """The replay store as an actor: asynchronous, with a concurrency group, and so an event loop, per kind of caller."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._store: Any = None
        self._stopped = asyncio.Event()

    async def start(self) -> tuple[int, str]:
        """Opens the log, or rebuilds from it."""
        end_with_node()
        _log_to(self._plan, "store")
        self._store = wiring.build_store(self._plan)
        _settle_memory()
        return os.getpid(), ray.get_runtime_context().get_node_id()

    async def call(self, verb: str, key: Key, *arguments: Any) -> Any:
        """In the concurrency group of the verb's protocol (transport.call_store)."""
        return await self._store.call(verb, key, *arguments)

    async def run(self) -> None:
        """Ends at `stop`; meanwhile its death is what the supervisor notices."""
        await self._stopped.wait()

    async def stop(self) -> None:
        try:
            if self._store is not None:
                await self._store.close()
        finally:  # also where the log can't be handed to a full disk
            self._stopped.set()
