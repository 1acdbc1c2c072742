"""The learner's main loop: leases full batches, trains, commits, publishes. Plain class; Ray is put on in `cluster/`.

    fence(c₀) ─► publish c₀ ─► ┌ take batch ─► update ─► commit ─► publish ─► (checkpoint) ─► (request_eval) ┐ ─► …
                               └─────────────────────────────────────────────────────────────────────────────┘
    meanwhile, in a helper:      lease_batch(c+1) ─► rows(c+1), for the update at which they will be trained
Waits only for that batch: `lease_batch` is a long poll for the store's oldest full batch. Commit comes before publish, so
that no generator ever holds weights that a restore would not reach again.

Prefetching does not raise the lag of the groups chosen, which were the oldest ready ones anyway. A straggler that becomes
ready during the update under way misses one batch, and trains one version later; with `mask`, tokens of it that were at the
bound are masked. The selector `freshest` chooses from what was ready one update earlier.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from asyncrl.errors import CheckpointError, Closed, Unavailable
from asyncrl.interfaces import LearnerStore, WeightSink
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.parallel.gang import Gang
from asyncrl.learn.parallel.rank import Rank
from asyncrl.report.timing import TimeInState
from asyncrl.types import BatchLease, Report, TrainRollout, Version

log = logging.getLogger(__name__)


class LeasedBatch(NamedTuple):
    """A lease and its rows."""

    lease: BatchLease
    rollouts: list[TrainRollout]
    rows_s: float  # how long the rows took to come, in the helper thread


class Learner:
    """The one who leads the training: it alone talks to the store and the weight bus.

    ranks: who trains: the only rank, or the view that the first of several has of all. checkpoints: as the ranks have them.
    open_bus: makes the sending end of the weight bus for an incarnation, once the store has given one.
    save_freq: updates between checkpoints. eval_freq: updates between held-out evaluations; None: never. poll_s: the
    longest wait of one call, which bounds how late `stop` is noticed.
    """

    def __init__(
        self,
        ranks: Rank | Gang,
        store: LearnerStore,
        open_bus: Callable[[int], WeightSink],
        checkpoints: Checkpoints,
        *,
        save_freq: int,
        eval_freq: int | None,
        poll_s: float,
    ) -> None:
        self._ranks = ranks
        self._store = store
        self._open_bus = open_bus
        self._bus: WeightSink | None = None
        self._checkpoints = checkpoints
        checkpoints.on_whole = self._retain
        self._save_freq = save_freq
        self._eval_freq = eval_freq
        self._poll_s = poll_s
        self._time = TimeInState()
        self._stopping = threading.Event()
        self._halting = threading.Event()  # ends this `run`, no later one
        self._save_asked = threading.Event()  # by hand, after the update under way
        self._started = False
        self._version = Version(0, 0)
        self._saved: Version | None = None  # the newest that is checkpointed
        self._evaluated: Version | None = None  # the newest whose evaluation was requested
        self._timings: dict[str, float] = defaultdict(float)  # since the last update was made
        self._since = time.monotonic()  # when that was; time between two `run`s is left out
        self._ended_blocks = 0  # of those that are timed

    def start(self, at: int | None = None) -> Version:
        """Restores the newest checkpoint that the log reaches (or that of update `at`), fences older learners, and publishes
        what it restored.

        In a new run this is version 0 of the starting weights, saved as step_000000. `run` calls it if nobody has.
        """
        with self._timed("sync", "timing_s/restore"):
            restored = self._checkpoints.choose(at, self._store.lineage().refusal)
            if restored is not None:
                self._ranks.load(restored)
            committed = restored or 0
            fence = self._store.fence(committed)
        if fence.committed != committed:
            raise CheckpointError(
                f"the store stands at update {fence.committed} after a fence at checkpoint {committed}: "
                "run directory and store belong to different runs; resume with the run's own replay folder"
            )
        self.close()
        self._bus = self._open_bus(fence.incarnation)
        self._version, self._started = Version(fence.incarnation, committed), True
        log.info("start at version %s, %d batches to retrain from the log", self._version, fence.reopened)
        if restored is None:
            self._save()
            self._checkpoints.wait()  # nothing is published that could be lost
        else:
            self._saved = self._version
            self._checkpoints.discard_after(committed)  # not before the fence: until then they are another learner's
            self._retain(self._version)
        self._publish()
        self._save_and_evaluate()
        return self._version

    def run(self, until: int) -> int:
        """Trains until `until` updates are committed, the data has ended, or `stop`; returns the updates committed.

        The last version is checkpointed and evaluated; after `halt` checkpointed only, after `stop` neither. Raises Fenced if a
        newer learner took over, Unavailable without a store, NonFinite if training broke down. A closed store ends it quietly.
        """
        self._time.enter("busy")
        self._halting.clear()
        self._since = time.monotonic() - sum(self._timings.values())
        try:
            if not self._started:
                self.start()
            with closing(self._batches(until)) as batches:
                while self.committed < until and not self._ending():
                    with self._timed("wait:store", "timing_s/wait_batch"):
                        batch = next(batches, None)
                    self._checkpoints.check()
                    if batch is None:
                        break
                    self._train(batch)
            if not self._ending():
                self._save_and_evaluate(last=True)
            elif self._halting.is_set() and self._saved != self._version:
                self._save()
            with self._timed("sync", "timing_s/checkpoint"):
                self._checkpoints.wait()
        except Closed:
            log.info("the store has closed; ending at update %d", self.committed)
        finally:
            self._time.enter("wait:idle")
        return self.committed

    @property
    def committed(self) -> int:
        return self._version.update

    def stop(self) -> None:
        """Ends `run` after the update or poll under way; idempotent, from any thread."""
        self._stopping.set()

    def halt(self) -> None:
        """Ends the `run` under way like `stop`, with a checkpoint; a later `run` goes on. Idempotent, from any thread."""
        self._halting.set()

    def _ending(self) -> bool:
        return self._stopping.is_set() or self._halting.is_set()

    def close(self) -> None:
        """Closes the weight bus; idempotent."""
        if self._bus is not None:
            self._bus.close()
            self._bus = None

    def admit(self, receiver: str, incarnation: int) -> object:
        """What a receiver needs to find and open the weight bus. Raises Unavailable where there is none, and Fenced."""
        if (bus := self._bus) is None:
            raise Unavailable("the learner has no weight bus now: ask again")
        return bus.admit(receiver, incarnation)

    def report(self) -> Report:
        """Time per state of the main loop, and what the weight bus says of itself. Progress is packs, and everything timed.

        Raises what went wrong with a checkpoint in the background, whatever the main loop waits for.
        """
        self._checkpoints.check()
        bus = self._bus
        gauges = {} if bus is None else {f"bus/{name}": value for name, value in bus.gauges().items()}
        gauges |= {"update": float(self.committed), **self._ranks.holds}
        return Report(
            name="learner",
            role="learner",
            seconds=self._time.seconds(),
            gauges=gauges,
            progress=self._ranks.pulse.progress + self._ended_blocks,
            doing=self._ranks.pulse.doing,
        )

    def save_checkpoint(self) -> str:
        """Saves the current version, between runs, for ever; returns the folder when it is whole."""
        if not self._started:
            self.start()
        path = self._save(by_hand=True)
        self._checkpoints.wait()
        return str(path)

    def save_soon(self) -> None:
        """Has the version after the update under way saved by hand, for ever. From any thread; waits for nothing."""
        self._save_asked.set()

    def evaluate(self) -> None:
        """Requests an evaluation of the current version, unless it has had one. From outside between runs only."""
        if not self._started:
            self.start()
        if self._evaluated != self._version:
            with self._timed("wait:store", "timing_s/request_eval"):
                self._store.request_eval(self._version)
            self._evaluated = self._version

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """What the present policy gives the tokens of a response, in nats. Between runs only."""
        return self._ranks.logprobs_of(prompt_ids, response_ids)

    def export(self, folder: str) -> None:
        """Writes the current policy as a Hugging Face folder, tokenizer included."""
        self._ranks.export(folder)

    def _batches(self, until: int) -> Generator[LeasedBatch, None, None]:
        """The batches to train from now up to update `until`, which lies ahead; fewer at the end of the data, `stop` or `halt`.

        Waits for the next one, which a helper thread has been fetching since the one before was handed out. The store is told
        after which update a batch will be trained: it applies the bound for that moment, not for the moment of asking. A lease
        ends only by its commit or a newer fence, so nothing is leased that would not be trained. Raises what the store raised.
        Closing the generator waits for the poll under way, `poll_s` at most while the store lives.
        """
        closed = threading.Event()

        def fetch(update: int) -> LeasedBatch | None:
            while not (closed.is_set() or self._ending()):
                lease = self._store.lease_batch(update, self._poll_s)
                if lease.groups:
                    began = time.monotonic()
                    rollouts = self._store.rows(lease.groups)
                    return LeasedBatch(lease, rollouts, time.monotonic() - began)
                if lease.ended:
                    return None
            return None

        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as helper:
            try:
                coming = helper.submit(fetch, self.committed)
                for update in range(self.committed, until):
                    batch = coming.result()
                    if batch is None:
                        return
                    if update + 1 < until:
                        coming = helper.submit(fetch, update + 1)
                    yield batch
            finally:
                closed.set()

    def _train(self, batch: LeasedBatch) -> None:
        version, (lease, rollouts, rows_s) = self._version, batch
        self._started = False  # until the commit is in, these weights have no name: a failure starts from the checkpoint
        with self._timed("busy", "timing_s/step"):
            metrics = self._ranks.update(rollouts, version.update)
        metrics |= self._paced(metrics)
        metrics["timing_s/rows"] = rows_s  # in the helper, during the update before
        metrics["training/groups"] = float(len(lease.groups))
        metrics["training/rollouts"] = float(len(rollouts))
        metrics["training/replayed"] = float(lease.replayed)
        following = Version(version.incarnation, version.update + 1)
        with self._timed("wait:store", "timing_s/commit"):
            self._store.commit(lease.lease, following, metrics)
        self._version, self._started = following, True
        self._publish()
        self._save_and_evaluate()

    def _paced(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What was timed since the update before this one was made, how long that is in all, and what of it nothing names.

        metrics: of the update just made, whose own timings are parts of its `timing_s/step`.
        """
        timings, now = dict(self._timings), time.monotonic()
        taken_s, self._since = now - self._since, now
        self._timings.clear()
        named_s = metrics.get("timing_s/update", 0.0) - metrics.get("timing_s/unaccounted", 0.0)
        named_s += sum(seconds for name, seconds in timings.items() if name != "timing_s/step")
        tokens_per_s = metrics.get("perf/total_num_tokens", 0.0) / taken_s
        return timings | {
            "timing_s/unaccounted": taken_s - named_s,
            "perf/time_per_step": taken_s,
            "perf/throughput": tokens_per_s / self._ranks.count,
        }

    def _save_and_evaluate(self, last: bool = False) -> None:
        """Checkpoints this version, and requests its evaluation, where it is its turn, asked for or the last; neither twice."""
        if self._save_asked.is_set():
            self._save_asked.clear()
            self._save(by_hand=True)
        elif self._saved != self._version and (last or self.committed % self._save_freq == 0):
            self._save()
        if self._eval_freq is not None and (last or self.committed % self._eval_freq == 0):
            self.evaluate()

    def _publish(self) -> None:
        with self._timed("sync", "timing_s/publish"):
            assert self._bus is not None, "published before start"
            self._bus.publish(self._version, self._ranks.staged)

    def _save(self, by_hand: bool = False) -> Path:
        """Begins to write a checkpoint of this version. It counts when it is whole; what fails then ends the run."""
        with self._timed("sync", "timing_s/checkpoint"):
            path = self._ranks.save(self._version, by_hand)
            self._saved = self._version
        return path

    def _retain(self, version: Version) -> None:
        """Makes the checkpoint of a version count, then deletes those that are no longer kept."""
        oldest = self._checkpoints.oldest_kept(version.update)
        self._store.checkpointed(oldest)  # first: it syncs the log, and a learner that was fenced deletes nothing
        self._checkpoints.prune(oldest)

    @contextmanager
    def _timed(self, state: str, name: str) -> Iterator[None]:
        """Counts the block's time to a ledger state and to a metric, which is logged with the next commit."""
        started = time.monotonic()
        with self._time.span(state):
            yield
        self._timings[name] += time.monotonic() - started
        self._ended_blocks += 1
