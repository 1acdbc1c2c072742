"""The running batch: the rows being decoded and the model's cache of them, kept in step.

`Decoder` runs the model: it fills rows of the cache, decodes all of them one token further, moves rows; it knows no requests.
`DecodeBatch` puts requests into rows: one method per thing that can happen between two tokens.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from asyncrl.errors import NonFinite
from asyncrl.generate.embedded.kv_cache import SlotCache, require_servable, use_slot_attention
from asyncrl.generate.embedded.masks import DecodeMasks
from asyncrl.generate.embedded.rows import Finished, Job, Rows
from asyncrl.generate.embedded.sampling import sample, uniforms
from asyncrl.types import Version

PREFILL_TOKENS = 8192  # padded tokens in one prefill forward; bounds its activations


class Decoder:
    """Runs the forward passes of a slot engine. Not thread-safe. Call under `torch.inference_mode`.

    A row of length L holds tokens 0 … L−1, of which the cache knows 0 … L−2: the last one is fed by the next `decode`.
    So `fill` needs no logits, and admitting a prompt and recomputing a row after a swap are the same call.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, max_length: int) -> None:
        require_servable(model)
        use_slot_attention(model)
        self.model = model.eval()
        self.device = next(model.parameters()).device
        text = model.config.get_text_config(decoder=True)
        self._cache = SlotCache(layers=text.num_hidden_layers, slots=slots, max_length=max_length, device=self.device)
        self._masks = DecodeMasks(text, max_length=max_length, dtype=model.dtype, device=self.device)
        self._steps = torch.arange(max_length, device=self.device)

    def fill(self, sequences: Sequence[np.ndarray], rows: Sequence[Sequence[int]]) -> int:
        """Computes the keys and values of each sequence once, and stores them in every row of `rows[i]`.

        Sequences are int64 [T_i]; those of like length share a forward. Returns the number of tokens computed.
        """
        order = sorted((i for i in range(len(sequences)) if len(sequences[i])), key=lambda i: len(sequences[i]), reverse=True)
        chunks: list[list[int]] = []
        for i in order:
            longest = len(sequences[chunks[-1][0]]) if chunks else 0
            if not chunks or (len(chunks[-1]) + 1) * longest > PREFILL_TOKENS or 2 * len(sequences[i]) < longest:
                chunks.append([])
            chunks[-1].append(i)
        for chunk in chunks:
            self._fill_chunk([sequences[i] for i in chunk], [rows[i] for i in chunk])
        return sum(len(sequences[i]) for i in order)

    def _fill_chunk(self, sequences: list[np.ndarray], rows: list[Sequence[int]]) -> None:
        # Padded at the end: causal attention keeps real tokens from seeing it, and decode masks or overwrites it.
        ids = np.zeros((len(sequences), len(sequences[0])), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        sources = np.repeat(np.arange(len(rows)), [len(targets) for targets in rows])
        targets = np.concatenate([np.asarray(targets, dtype=np.int64) for targets in rows])
        self._cache.plan_prefill(self._tensor(targets), self._tensor(sources))
        self.model(
            input_ids=self._tensor(ids),
            position_ids=self._steps[None, : ids.shape[1]].expand(len(sequences), -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def decode(self, ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feeds token ids [n] at positions [n] to rows 0 … n−1; returns the next token's logits [n, V]."""
        length = int(positions.max()) + 1
        at = self._tensor(positions)
        self._cache.plan_decode(at, length, level=int(positions.min()) + 1 == length)
        output = self.model(
            input_ids=self._tensor(ids)[:, None],
            attention_mask=self._masks.of(at, length),
            position_ids=at[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def move(self, to: np.ndarray, source: np.ndarray, length: int) -> None:
        """Rows `source` take the places `to`, up to `length` tokens."""
        self._cache.move(self._tensor(to), self._tensor(source), length)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


class DecodeBatch:
    """Requests in rows of the model's cache. Not thread-safe: the engine's gate lets one caller in at a time.

    keep_ended: rows that end stay as dummies until all have ended, so that the shape of every forward depends on who
    joined, not on who ended when.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, max_length: int, keep_ended: bool) -> None:
        self._decoder = Decoder(model, slots=slots, max_length=max_length)
        self._rows = Rows(slots, max_length, self._decoder.device)
        self._keep_ended = keep_ended

    @property
    def count(self) -> int:
        """Rows in every forward, dummies included."""
        return self._rows.count

    def jobs(self) -> list[Job]:
        """Jobs whose responses have not ended."""
        return self._rows.jobs()

    @torch.inference_mode()
    def join(self, jobs: Sequence[Job], version: Version) -> None:
        """Adds a row per job; a prompt that several of them share is computed once."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for row, job in zip(self._rows.add(jobs, version), jobs, strict=True):
            shared.setdefault(job.request.prompt_ids, []).append(row)
        targets = list(shared.values())
        self._decoder.fill([self._rows.known(rows[0]) for rows in targets], targets)

    @torch.inference_mode()
    def advance(self, version: Version) -> list[Finished]:
        """Samples one token for every row; returns the rows that ended. Raises NonFinite if `version` gives no distribution."""
        rows = self._rows
        logits = self._decoder.decode(*rows.last())
        sampled = sample(logits, uniforms(*rows.draw_keys()), rows.sampling())
        ids, logprobs = sampled.ids.cpu().numpy(), sampled.logprobs.cpu().numpy()
        # A sum is finite iff all its terms are, and far cheaper than a mask.
        if not math.isfinite(logprobs.sum()):
            raise NonFinite(
                f"logits of version {version} are not finite: no token can be sampled; look at the learner's last steps"
            )
        kept = None if sampled.kept_logmass is None else sampled.kept_logmass.cpu().numpy()
        finished = rows.record(ids, logprobs, kept)
        if finished:
            self._drop_ended()
        return finished

    def abort(self, group: int | None) -> list[Finished]:
        """Ends the rows of a group, or all of them."""
        finished = self._rows.abort(group)
        self._drop_ended()
        return finished

    @torch.inference_mode()
    def _drop_ended(self) -> None:
        if self._keep_ended and len(self._rows.jobs()) > 0:
            return
        to, source = self._rows.drop()
        if len(to):
            self._decoder.move(to, source, int(self._rows.length[to].max()))

    @torch.inference_mode()
    def swapped(self, version: Version, *, recompute: bool) -> int:
        """Later tokens come from `version`. recompute: computes the cache of every row again, generated tokens included.
        Returns how many tokens were computed."""
        self._rows.mark(version)
        rows = range(self._rows.count if recompute else 0)
        return self._decoder.fill([self._rows.known(row) for row in rows], [[row] for row in rows])

    def clear(self) -> tuple[list[Job], int]:
        """Throws all rows away. Returns the jobs whose responses have not ended, in the order in which they joined, and how
        many tokens had been sampled for them."""
        return self._rows.clear()
