"""What the ledger holds: small structures per group, lease and commit; nothing per token."""

from msgspec import Struct

from asyncrl.types import Purpose, Status, Version


class RolloutState(Struct):
    """One rollout of a group. row -1: not submitted yet; status None: not scored yet."""

    row: int = -1
    attempt: int = 0
    oldest: int = 0
    newest: int = 0
    length: int = 0
    status: Status | None = None
    reward: float = 0.0
    parts: dict[str, float] = {}


class Group(Struct):
    """A reservation. update: of the weights its holder had when it got the present attempt."""

    id: int
    purpose: Purpose
    position: int
    retry: int
    attempt: int
    update: int
    worker: str
    incarnation: int
    rollouts: list[RolloutState]
    unsubmitted: int
    unscored: int

    def missing(self) -> tuple[int, ...]:
        return tuple(i for i, r in enumerate(self.rollouts) if r.row < 0)

    def in_flight(self) -> bool:
        return self.unsubmitted > 0

    def scored(self) -> bool:
        return self.unscored == 0

    def ok(self) -> list[RolloutState]:
        return [r for r in self.rollouts if r.status == "ok"]

    def oldest(self) -> int:
        """A bound on the update of the oldest token: known for submitted rollouts, the reservation's for the others."""
        return min(self.update if r.row < 0 else r.oldest for r in self.rollouts if r.status in (None, "ok"))

    def newest(self) -> int:
        return max(r.newest for r in self.ok())


class Lease(Struct):
    """A batch that a learner trains as the update after `update`."""

    lease: int
    update: int
    groups: tuple[int, ...]
    replayed: bool


class Reopened(Struct):
    """A committed batch that a restore undid; trained again as the update after `update`."""

    update: int
    groups: tuple[int, ...]


class Commit(Struct):
    lease: int
    version: Version
    groups: list[Group]


class EvalRound(Struct):
    """The running evaluation. next: how many eval prompts have a ticket."""

    version: Version
    next: int
    groups: dict[int, Group]


class Lengths(Struct):
    """Response tokens and rollouts, dispatched (submitted) and trained: their means show a bias against long answers."""

    dispatched: int = 0
    dispatched_tokens: int = 0
    trained: int = 0
    trained_tokens: int = 0
