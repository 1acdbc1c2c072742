"""The protocols through which stages meet. A stage takes these in its constructor and knows no other stage.

Calls that wait are long polls: they return empty-handed at their deadline (`wait_s`, seconds) and never block for ever.
All store calls raise `Fenced` (a newer incarnation took over), `Closed` (the run is stopping) or `Unavailable` (no store).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from asyncrl.lineage import Fence, Lineage
from asyncrl.types import (
    BatchLease,
    Generation,
    GenerationRequest,
    Report,
    Reserved,
    Rollout,
    RolloutPiece,
    Score,
    StoreReport,
    SwapReport,
    Ticket,
    Tokens,
    TrainRollout,
    UnscoredLease,
    Version,
)

Tensors = Mapping[str, Any]  # parameter name -> torch.Tensor
# Hears from an engine what came of an unfinished request: the number of the first token, and the tokens from there on.
Told = Callable[[GenerationRequest, int, Tokens], None]
Keep = Callable[[Sequence[float]], bool]  # rewards of a complete group -> worth training?


class Stage(Protocol):
    """What generators, reward workers and learners offer to whoever runs them, with or without Ray."""

    def run(self, *arguments: Any) -> Any:
        """The main loop. Returns when its work has ended or after `stop`; raises the first error of any of its threads."""

    def stop(self) -> None:
        """Ends `run` soon; idempotent, from any thread."""

    def report(self) -> Report: ...


class Engine(Protocol):
    """Token ids in; token ids, behaviour logprobs and per-token versions out. Thread-safe; requests join and leave freely."""

    @property
    def slots(self) -> int:
        """Requests decoded together at most. May change at any time, also below what is in flight; asking never waits."""

    @property
    def hands_over(self) -> bool:
        """Whether another engine may go on with its unfinished requests."""

    @property
    def max_length(self) -> int:
        """Prompt + response tokens of one request, at most."""

    @property
    def version(self) -> Version | None:
        """Version of the weights now in use; None before the first `update_weights`."""

    def start(self) -> None:
        """Begins to work on requests, those that were submitted before included. Returns at once."""

    def submit_group(self, requests: Sequence[GenerationRequest], told: Told | None = None) -> "list[Future[Generation]]":
        """Queues requests together, so that they may share the work on their common prompt.

        told: hears of each request that goes on, in a thread of the engine's, whenever it has `stream_interval` more tokens;
        never again of one that had to begin anew. It must not wait.
        Returns futures in the same order. Each ends when its rollout does; `abort` ends it with finish_reason `abort`. One
        that its holder cancels gives its slot back soon.
        """

    def update_weights(self, version: Version, tensors: Tensors) -> SwapReport:
        """Blocks until the engine has swapped, at a decode step boundary. Later tokens carry `version`.

        tensors: whole, by name, on the CPU; read only. They may be memory of another process that is mapped, of which an
        engine that is divided (tensor parallel) reads in each of its processes the slices that it needs, and copies nothing.
        """

    def pause(self) -> None:
        """Blocks until no step runs; requests stay queued or unfinished."""

    def resume(self) -> None: ...

    def abort(self, group: int | None = None) -> None:
        """Ends the unfinished requests of one group, or all of them."""

    def health(self, deadline_s: float) -> None:
        """Proves that the engine makes progress, or raises `Unavailable` before the deadline."""

    def gauges(self) -> dict[str, float]:
        """Figures for the generator's report, counters or present values. Never waits."""

    def progress(self) -> int:
        """Rises with every token, with every piece of weights, and while a server starts, which has a limit of its own. Never
        waits."""

    def close(self) -> None:
        """Stops the engine; unfinished futures raise `Closed`."""


class Episodes(Protocol):
    """What makes the rollouts of tickets, of one turn or several, with an engine. Thread-safe; never waits."""

    @property
    def slots(self) -> int:
        """Rollouts that are welcome at a time."""

    def submit(self, ticket: Ticket) -> "list[Future[Generation]]":
        """One future per rollout of the ticket; each ends when its episode does, as those of `Engine.submit_group` end."""

    def abort(self, group: int) -> None:
        """Ends the unfinished episodes of a group."""

    def gauges(self) -> dict[str, float]:
        """Figures for the generator's report."""

    def progress(self) -> int:
        """Rises while episodes are under way, which have limits of their own."""


class GeneratorStore(Protocol):
    """What a generator asks of the store."""

    def reserve(self, k: int, version: Version, held: Sequence[int], wait_s: float) -> Reserved:
        """Up to k tickets for weights `version`. Waits for "bound full" or "data"; "weights too old" returns at
        once, since only a swap can help.

        `held` are the groups this caller still works on: their leases are renewed. Groups that it does not name are
        taken as lost, and reissued. k = 0 only renews, and waits for a cancellation.
        """

    def recall(self) -> None:
        """Has this caller's `reserve` return at once with what there is: it has something else to do, such as a swap. One that
        has not reached the store yet is not recalled."""

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Hands over finished rollouts. Never waits: their slots are reserved. Duplicates are ignored."""

    def stream(self, pieces: Sequence[RolloutPiece]) -> None:
        """Hands over what came of unfinished rollouts, in order, so that others can go on with them. Never waits. Duplicates
        are ignored, and what does not follow on what is known."""


class RewardStore(Protocol):
    """What a reward worker asks of the store."""

    def lease_unscored(self, k: int, wait_s: float) -> UnscoredLease:
        """Up to k rollouts without a score; waits for the first."""

    def extend(self, lease: int) -> None:
        """Renews a lease of rollouts."""

    def score(self, lease: int, scores: Sequence[Score]) -> None:
        """Delivers verdicts, all or some of a lease. Never waits. Duplicates are ignored."""


class LearnerStore(Protocol):
    """What a learner asks of the store."""

    def lineage(self) -> Lineage:
        """Which checkpoints a learner may go on from. Changes nothing."""

    def fence(self, committed: int) -> Fence:
        """Starts a new incarnation at checkpoint `committed`: older learners are refused from here on, and commits after
        `committed` are reopened, to be leased again first, in their logged order."""

    def lease_batch(self, update: int, wait_s: float) -> BatchLease:
        """The next batch for the update that follows `update`; waits for ready groups. Ends only by commit or fence.

        May run ahead of the commits, from another thread: in order, one batch per update, and the bound is that of `update`.
        Asking again for the same update gets the same lease.
        """

    def rows(self, groups: Sequence[int]) -> list[TrainRollout]:
        """The `ok` rollouts of leased groups, in group order, then rollout order. A group's baseline is not among them: each
        of its rollouts says what it earned."""

    def commit(self, lease: int, version: Version, metrics: Mapping[str, float]) -> None:
        """Counts the leased groups as trained by `version`. The metrics are logged with it, exactly once."""

    def request_eval(self, version: Version) -> None:
        """Asks for a held-out evaluation by generators at `version`. A newer request replaces one that has not begun."""

    def checkpointed(self, oldest_retained: int) -> None:
        """Makes a checkpoint count: when this returns, all that the log holds is on the disk. Checkpoints before
        `oldest_retained` may go then, and segments of rows that only they need are deleted."""


class SupervisorStore(Protocol):
    """What the supervisor asks of the store. None of these calls waits."""

    def finish(self) -> None:
        """The last update is made: what is outstanding is settled as unused. Evaluations that were asked for still run to their
        end, then generators and reward workers are told that there will be no more."""

    def forget(self, worker: str, incarnation: int, excused: bool = False) -> None:
        """This incarnation of a worker is dead: its work is reassigned immediately, its late calls are refused. What its
        successor holds stays. excused: it was given up, or its node was: no prompt of its is to blame."""

    def limit_outstanding(self, groups: int) -> None:
        """So many groups may be outstanding from now on, for there are more or fewer engines. A store that restarts is built
        with the same limit."""

    def report(self, since: int) -> StoreReport:
        """Records after sequence number `since`, some hundred at a time, each once and in order however often the store
        restarts; and where everything stands. Those up to `since` have arrived, it says: the store forgets them."""

    def state(self) -> dict[str, Any]:
        """What a watchdog prints: queue depths, work in flight with its holders, leases. Ages and times in seconds."""


class Verb(NamedTuple):
    """One kind of call to the store."""

    caller: str  # the protocol that declares it; each protocol's calls have an event loop of their own in the store
    signature: inspect.Signature  # of the protocol's method, `self` included

    @property
    def waits(self) -> bool:
        """Whether it is a long poll."""
        return "wait_s" in self.signature.parameters


# Every store verb by name. To add one, declare it in a protocol above and implement it in a part of the store (replay/core.py).
VERBS = {
    name: Verb(protocol.__name__, inspect.signature(method))
    for protocol in (GeneratorStore, RewardStore, LearnerStore, SupervisorStore)
    for name, method in vars(protocol).items()
    if not name.startswith("_")
}


class WeightSink(Protocol):
    """The learner's end of the weight bus."""

    def admit(self, receiver: str, incarnation: int) -> Any:
        """What this receiver needs to find and open the bus, with keys of its own. A secret. From any thread.

        Raises Fenced for one that a later incarnation has replaced.
        """

    def publish(self, version: Version, weights: Tensors | Callable[[str], Any]) -> None:
        """Blocks until staged (copied), not until delivered.

        weights: tensors, on any device; or what stages them itself, such as `models.staging.Staging.staged`, whose parts lie
        in several processes. If that raises, there is no such version.
        """

    def gauges(self) -> dict[str, float]:
        """Figures for the learner's report: bytes sent, receivers, what was dropped."""

    def close(self) -> None: ...


class WeightSource(Protocol):
    """A generator's end of the weight bus."""

    def next(self, after: Version | None, wait_s: float) -> "tuple[Version, Tensors] | None":
        """The newest whole version, if it differs from and supersedes `after` (incarnation first, then update).

        Returns None at the deadline. Raises `Unavailable` when no publisher could be found for longer than allowed,
        `BadTransfer` after repeated damage, `Closed`. The tensors are on CPU, and valid until the following call.
        """

    def gauges(self) -> dict[str, float]:
        """Figures for the generator's report: `received_bytes`, transfers that failed, time to fetch."""

    def close(self) -> None: ...
