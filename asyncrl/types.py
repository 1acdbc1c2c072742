"""The nouns that travel between the stages. Immutable; no torch, no Ray, no I/O.

One noun per hop (DESIGN, "The flow"):

    Ticket ──► Generation ──► Rollout ──► Unscored ──► Score ──► BatchLease + TrainRollout ──► commit
    store      engine         generator   store        reward    store                        learner
"""

import hashlib
from typing import Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

Purpose = Literal["train", "eval"]
FinishReason = Literal["stop", "length", "abort"]
Status = Literal["ok", "invalid", "timeout"]
Outcome = Literal["trained", "filtered", "evicted", "failed"]


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
    """Idempotency key of a call. A repeated key returns the first answer and changes nothing."""

    worker: str
    incarnation: int
    sequence: int


class Prompt(Struct, frozen=True, kw_only=True):
    """One dataset row, tokenized once. `ground_truth` and `extra_info` are JSON texts, decoded by the reward."""

    row: int
    ids: tuple[int, ...]
    data_source: str
    ground_truth: str = "null"
    extra_info: str = "null"


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


class Ticket(Struct, frozen=True, kw_only=True):
    """The right to generate `rollouts` of one group: a reservation in the store.

    `rollouts` are the indices still missing (all of them at first, fewer after a reissue); `seeds` is parallel to it.
    An eval ticket is pinned: every token must come from the weights `pinned`. baseline: the index of the rollout that is to
    be greedy, and is compared with, not trained (ReMax); None: there is none.
    """

    group: int
    attempt: int
    prompt: Prompt
    rollouts: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    purpose: Purpose = "train"
    pinned: Version | None = None
    baseline: int | None = None


class Reserved(Struct, frozen=True, kw_only=True):
    """Answer to `reserve`. No ticket means: waited until the deadline, `waiting_for` says why.

    `cancelled`: held groups that the store no longer wants; abort them. `ended`: there will be no more tickets.
    """

    tickets: tuple[Ticket, ...] = ()
    cancelled: tuple[int, ...] = ()
    waiting_for: str = ""
    ended: bool = False


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """What an engine is asked for. Requests with the same `group` share their prompt's prefix."""

    id: str
    group: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


class Generation(Struct, frozen=True, kw_only=True):
    """What an engine answers; lists are parallel, one entry per response token (the stop token included).

    logprobs: nats, of the distribution that was sampled (after temperature, top-p, top-k).
    kept_logmass: log of the probability mass that top-p/top-k kept (0 where nothing was cut); None when both were off.
    Full-softmax log-probability at the same temperature = logprobs + kept_logmass.
    """

    id: str
    token_ids: list[int]
    logprobs: list[float]
    kept_logmass: list[float] | None
    spans: tuple[Span, ...]
    finish_reason: FinishReason


class Rollout(Struct, frozen=True, kw_only=True):
    """One finished rollout, as the generator submits it; the first writer of (group, rollout, attempt) wins.

    loss_mask: 1 where the policy chose the token, 0 for tool and environment tokens.
    turns: start offsets of the turns in response_ids; (0,) for a single turn.
    times: seconds since the epoch, at each hop's name ("reserved", "started", "finished").
    baseline: greedy, scored like the others and never trained.
    """

    group: int
    rollout: int
    attempt: int
    prompt: Prompt
    response_ids: list[int]
    logprobs: list[float]
    kept_logmass: list[float] | None
    loss_mask: list[int]
    turns: tuple[int, ...]
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    worker: str
    times: dict[str, float]
    purpose: Purpose = "train"
    baseline: bool = False


class Unscored(Struct, frozen=True, kw_only=True):
    """One rollout handed to a reward worker. response_ids still hold the stop token. turns: as in `Rollout`."""

    group: int
    rollout: int
    attempt: int
    prompt: Prompt
    response_ids: list[int]
    purpose: Purpose
    finish_reason: FinishReason
    turns: tuple[int, ...] = (0,)


class UnscoredLease(Struct, frozen=True, kw_only=True):
    """Rollouts leased to one reward worker until `lease_s` after the last `extend`. Empty: the long poll ran out."""

    lease: int
    lease_s: float
    items: tuple[Unscored, ...]
    ended: bool = False


class Score(Struct, frozen=True, kw_only=True):
    """The verdict on one rollout. Only `ok` carries a reward; a failure is never a silent 0.

    reward: due at the end. token_rewards: what each response token earns beside it, one number per token, or None.
    """

    group: int
    rollout: int
    attempt: int
    status: Status
    reward: float | None = None
    parts: dict[str, float] = {}
    error: str = ""
    token_rewards: list[float] | None = None


class BatchLease(Struct, frozen=True, kw_only=True):
    """Groups to train as one update, oldest first. `replayed`: a committed batch that a restore reopened.

    Empty `groups` without `ended`: the long poll ran out. `ended`: the data is used up and every group settled.
    """

    lease: int
    groups: tuple[int, ...]
    committed: int
    replayed: bool = False
    ended: bool = False
    waiting_for: str = ""


class TrainRollout(Struct, frozen=True, kw_only=True):
    """One scored rollout as the learner sees it. Arrays are 1-D and parallel over response tokens (T).

    prompt_ids [P] int64; response_ids [T] int64; loss_mask [T] bool; logprobs [T] float32 nats, of the sampled
    distribution; kept_logmass [T] float32 or None; updates [T] int64, the policy update that produced each token.
    token_rewards [T] float64 or None: what each token earned beside `reward`, which is due at the end. baseline: what the
    greedy rollout of the same prompt earned in all, None where none was asked for.
    """

    group: int
    rollout: int
    attempt: int
    data_source: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    kept_logmass: np.ndarray | None
    updates: np.ndarray
    reward: float
    parts: dict[str, float]
    finish_reason: FinishReason
    token_rewards: np.ndarray | None = None
    baseline: float | None = None


class Fence(Struct, frozen=True, kw_only=True):
    """Answer to a learner's `fence`: its new incarnation, and where the surviving lineage stands."""

    incarnation: int
    committed: int
    reopened: int


class EvalResult(Struct, frozen=True, kw_only=True):
    """Mean held-out score of one pinned version. Rollouts without a verdict count as 0 in the means."""

    version: Version
    score: float
    count: int  # rollouts
    invalid: int  # of them, those whose reward function failed
    by_source: dict[str, float]  # mean score by data source
    mean_length: float  # response tokens
    timeout: int = 0  # of them, those whose reward function took too long


class Counts(Struct, frozen=True, kw_only=True):
    """The store's ledger of training groups. reserved = trained + filtered + evicted + failed + pending, always."""

    reserved: int = 0
    trained: int = 0
    filtered: int = 0
    evicted: int = 0
    failed: int = 0
    pending: int = 0


class Record(Struct, frozen=True, kw_only=True):
    """One line of metrics.jsonl: a committed update or an evaluation. `sequence` rises and survives restarts."""

    sequence: int
    time: float
    kind: Literal["step", "eval"]
    version: Version
    metrics: dict[str, float]


class StoreReport(Struct, frozen=True, kw_only=True):
    """What the store says of itself: records after the sequence number asked for, and where everything stands now.

    evals_pending: evaluations asked for and not yet settled. activity: rises with every accepted call that moved data.
    gauges: queue depths by name. seconds: time per state, as in a `Report`.
    """

    records: tuple[Record, ...]
    committed: int
    counts: Counts
    evals_pending: int
    activity: int
    gauges: dict[str, float]
    seconds: dict[str, float] = {}


class SwapReport(Struct, frozen=True, kw_only=True):
    """One weight update as an engine saw it. pause_s: how long no token was produced.

    recomputed_tokens: whose cache was computed anew, prompts included; they stay part of their rollouts.
    discarded_tokens: response tokens thrown away with the rollouts that began anew (`restart`).
    """

    version: Version
    pause_s: float
    recomputed_tokens: int
    discarded_tokens: int = 0


class Report(Struct, frozen=True, kw_only=True):
    """What an actor says of itself. `seconds`: time per state of its main loop; they add up to its wall clock."""

    name: str
    role: str
    seconds: dict[str, float]
    gauges: dict[str, float]


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine and Python version."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
