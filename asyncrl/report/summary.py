"""How a run stands: what its store wrote down and what its actors said last, summed up. Whoever shows a run reads this."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import asdict

from asyncrl.types import GroupCounts, Record, Report, RewardFailures, StoreReport

_SUMMED = ("samples", "tokens/policy", "tokens/trained", "tokens/head", "tokens/head_trained")  # metrics of a step


class Scaling(Struct, frozen=True, kw_only=True):
    """A decision about how many actors of a role there should be: a line of kind `scale` in metrics.jsonl."""

    time: float  # seconds since the epoch
    step: int  # updates committed
    role: str
    count_before: int
    count: int
    reason: str


def actors_of(role: str) -> str:
    """What those are called that a `Scaling` counts."""
    return "learner ranks" if role == "learner" else f"{role} actors"


class RunResult(Struct, frozen=True, kw_only=True):
    """What a run came to; `asyncrl run` prints it as its one line of JSON."""

    run_dir: str
    steps: int  # updates committed
    samples: int  # rollouts trained
    wall_s: float
    first_score: float | None  # `eval/score` of the first evaluation
    last_score: float | None
    trained: int  # groups, as in `GroupCounts`
    filtered: int
    evicted: int
    failed: int
    unused: int
    pending: int
    invalid: int  # samples on which the reward failed since this start, and those on which it took too long
    timeout: int
    reward_errors: dict[str, int]  # the most frequent of these failures
    restarts: dict[str, int]
    max_trained_lag: int  # the largest lag of a trained token
    mean_trained_lag: float
    masked_share: float  # of the policy's leased tokens, those too old to train
    masked_head_share: float  # the same of the first quarter of long responses
    trained_length_ratio: float | None  # mean response length, trained over dispatched; below 1, staleness favoured short ones
    learner_utilization: float  # the share of the learner's wall clock in which it computed
    # Shares of the store's time. `reserve_ahead`, `max_lag`: generators with free slots got no more prompts because of it;
    # `stragglers`: a full batch was held back for groups that would else pass the bound.
    limited_by: dict[str, float]
    preemptions: dict[str, int] = {}  # how often actors were lost, or given up, with their node: no failures of theirs
    sentinels: dict[str, int] = {}  # those that fired since this start, and the update at which each did last
    error: str = ""  # what ended the run, if it failed


class RunEnd(Struct, frozen=True, kw_only=True):
    """`ended.json` of a run directory: how its newest start ended."""

    time: float  # seconds since the epoch
    status: int  # as the exit status of the command: 0 it is done, 130 it was interrupted, else it failed
    steps: int  # updates committed
    checkpoint: str = ""  # the newest, if there is any
    error: str = ""


@dataclass(kw_only=True)
class RunSummary:
    """A run's present state. Sums are over the surviving lineage: a step that a restore reopened counts once.

    The supervisor updates it about twice a second, in the thread that leads the run.
    """

    name: str
    total_steps: int
    starting: bool = False  # until all is up and, in a resumed run, back at its checkpoint
    elapsed_s: float = 0.0
    committed: int = 0  # updates
    counts: GroupCounts = field(default_factory=GroupCounts)
    steps: dict[int, Record] = field(default_factory=dict)  # by update: those that a restore may undo, and the one before
    evals: dict[int, Record] = field(default_factory=dict)  # the same, and the first
    fired: dict[str, int] = field(default_factory=dict)  # sentinels, and the update at which each did last
    settled: dict[str, float] = field(default_factory=dict)  # sums over all other steps
    settled_lag: int = 0  # the largest of a token that they trained
    reports: dict[str, Report] = field(default_factory=dict)  # the newest of every actor; their seconds only grow
    restarts: dict[str, int] = field(default_factory=dict)  # of the actors that had any
    preemptions: dict[str, int] = field(default_factory=dict)  # of the actors whose node was taken, or drained
    scalings: list[Scaling] = field(default_factory=list)  # since this start
    pids: dict[str, int] = field(default_factory=dict)  # of the actors that are up
    failures: RewardFailures = field(default_factory=RewardFailures)
    given_up: tuple[str, ...] = ()  # a message for each prompt that generators died of, since the run's first start

    def update(
        self, store: StoreReport | None, reports: Iterable[Report], restarts: dict[str, int], pids: dict[str, int]
    ) -> None:
        """Takes what the supervisor learnt in one round. store: None while it has not answered again."""
        self.reports |= {report.name: report for report in reports}
        self.restarts, self.pids = restarts, pids
        if store is None:
            return
        self.reports["store"] = Report(name="store", role="store", seconds=store.seconds, gauges=store.gauges)
        for record in store.records:
            (self.evals if record.kind == "eval" else self.steps)[record.version.update] = record
        self.committed, self.counts, self.given_up = store.committed, store.counts, store.given_up
        self.failures = store.failures
        # A learner that was restored to an earlier update has dropped what came after it.
        self.steps = {update: record for update, record in self.steps.items() if update <= self.committed}
        self.evals = {update: record for update, record in self.evals.items() if update <= self.committed}
        self._settle(store.settled)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the newest update."""
        return self.steps[max(self.steps)].metrics if self.steps else {}

    @property
    def scores(self) -> list[float]:
        """Held-out scores that are kept, by update."""
        return [self.evals[update].metrics["eval/score"] for update in sorted(self.evals)]

    @property
    def samples(self) -> int:
        """Rollouts trained."""
        return int(self._sum("samples"))

    def result(self, run_dir: str, wall_s: float) -> RunResult:
        """What the run has come to. wall_s: what it took, in seconds."""
        scores = self.scores
        policy_tokens, head_tokens = self._sum("tokens/policy"), self._sum("tokens/head")
        lags = [self.settled_lag, *(step.metrics.get("staleness/lag_max", 0) for step in self.steps.values())]
        store = self.reports["store"].gauges if "store" in self.reports else {}
        dispatched, trained = store.get("length/dispatched_mean"), store.get("length/trained_mean")
        # From the learner's first batch on.
        seconds = self.reports["learner"].seconds if "learner" in self.reports else {}
        in_all = sum(value for state, value in seconds.items() if state != "wait:start")
        return RunResult(
            run_dir=run_dir,
            steps=self.committed,
            samples=self.samples,
            wall_s=round(wall_s, 2),
            first_score=scores[0] if scores else None,
            last_score=scores[-1] if scores else None,
            **{name: count for name, count in asdict(self.counts).items() if name != "reserved"},
            invalid=self.failures.invalid,
            timeout=self.failures.timeout,
            reward_errors=self.failures.errors,
            restarts=self.restarts,
            preemptions=self.preemptions,
            max_trained_lag=int(max(lags)),
            mean_trained_lag=self._sum("lag") / max(1.0, self._sum("tokens/trained")),
            masked_share=1.0 - self._sum("tokens/trained") / policy_tokens if policy_tokens else 0.0,
            masked_head_share=1.0 - self._sum("tokens/head_trained") / head_tokens if head_tokens else 0.0,
            trained_length_ratio=trained / dispatched if dispatched and trained else None,
            learner_utilization=seconds.get("busy", 0.0) / in_all if in_all else 0.0,
            limited_by={name.removeprefix("limit/"): share for name, share in store.items() if name.startswith("limit/")},
            sentinels=dict(self.fired),
        )

    def _settle(self, settled: int) -> None:
        """Keeps of the steps up to this one sums and the newest, and of the evaluations the first and the newest."""
        for update in [u for u in sorted(self.steps) if u <= settled][:-1]:
            step = self.steps.pop(update)
            self.settled = {name: self.settled.get(name, 0.0) + _figure(step, name) for name in (*_SUMMED, "lag")}
            self.settled_lag = max(self.settled_lag, int(step.metrics.get("staleness/lag_max", 0)))
        for update in [u for u in sorted(self.evals) if u <= settled][1:-1]:
            del self.evals[update]

    def _sum(self, name: str) -> float:
        return sum((_figure(step, name) for step in self.steps.values()), self.settled.get(name, 0.0))


def _figure(step: Record, name: str) -> float:
    """One of `_SUMMED`, or the sum of the lags of all trained tokens."""
    if name == "lag":
        return step.metrics.get("staleness/lag_mean", 0.0) * step.metrics.get("tokens/trained", 0.0)
    return step.metrics.get(name, 0.0)
