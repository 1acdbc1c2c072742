"""Several weighted rewards as one: the sum is the reward, and each value is a part under its name."""

from collections.abc import Sequence

from asyncrl.config import RewardTerm
from asyncrl.reward.frames import Sample, Verdict
from asyncrl.reward.functions import Judge, load_judge


def load_terms(terms: Sequence[RewardTerm]) -> Judge:
    """Loads every function of `RewardSpec.terms()`. Raises ConfigError."""
    judges = [load_judge(term.function, term.style, term.arguments) for term in terms]
    return alone(judges[0]) if not terms[0].name else weighted(terms, judges)


def alone(judge: Judge) -> Judge:
    """One function, whose parts keep their names. Where it does not apply, nothing does: the sample is `invalid`."""

    def verdict(sample: Sample) -> Verdict:
        return _applied(judge(sample), True)

    return verdict


def weighted(terms: Sequence[RewardTerm], judges: Sequence[Judge]) -> Judge:
    """The weighted sum of the rewards that apply to a sample, as in TRL (`reward_weights`, None left out).

    Parts: each reward's unweighted value under the term's name, and its own parts under `name/part`. One failure makes the
    sample `invalid`: a sum that lacks a reward would be another reward. The answer is that of the first term that has one.
    What tokens earn is summed by the same weights.
    """

    def verdict(sample: Sample) -> Verdict:
        total, parts, answer, applies = 0.0, dict[str, float](), None, False
        earned: list[float] | None = None
        for term, judge in zip(terms, judges, strict=True):
            one = judge(sample)
            if one.status != "ok":
                return Verdict(one.status, error=f"{term.name}: {one.error}")
            if one.reward is None:
                continue
            applies = True
            total += term.weight * one.reward
            parts[term.name] = one.reward
            parts |= {f"{term.name}/{part}": value for part, value in one.parts.items()}
            answer = one.answer if answer is None else answer
            if one.token_rewards is not None:
                before = earned or [0.0] * len(one.token_rewards)
                earned = [sum_ + term.weight * more for sum_, more in zip(before, one.token_rewards, strict=True)]
        return _applied(Verdict("ok", total, parts, answer=answer, token_rewards=earned), applies)

    return verdict


def _applied(verdict: Verdict, applies: bool) -> Verdict:
    if verdict.status != "ok" or (applies and verdict.reward is not None):
        return verdict
    return Verdict("invalid", error="no reward function applies to this sample: each returned None for it")
