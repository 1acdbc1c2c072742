"""What a generator has in flight and what it counts: groups held, requests unfinished, rollouts to submit. Not thread-safe."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from asyncrl.interfaces import Engine
from asyncrl.types import Generation, GenerationRequest, Rollout, RolloutPiece, SwapReport, Ticket, Tokens, Trajectory, Version


class SingleAnswers:
    """Episodes (asyncrl.interfaces) of one answer each, which are the engine's own."""

    def __init__(self, engine: Engine, told: Callable[[RolloutPiece], None] | None = None) -> None:
        """told: hears what came of training rollouts that go on, in a thread of the engine's."""
        self._engine = engine
        self._told = told

    @property
    def slots(self) -> int:
        return self._engine.slots

    def submit(self, ticket: Ticket) -> "list[Future[Generation]]":
        """One request per missing rollout of the ticket."""
        requests = [
            GenerationRequest(
                id=ticket.name_of(rollout),
                group=ticket.group,
                prompt_ids=ticket.prompt.ids,
                sampling=ticket.sampling_of(rollout),
                seed=seed,
                begun=ticket.begun.get(rollout),
            )
            for rollout, seed in zip(ticket.rollouts, ticket.seeds, strict=True)
        ]
        if (tell := self._told) is None or ticket.purpose == "eval":
            return self._engine.submit_group(requests)
        rollouts = {request.id: rollout for request, rollout in zip(requests, ticket.rollouts, strict=True)}
        return self._engine.submit_group(
            requests, lambda request, start, tokens: tell(piece_of(ticket, rollouts[request.id], start, tokens))
        )

    def abort(self, group: int) -> None:
        self._engine.abort(group)

    def gauges(self) -> dict[str, float]:
        return {}

    def progress(self) -> int:
        return 0


def piece_of(ticket: Ticket, rollout: int, start: int, tokens: Tokens) -> RolloutPiece:
    """tokens: of the rollout, from number `start` on."""
    lists = {name: getattr(tokens, name) for name in Tokens.__struct_fields__}
    return RolloutPiece(group=ticket.group, rollout=rollout, attempt=ticket.attempt, start=start, **lists)


@dataclass(eq=False)
class HeldGroup:
    """One ticket being worked on."""

    ticket: Ticket
    prompt_text: str
    started: float  # seconds since the epoch: work begins as soon as the ticket is reserved
    unsubmitted: int  # rollouts that the store does not have yet
    told: dict[int, int] = field(default_factory=dict)  # how many tokens of a rollout the store knows, or is about to
    swaps: dict[str, float] = field(default_factory=dict)  # by "swap UPDATE", while it was held; replaced, never changed


class EndedRequest(NamedTuple):
    """One request that the engine has ended, well or not."""

    held: HeldGroup
    rollout: int
    future: "Future[Generation]"
    finished: float  # seconds since the epoch

    @property
    def aborted(self) -> bool:
        """Whether the engine was told to drop it."""
        return self.future.result().finish_reason == "abort"

    @property
    def begun(self) -> int:
        """How many of its tokens others have sampled."""
        begun = self.held.ticket.begun.get(self.rollout)
        return len(begun.token_ids) if begun else 0

    def rest(self) -> RolloutPiece:
        """What the store does not know of a rollout that was aborted."""
        generation: Generation = self.future.result()
        start = self.held.told.get(self.rollout, self.begun)
        return piece_of(self.held.ticket, self.rollout, start, generation.after(start))

    def as_rollout(self, generation: Generation, text: str, worker: str) -> Rollout:
        """text: of the response, of which the policy chose every token, unless an episode says otherwise."""
        held, ticket = self.held, self.held.ticket
        made = generation if isinstance(generation, Trajectory) else None
        return Rollout(
            group=ticket.group,
            rollout=self.rollout,
            attempt=ticket.attempt,
            prompt=ticket.prompt,
            response_ids=generation.token_ids,
            logprobs=generation.logprobs,
            kept_logmass=generation.kept_logmass,
            loss_mask=made.loss_mask if made else [1] * len(generation.token_ids),
            turns=made.turns if made else (0,),
            segments=made.segments if made else (0,),
            prompt_ids=made.prompt_ids if made else None,
            episode=made.episode if made else None,
            spans=generation.spans,
            finish_reason=generation.finish_reason,
            worker=worker,
            times={"reserved": held.started, "started": held.started, "finished": self.finished}
            | {swap: at for swap, at in held.swaps.items() if at < self.finished},
            text=text,
            prompt_text=held.prompt_text,
            purpose=ticket.purpose,
            baseline=self.rollout == ticket.baseline,
        )


def tickets_wanted(slots: int, unfinished: int, group_size: int, ahead: int = 0) -> int:
    """How many tickets to ask for: for all slots and `ahead` more rollouts, many at once; at least one for an idle engine.

    The engine may have fewer slots than requests unfinished: then none.
    """
    wanted = max(0, slots + ahead - unfinished) // group_size
    if unfinished == 0:
        return max(1, wanted)
    return wanted if wanted * group_size > ahead // 2 else 0


@dataclass
class StoreReply:
    """What the store last said."""

    heard: float = -math.inf  # when it was last called, monotonic seconds
    too_old: Version | None = None  # weights for which it has no ticket; newer ones are waited for
    ended: bool = False  # there will be no more tickets


class Workload:
    """Counts requests until the engine has ended them, and holds groups until the store has all of their rollouts."""

    def __init__(self) -> None:
        self.unfinished = 0  # requests in the engine
        self.more_evals = False  # the last reserve brought eval tickets for the present weights: the next may bring more
        self.ended: deque[EndedRequest] = deque()  # not yet submitted
        self.pieces: list[RolloutPiece] = []  # of unfinished rollouts, not yet streamed
        self._unfinished_evals = 0  # requests in the engine that are pinned to the present weights
        self._pace, self._paced = 0.0, 0.0  # requests that end per second, and when it was (monotonic seconds)
        self._groups: dict[int, HeldGroup] = {}

    @property
    def empty(self) -> bool:
        return not (self.unfinished or self.ended or self._groups)

    @property
    def pinned(self) -> bool:
        """Whether a swap would tear an evaluation of the present weights."""
        return self._unfinished_evals > 0 or self.more_evals

    def groups(self) -> tuple[int, ...]:
        """What to name as held in `reserve`."""
        return tuple(self._groups)

    def begin(self, held: HeldGroup) -> None:
        self._groups[held.ticket.group] = held
        self._count(held, len(held.ticket.rollouts))

    def pace(self, now: float) -> float:
        """Requests that end per second, of late: the latest second counts most."""
        return self._pace * math.exp(self._paced - now)

    def finish(self, request: EndedRequest, now: float) -> None:
        self._pace, self._paced = self.pace(now) + 1.0, now
        self._count(request.held, -1)
        self.ended.append(request)

    def grow(self, piece: RolloutPiece) -> None:
        """An unfinished rollout has got further."""
        held = self._groups.get(piece.group)
        if held is not None and held.ticket.attempt == piece.attempt:  # else it was cancelled
            held.told[piece.rollout] = piece.start + len(piece.token_ids)
            self.pieces.append(piece)

    def swapped(self, version: Version, at: float) -> None:
        """Notes with what is under way that the weights were swapped then (seconds since the epoch)."""
        for held in self._groups.values():
            held.swaps = {**held.swaps, f"swap {version.update}": at}

    def _count(self, held: HeldGroup, change: int) -> None:
        self.unfinished += change
        if held.ticket.pinned is not None:
            self._unfinished_evals += change

    def wanted(self, held: HeldGroup) -> bool:
        """False once the group was cancelled, even if a later attempt of the same group is held now."""
        return self._groups.get(held.ticket.group) is held

    def forget(self, group: int) -> None:
        """The group is no longer held; its requests count as unfinished until the engine has ended them."""
        self._groups.pop(group, None)

    def submitted(self, requests: Sequence[EndedRequest]) -> None:
        """The store has the rollouts of these requests."""
        for held, *_ in requests:
            held.unsubmitted -= 1
            if held.unsubmitted == 0 and self.wanted(held):
                self.forget(held.ticket.group)


class GeneratorCounters:
    """Tokens, rollouts, swaps, and how often the store gave nothing, by its reason. None but `pause_s_last` ever goes down."""

    def __init__(self) -> None:
        self._since = time.monotonic()  # rates count from here
        counted = ("tokens", "rollouts", "swaps", "recomputed_tokens", "discarded_tokens", "evals_left")
        self._gauges = dict.fromkeys((*counted, "pause_s_total", "pause_s_last", "pause_s_max"), 0.0)

    def add(self, name: str, count: int = 1) -> None:
        self._gauges[name] = self._gauges.get(name, 0.0) + count

    def swap(self, report: SwapReport) -> None:
        self.add("swaps")
        self.add("recomputed_tokens", report.recomputed_tokens)
        self.add("discarded_tokens", report.discarded_tokens)
        self._gauges |= {
            "swapped_at": time.time(),  # seconds since the epoch
            "pause_s_last": report.pause_s,
            "pause_s_total": self._gauges["pause_s_total"] + report.pause_s,
            "pause_s_max": max(self._gauges["pause_s_max"], report.pause_s),
        }

    def gauges(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        return {**self._gauges, "tokens_per_s": self._gauges["tokens"] / seconds}
