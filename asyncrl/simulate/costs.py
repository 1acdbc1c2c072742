"""How long everything takes, and how long responses are: stated, or (simulate/measured.py) as they were in a run."""

import math
import random
from collections.abc import Sequence

from asyncrl.config.base import Spec, require_fields

Lengths = Sequence[Sequence[int]]  # response tokens of the rollouts of each group


class Costs(Spec, frozen=True, kw_only=True):
    """Seconds that things take (`…_s`), and how long responses are. The defaults are a guess at a model of 7B parameters with a
    GPU for each generator and for each rank of the learner."""

    step_s: float = 0.02  # of a decode step
    row_s: float = 0.0001  # what each row adds to it
    pause_s: float = 0.2  # of generation, for new weights
    deliver_s: float = 2.0  # from a commit until a generator has the weights
    update_s: float = 1.0  # of an update
    token_s: float = 0.0001  # what each response token adds to it, on one rank
    publish_s: float = 0.5  # from the end of an update until the learner goes on
    score_s: float = 0.01  # of one score, in one process
    rows_s: float = 0.1  # from the lease of a batch until the learner has its rows
    start_s: float = 60.0  # from the decision that there is to be one more generator until it is up
    call_s: float = 0.003  # of any other call of the store
    filtered_share: float = 0.0  # of groups that `sampling.keep` leaves out
    length_median: float = 200.0  # of responses that are not measured, in tokens
    length_sigma: float = 0.9  # of their logarithms; half of the variance is the prompt's

    def __post_init__(self) -> None:
        refusal = "is outside [0, ∞): nothing takes less than no time; use a number >= 0"
        require_fields(self, "costs.", [(" ".join(self.__struct_fields__), lambda x: 0 <= x < math.inf, refusal)])
        require_fields(self, "costs.", [("filtered_share", lambda x: x < 1, ">= 1: nothing would be left to train")])

    def lengths(self, n: int, longest: int, groups: int = 4096) -> Lengths:
        """Of groups of n: log-normal, cut off at `longest`."""
        rng, sigma = random.Random(0), self.length_sigma / math.sqrt(2)
        prompts = (self.length_median * rng.lognormvariate(0, sigma) for _ in range(groups))
        return [[min(longest, 1 + int(prompt * rng.lognormvariate(0, sigma))) for _ in range(n)] for prompt in prompts]
