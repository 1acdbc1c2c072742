"""What is known of the requests being decoded: one row each, as arrays, so that a step has no Python loop over rows."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from asyncrl.errors import ConfigError
from asyncrl.generate.embedded.sampling import RowSampling
from asyncrl.interfaces import Told
from asyncrl.types import FinishReason, Generation, GenerationRequest, Span, Tokens, Version

_NEVER = 1 << 62


class Job(NamedTuple):
    """A request and the future that its caller holds."""

    request: GenerationRequest
    future: "Future[Generation]"
    told: Told | None = None


class Grown(NamedTuple):
    """What came of a job that goes on: the tokens from number `start` on."""

    job: Job
    start: int
    tokens: Tokens


class Finished(NamedTuple):
    """A job with its generation, or why it can't be served after all."""

    job: Job
    generation: Generation | ConfigError


def spans_of(starts: Sequence[tuple[Version, int]], length: int) -> tuple[Span, ...]:
    """Runs of equal version over `length` tokens, from (version, first token) in order; empty runs vanish."""
    ends = [start for _, start in starts[1:]] + [length]
    return tuple(Span(version, end - start) for (version, start), end in zip(starts, ends, strict=True) if end > start)


def starts_of(spans: Sequence[Span]) -> list[tuple[Version, int]]:
    """The same (version, first token) for given spans."""
    ends = accumulate(span.length for span in spans)
    return [(span.version, end - span.length) for span, end in zip(spans, ends, strict=True)]


class Rows:
    """State of rows 0 … count−1. A row that has ended stays, as a dummy, until `drop` takes it out."""

    def __init__(self, slots: int, max_length: int, device: torch.device) -> None:
        self.count = 0
        self.tokens = np.zeros((slots, max_length), dtype=np.int64)
        self.length = np.zeros(slots, dtype=np.int64)  # tokens known, the prompt's included; the last one is fed next
        self.alive = np.zeros(slots, dtype=bool)
        self._device = device
        self._index = np.arange(slots)
        self._logprobs = np.zeros((slots, max_length), dtype=np.float32)
        self._kept = np.zeros((slots, max_length), dtype=np.float32)
        self.prompt = np.zeros(slots, dtype=np.int64)  # tokens of the prompt
        self.limit = np.zeros(slots, dtype=np.int64)  # length at which the row ends
        self._told = np.zeros(slots, dtype=np.int64)  # length up to which its caller has heard of it
        self._seed = np.zeros(slots, dtype=np.int64)
        self._turn = np.zeros(slots, dtype=np.int64)  # rises in the order in which rows joined
        self._turns = 0
        self._stops = np.full((slots, 1), -1, dtype=np.int64)
        self._temperature = np.ones(slots)
        self._top_p = np.ones(slots)
        self._top_k = np.zeros(slots, dtype=np.int64)
        self._jobs: list[Job] = []
        self._starts: list[list[tuple[Version, int]]] = []
        self._sampling: RowSampling | None = None

    def add(self, jobs: Sequence[Job], version: Version) -> list[int]:
        """Appends a row per job, its tokens to come from `version`. Returns the rows' numbers."""
        first = self.count
        for job in jobs:
            row, request, sampling = self.count, job.request, job.request.sampling
            known, size, begun = request.known_ids, len(request.prompt_ids), request.begun
            self.tokens[row, : len(known)] = known
            self.length[row], self.prompt[row] = len(known), size
            self._told[row] = _NEVER if job.told is None else len(known)
            starts = [(version, len(known) - size)]
            if begun is not None:
                self._logprobs[row, size : len(known)] = begun.logprobs
                self._kept[row, size : len(known)] = begun.kept_logmass or 0.0
                starts = [*starts_of(begun.spans), *starts]
            self.limit[row] = size + sampling.max_tokens
            self._seed[row] = request.seed
            self._turn[row], self._turns = self._turns, self._turns + 1
            self._set_stops(row, sampling.stop_token_ids)
            self._temperature[row], self._top_p[row], self._top_k[row] = sampling.temperature, sampling.top_p, sampling.top_k
            self.alive[row] = True
            self._jobs.append(job)
            self._starts.append(starts)
            self.count += 1
        self._sampling = None
        return list(range(first, self.count))

    def _set_stops(self, row: int, stops: tuple[int, ...]) -> None:
        if (extra := len(stops) - self._stops.shape[1]) > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, extra)), constant_values=-1)
        self._stops[row] = -1
        self._stops[row, : len(stops)] = stops

    def last(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to feed next and their positions, both [count]."""
        positions = self.length[: self.count] - 1
        return self.tokens[self._index[: self.count], positions], positions

    def known(self, row: int) -> np.ndarray:
        """The tokens that the cache must hold before the row's next step: all but the last."""
        return self.tokens[row, : self.length[row] - 1]

    def prompts(self) -> list[tuple[int, ...]]:
        """The token ids of each row's prompt."""
        return [job.request.prompt_ids for job in self._jobs]

    def draw_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Seeds [count], and how many tokens each row has sampled [count]: the counter of its random numbers."""
        return self._seed[: self.count], self.length[: self.count] - self.prompt[: self.count]

    def sampling(self) -> RowSampling:
        """The rows' sampling parameters; rebuilt only when the rows changed."""
        if self._sampling is None:
            n = self.count
            self._sampling = RowSampling.of(self._temperature[:n], self._top_p[:n], self._top_k[:n], self._device)
        return self._sampling

    def record(self, ids: np.ndarray, logprobs: np.ndarray, kept: np.ndarray | None) -> list[Finished]:
        """Appends one sampled token to every living row; returns those that ended with it. All arrays [count]."""
        n = self.count
        rows = self._index[:n][self.alive[:n]]
        at = self.length[rows]
        self.tokens[rows, at] = ids[rows]
        self._logprobs[rows, at] = logprobs[rows]
        self._kept[rows, at] = 0.0 if kept is None else kept[rows]
        self.length[rows] = at + 1
        stopped = (self._stops[rows] == ids[rows, None]).any(axis=1)
        ended = stopped | (at + 1 >= self.limit[rows])
        if not ended.any():
            return []
        return [
            self._end(int(row), "stop" if stop else "length") for row, stop in zip(rows[ended], stopped[ended], strict=True)
        ]

    def grown(self, interval: int) -> list[Grown]:
        """What came of the rows that have at least `interval` tokens more than their callers have heard of."""
        n = self.count
        rows = np.flatnonzero(self.alive[:n] & (self.length[:n] - self._told[:n] >= interval))
        found = [self._grown(int(row), int(self._told[row])) for row in rows]
        self._told[rows] = self.length[rows]
        return found

    def _grown(self, row: int, begin: int) -> Grown:
        """Its tokens from position `begin` on."""
        start, end = begin - int(self.prompt[row]), int(self.length[row])
        spans = spans_of([(v, max(0, at - start)) for v, at in self._starts[row]], end - begin)
        return Grown(self._jobs[row], start, Tokens(**self._lists(row, begin, end), spans=spans))

    def _lists(self, row: int, begin: int, end: int) -> dict[str, Any]:
        """Of `Tokens`, for positions begin to end."""
        sampling = self._jobs[row].request.sampling
        cut = sampling.top_p < 1.0 or sampling.top_k > 0
        return {
            "token_ids": self.tokens[row, begin:end].tolist(),
            "logprobs": self._logprobs[row, begin:end].tolist(),
            "kept_logmass": self._kept[row, begin:end].tolist() if cut else None,
        }

    def abort(self, doomed: Callable[[Job], bool]) -> list[Finished]:
        """Ends the living rows of these jobs."""
        return [self._end(row, "abort") for row in range(self.count) if self.alive[row] and doomed(self._jobs[row])]

    def _end(self, row: int, reason: FinishReason) -> Finished:
        self.alive[row] = False
        job, start, end = self._jobs[row], int(self.prompt[row]), int(self.length[row])
        spans = spans_of(self._starts[row], end - start)
        return Finished(job, Generation(id=job.request.id, **self._lists(row, start, end), spans=spans, finish_reason=reason))

    def mark(self, version: Version) -> None:
        """Later tokens come from `version`."""
        for row in range(self.count):
            self._starts[row].append((version, int(self.length[row] - self.prompt[row])))

    def drop(self) -> tuple[np.ndarray, np.ndarray]:
        """Takes out the ended rows. Rows from the back fill the holes: returns (to, source), for the cache to follow."""
        n, alive = self.count, self.alive[: self.count]
        left = int(alive.sum())
        to = self._index[:left][~alive[:left]]
        source = self._index[left:n][alive[left:]]
        for array in (self.tokens, self._logprobs, self._kept, self.length, self.alive, self.prompt, self.limit, self._seed):
            array[to] = array[source]
        for array in (self._told, self._turn, self._stops, self._temperature, self._top_p, self._top_k):
            array[to] = array[source]
        for hole, mover in zip(to.tolist(), source.tolist(), strict=True):
            self._jobs[hole], self._starts[hole] = self._jobs[mover], self._starts[mover]
        del self._jobs[left:], self._starts[left:]
        self.count, self._sampling = left, None
        return to, source

    def clear(self) -> tuple[list[Job], int]:
        """Takes out all rows. Returns the jobs of the living ones, in the order in which they joined, and the number of tokens
        sampled for them, which are lost. Their callers hear of them no more: it would not go with what they have heard."""
        living = [int(row) for row in np.argsort(self._turn[: self.count]) if self.alive[row]]
        jobs = [self._jobs[row]._replace(told=None) for row in living]
        sampled = int(self.length[living].sum()) - sum(len(job.request.known_ids) for job in jobs)
        self._jobs.clear()
        self._starts.clear()
        self.count, self._sampling = 0, None
        return jobs, sampled

    def request(self, row: int) -> GenerationRequest:
        return self._jobs[row].request

    def jobs(self) -> list[Job]:
        """The jobs of the living rows."""
        return [self._jobs[row] for row in range(self.count) if self.alive[row]]
