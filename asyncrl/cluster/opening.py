"""Before its first update a run is looked at as a whole: one answer of its engine, scored by its learner and its rewards.

    generator.answer ─► Rollout ─┬─► learner.logprobs_of ─► agreement ─┐
                                 └─► reward.verdict ─► Score ──────────┴─► facts.json, log lines; or the run ends
Generators have begun with the first batch meanwhile, which the learner could not have before: this costs a start next to
nothing. The store does not know of it.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from asyncrl.cluster.members import Member
from asyncrl.cluster.plan import RunPlan
from asyncrl.config import max_gap, run_dtypes
from asyncrl.errors import Closed, ConfigError
from asyncrl.report.facts import ActorFacts, OpeningFacts, agreement, disagreement, held
from asyncrl.rundir import write_atomic
from asyncrl.types import Rollout, Score, Unscored

log = logging.getLogger(__name__)
_ROLES = ("generator", "learner", "rank", "reward", "model")  # whose place is told


class Opening:
    """Of one start of a run. `refs` are what the next `look` is waiting for; it is `done` after the look that found all."""

    def __init__(self, plan: RunPlan, members: Sequence[Member]) -> None:
        self.done = False
        self._plan, self._members = plan, members
        recipe = plan.recipe
        self._alone = not (recipe.episode.what or recipe.reward.pairwise)  # whether the reward is for single answers
        self._tries = 0  # a generator may have died of the prompt: then another one is tried
        self._asked: dict[str, tuple[Member, int, Any, float]] = {}  # by what for: whom, which actor, reference, when
        self._found: dict[str, tuple[str, Any, float]] = {}  # by what for: who said what, and how long it took, in seconds

    @property
    def refs(self) -> list[Any]:
        return [ref for _, _, ref, _ in self._asked.values()]

    def forget(self) -> None:
        """Waits for nothing any more; the next `look` asks again."""
        self._asked.clear()

    def look(self, committed: int) -> list[tuple[Member, Exception]]:
        """Takes what has come, and asks for what is missing of those that are up; never waits. Returns who failed at it, and
        how. Raises ConfigError if engine and learner differ by more than `generators.max_gap`.

        committed: updates that the learner's weights have had: an answer of other weights, which may be on their way, is asked
        for again.
        """
        failed = [failure for what in list(self._asked) if (failure := self._take(what)) is not None]
        if (answer := self._answer) is not None and any(span.version.update != committed for span in answer.spans):
            del self._found["answer"]
        if not failed:
            self._ask_for_more()
        if not self._asked and not failed and self._answer is not None:
            self._conclude()
        return failed

    @property
    def _answer(self) -> Rollout | None:
        return self._found["answer"][1] if "answer" in self._found else None

    def _take(self, what: str) -> tuple[Member, Exception] | None:
        member, actor, ref, began = self._asked[what]
        if not ray.wait([ref], timeout=0)[0]:
            return None
        del self._asked[what]
        try:
            self._found[what] = member.name, ray.get(ref), time.monotonic() - began
        except RayActorError:
            self._tries += 1  # the supervisor hears of it elsewhere; then another is asked
        except RayTaskError as error:
            if what == member.name:
                self._found[what] = member.name, None, 0.0  # where it is can't be told
            elif not isinstance(error.cause, Closed) and actor == member.restart_count:  # else that is known already
                return member, error
        except RayError:  # out of memory: the supervisor hears of it elsewhere, too
            self._tries += 1
        return None

    def _ask_for_more(self) -> None:
        answer = self._answer
        if answer is None:
            self._ask("answer", "generator", "answer_first", self._tries)
            return
        self._ask("logprobs", "learner", "ask", "logprobs_of", answer.prompt.ids, answer.response_ids)
        if self._alone:
            self._ask("verdict", "reward", "ask", "verdict", _unscored(answer))
        for member in self._members:
            if member.role in _ROLES:
                self._ask(member.name, member.role, "where", named=member.name)

    def _ask(self, what: str, role: str, method: str, *arguments: Any, named: str = "") -> None:
        """Unless that is known or asked for; of the first one that is up, where none is named."""
        phases = ("idle",) if method == "ask" and role == "learner" else ("idle", "running")
        up = [m for m in self._members if m.role == role and m.phase in phases and named in ("", m.name)]
        if what not in self._found and what not in self._asked and up:
            self._asked[what] = up[0], up[0].restart_count, getattr(up[0].handle, method).remote(*arguments), time.monotonic()

    def _conclude(self) -> None:
        needed = ["logprobs", *(["verdict"] if self._alone else [])]
        if any(what not in self._found for what in needed):
            return  # who is to say it is down just now
        facts = self._facts()
        write_atomic(self._plan.paths.facts, msgspec.json.format(msgspec.json.encode(facts)) + b"\n")
        for line in facts.lines():
            log.info("%s", line)
        if facts.verdict is not None and facts.verdict.status != "ok":
            log.warning("the reward failed on the first answer (%s): %s", facts.verdict.status, facts.verdict.error)
        if not facts.agreement.holds:
            raise ConfigError(disagreement(facts))
        self.done = True

    def _facts(self) -> OpeningFacts:
        recipe, deployment = self._plan.recipe, self._plan.deployment
        generator, answer, answer_s = self._found["answer"]
        verdict: tuple[str, Score | None, float] = self._found.get("verdict", ("", None, 0.0))
        told = {m.name: told for m in self._members if (told := self._found.get(m.name, ("", None, 0.0))[1]) is not None}
        gauges = told["learner"][1].gauges if "learner" in told else {}
        return OpeningFacts(
            time=time.time(),
            version=answer.spans[0].version,
            parameters=int(gauges.get("parameters", 0)),
            trained_parameters=int(gauges.get("trained_parameters", 0)),
            dtypes=run_dtypes(recipe, deployment)._asdict(),
            actors=tuple(
                ActorFacts(name=name, place=place, holds=held(report.gauges)) for name, (place, report) in told.items()
            ),
            generator=generator,
            prompt=answer.prompt_text,
            response=answer.text,
            finish_reason=answer.finish_reason,
            answer_s=answer_s,
            agreement=agreement(answer, self._found["logprobs"][1], max_gap(recipe, deployment)),
            verdict=verdict[1],
            truth=answer.prompt.readable_truth(),
            verdict_s=verdict[2],
        )


def _unscored(answer: Rollout) -> Unscored:
    return Unscored(
        group=answer.group,
        rollout=answer.rollout,
        attempt=answer.attempt,
        prompt=answer.prompt,
        response_ids=answer.response_ids,
        text=answer.text,
        purpose=answer.purpose,
        finish_reason=answer.finish_reason,
        turns=answer.turns,
    )
