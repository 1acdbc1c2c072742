"""What a store is told at construction: a few small structs, each validated when made."""

from collections.abc import Sequence

from msgspec import Struct

from asyncrl.errors import ConfigError
from asyncrl.interfaces import Keep
from asyncrl.staleness import Staleness
from asyncrl.types import Prompt, Sampling


class Source(Struct, frozen=True, kw_only=True):
    """Prompts to train on and the order they come in. epochs None: without end."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None


class Grouping(Struct, frozen=True, kw_only=True):
    """n rollouts per prompt, at most max_attempts groups per prompt. Fewer than min_valid `ok` rollouts fail the group; keep: a
    pure function of their rewards. max_empty_batches: so many batches' worth of failed or filtered groups in a row end the run;
    None: 32, and at least 1024 groups.

    baseline: each group has one greedy rollout more, which is scored and never trained. It counts in neither min_valid nor
    keep; where it is not `ok`, the group is failed: without it the others' advantages would be of another kind.
    """

    n: int
    min_valid: int
    max_attempts: int
    keep: Keep
    max_empty_batches: int | None = None
    baseline: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_valid <= self.n:
            raise ConfigError(f"min_valid={self.min_valid} is outside [1, n={self.n}]: no group could be complete; lower it")


class Evaluation(Struct, frozen=True, kw_only=True):
    """Held-out prompts, n rollouts of each."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    n: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("0 evaluation prompts: there is nothing to score; raise evaluation.limit or leave files empty")


class Plan(Struct, frozen=True, kw_only=True):
    """Everything the core decides by. capacity_groups None: the staleness bound alone limits what is outstanding.

    lease_s: silence after which a worker's work is handed to others.
    """

    rule: Staleness
    source: Source
    grouping: Grouping
    evaluation: Evaluation | None = None
    capacity_groups: int | None = None
    lease_s: float = 30.0

    def __post_init__(self) -> None:
        batch, capacity, size = self.rule.batch_groups, self.capacity_groups, len(self.source.prompts)
        if capacity is not None and batch > capacity:
            raise ConfigError(
                f"batch_groups={batch} > capacity_groups={capacity}: a batch could never be admitted and the learner would "
                "wait for ever; raise capacity_groups or lower batch_groups"
            )
        if size < batch:
            raise ConfigError(
                f"{size} prompts < batch_groups={batch}: an epoch cannot fill a batch, and one prompt would be in it twice; "
                "add data or lower learner.batch_groups"
            )
