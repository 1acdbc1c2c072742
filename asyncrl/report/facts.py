"""What a run knows of itself before its first update: who is where and holds what, and whether engine and learner agree."""

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from asyncrl.disk import as_size
from asyncrl.types import Rollout, Score, Version

_SHOWN = 60  # characters of a text


class ActorFacts(Struct, frozen=True, kw_only=True):
    """Where an actor is, and what it holds: bytes and counts by name."""

    name: str
    place: str
    holds: dict[str, float] = {}

    def said(self) -> str:
        holds = ", ".join(f"{_words(name)} {as_size(size)}" for name, size in self.holds.items() if name.endswith("_bytes"))
        return f"{self.name} on {self.place}" + f": {holds}" * bool(holds)


class Agreement(Struct, frozen=True, kw_only=True):
    """How far the learner's log-probabilities of an answer's tokens are from the engine's, in nats."""

    tokens: int
    mean: float
    worst: float
    worst_at: int  # index of that token in the answer
    engine: float  # its log-probability there
    learner: float
    bound: float | None  # of the mean

    @property
    def holds(self) -> bool:
        return self.bound is None or self.mean <= self.bound  # not where it is NaN

    def said(self) -> str:
        allowed = "any" if self.bound is None else f"{self.bound:g}"
        return f"learner and engine are {self.mean:.2g} nats apart on average, of {allowed} allowed, {self.worst:.2g} at worst"


class OpeningFacts(Struct, frozen=True, kw_only=True):
    """`facts.json` of a run directory: what its newest start knew before it trained."""

    time: float  # seconds since the epoch
    version: Version
    parameters: int
    trained_parameters: int
    dtypes: dict[str, str]
    actors: tuple[ActorFacts, ...]
    generator: str  # whose answer this is
    prompt: str
    response: str
    finish_reason: str
    answer_s: float
    agreement: Agreement
    verdict: Score | None  # None: the reward is for whole episodes, or for whole groups
    truth: str
    verdict_s: float = 0.0

    def lines(self) -> Iterator[str]:
        """The same for people."""
        trained = "all" if self.trained_parameters == self.parameters else f"{self.trained_parameters:,}"
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in self.dtypes.items())
        yield f"policy: {self.parameters:,} parameters, {trained} trained; {dtypes}"
        yield from (actor.said() for actor in self.actors)
        ended = f"{self.agreement.tokens} tokens in {self.answer_s:.2f} s"
        yield f"first answer ({self.generator}, {ended}): {_quoted(self.prompt)} → {_quoted(self.response)}"
        yield f"engine and learner: {self.agreement.said()}"
        yield self._judged()

    def _judged(self) -> str:
        if (verdict := self.verdict) is None:
            return "reward: seen with the first whole group or episode; one answer alone is none"
        if verdict.status != "ok":
            return f"reward: {verdict.status}: {verdict.error}"
        parts = ", ".join(f"{name} {value:.3g}" for name, value in verdict.parts.items())
        expected = f", expected {_quoted(self.truth)}" if self.truth != "null" else ""
        return f"reward: {verdict.reward:.3g}" + f" ({parts})" * bool(parts) + f" in {self.verdict_s:.2f} s{expected}"


def agreement(answer: Rollout, learner: Sequence[float], bound: float | None) -> Agreement:
    """learner: log-probabilities of the answer's tokens, at least one. What top-p or top-k cut off, counts for the engine."""
    engine = [x + kept for x, kept in zip(answer.logprobs, answer.kept_logmass or [0.0] * len(learner), strict=True)]
    gaps = [abs(ours - theirs) for ours, theirs in zip(learner, engine, strict=True)]
    at = max(range(len(gaps)), key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i])
    return Agreement(
        tokens=len(gaps),
        mean=math.fsum(gaps) / len(gaps),
        worst=gaps[at],
        worst_at=at,
        engine=engine[at],
        learner=learner[at],
        bound=bound,
    )


def disagreement(facts: OpeningFacts) -> str:
    """What ends a run whose engine is not the learner's policy."""
    found = facts.agreement
    return (
        f"{facts.generator} and the learner are not the same policy: over the {found.tokens} tokens of its first answer "
        f"{found.said()} (token {found.worst_at}: engine {found.engine:.4g}, learner {found.learner:.4g}). Every update would "
        "learn from log-probabilities that nobody sampled by. Look at generators.engine.dtype and quantisation, at a "
        "model.builder that makes another model in another process, at how the engine serves this architecture "
        "(docs/architectures.md). To go on all the same: deploy.generators.max_gap=null, or a larger bound"
    )


def _quoted(text: str) -> str:
    """In quotes, on one line, and not too long."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")


def held(gauges: Mapping[str, float]) -> dict[str, float]:
    """Of an actor's gauges, those of memory."""
    return {
        name.removeprefix("engine/"): value for name, value in gauges.items() if name.endswith("_bytes") and "bus" not in name
    }


def _words(name: str) -> str:
    return {"kv_bytes": "KV cache up to"}.get(name, name.removesuffix("_bytes").replace("_", " "))
