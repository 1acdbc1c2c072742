"""What the ledger holds: small structures per group, lease and commit; nothing per token. They are written down in snapshots:
new fields go last, with a default; any other change raises the snapshots' format."""

from msgspec import Struct

from asyncrl.types import Purpose, Status, Version

PromptKey = tuple[Purpose, int]  # a prompt, whichever group tries it: its purpose and position


class RolloutState(Struct, gc=False, array_like=True):
    """One rollout of a group."""

    row: int = -1  # of the log; -1: not submitted yet, and what follows is of its pieces
    attempt: int = 0
    oldest: int = 0  # updates of its oldest and newest token that the policy chose
    newest: int = 0
    length: int = 0  # response tokens
    status: Status | None = None  # None: not scored yet
    reward: float = 0.0
    parts: dict[str, float] = {}
    token_sum: float = 0.0  # what its tokens earned beside `reward`
    figures: dict[str, float] | None = None  # how its episode went; None: a single turn
    pieces: list[int] = []  # of the log, in order: what was streamed of it, until it is submitted

    def oldest_at(self, update: int) -> int:
        """A bound on the update of its oldest token, where those to come are from `update` or newer."""
        return self.oldest if self.row >= 0 else min(update, self.oldest) if self.pieces else update

    def begin_anew(self) -> None:
        """Forgets what was streamed."""
        self.pieces, self.oldest, self.newest, self.length = [], 0, 0, 0

    @property
    def earned(self) -> float:
        """Reward and token-level rewards together."""
        return self.reward + self.token_sum


class Group(Struct, gc=False, array_like=True):
    """A reservation."""

    id: int
    purpose: Purpose
    position: int  # in the order of prompts, or of the eval set
    retry: int  # earlier groups of this prompt that failed or were evicted
    attempt: int  # how often it was reissued
    update: int  # of the weights that its holder had when it got the present attempt
    worker: str  # its holder; empty: it died
    incarnation: int
    # `n` that are sampled and, where a baseline is wanted, a greedy one after them. It is generated and scored with the
    # others; having no token to train, it has no lag, and counts in nothing that is said of the sampled ones.
    rollouts: list[RolloutState]
    n: int
    unsubmitted: int  # of `rollouts`
    unscored: int
    excused: bool = False  # nobody waits for it any more: what is too old when it comes is masked

    @property
    def prompt(self) -> PromptKey:
        return self.purpose, self.position

    def missing(self) -> tuple[int, ...]:
        return tuple(i for i, r in enumerate(self.rollouts) if r.row < 0)

    def in_flight(self) -> bool:
        return self.unsubmitted > 0

    def give_up(self) -> None:
        """Counts what is missing as invalid."""
        for i in self.missing():
            self.rollouts[i].status = "invalid"
        self.unscored, self.unsubmitted = self.unscored - self.unsubmitted, 0

    def scored(self) -> bool:
        return self.unscored == 0

    def sampled(self) -> list[RolloutState]:
        return self.rollouts[: self.n]

    def baseline(self) -> RolloutState | None:
        return self.rollouts[self.n] if len(self.rollouts) > self.n else None

    def ok(self) -> list[RolloutState]:
        """The sampled ones that have a reward; none where the baseline that they are compared with has failed."""
        baseline = self.baseline()
        if baseline is not None and baseline.status not in (None, "ok"):
            return []
        return [r for r in self.sampled() if r.status == "ok"]

    def oldest(self) -> int:
        """A bound on the update of the oldest token: known for submitted rollouts and pieces, else the reservation's."""
        known = (r.oldest_at(self.update) for r in self.sampled() if r.status in (None, "ok"))
        return min(known, default=self.update)

    def oldest_submitted(self) -> int | None:
        """The same for the rollouts that were submitted; None where there is none."""
        return min((r.oldest for r in self.sampled() if r.row >= 0 and r.status in (None, "ok")), default=None)

    def hopeless(self) -> bool:
        """Whether nothing of it can be trained any more: it only waits for its baseline, to fail."""
        return all(r.status not in (None, "ok") for r in self.sampled())

    def newest(self) -> int:
        return max(r.newest for r in self.ok())


class Commit(Struct):
    """A trained batch: needed again if a learner goes back to a checkpoint before it."""

    lease: int
    version: Version
    groups: list[Group]
    trained: int  # rollouts, with a token that was not too old, and tokens, as `Lengths` counts them
    trained_tokens: int


class EvalRound(Struct):
    """The running evaluation."""

    version: Version
    groups: dict[int, Group] = {}  # one for each eval prompt that has had a ticket, in their order
    unscored: int = 0  # of them


class Lengths(Struct):
    """Response tokens and rollouts, dispatched (submitted) and trained: their means show a bias against long responses."""

    dispatched: int = 0
    dispatched_tokens: int = 0
    trained: int = 0
    trained_tokens: int = 0
