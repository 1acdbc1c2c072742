"""What a store is told at construction, and what follows from it alone: which groups are kept, in which order prompts are
drawn, and with which seed each rollout is sampled. Pure: a plain loop computes the same."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from msgspec import Struct

from asyncrl.config import SamplingSpec
from asyncrl.errors import ConfigError
from asyncrl.interfaces import Keep
from asyncrl.report.scores import Metric
from asyncrl.staleness import Staleness
from asyncrl.types import Prompt, Purpose, Sampling, derive_seed


def keep_all(rewards: Sequence[float]) -> bool:
    return True


def keep_varied(rewards: Sequence[float]) -> bool:
    """DAPO's dynamic sampling: equal rewards give a group no relative advantage, so no gradient."""
    return max(rewards) > min(rewards)


# Dynamic sampling: which complete groups are worth training, by name; functions of the rewards of their `ok` rollouts.
GROUP_FILTERS: dict[str, Keep] = {"all": keep_all, "varied": keep_varied}


class Source(Struct, frozen=True, kw_only=True):
    """Prompts to train on, and the order they come in: a seeded permutation per epoch. Positions count through all epochs,
    from 0."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int = 0
    shuffle: bool = True  # False: in every epoch the order of the files
    epochs: int | None = None  # None: without end

    @property
    def total(self) -> int | None:
        """Positions in all; None: without end."""
        return None if self.epochs is None else len(self.prompts) * self.epochs

    def index(self, position: int) -> int:
        """The index into the prompts at `position`."""
        size = len(self.prompts)
        epoch, place = divmod(position, size)
        return int(_permutation(size, self.seed, epoch)[place]) if self.shuffle else place


@lru_cache(maxsize=2)  # retries reach back into older epochs, but rarely
def _permutation(size: int, run_seed: int, epoch: int) -> np.ndarray:
    # RandomState's stream is frozen by NumPy's policy; Generator's may change between releases.
    return np.random.RandomState(derive_seed(run_seed, epoch) & 0xFFFFFFFF).permutation(size)


class EvalSetting(Struct, frozen=True):
    """How responses to held-out prompts are sampled, n of each."""

    name: str  # empty: the first one's
    sampling: Sampling
    n: int = 1


class Evaluation(Struct, frozen=True, kw_only=True):
    """Held-out prompts, and what is asked of each. Positions count through all prompts of a setting, then of the next.

    Without prompts or settings nothing is evaluated.
    """

    prompts: Sequence[Prompt] = ()
    settings: tuple[EvalSetting, ...] = ()
    metrics: tuple[Metric, ...] = ()  # of the user's own
    pinned: bool = True  # to one version, which every response comes from. Episodes are not: no swap is to wait for them

    @property
    def total(self) -> int:
        """Positions in all."""
        return len(self.prompts) * len(self.settings)

    def at(self, position: int) -> tuple[EvalSetting, Prompt]:
        """What is asked at `position`."""
        setting, place = divmod(position, len(self.prompts))
        return self.settings[setting], self.prompts[place]


class StorePlan(Struct, frozen=True, kw_only=True):
    """Everything the store decides by."""

    rule: Staleness
    source: Source
    sampling: SamplingSpec  # read: n, min_valid, max_attempts, max_first_failures, max_empty_batches
    keep: Keep = keep_all  # which complete groups are worth training; what `sampling.keep` names
    # Whether each group has one greedy rollout more, which is scored and never trained. It counts in neither min_valid nor
    # keep; where it is not `ok`, the group is failed: without it the others' advantages would be of another kind.
    baseline: bool = False
    evaluation: Evaluation = Evaluation()
    lease_s: float = 30.0  # silence after which a worker's work is reassigned
    reward: str = "the reward"  # what scores, as errors name it
    stream_interval: int = 0  # tokens of a rollout between two pieces, at most; 0: unfinished ones are not streamed
    whole_groups: bool = False  # whether rollouts are leased to reward workers with all others of their group

    def __post_init__(self) -> None:
        size, batch = len(self.source.prompts), self.rule.batch_groups
        if size < batch:
            raise ConfigError(
                f"{size} prompts < batch_groups={batch}: an epoch cannot fill a batch, and one prompt would be in it twice; "
                "add data or lower learner.batch_groups"
            )


def ticket_seed(run_seed: int, purpose: Purpose, position: int, retry: int, rollout: int) -> int:
    """Sampling seed of one rollout.

    It depends on what is generated, never on when or by whom: a reissue of a lost group keeps its seeds, a retry of
    a failed prompt (`retry` 1, 2, …) gets others. position: in the order of prompts, or of the eval set.
    """
    return derive_seed(run_seed, 1 if purpose == "eval" else 0, position, retry, rollout)
