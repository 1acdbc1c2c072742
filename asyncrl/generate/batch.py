"""The running batch: rows and their cache, kept in step. One method per thing that can happen between two tokens."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from asyncrl.errors import NonFinite
from asyncrl.generate.decoder import Decoder
from asyncrl.generate.rows import Finished, Job, Rows
from asyncrl.generate.sampling import sample, uniforms
from asyncrl.types import Version


class Batch:
    """Not thread-safe: the engine's gate lets one caller in at a time.

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
        """Jobs without an answer yet."""
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
    def recompute(self) -> int:
        """Computes the cache of every row anew, generated tokens included. Returns how many tokens that were."""
        rows = range(self._rows.count)
        return self._decoder.fill([self._rows.known(row) for row in rows], [[row] for row in rows])

    def clear(self) -> tuple[list[Job], int]:
        """Throws all rows away. Returns the jobs without an answer, in the order in which they joined, and how many tokens
        had been sampled for them."""
        return self._rows.clear()

    def mark(self, version: Version) -> None:
        """Later tokens come from `version`."""
        self._rows.mark(version)
