"""The running batch: the rows being decoded and the model's cache of them, kept in step.

`Decoder` runs the model: it fills rows of the cache, decodes all of them one token further, moves rows; it knows no requests.
`DecodeBatch` puts requests into rows: one method per thing that can happen between two tokens.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from asyncrl.errors import ConfigError, NonFinite
from asyncrl.generate.embedded.kv_cache import SlotCache, require_servable, use_slot_attention
from asyncrl.generate.embedded.masks import DecodeMasks
from asyncrl.generate.embedded.rows import Finished, Grown, Job, Rows
from asyncrl.generate.embedded.sampling import sample, uniforms
from asyncrl.models.room import available_bytes
from asyncrl.types import GenerationRequest, Version

PREFILL_TOKENS = 8192  # padded tokens in one prefill forward; bounds its activations


def device_budget(device: torch.device) -> int:
    """Bytes for the KV cache where nothing is said: 0.8 of what a GPU has free, which leaves room for the activations; on a CPU
    half of what this process can get, since others share it."""
    return int(0.8 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes() // 2


def out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory. (Where the system overcommits, a CPU has no such error: only the budget helps.)"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Decoder:
    """Runs the forward passes of a slot engine. Not thread-safe. Call under `torch.inference_mode`.

    A row of length L holds tokens 0 … L−1, of which the cache knows 0 … L−2: the last one is fed by the next `decode`.
    So `fill` needs no logits, and admitting a prompt and recomputing a row after a swap are the same call.
    together: attention is never split by the rows' lengths.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, max_length: int, together: bool = False) -> None:
        require_servable(model)
        use_slot_attention(model)
        self.model = model.eval()
        self.device = next(model.parameters()).device
        text = model.config.get_text_config(decoder=True)
        self.cache = SlotCache(
            layers=text.num_hidden_layers, slots=slots, max_length=max_length, device=self.device, together=together
        )
        self._masks = DecodeMasks(text, max_length=max_length, dtype=model.dtype, device=self.device)
        with torch.inference_mode():
            self._fill_chunk([np.zeros(1, dtype=np.int64)], [()], np.zeros(1, dtype=np.int64))
        self.cache.learn()

    def fill(self, sequences: Sequence[np.ndarray], rows: Sequence[Sequence[int]], starts: np.ndarray | None = None) -> int:
        """Computes the keys and values of each sequence once, and stores them in every row of `rows[i]`, new or not.

        Sequences are int64 [T_i]; those of like length share a forward. starts: they go on from position starts[i] [n], each in
        a row whose cache holds what comes before. Returns the number of tokens computed.
        """
        sizes = np.array([len(sequence) for sequence in sequences])
        first = np.zeros_like(sizes) if starts is None else starts
        self.cache.fit(np.concatenate(rows), np.repeat(first + sizes + 1, [len(of) for of in rows]))
        kinds = np.zeros_like(sizes) if starts is None else self.cache.places.kind[np.concatenate(rows)]
        chunks: list[list[int]] = []
        for i in sorted(np.flatnonzero(sizes).tolist(), key=lambda i: (kinds[i], -sizes[i])):
            head = chunks[-1][0] if chunks else i
            full = not chunks or (len(chunks[-1]) + 1) * sizes[head] > PREFILL_TOKENS
            if full or 2 * sizes[i] < sizes[head] or kinds[i] != kinds[head]:
                chunks.append([])
            chunks[-1].append(i)
        for chunk in chunks:
            self._fill_chunk([sequences[i] for i in chunk], [rows[i] for i in chunk], first[chunk])
        return int(sizes.sum())

    def _fill_chunk(self, sequences: list[np.ndarray], rows: list[Sequence[int]], starts: np.ndarray) -> None:
        # Padded at the end: attention keeps real tokens from seeing it, and decode masks or overwrites what is stored of it.
        sizes = np.array([len(sequence) for sequence in sequences])
        ids = np.zeros((len(sequences), sizes.max()), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        targets = np.concatenate([np.asarray(targets, dtype=np.int64) for targets in rows])
        length = int((starts + sizes).max())
        at = self.cache.tensor(np.minimum(starts[:, None] + np.arange(ids.shape[1]), length - 1))
        mask = None
        if starts.any():
            self.cache.plan_rest(targets, starts, sizes)
            mask = self._masks.of(at, length)
        else:
            self.cache.plan_fill(targets, np.repeat(np.arange(len(rows)), [len(of) for of in rows]), length)
        self._forward(ids, at, mask)

    def decode(self, ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feeds token ids [n] at positions [n] to rows 0 … n−1; returns the next token's logits [n, V]."""
        if (positions >= self.cache.room).any():
            self.cache.fit(np.arange(len(ids)), positions + 1)
        if (order := self.cache.order) is not None:
            ids, positions = ids[order], positions[order]
        at = self.cache.tensor(positions)
        self.cache.plan_decode(positions, at)
        mask = self._masks.of(at[:, None], int(positions.max()) + 1)
        logits = self._forward(ids[:, None], at[:, None], mask)
        return logits if order is None else logits[self.cache.tensor(np.argsort(order))]

    def _forward(self, ids: np.ndarray, at: torch.Tensor, mask: torch.Tensor | dict[str, torch.Tensor] | None) -> torch.Tensor:
        """Token ids [n, T] at positions [n, T], by the cache's plan; returns the logits [n, V] after the last column."""
        output = self.model(
            input_ids=self.cache.tensor(ids),
            attention_mask=mask,
            position_ids=at,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class DecodeBatch:
    """Requests in rows of the model's cache. Not thread-safe: the engine's gate lets one caller in at a time.

    keep_ended: rows that end stay as dummies until all have ended, so that the shape of every forward depends on who
    joined, not on who ended when. Otherwise what was computed of a request that may go on is kept for its next turn, as far as
    the running rows leave room for it.
    """

    def __init__(
        self, model: PreTrainedModel, *, slots: int, max_length: int, keep_ended: bool, kv_bytes: int | None = None
    ) -> None:
        self._decoder = Decoder(model, slots=slots, max_length=max_length, together=keep_ended)
        self._rows = Rows(slots, max_length, self._decoder.device)
        self._keep_ended = keep_ended
        self._cache = self._decoder.cache
        self._cache.budget = kv_bytes or device_budget(self._decoder.device)
        self._reuse = not keep_ended
        self.prefilled = self.reused = 0  # tokens of prompts, so far

    @property
    def count(self) -> int:
        """Rows in every forward, dummies included."""
        return self._rows.count

    @property
    def budget(self) -> float:
        """Bytes that the cache may take."""
        return self._cache.budget

    def jobs(self) -> list[Job]:
        """Jobs whose responses have not ended."""
        return self._rows.jobs()

    # ---------------------------------------------------------------------------------------- memory

    def _need(self, requests: Sequence[GenerationRequest], running: np.ndarray) -> int:
        """Bytes that requests, and rows that grow to `running` tokens, take at the most."""
        longest = [len(request.prompt_ids) + request.sampling.max_tokens for request in requests]
        return self._cache.bytes_for(np.concatenate([running, np.array(longest, dtype=np.int64)]))

    def room(self, jobs: Sequence[Job]) -> int:
        """How many of the jobs, from the first on, may join the running rows: whatever they sample, there is memory for it."""
        limits, requests = self._rows.limit[: self.count], [job.request for job in jobs]
        fitting = (n for n in range(len(jobs), 0, -1) if self._need(requests[:n], limits) <= self._cache.budget)
        return next(fitting, 0)

    def too_large(self, requests: Sequence[GenerationRequest]) -> ConfigError | None:
        """Why the requests can never run side by side; None if they can."""
        if (need := self._need(requests, np.arange(0))) <= self._cache.budget:
            return None
        return ConfigError(
            f"request {requests[0].id}: the KV cache of {len(requests)} rollouts that run together, of up to "
            f"{max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)} tokens, may take {need:,} bytes > "
            f"engine.kv_bytes={self._cache.budget:,}: it would never be started; raise engine.kv_bytes, or lower max_tokens"
        )

    def cut_budget(self) -> None:
        """The device had no room: from now on there is at most three quarters of what the running rows may need, and of what is
        kept of ended ones, which goes."""
        held = self._need((), self._rows.limit[: self.count]) + self._cache.prefixes.bytes
        self._cache.budget = min(self._cache.budget, held) * 3 // 4
        self._cache.prefixes.clear()
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------------------------------- rows

    @torch.inference_mode()
    def join(self, jobs: Sequence[Job], version: Version) -> None:
        """Adds a row per job; a prompt that several of them share is computed once; of one that goes on, only what is new."""
        shared: dict[tuple[int, ...], list[int]] = {}
        rows = self._rows.add(jobs, version)
        for row, job in zip(rows, jobs, strict=True):
            shared.setdefault(job.request.known_ids, []).append(row)
        self._cache.fit(np.array(rows), self._rows.length[rows])
        targets = list(shared.values())
        known = [self._rows.known(of[0]) for of in targets]
        starts = [self._begin(of, ids) for of, ids in zip(targets, known, strict=True)]
        whole = [i for i, start in enumerate(starts) if start == 0]
        if whole:
            self.prefilled += self._decoder.fill([known[i] for i in whole], [targets[i] for i in whole])
        if rest := [i for i, start in enumerate(starts) if start > 0]:
            begun = np.array([starts[i] for i in rest])
            self.prefilled += self._decoder.fill([known[i][starts[i] :] for i in rest], [targets[i] for i in rest], begun)
            self.reused += int(begun.sum())

    def _begin(self, rows: Sequence[int], ids: np.ndarray) -> int:
        """How many of ids [T] the rows' cache holds as they were computed for another turn; what several rows share is not
        looked for."""
        request = self._rows.request(rows[0])
        return self._cache.begin(rows[0], request.group, ids) if request.goes_on and len(rows) == 1 else 0

    @torch.inference_mode()
    def advance(self, version: Version) -> list[Finished]:
        """Samples one token for every row; returns the rows that ended. Raises NonFinite if `version` gives no distribution."""
        rows = self._rows
        logits = self._decoder.decode(*rows.last())
        ids, logprobs, *kept = sample(logits, uniforms(*rows.draw_keys()), rows.sampling()).on_host()
        # A sum is finite iff all its terms are, and far cheaper than a mask.
        if not math.isfinite(logprobs.sum()):
            raise NonFinite(
                f"logits of version {version} are not finite: no token can be sampled; look at the learner's last steps"
            )
        finished = rows.record(ids, logprobs, kept[0] if kept else None)
        if finished:
            if self._reuse:
                self._keep_ended_turns()
            self._drop_ended()
        return finished

    def grown(self, interval: int) -> list[Grown]:
        """What came of the rows that have so many tokens more than their callers have heard of."""
        return self._rows.grown(interval)

    def abort(self, doomed: Callable[[Job], bool]) -> list[Finished]:
        """Ends the rows of these jobs."""
        finished = self._rows.abort(doomed)
        self._drop_ended()
        return finished

    def _keep_ended_turns(self) -> None:
        """What was computed of the rows that ended, where they may go on and the device has room for it."""
        try:
            for row in np.flatnonzero(~self._rows.alive[: self.count]).tolist():
                if (request := self._rows.request(row)).goes_on:
                    self._cache.keep(row, request.group, self._rows.known(row).copy())
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._cache.prefixes.clear()

    @torch.inference_mode()
    def _drop_ended(self) -> None:
        if self._keep_ended and len(self._rows.jobs()) > 0:
            return
        to, source = self._rows.drop()
        self._cache.drop(to, source, self._rows.count)

    @torch.inference_mode()
    def swapped(self, version: Version, *, recompute: bool) -> int:
        """Later tokens come from `version`. recompute: computes the cache of every row again, generated tokens included, but a
        prompt that rows share only once. Returns how many tokens were computed."""
        self._rows.mark(version)
        self._cache.prefixes.clear()
        self._reuse = self._reuse and recompute  # else rows hold what other weights computed
        if not recompute or self.count == 0:
            return 0
        known = [self._rows.known(row) for row in range(self.count)]
        shared: dict[object, list[int]] = {}
        for row, prompt in enumerate(self._rows.prompts()):
            # Deterministic batches compute each row whole, as they always have: another split would round otherwise.
            shared.setdefault(row if self._keep_ended else prompt, []).append(row)
        groups = list(shared.values())
        # Rows share, as when they joined, their prompt but for its last token. One that shares nothing goes in one piece.
        ends = [int(self._rows.prompt[rows[0]]) - 1 if len(rows) > 1 else len(known[rows[0]]) for rows in groups]
        computed = self._decoder.fill([known[rows[0]][:end] for rows, end in zip(groups, ends, strict=True)], groups)
        starts, rows = np.repeat(ends, [len(rows) for rows in groups]), np.concatenate(groups)
        rest = [known[row][start:] for row, start in zip(rows, starts, strict=True)]
        return computed + self._decoder.fill(rest, [[row] for row in rows.tolist()], starts)

    def clear(self) -> tuple[list[Job], int]:
        """Throws all rows away. Returns the jobs whose responses have not ended, in the order in which they joined, and how
        many tokens had been sampled for them."""
        jobs = self._rows.clear()
        nothing = np.arange(0)
        self._cache.prefixes.clear()
        self._cache.drop(nothing, nothing, 0)
        return jobs
