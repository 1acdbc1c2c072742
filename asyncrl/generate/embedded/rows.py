"""What is known of the requests being decoded: one row each, as arrays, so that a step has no Python loop over rows."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch

from asyncrl.errors import ConfigError
from asyncrl.generate.embedded.sampling import RowSampling
from asyncrl.types import FinishReason, Generation, GenerationRequest, Span, Version


class Job(NamedTuple):
    """A request and the future that its caller holds."""

    request: GenerationRequest
    future: "Future[Generation]"


class Finished(NamedTuple):
    """A job with its generation, or why it can't be served after all."""

    job: Job
    generation: Generation | ConfigError


def spans_of(starts: Sequence[tuple[Version, int]], length: int) -> tuple[Span, ...]:
    """Runs of equal version over `length` tokens, from (version, first token) in order; empty runs vanish."""
    ends = [start for _, start in starts[1:]] + [length]
    return tuple(Span(version, end - start) for (version, start), end in zip(starts, ends, strict=True) if end > start)


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
            size = len(request.prompt_ids)
            self.tokens[row, :size] = request.prompt_ids
            self.length[row] = self.prompt[row] = size
            self.limit[row] = size + sampling.max_tokens
            self._seed[row] = request.seed
            self._turn[row], self._turns = self._turns, self._turns + 1
            self._set_stops(row, sampling.stop_token_ids)
            self._temperature[row], self._top_p[row], self._top_k[row] = sampling.temperature, sampling.top_p, sampling.top_k
            self.alive[row] = True
            self._jobs.append(job)
            self._starts.append([(version, 0)])
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

    def abort(self, doomed: Callable[[Job], bool]) -> list[Finished]:
        """Ends the living rows of these jobs."""
        return [self._end(row, "abort") for row in range(self.count) if self.alive[row] and doomed(self._jobs[row])]

    def _end(self, row: int, reason: FinishReason) -> Finished:
        self.alive[row] = False
        job, start, end = self._jobs[row], int(self.prompt[row]), int(self.length[row])
        sampling = job.request.sampling
        cut = sampling.top_p < 1.0 or sampling.top_k > 0
        return Finished(
            job,
            Generation(
                id=job.request.id,
                token_ids=self.tokens[row, start:end].tolist(),
                logprobs=self._logprobs[row, start:end].tolist(),
                kept_logmass=self._kept[row, start:end].tolist() if cut else None,
                spans=spans_of(self._starts[row], end - start),
                finish_reason=reason,
            ),
        )

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
        for array in (self._turn, self._stops, self._temperature, self._top_p, self._top_k):
            array[to] = array[source]
        for hole, mover in zip(to.tolist(), source.tolist(), strict=True):
            self._jobs[hole], self._starts[hole] = self._jobs[mover], self._starts[mover]
        del self._jobs[left:], self._starts[left:]
        self.count, self._sampling = left, None
        return to, source

    def clear(self) -> tuple[list[Job], int]:
        """Takes out all rows. Returns the jobs of the living ones, in the order in which they joined, and the number of tokens
        sampled for them, which are lost."""
        living = [int(row) for row in np.argsort(self._turn[: self.count]) if self.alive[row]]
        jobs = [self._jobs[row] for row in living]
        sampled = int((self.length[living] - self.prompt[living]).sum())
        self._jobs.clear()
        self._starts.clear()
        self.count, self._sampling = 0, None
        return jobs, sampled

    def request(self, row: int) -> GenerationRequest:
        return self._jobs[row].request

    def jobs(self) -> list[Job]:
        """The jobs of the living rows."""
        return [self._jobs[row] for row in range(self.count) if self.alive[row]]
