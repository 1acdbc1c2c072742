"""The recipe: what to learn. Like the deployment (deployment.py) it is data, validated when made.

Every default lives once, here or in algorithm.py and learning.py. Paths may hold `{run}`: the run directory. Callables are
`package.module:name` or `path/to/file.py:name`. No torch here: a wrong spec must fail in well under two seconds.
"""

from typing import Literal

from msgspec.structs import asdict, replace

from asyncrl.config.algorithm import AlgorithmSpec
from asyncrl.config.base import Spec, require
from asyncrl.config.learner import CriticSpec, LearnerSpec, ModelSpec
from asyncrl.staleness import OnStale, SelectorName, Staleness

RewardStyle = Literal["auto", "verl", "trl"]
# Under these names shaping logs what it adds, and the reward before it.
SHAPING_PARTS = ("unshaped", "overlong_penalty", "length_penalty", "repetition_penalty")
_TAKEN = ("mean", "std", "token_sum", "baseline", *SHAPING_PARTS)

# ------------------------------------------------------------------------------------------------- recipe


class DataSpec(Spec, frozen=True, kw_only=True):
    """Prompts in verl's parquet schema or JSONL: `prompt_key` holds chat messages or a plain string.

    answer_key: a dotted path to the ground truth inside the row. epochs None: as many as total_steps needs.
    Prompts longer than max_prompt_length tokens are left out, and counted.
    """

    files: tuple[str, ...]
    prompt_key: str = "prompt"
    answer_key: str = "reward_model.ground_truth"
    source_key: str = "data_source"
    max_prompt_length: int = 1024
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self) -> None:
        require(len(self.files) > 0, "data.files=(): there is nothing to train on; name at least one parquet or JSONL file")
        require(
            self.epochs is None or self.epochs >= 1,
            f"data.epochs={self.epochs} < 1: nothing would be trained; use null or >= 1",
        )


class RewardTerm(Spec, frozen=True, kw_only=True):
    """One of several rewards. `weight` times its value enters the sum; its unweighted value is logged as `reward/<name>`.

    function, style: as in RewardSpec. name: empty is the function's own. arguments: passed by keyword with every call.
    """

    function: str
    weight: float = 1.0
    name: str = ""
    style: RewardStyle = "auto"
    arguments: dict[str, str | int | float | bool] = {}


class ShapingSpec(Spec, frozen=True, kw_only=True):
    """What is added to the rewards of training rollouts, after the functions; evaluation is never shaped. 0 is off.

    overlong_buffer, overlong_penalty: DAPO's soft punishment: none up to max_response_length − overlong_buffer tokens, then
    linear down to −overlong_penalty at max_response_length. length_penalty: what an answer of max_response_length costs,
    shorter ones in proportion. repetition_penalty: times the share of token n-grams (of repetition_ngram tokens) that stood
    in the answer before. clip: [low, high] bounds of the result, last of all. Token and turn
    rewards pass by it.
    """

    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    length_penalty: float = 0.0
    repetition_penalty: float = 0.0
    repetition_ngram: int = 4
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require(self.overlong_buffer >= 0, f"reward.shaping.overlong_buffer={self.overlong_buffer} < 0 tokens; 0 turns it off")
        for name in ("overlong_penalty", "length_penalty", "repetition_penalty"):
            value = getattr(self, name)
            require(value >= 0, f"reward.shaping.{name}={value} < 0: it is subtracted, so this would pay for it; use >= 0")
        require(
            self.repetition_ngram >= 1,
            f"reward.shaping.repetition_ngram={self.repetition_ngram} < 1 token: nothing could repeat; use at least 1",
        )
        require(
            self.clip is None or self.clip[0] < self.clip[1],
            f"reward.shaping.clip={self.clip}: low is not below high, so all rewards would be equal; write [low, high]",
        )


class RewardSpec(Spec, frozen=True, kw_only=True):
    """function: verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`, a float or a dict with `score`
    and, for what is earned beside it, `turn_rewards` or `token_rewards`; or TRL's `f(prompts, completions, **columns) ->
    list[float | None]`, called with lists of one.

    functions: several instead; the reward is their weighted sum. style `auto` tells the two kinds apart by their parameters.
    deadline_s: wall clock for one sample; past it the process is killed and the sample is `timeout`.
    """

    function: str = ""
    functions: tuple[RewardTerm, ...] = ()
    style: RewardStyle = "auto"
    shaping: ShapingSpec = ShapingSpec()
    deadline_s: float = 10.0

    def __post_init__(self) -> None:
        require(self.deadline_s > 0, f"reward.deadline_s={self.deadline_s}: every sample would time out; use seconds > 0")
        require(
            bool(self.function) != bool(self.functions),
            f"reward.function={self.function!r} and {len(self.functions)} reward.functions: it is not clear what scores; set "
            "one of the two",
        )
        require(
            not self.functions or self.style == "auto",
            f"reward.style={self.style!r} with reward.functions would be ignored; set the style of each function instead",
        )
        names = [term.name for term in self.terms()]
        taken = [name for name in names if name in _TAKEN or names.count(name) > 1]
        require(
            not taken,
            f"reward.functions: the name {taken[0] if taken else ''!r} is taken, so two figures would be logged as one; set "
            "the function's `name`",
        )

    def terms(self) -> tuple[RewardTerm, ...]:
        """What scores: the functions, each with a name; or the one function, whose name is empty: its parts keep theirs."""
        if self.function:
            return (RewardTerm(function=self.function, style=self.style),)
        return tuple(
            replace(term, name=term.name or term.function.replace(":", ".").rpartition(".")[2]) for term in self.functions
        )


class SamplingSpec(Spec, frozen=True, kw_only=True):
    """n rollouts per prompt. top_p 1 and top_k 0 are off, which is the default: both renormalize the behaviour policy.

    keep: which complete groups are worth training: `all`, `varied` (rewards not all equal), or a user's
    `keep(rewards) -> bool`. min_valid: fewer `ok` rollouts than this and the group is `failed`.
    max_attempts: how often one prompt may be tried after failures. max_empty_batches: the run ends, with a message, when so
    many times learner.batch_groups groups in a row gave nothing to train on; None: 32 times, and at least 1024 groups.
    """

    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_length: int = 1024
    min_valid: int = 2
    max_attempts: int = 3
    keep: str = "all"
    max_empty_batches: int | None = None

    def __post_init__(self) -> None:
        require(self.n >= 1, f"sampling.n={self.n} < 1: a group needs at least one rollout")
        require(self.temperature > 0, f"sampling.temperature={self.temperature}: training needs a stochastic policy; use > 0")
        require(0 < self.top_p <= 1, f"sampling.top_p={self.top_p} is outside (0, 1]; 1 turns it off")
        require(self.top_k >= 0, f"sampling.top_k={self.top_k} < 0; 0 turns it off")
        require(
            self.max_response_length >= 1,
            f"sampling.max_response_length={self.max_response_length} < 1: no token could be sampled",
        )
        require(
            1 <= self.min_valid <= self.n,
            f"sampling.min_valid={self.min_valid} is outside [1, n={self.n}]: no group could ever be complete; lower it",
        )
        require(
            self.n > 1 or self.keep != "varied",
            "sampling.keep='varied' with sampling.n=1: a single reward never varies, so every group would be filtered; use "
            "keep='all', or n >= 2",
        )
        require(self.max_attempts >= 1, f"sampling.max_attempts={self.max_attempts} < 1: no prompt could be tried")
        empty = self.max_empty_batches
        require(
            empty is None or empty >= 1,
            f"sampling.max_empty_batches={empty} < 1: the run would end before its first group; use >= 1, or null",
        )


class StalenessSpec(Spec, frozen=True, kw_only=True):
    """max_lag: η, in versions, per token. on_stale and selector: see asyncrl.staleness. capacity_groups: outstanding
    groups at the most, whatever the bound admits; None: the bound alone."""

    max_lag: int = 4
    on_stale: OnStale = "mask"
    selector: SelectorName = "oldest"
    capacity_groups: int | None = None


class EvaluationSpec(Spec, frozen=True, kw_only=True):
    """Held-out evaluation through the same hops, every `freq` updates, at the start and at the end; files () turns it off."""

    files: tuple[str, ...] = ()
    freq: int = 10
    n: int = 1
    temperature: float = 0.0
    limit: int | None = None

    def __post_init__(self) -> None:
        require(self.freq >= 1, f"evaluation.freq={self.freq} < 1; to turn evaluation off leave evaluation.files empty")


class CheckpointSpec(Spec, frozen=True, kw_only=True):
    """Every save_freq updates; keep_last_n complete ones are kept. step_000000 is written at the start."""

    save_freq: int = 50
    keep_last_n: int = 2

    def __post_init__(self) -> None:
        require(self.save_freq >= 1, f"checkpoint.save_freq={self.save_freq} < 1: a killed learner could not be restored")
        require(self.keep_last_n >= 1, f"checkpoint.keep_last_n={self.keep_last_n} < 1: there would be nothing to resume from")


class Recipe(Spec, frozen=True, kw_only=True):
    """What to learn. prepare: optional `prepare(recipe, run_dir)` that makes data and models before any actor starts."""

    name: str
    model: ModelSpec
    data: DataSpec
    reward: RewardSpec
    total_steps: int
    seed: int = 0
    prepare: str = ""
    sampling: SamplingSpec = SamplingSpec()
    staleness: StalenessSpec = StalenessSpec()
    algorithm: AlgorithmSpec = AlgorithmSpec()
    learner: LearnerSpec = LearnerSpec()
    critic: CriticSpec = CriticSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()

    def __post_init__(self) -> None:
        require(self.total_steps >= 1, f"total_steps={self.total_steps} < 1: nothing would be trained")
        buffer, longest = self.reward.shaping.overlong_buffer, self.sampling.max_response_length
        require(
            buffer <= longest,
            f"reward.shaping.overlong_buffer={buffer} > sampling.max_response_length={longest}: every answer would be punished "
            "for its length; lower the buffer",
        )
        loss, n = self.algorithm.policy_loss, self.sampling.n
        require(
            n >= 2 or not self.algorithm.learns_preferences,
            f"sampling.n={n} with algorithm.policy_loss={loss!r}: rollouts are ranked within their group, so nothing would be "
            "learned; use sampling.n >= 2",
        )
        critic, gae = self.critic, self.algorithm.needs_critic
        require(
            gae or critic == CriticSpec(),
            f"critic settings with algorithm.adv_estimator={self.algorithm.adv_estimator!r}: it has no critic, they would be "
            "ignored; use adv_estimator='gae', or leave them out",
        )
        require(
            critic.critic_warmup < self.total_steps,
            f"critic.critic_warmup={critic.critic_warmup} >= total_steps={self.total_steps}: the policy would never move; "
            "lower it",
        )
        self.bound()

    @property
    def rollouts_per_group(self) -> int:
        """Those generated together: the sampled ones and, where the estimator wants it, their baseline."""
        return self.sampling.n + self.algorithm.wants_baseline

    def bound(self) -> Staleness:
        """The staleness rule that the store and the learner both run."""
        return Staleness(batch_groups=self.learner.batch_groups, **asdict(self.staleness))
