"""What a generator has in hand: groups held, requests unfinished, rollouts waiting to be submitted. Not thread-safe."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from asyncrl.types import Generation, GenerationRequest, Rollout, SwapReport, Ticket


@dataclass(eq=False)
class Held:
    """One ticket being worked on. Times are seconds since the epoch; unsubmitted: rollouts the store does not have yet."""

    ticket: Ticket
    reserved: float
    started: float
    unsubmitted: int


class Done(NamedTuple):
    """One request that has ended, well or not."""

    held: Held
    rollout: int
    future: "Future[Generation]"
    finished: float


class Workload:
    """Counts requests until the engine has ended them, and holds groups until the store has all of their rollouts."""

    def __init__(self) -> None:
        self.unfinished = 0  # requests in the engine
        self.unfinished_eval = 0  # of them, those pinned to a version
        self.done: deque[Done] = deque()
        self._groups: dict[int, Held] = {}

    @property
    def empty(self) -> bool:
        return not (self.unfinished or self.done or self._groups)

    def groups(self) -> tuple[int, ...]:
        """What to name as held in `reserve`."""
        return tuple(self._groups)

    def begin(self, held: Held) -> None:
        self._groups[held.ticket.group] = held
        self._count(held, len(held.ticket.rollouts))

    def finish(self, done: Done) -> None:
        self._count(done.held, -1)
        self.done.append(done)

    def _count(self, held: Held, change: int) -> None:
        self.unfinished += change
        if held.ticket.purpose == "eval":
            self.unfinished_eval += change

    def wanted(self, held: Held) -> bool:
        """False once the group was cancelled, even if a later attempt of the same group is held now."""
        return self._groups.get(held.ticket.group) is held

    def forget(self, group: int) -> None:
        """The group is no longer held; its requests count as unfinished until the engine has ended them."""
        self._groups.pop(group, None)

    def submitted(self, done: Sequence[Done]) -> None:
        """The store has these rollouts."""
        for held, *_ in done:
            held.unsubmitted -= 1
            if held.unsubmitted == 0 and self.wanted(held):
                self.forget(held.ticket.group)


def requests_of(ticket: Ticket) -> list[GenerationRequest]:
    """One request per missing rollout of the ticket; that of the baseline is greedy."""
    return [
        GenerationRequest(
            id=f"{ticket.group}/{rollout}/{ticket.attempt}",
            group=ticket.group,
            prompt_ids=ticket.prompt.ids,
            sampling=ticket.sampling.greedy() if rollout == ticket.baseline else ticket.sampling,
            seed=seed,
        )
        for rollout, seed in zip(ticket.rollouts, ticket.seeds, strict=True)
    ]


def rollout_of(done: Done, generation: Generation, worker: str) -> Rollout:
    """A single-turn rollout: every response token was chosen by the policy."""
    held = done.held
    return Rollout(
        group=held.ticket.group,
        rollout=done.rollout,
        attempt=held.ticket.attempt,
        prompt=held.ticket.prompt,
        response_ids=generation.token_ids,
        logprobs=generation.logprobs,
        kept_logmass=generation.kept_logmass,
        loss_mask=[1] * len(generation.token_ids),
        turns=(0,),
        spans=generation.spans,
        finish_reason=generation.finish_reason,
        worker=worker,
        times={"reserved": held.reserved, "started": held.started, "finished": done.finished},
        purpose=held.ticket.purpose,
        baseline=done.rollout == held.ticket.baseline,
    )


# --------------------------------------------------------------------------------------------- tally
# The generator's counters. Not thread-safe; they never go down, except `pause_s_last`. swapped_at: seconds since the epoch.


class GeneratorCounters:
    """Tokens, rollouts, swaps, and how often the store gave nothing, by its reason."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._gauges = dict.fromkeys(
            (
                *("tokens", "rollouts", "swaps", "pause_s_total", "pause_s_last", "pause_s_max"),
                *("recomputed_tokens", "discarded_tokens", "evals_left"),
            ),
            0.0,
        )

    def start(self) -> None:
        """Rates count from here."""
        self._since = time.monotonic()

    def rollout(self, tokens: int) -> None:
        """One rollout for the store."""
        self._gauges["rollouts"] += 1
        self._gauges["tokens"] += tokens

    def swap(self, report: SwapReport) -> None:
        self._gauges["swaps"] += 1
        self._gauges["recomputed_tokens"] += report.recomputed_tokens
        self._gauges["discarded_tokens"] += report.discarded_tokens
        self._gauges["swapped_at"] = time.time()
        self._gauges["pause_s_last"] = report.pause_s
        self._gauges["pause_s_total"] += report.pause_s
        self._gauges["pause_s_max"] = max(self._gauges["pause_s_max"], report.pause_s)

    def waited(self, reason: str) -> None:
        """The store had no ticket."""
        if reason:
            key = "waits/" + reason.replace(" ", "_")
            self._gauges[key] = self._gauges.get(key, 0.0) + 1

    def eval_left(self) -> None:
        """An eval ticket for a version that is no longer loaded."""
        self._gauges["evals_left"] += 1

    def gauges(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        return {**self._gauges, "tokens_per_s": self._gauges["tokens"] / seconds}
