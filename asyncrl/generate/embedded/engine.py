"""The embedded engine: continuous batching over Hugging Face causal LMs (docs/architectures.md says which).

    submit ─► queue ─► admission ─► prefill ─┐
                                             ├─► decode step ─► sample ─► record ─► future
    update_weights ══► between two steps ════╝        (rows join and leave at every step)

After Orca (Yu et al., OSDI 2022) for iteration-level batching, and PipelineRL for swaps in flight.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from transformers import PreTrainedModel

from asyncrl.config import UpdateMode
from asyncrl.errors import AsyncRLError, Closed, ConfigError, Unavailable
from asyncrl.generate.embedded.batch import DecodeBatch, out_of_memory
from asyncrl.generate.embedded.kv_cache import longest_context
from asyncrl.generate.embedded.rows import Finished, Grown, Job
from asyncrl.generate.embedded.scheduling import GroupAlone, JoinAtOnce, StepGate
from asyncrl.generate.requests import check_request, settle
from asyncrl.interfaces import Tensors, Told
from asyncrl.models.loading import load_weights
from asyncrl.types import Generation, GenerationRequest, SwapReport, Version


class TorchEngine:
    """An `Engine` (asyncrl.interfaces) in this process. Thread-safe; steps run in its own thread after `start`, or in
    whoever calls `step`. Owns the model: nobody else may run or change it. Nothing is decoded before the first weights.

    slots: rows decoded together. max_length: prompt + response tokens (cut to what the model's positions allow).
    update_mode: `in_flight` recomputes the cache of unfinished rows, so every logprob is that of the tagged version;
    `keep_kv` does not, which is faster and outside that guarantee; `drain` swaps when the running rows have ended;
    `restart` regenerates unfinished rows from their prompts, so that a rollout is of one version and its work so far lost.
    deterministic: one group at a time, rows constant until all of it has ended; results repeat to the bit.
    Otherwise the turns of an episode go on with what was computed for the last one, unless a swap came between them.
    stream_interval: tokens of a request between two times that its caller is told of it.
    kv_bytes: what the cache may take; None: a share of what the device has left (`device_budget`). A request joins when there
    is room for the longest that it and all running rows may get, so that no row ever has to leave; until then it waits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        update_mode: UpdateMode = "in_flight",
        deterministic: bool = False,
        kv_bytes: int | None = None,
        stream_interval: int = 256,
    ) -> None:
        self.max_length = longest_context(model, max_length)
        self._model = model
        self.slots = slots
        self.hands_over = not deterministic and update_mode != "restart"
        self._weights_bytes = float(sum(weight.nbytes for weight in model.parameters()))
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._batch = DecodeBatch(model, slots=slots, max_length=self.max_length, keep_ended=deterministic, kv_bytes=kv_bytes)
        self._admission = GroupAlone(slots) if deterministic else JoinAtOnce(slots)
        self._deterministic = deterministic
        self._update_mode, self._stream_interval = update_mode, stream_interval
        self._gate = StepGate()
        # Guards everything below; notified at every change. Taken inside the gate, never around it.
        self._cond = threading.Condition()
        self._queue: deque[Job] = deque()
        self.version: Version | None = None  # of the weights now in use
        self._paused = self._draining = False
        self._ended: AsyncRLError | None = None  # why the engine ended: failure or close
        self._cancelled = False  # some future since the last step
        self._beats = 0  # steps and swaps so far
        self._discarded = 0  # tokens lost with rows that began anew, since the last swap
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------- requests

    def submit_group(self, requests: Sequence[GenerationRequest], told: Told | None = None) -> "list[Future[Generation]]":
        """Queues requests together, so that they can join the same step and share one prefill of their prompt.

        The future of one raises ConfigError if it can't fit, Closed after `close`, Unavailable on failure. One that is
        cancelled gives its slot back at the next step.
        """
        jobs = [Job(request, Future(), told) for request in requests]
        for job in jobs:
            job.future.add_done_callback(self._note_cancelled)
        refusals = [self._refusal(request, requests) for request in requests]
        with self._cond:
            errors = [refusal or self._ended for refusal in refusals]
            self._queue.extend(job for job, error in zip(jobs, errors, strict=True) if error is None)
            self._cond.notify_all()
        for job, error in zip(jobs, errors, strict=True):
            if error is not None:
                settle(job.future, error)
        return [job.future for job in jobs]

    def _refusal(self, request: GenerationRequest, group: Sequence[GenerationRequest]) -> ConfigError | None:
        """Why this request of a group can't be served; None if it can."""
        if self._deterministic and len(group) > self.slots:
            return ConfigError(
                f"a group of {len(group)} rollouts > engine.slots={self.slots} in deterministic mode: it could not run as one "
                "batch; raise engine.slots or lower sampling.n"
            )
        return check_request(request, max_length=self.max_length, vocabulary=self._vocabulary) or self._batch.too_large(
            group if self._deterministic else [request]
        )

    def abort(self, group: int | None = None) -> None:
        """Ends a group's unfinished requests, or all, with finish_reason `abort` and the tokens so far. Waits for one step."""
        with self._gate.between_steps():
            finished = self._take_out(lambda job: group in (None, job.request.group))
        self._deliver(finished)

    def _note_cancelled(self, future: "Future[Generation]") -> None:
        """Called by whoever ends a future."""
        if future.cancelled():
            self._cancelled = True

    def _take_out(self, doomed: Callable[[Job], bool]) -> list[Finished]:
        """Inside the gate: ends these jobs, wherever they are, as aborted."""
        finished = self._batch.abort(doomed)
        with self._cond:
            queued = [job for job in self._queue if doomed(job)]
            self._queue = deque(job for job in self._queue if not doomed(job))
            self._cond.notify_all()  # `drain` may have waited for them
        for job in queued:
            nothing = Generation(
                id=job.request.id, token_ids=[], logprobs=[], kept_logmass=None, spans=(), finish_reason="abort"
            )
            finished.append(Finished(job, nothing))
        return finished

    # ----------------------------------------------------------------------------------------- stepping

    def start(self) -> None:
        """Starts the thread that steps; `close` ends it."""
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._cond:
                self._cond.wait_for(lambda: self._ended is not None or self._has_work())
                if self._ended is not None:
                    return
            try:
                self.step()
            except Exception:
                return  # `step` has recorded it: every future and `health` carry the cause

    def _has_work(self) -> bool:
        if self._paused or self.version is None:
            return False
        return self._batch.count > 0 or (len(self._queue) > 0 and not self._draining)

    def step(self) -> bool:
        """Lets requests join, decodes one token for every row, ends futures. False if there was nothing to do.

        A failure ends the engine: all futures raise Unavailable naming it, and it is raised here.
        """
        joining: list[Job] = []
        grown: list[Grown] = []
        try:
            with self._gate.step():
                if self._cancelled:
                    self._cancelled = False
                    self._take_out(lambda job: job.future.cancelled())
                with self._cond:
                    version = self.version
                    if self._ended is not None or version is None or not self._has_work():
                        return False
                    if not self._draining:
                        joining = self._admission.take(self._queue, self._batch.count, self._batch.room)
                with self._surviving() as finished:
                    if joining:
                        self._batch.join(joining, version)
                    finished += self._batch.advance(version)
                    grown = self._batch.grown(self._stream_interval)
        except Exception as error:
            self._fail(error, joining)
            raise
        self._deliver(finished)
        for (request, _, told), start, tokens in grown:
            assert told is not None
            told(request, start, tokens)
        return True

    @contextmanager
    def _surviving(self) -> Iterator[list[Finished]]:
        """Inside the gate: if the device runs out of memory, the budget shrinks, and all rows begin anew from their prompts,
        with their random numbers. Requests that it has no room for now are added to the list. (In the deterministic mode a
        smaller group would not be the same: the engine fails.)"""
        finished: list[Finished] = []
        try:
            yield finished
        except Exception as error:
            if self._deterministic or not out_of_memory(error):
                raise
            self._batch.cut_budget()
            self._requeue()
            with self._cond:
                outcomes = [(job, self._batch.too_large([job.request])) for job in self._queue]
                self._queue = deque(job for job, refusal in outcomes if refusal is None)
            finished += [Finished(job, refusal) for job, refusal in outcomes if refusal is not None]

    def _deliver(self, finished: list[Finished]) -> None:
        """Ends futures outside every lock: their callbacks may call the engine."""
        with self._cond:
            self._beats += 1
            self._cond.notify_all()
        for job, outcome in finished:
            settle(job.future, outcome)

    def _fail(self, error: Exception, joining: Sequence[Job] = ()) -> None:
        """The engine is over: every unfinished future and `health` name the error. Called outside the gate."""
        failure = Unavailable(f"the torch engine failed: {type(error).__name__}: {error}; restart it")
        failure.__cause__ = error
        self._settle_all(self._end(failure), joining)

    def _end(self, reason: AsyncRLError) -> AsyncRLError:
        """Refuses all further work. The first reason stays, and is returned."""
        with self._cond:
            if self._ended is None:
                self._ended = reason
            self._cond.notify_all()
            return self._ended

    def _settle_all(self, reason: AsyncRLError, joining: Sequence[Job] = ()) -> None:
        with self._cond:
            jobs = [*self._queue, *self._batch.jobs(), *joining]
            self._queue.clear()
        for job in jobs:
            settle(job.future, reason)

    # ------------------------------------------------------------------------------------------ weights

    def update_weights(self, version: Version, tensors: Tensors) -> SwapReport:
        """Swaps between two steps; in `drain` mode waits first until the running rows have ended (so not while paused).

        Raises CheckpointError for weights of another model; the engine, now of unknown weights, then refuses all work.
        """
        if self._update_mode == "drain":
            self._drain()
        try:
            with self._gate.between_steps():
                self._require_running()
                started = time.monotonic()
                load_weights(self._model, tensors)
                if self._update_mode == "restart":
                    self._requeue()
                # After a drain or a restart there is nothing to recompute.
                recomputed = 0
                with self._surviving() as refused:
                    recomputed = self._batch.swapped(version, recompute=self._update_mode != "keep_kv")
                with self._cond:
                    self.version, self._draining = version, False
                discarded, self._discarded = self._discarded, 0
                pause_s = time.monotonic() - started
            self._deliver(refused)
            return SwapReport(version=version, pause_s=pause_s, recomputed_tokens=recomputed, discarded_tokens=discarded)
        except Exception as error:
            self._fail(error)
            raise

    def _requeue(self) -> None:
        """Puts unfinished rows back at the head of the queue, in order, to be regenerated from their prompts.

        They keep their seeds, and so their random numbers: under weights that hardly changed they come out nearly the same.
        Fresh ones would favour short responses, since it is the long ones that a swap finds unfinished.
        """
        with self._cond:  # from batch to queue at once: `close` must find every job in one of them
            jobs, discarded = self._batch.clear()
            self._queue.extendleft(reversed(jobs))
            self._discarded += discarded

    def _drain(self) -> None:
        with self._cond:
            self._draining = True
            if self._thread is not None:
                self._cond.wait_for(lambda: self._ended is not None or self._batch.count == 0)
        while self._thread is None and self.step():
            pass

    # ----------------------------------------------------------------------------------------- life

    def pause(self) -> None:
        with self._cond:
            self._paused = True
        with self._gate.between_steps():
            pass

    def resume(self) -> None:
        with self._cond:
            self._paused = False
            self._cond.notify_all()

    def _require_running(self) -> None:
        if self._ended is not None:
            raise self._ended

    def health(self, deadline_s: float) -> None:
        """Returns once a step or a swap was made, at once if there is nothing to do. Else raises Unavailable (or Closed)."""
        with self._cond:
            before = self._beats
            self._cond.wait_for(
                lambda: self._ended is not None or self._beats > before or not self._has_work(), timeout=deadline_s
            )
            self._require_running()
            if self._beats == before and self._has_work():
                raise Unavailable(
                    f"the torch engine made no step in {deadline_s} s with {self._batch.count} rows running and "
                    f"{len(self._queue)} requests queued; restart it"
                )

    def gauges(self) -> dict[str, float]:
        """active: rows in every step. queued: requests that wait for a slot. kv_bytes: what the cache may take. Of prompts so
        far, prefilled_tokens: computed; reused_tokens: known from the turn before."""
        return {
            "active": float(self._batch.count),
            "queued": float(len(self._queue)),
            "weights_bytes": self._weights_bytes,
            "kv_bytes": float(self._batch.budget),
            "prefilled_tokens": float(self._batch.prefilled),
            "reused_tokens": float(self._batch.reused),
        }

    def progress(self) -> int:
        """Steps and swaps so far."""
        return self._beats

    def close(self, deadline_s: float = 30.0) -> None:
        """Ends the thread after its step; unfinished futures raise Closed. Raises Unavailable if the step takes longer."""
        reason, thread = self._end(Closed("the engine was closed")), self._thread
        if thread is not None:
            thread.join(deadline_s)
        self._settle_all(reason)
        if thread is not None and thread.is_alive():
            raise Unavailable(
                f"the torch engine's thread did not end in {deadline_s} s: a forward pass hangs; kill the process"
            )
