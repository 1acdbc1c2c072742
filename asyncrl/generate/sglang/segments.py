"""A request on its way to a Generation, held against what a server reports of it. Pure: no network.

A request may take several *segments*: one per server or interruption. Each resumes with the tokens so far as its prefix, so a
swap or the death of a server costs no token that was reported and whose version is known.
"""

import re
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TypeVar

from msgspec.structs import replace

from asyncrl.errors import Unavailable
from asyncrl.generate.sglang.wire import Chunk, Labelled
from asyncrl.interfaces import Told
from asyncrl.types import FinishReason, Generation, GenerationRequest, Span, Version

T = TypeVar("T")


class RequestRow:
    """One request, and what is known of its response. Not thread-safe: call it only from the engine's event loop.

    vocabulary: tokens that the model knows.

    A segment is *mixed* once weights were swapped while it ran: only its end tells which token came from which version.
    """

    def __init__(self, request: GenerationRequest, vocabulary: int, told: Told | None = None) -> None:
        self.request, self._vocabulary = request, vocabulary
        self.future: Future[Generation] = Future()
        self.cut = request.sampling.temperature > 0 and (request.sampling.top_p < 1.0 or request.sampling.top_k > 0)
        self.segments, self.nonce = 0, secrets.token_hex(4)
        self.cancelled = False
        self._clear()
        if (begun := request.begun) is not None:
            kept = begun.kept_logmass or [0.0] * len(begun.token_ids)
            full = [sampled + mass for sampled, mass in zip(begun.logprobs, kept, strict=True)]
            self.token_ids += begun.token_ids
            self._logprobs += full
            self._sampled += begun.logprobs if self.cut else []
            self._spans += begun.spans
        self.told, self._heard = told, len(self.token_ids)  # who hears of it while it goes on, and of how many tokens so far

    def _clear(self) -> None:
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._sampled: list[float] = []
        self._spans: list[Span] = []
        self._pinned: Version | None = None  # of the segment's start; None between segments
        self._newest: Version | None = None  # that the server may have by now
        self._base = self._certain = 0
        self.swaps = 0  # while the present segment ran

    @property
    def done(self) -> bool:
        return self.future.done()

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the response so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    def begin(self, version: Version) -> None:
        """A segment starts, on weights `version`."""
        self._pinned = self._newest = version
        self._base, self.swaps = len(self.token_ids), 0
        self.segments += 1

    def swapping(self, version: Version) -> None:
        """`version` comes in while the segment runs: tokens that are not yet reported may be of it or of an older one."""
        if self.swaps == 0:
            self._certain = len(self.token_ids)
        self._newest = version
        self.swaps += 1

    def distrust(self) -> None:
        """The server contradicted itself, over this row or another one: `lost` then keeps nothing of the segment."""
        self._certain, self.swaps = self._base, max(self.swaps, 1)

    def extend(self, chunk: Chunk) -> FinishReason | None:
        """Takes the news of a chunk; returns why the segment ended, if it has. Raises Unavailable for what can't be right."""
        meta = chunk.meta_info
        new = self._base + meta.completion_tokens - len(self.token_ids)
        if new:
            have = len(self.token_ids) - self._base
            news = _news(meta.output_token_logprobs, have, new)
            sampled = _news(meta.output_token_sampling_logprobs, have, new) if self.cut else []
            ids = [value[1] for value in news]
            if new < 0 or _news(chunk.output_ids, have, new) != ids or len(ids) != new or (self.cut and len(sampled) != new):
                raise Unavailable(
                    f"request {self.request.id}: the server reports {new} new tokens, with ids {chunk.output_ids[:8]}…, "
                    f"logprobs {news[:3]}… and sampling logprobs {sampled[:3]}…, which don't agree; use SGLang 0.5.20"
                )
            count, most = len(self.token_ids) + new, self.request.sampling.max_tokens
            if max(ids) >= self._vocabulary or count > most:
                raise Unavailable(
                    f"request {self.request.id}: the server reports {count} tokens with ids up to {max(ids)}, but "
                    f"max_tokens={most} of a vocabulary of {self._vocabulary} were asked for: it serves another model, or its "
                    "answer was damaged"
                )
            self.token_ids += ids
            self._logprobs += [value[0] for value in news]
            self._sampled += sampled
        if meta.finish_reason is None:
            return None
        self._label(meta.weight_versions)
        if meta.finish_reason.type == "stop" or (new and self.token_ids[-1] in self.request.sampling.stop_token_ids):
            return "stop"
        # An abort may come with the very token that was the last one.
        return "length" if len(self.token_ids) == self.request.sampling.max_tokens else "abort"

    def tell(self, interval: int) -> None:
        """Tells of the tokens of which nobody has heard, if they are `interval` or more and their versions certain."""
        count = len(self.token_ids)
        if self.told is not None and self._pinned is not None and self.swaps == 0 and count - self._heard >= interval:
            spans = (*self._spans, Span(self._pinned, count - self._base))
            self.told(self.request, self._heard, replace(self.generation("abort"), spans=spans).after(self._heard))
            self._heard = count

    def _label(self, labels: Sequence[Labelled] | None) -> None:
        """Ends the segment: every token of it gets the version that the server says, which must be one that it was given."""
        count = len(self.token_ids) - self._base
        assert self._pinned is not None
        assert self._newest is not None
        if labels is None:
            if self.swaps:
                raise Unavailable(
                    f"request {self.request.id}: the server doesn't say which tokens came before a swap (no weight_versions); "
                    "use SGLang >= 0.5.20, or engine.sglang.prefix_cache: true, which interrupts requests instead"
                )
            labels = [Labelled(version=str(self._pinned), start=0, end=count)] if count else []
        end, oldest, spans = 0, self._pinned, []
        for label in labels:
            version = parse_label(label.version)
            if label.start != end or label.end < end or version is None or not oldest <= version <= self._newest:
                raise Unavailable(
                    f"request {self.request.id}: started on weights {self._pinned}, but the server labels tokens {label.start} "
                    f"to {label.end} with {label.version!r}: somebody else updates it, or it lost an update; it is restarted"
                )
            spans.append(Span(version, label.end - end))
            end, oldest = label.end, version
        if end != count:
            raise Unavailable(f"request {self.request.id}: {count} tokens, but the server labels {end}; it is restarted")
        for span in spans:
            self._add(span.version, span.length)
        self._pinned = None

    def _add(self, version: Version, length: int) -> None:
        if length == 0:
            return
        if self._spans and self._spans[-1].version == version:
            self._spans[-1] = Span(version, self._spans[-1].length + length)
        else:
            self._spans.append(Span(version, length))

    def lost(self) -> int:
        """The server is gone in the middle of a segment: keeps the tokens whose version is certain. Returns how many go."""
        if self._pinned is None:
            return 0
        keep = self._certain if self.swaps else len(self.token_ids)
        gone = len(self.token_ids) - keep
        for values in (self.token_ids, self._logprobs, self._sampled):
            del values[keep:]
        self._forget(keep)
        self._add(self._pinned, keep - self._base)
        self._pinned = None
        return gone

    def restart(self) -> int:
        """Drops all tokens: the response is regenerated from the prompt. Returns how many they were."""
        gone = len(self.token_ids)
        self._clear()
        self._forget(0)
        return gone

    def _forget(self, keep: int) -> None:
        """Nobody is told any more of a row whose next tokens don't go with what was told."""
        if keep < self._heard:
            self.told = None

    def generation(self, reason: FinishReason) -> Generation:
        """The response as it is now. Greedy rows: the distribution is a point mass, so every logprob is 0."""
        logprobs, kept = self._logprobs, None
        if self.request.sampling.temperature == 0:
            logprobs = [0.0] * len(self.token_ids)
        elif self.cut:
            logprobs, kept = self._sampled, [full - cut for full, cut in zip(self._logprobs, self._sampled, strict=True)]
        return Generation(
            id=self.request.id,
            token_ids=self.token_ids,
            logprobs=logprobs,
            kept_logmass=kept,
            spans=tuple(self._spans),
            finish_reason=reason,
        )


def _news(values: list[T], have: int, new: int) -> list[T]:
    """The `new` values after the first `have`, of a list that holds only these, or all of the segment.

    One that holds all may run ahead of the count: without incremental streaming, SGLang goes on filling it until it is sent.
    """
    return values if len(values) <= new else values[have : have + new]


def parse_label(label: str) -> Version | None:
    """The version that `str(version)` names; None if it names none."""
    parts = re.fullmatch(r"([0-9]{1,18})\.([0-9]{1,18})", label)
    return Version(int(parts[1]), int(parts[2])) if parts else None
