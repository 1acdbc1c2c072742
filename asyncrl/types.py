"""The nouns that travel between the stages. Immutable; no torch, no Ray, no I/O.

One noun per hop (docs/architecture.md):

    Ticket ──► Generation ──► Rollout ──► Unscored ──► Score ──► BatchLease + TrainRollout ──► commit
    store      engine         generator   store        reward    store                        learner
"""

import hashlib
from itertools import accumulate
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

Purpose = Literal["train", "eval"]
FinishReason = Literal["stop", "length", "abort"]
Status = Literal["ok", "invalid", "timeout"]
EpisodeStop = Literal["done", "max_turns", "max_tokens", "deadline", "error", "abandoned"]
Outcome = Literal["trained", "filtered", "evicted", "failed", "unused"]


class Version(Struct, frozen=True, order=True, array_like=True):
    """Identity of one set of policy weights. Never repeats.

    `update` counts trained batches; `incarnation` counts starts and restores of the learner, so that
    weights of a lost lineage never share a name with those of the surviving one.
    """

    incarnation: int
    update: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.update}"


class Span(Struct, frozen=True, array_like=True):
    """`length` consecutive response tokens, all sampled from the weights `version`."""

    version: Version
    length: int


class Key(Struct, frozen=True, array_like=True):
    """Who calls the store, and the idempotency key of the call: a repeated key gets the first reply and changes nothing."""

    worker: str
    incarnation: int  # of the worker: rises with every restart; the store refuses older ones
    sequence: int  # of the worker's calls
    learner: int = 0  # the incarnation that the learner's `fence` gave it; 0 for others


class Prompt(Struct, frozen=True, kw_only=True):
    """One dataset row, tokenized once."""

    row: int
    ids: tuple[int, ...]
    data_source: str
    ground_truth: str = "null"  # JSON, decoded by the reward; so is extra_info
    extra_info: str = "null"

    def readable_truth(self) -> str:
        """The ground truth for people and tables: a text as it is, anything else as JSON."""
        return msgspec.json.decode(self.ground_truth, type=str) if self.has_text_truth() else self.ground_truth

    def has_text_truth(self) -> bool:
        return self.ground_truth.startswith('"')


class Sampling(Struct, frozen=True, kw_only=True):
    """How one rollout is sampled. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]

    def greedy(self) -> "Sampling":
        """The same, without chance."""
        return replace(self, temperature=0.0, top_p=1.0, top_k=0)


class Tokens(Struct, frozen=True, kw_only=True):
    """Sampled response tokens; lists are parallel, one entry per token (a stop token included). Full-softmax log-probability at
    the same temperature = logprobs + kept_logmass."""

    token_ids: list[int]
    logprobs: list[float]  # nats, of the distribution that was sampled (after temperature, top-p, top-k)
    # log of the probability mass that top-p/top-k kept (0 where nothing was cut); None when both were off
    kept_logmass: list[float] | None
    spans: tuple[Span, ...]

    def after(self, start: int) -> "Tokens":
        """Those from number `start` on."""
        ends = accumulate(span.length for span in self.spans)
        spans = [(span.version, min(span.length, end - start)) for span, end in zip(self.spans, ends, strict=True)]
        return Tokens(
            token_ids=self.token_ids[start:],
            logprobs=self.logprobs[start:],
            kept_logmass=None if self.kept_logmass is None else self.kept_logmass[start:],
            spans=tuple(Span(version, length) for version, length in spans if length > 0),
        )


class RolloutPiece(Tokens, frozen=True, kw_only=True):
    """What was sampled of an unfinished rollout from its token number `start` on."""

    group: int
    rollout: int
    attempt: int
    start: int


class Ticket(Struct, frozen=True, kw_only=True):
    """The right to generate `rollouts` of one group: a reservation in the store."""

    group: int
    attempt: int
    prompt: Prompt
    rollouts: tuple[int, ...]  # the indices still missing: all of them at first, fewer after a reissue
    seeds: tuple[int, ...]  # parallel to rollouts
    sampling: Sampling
    purpose: Purpose = "train"
    pinned: Version | None = None  # of an eval ticket, unless it is an episode's: every token must come from these weights
    baseline: int | None = None  # the rollout that is to be greedy, and is compared with, not trained (ReMax), if there is one
    begun: dict[int, Tokens] = {}  # what others have sampled of some of the rollouts, which go on from there

    def name_of(self, rollout: int) -> str:
        return f"{self.group}/{rollout}/{self.attempt}"

    def sampling_of(self, rollout: int) -> Sampling:
        """How one of the rollouts is sampled: the baseline without chance."""
        return self.sampling.greedy() if rollout == self.baseline else self.sampling


TOO_OLD = "weights too old"  # what only newer weights help against


class Reserved(Struct, frozen=True, kw_only=True):
    """Reply to `reserve`. No ticket means: waited until the deadline."""

    tickets: tuple[Ticket, ...] = ()
    cancelled: tuple[int, ...] = ()  # held groups that the store no longer wants; abort them
    waiting_for: str = ""  # why there was no ticket: TOO_OLD, or whom the store waits for
    ended: bool = False  # there will be no more tickets


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """What an engine is asked for. Requests with the same `group` share their prompt's prefix."""

    id: str
    group: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    goes_on: bool = False  # another prompt of the group may begin with this one and its answer
    begun: Tokens | None = None  # of the answer, sampled elsewhere; `sampling.max_tokens` counts these too

    @property
    def known_ids(self) -> tuple[int, ...]:
        """The prompt, and what there is of the answer."""
        return self.prompt_ids if self.begun is None else (*self.prompt_ids, *self.begun.token_ids)


class Generation(Tokens, frozen=True, kw_only=True):
    """What an engine generated."""

    id: str
    finish_reason: FinishReason


class EpisodeSummary(Struct, frozen=True, kw_only=True):
    """How an episode ended, and how it went, in numbers."""

    status: Status = "ok"  # past its deadline it is `timeout`, after an error `invalid`: never a silent 0
    stop: EpisodeStop = "done"
    error: str = ""
    turn_rewards: tuple[float, ...] | None = None  # what each turn earned of the reward; None: nobody said
    figures: dict[str, float] = {}  # turns, segments, tokens sampled and read, calls of tools and of these failures, seconds

    def measures(self) -> dict[str, float]:
        """All that is counted of it, by name."""
        earned = {f"turn_reward/{turn}": reward for turn, reward in enumerate(self.turn_rewards or (), start=1)}
        return {**self.figures, f"stop/{self.stop}": 1.0, **earned}


class Episode(EpisodeSummary, frozen=True, kw_only=True):
    """What an episode earned by itself, and what was said."""

    reward: float | None = None  # None: the reward stage alone scores it
    parts: dict[str, float] = {}
    messages: str = "[]"  # JSON, for judges and readers; not for training

    def for_rewards(self, purpose: Purpose) -> str:
        """As reward functions see it: JSON, with what it was for."""
        told = {**msgspec.to_builtins(self), "messages": msgspec.Raw(self.messages.encode()), "purpose": purpose}
        return msgspec.json.encode(told).decode()


class Trajectory(Generation, frozen=True, kw_only=True):
    """What an episode generated: its context is in the lists as well, with mask 0. As in `Rollout`."""

    loss_mask: list[int]
    turns: tuple[int, ...]
    segments: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    episode: Episode


class Rollout(Struct, frozen=True, kw_only=True):
    """One finished rollout, as the generator submits it; the first writer of (group, rollout, attempt) wins.

    An episode whose contexts do not each begin with the one before is several *segments*, one after the other in
    `response_ids` and the lists beside it: each but the first starts with a prompt of its own, whose tokens have mask 0.
    """

    group: int
    rollout: int
    attempt: int
    prompt: Prompt
    response_ids: list[int]
    logprobs: list[float]
    kept_logmass: list[float] | None
    loss_mask: list[int]  # 1 where the policy chose the token, 0 for tool and environment tokens
    turns: tuple[int, ...]  # start offsets of the turns in response_ids; (0,) for a single turn
    segments: tuple[int, ...] = (0,)  # start offsets of the segments
    prompt_ids: tuple[int, ...] | None = None  # of the first segment; None: the prompt's. An episode may write its own
    episode: Episode | None = None  # None: a single turn
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    worker: str
    times: dict[str, float]  # seconds since the epoch, at each hop: "reserved", "started", "finished", "swap 12"
    text: str = ""  # of the response, and of the prompt, without special tokens
    prompt_text: str = ""
    purpose: Purpose = "train"
    baseline: bool = False  # greedy, scored like the others and never trained


class Unscored(Struct, frozen=True, kw_only=True):
    """One rollout handed to a reward worker."""

    group: int
    rollout: int
    attempt: int
    prompt: Prompt  # without `ids`, which are not sent
    response_ids: list[int]  # the stop token included
    text: str  # what they say, without special tokens
    purpose: Purpose
    finish_reason: FinishReason
    turns: tuple[int, ...] = (0,)  # as in `Rollout`; so is `episode`
    episode: Episode | None = None


class UnscoredLease(Struct, frozen=True, kw_only=True):
    """Rollouts leased to one reward worker until `lease_s` after the last `extend`."""

    lease: int
    lease_s: float
    items: tuple[Unscored, ...]  # empty: the long poll ran out
    ended: bool = False  # there will be no more rollouts


class Score(Struct, frozen=True, kw_only=True):
    """The verdict on one rollout. Only `ok` carries a reward; a failure is never a silent 0."""

    group: int
    rollout: int
    attempt: int
    status: Status
    reward: float | None = None  # assigned to the last token
    parts: dict[str, float] = {}
    error: str = ""
    token_rewards: list[float] | None = None  # what each response token earns beside it, one number per token
    said: dict[str, str] = {}  # what judges wrote, by the name of their term
    scoring: tuple[str, float, float] | None = None  # the process (WORKER/NUMBER), from when to when: seconds since the epoch


class BatchLease(Struct, frozen=True, kw_only=True):
    """Groups to train as one update."""

    lease: int
    groups: tuple[int, ...]  # oldest first; empty without `ended`: the long poll ran out
    committed: int
    replayed: bool = False  # a committed batch that a restore reopened
    ended: bool = False  # the data is used up and every group settled
    waiting_for: str = ""


class TrainRollout(Struct, frozen=True, kw_only=True):
    """One scored rollout as the learner sees it. Arrays are 1-D and parallel over response tokens (T)."""

    group: int
    rollout: int
    attempt: int
    data_source: str
    prompt_ids: np.ndarray  # [P] int64
    response_ids: np.ndarray  # [T] int64
    loss_mask: np.ndarray  # [T] bool
    logprobs: np.ndarray  # [T] float32 nats, of the sampled distribution
    kept_logmass: np.ndarray | None  # [T] float32
    updates: np.ndarray  # [T] int64, the policy update that produced each token
    reward: float  # assigned to the last token
    parts: dict[str, float]
    finish_reason: FinishReason
    segments: tuple[int, ...] = (0,)  # as in `Rollout`
    token_rewards: np.ndarray | None = None  # [T] float64, what each token earned beside `reward`
    baseline: float | None = None  # what the greedy rollout of the same prompt earned in all, where one was asked for


class EvalResult(Struct, frozen=True, kw_only=True):
    """Mean held-out score of a version; of episodes `more` has the oldest and newest whose tokens are in it. Rollouts without a
    verdict count as 0 in the means."""

    version: Version
    score: float
    count: int  # rollouts
    invalid: int  # of them, those whose reward function failed
    by_source: dict[str, float]  # mean score by data source
    mean_length: float  # response tokens
    timeout: int = 0  # of them, those whose reward function took too long
    more: dict[str, float] = {}  # `pass@k` of several rollouts per prompt, `metric/…` of the user's own, how episodes went


class GroupCounts(Struct, frozen=True, kw_only=True):
    """Training groups by outcome. reserved = trained + filtered + evicted + failed + unused + pending, always."""

    reserved: int = 0
    trained: int = 0
    filtered: int = 0
    evicted: int = 0
    failed: int = 0
    unused: int = 0  # in flight or ready when the run had made its last update
    pending: int = 0


class RewardFailures(Struct, frozen=True, kw_only=True):
    """Samples on which the reward function failed, since the store started."""

    invalid: int = 0
    timeout: int = 0
    first: str = ""  # which function failed on which sample, and how
    errors: dict[str, int] = {}  # the most frequent: the first of each kind, and how many there are
    broken: str = ""  # why the run can't go on, if it has never worked


class Record(Struct, frozen=True, kw_only=True):
    """One line of metrics.jsonl: a committed update or an evaluation."""

    sequence: int  # rises, and survives restarts
    time: float
    kind: Literal["step", "eval"]
    version: Version
    metrics: dict[str, float]


class StoreReport(Struct, frozen=True, kw_only=True):
    """What the store says of itself: records after the sequence number asked for, and where everything stands now."""

    records: tuple[Record, ...]
    committed: int
    counts: GroupCounts
    evals_pending: int  # asked for and not yet settled
    activity: int  # rises with every accepted call that moved data
    gauges: dict[str, float]  # queue depths by name
    seconds: dict[str, float] = {}  # time per state, as in a `Report`
    failures: RewardFailures = RewardFailures()
    given_up: tuple[str, ...] = ()  # a message for each prompt that workers died of, since the run's first start
    settled: int = 0  # no restore goes back behind this update, and with these records all steps up to it are told


class SwapReport(Struct, frozen=True, kw_only=True):
    """One weight update as an engine saw it."""

    version: Version
    pause_s: float  # how long no token was produced
    recomputed_tokens: int  # whose cache was recomputed, prompts included; they stay part of their rollouts
    discarded_tokens: int = 0  # response tokens thrown away with rollouts that are regenerated from the prompt (`restart`)


class Report(Struct, frozen=True, kw_only=True):
    """What an actor says of itself."""

    name: str
    role: str
    seconds: dict[str, float]  # time per state of its main loop; they add up to its wall clock
    gauges: dict[str, float]
    # Rises with whatever it gets done, however small (a token, a pack, a verdict, a piece of weights), and while something is
    # under way that has a limit of its own (a server that starts, a sample that is scored). If nobody's does, the run is stuck.
    progress: int = 0
    doing: str = ""  # of a rank among several: what it works on, for how long, and what it waits for there


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine and Python version."""
    digest = hashlib.blake2b(((",%d" * len(parts))[1:] % parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
