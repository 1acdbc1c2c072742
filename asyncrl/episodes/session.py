"""What an episode has generated so far: every answer recorded where it was made, in the context that it was made in."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from asyncrl.types import Episode, Generation, GenerationRequest, Sampling, Span, Trajectory, derive_seed


@dataclass
class Segment:
    """A context that only grew: a prompt, and after it answers and what came between them. The lists are parallel."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logmass: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # where answers start

    def goes_on_as(self, prompt_ids: Sequence[int]) -> bool:
        """Whether this prompt starts with exactly what is here."""
        own = len(self.prompt_ids)
        return [*prompt_ids[:own]] == self.prompt_ids and [*prompt_ids[own : own + len(self.ids)]] == self.ids

    def read(self, ids: Sequence[int], span: Span) -> None:
        """Adds context. span: of its tokens, which nobody sampled."""
        self._add(ids, [0.0] * len(ids), None, 0)
        self.spans += [span] if ids else []

    def wrote(self, answer: Generation) -> None:
        self.turns.append(len(self.ids))
        self._add(answer.token_ids, answer.logprobs, answer.kept_logmass, 1)
        self.spans += answer.spans

    def _add(self, ids: Sequence[int], logprobs: Sequence[float], logmass: Sequence[float] | None, mask: int) -> None:
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs
        self.logmass += [0.0] * len(ids) if logmass is None else logmass


class Budget(NamedTuple):
    """What an episode may use; in tokens that the policy samples, but for `context`, which counts all that it reads as well."""

    tokens: int
    turn_tokens: int
    context: int


class Session:
    """One episode's calls of the engine. Its sampling is the recipe's; seed: of the rollout.

    A prompt that starts with exactly a segment's tokens goes on with it; any other one (a branch, a shortened history, a call
    repeated) starts a segment. So every sampled token is trained exactly once, in the context it was sampled in: that holds by
    the tokens alone, whatever a message or a template says. (AReaL and rLLM record completions too, and go by their text.)
    """

    def __init__(self, name: str, group: int, sampling: Sampling, seed: int, budget: Budget) -> None:
        self._name, self._group, self._sampling, self._seed, self._budget = name, group, sampling, seed, budget
        self._segments: list[Segment] = []
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._cut = False  # the last answer was cut by a limit
        self.sampled = 0  # tokens
        self.turns = 0

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that the policy may answer a prompt with; 0: none."""
        budget = self._budget
        return max(0, min(budget.turn_tokens, budget.tokens - self.sampled, budget.context - len(prompt_ids)))

    def request(self, prompt_ids: Sequence[int], max_tokens: int = sys.maxsize) -> GenerationRequest:
        """For which there must be room. Its seed comes from the prompt, so that calls side by side may come in any order."""
        prompt = tuple(prompt_ids)
        self._asked[prompt] += 1
        return GenerationRequest(
            id=f"{self._name}/{self._asked.total()}",
            group=self._group,
            prompt_ids=prompt,
            sampling=replace(self._sampling, max_tokens=min(self.room(prompt), max_tokens)),
            seed=derive_seed(self._seed, self._asked[prompt], *prompt),
            goes_on=True,
        )

    def record(self, request: GenerationRequest, answer: Generation) -> None:
        """Takes an answer in. One without tokens leaves nothing."""
        if not answer.token_ids:
            return
        self.turns += 1
        self.sampled += len(answer.token_ids)
        self._cut = answer.finish_reason == "length"
        segment = next((s for s in reversed(self._segments) if s.goes_on_as(request.prompt_ids)), None)
        if segment is None:
            self._segments.append(segment := Segment(list(request.prompt_ids)))
        new = request.prompt_ids[len(segment.prompt_ids) + len(segment.ids) :]
        segment.read(new, Span(answer.spans[0].version, len(new)))
        segment.wrote(answer)

    def trajectory(self, episode: Episode) -> Trajectory:
        """All of it as one response: later segments stand after the first, each behind its own prompt. Its counts are added to
        the episode's figures."""
        whole = Segment([])
        starts = []
        for number, segment in enumerate(self._segments):
            starts.append(len(whole.ids))
            if number:
                whole.read(segment.prompt_ids, Span(segment.spans[0].version, len(segment.prompt_ids)))
            whole.turns += [len(whole.ids) + turn for turn in segment.turns]
            whole.ids += segment.ids
            whole.mask += segment.mask
            whole.logprobs += segment.logprobs
            whole.logmass += segment.logmass
            whole.spans += segment.spans
        read = len(whole.ids) - self.sampled
        counts = {"turns": self.turns, "segments": len(starts), "tokens": self.sampled, "read_tokens": read}
        cuts = self._sampling.top_p < 1 or self._sampling.top_k > 0
        return Trajectory(
            id=self._name,
            token_ids=whole.ids,
            logprobs=whole.logprobs,
            kept_logmass=whole.logmass if cuts else None,
            spans=tuple(whole.spans),
            finish_reason="length" if self._cut or episode.stop == "max_tokens" else "stop",
            loss_mask=whole.mask,
            turns=tuple(whole.turns) or (0,),
            segments=tuple(starts) or (0,),
            prompt_ids=tuple(self._segments[0].prompt_ids) if self._segments else (),
            episode=replace(episode, figures={**episode.figures, **counts}),
        )
