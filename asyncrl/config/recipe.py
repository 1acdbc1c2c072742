"""The recipe: what to learn. Like the deployment (deployment.py) it is data, validated when made.

Every default lives once, here or in algorithm.py and learner.py. Paths may hold `{run}`: the run directory. Callables are
`package.module:name` or `path/to/file.py:name`; a function that is given itself gets such a name. No torch here: a wrong spec
must fail in well under two seconds.
"""

import math
import re
from typing import Literal

from msgspec.structs import asdict

from asyncrl.config.algorithm import AlgorithmSpec
from asyncrl.config.base import MEMORY_RULE, SEED_RULE, Rule, Spec, require, require_fields, require_unset
from asyncrl.config.callables import Function, is_file, name_functions
from asyncrl.config.learner import CriticSpec, LearnerSpec, ModelSpec
from asyncrl.config.rewards import RewardSpec
from asyncrl.config.sentinels import SentinelSpec
from asyncrl.staleness import OnStale, SelectorName, Staleness

AUTO_IN_FLIGHT = 4  # batches that `reserve_ahead: auto` lets be in flight at most, however many slots there are


class DataSpec(Spec, frozen=True, kw_only=True):
    """The prompts to train on, and where their ground truth is."""

    # Parquet in verl's schema, or JSONL.
    files: tuple[str, ...]
    # The column of the prompt: chat messages, or a plain string. This and the other keys may be dotted paths into the row.
    prompt_key: str = "prompt"
    answer_key: str = "reward_model.ground_truth"  # the ground truth; empty: there is none
    source_key: str = "data_source"  # where the row comes from, for metrics by source; empty: the file's name
    # Longer prompts, in tokens, are left out, and counted.
    max_prompt_length: int = 1024
    shuffle: bool = True  # each epoch in an order of its own
    epochs: int | None = None  # null: as many as total_steps needs

    def __post_init__(self) -> None:
        require(len(self.files) > 0, "data.files=(): there is nothing to train on; name at least one parquet or JSONL file")
        rules: list[Rule] = [
            ("max_prompt_length", lambda x: x >= 1, "< 1: every prompt would be left out; use the longest that you train on"),
            ("epochs", lambda x: x >= 1, "< 1: nothing would be trained; use null or >= 1"),
        ]
        require_fields(self, "data.", rules)


class EpisodeSpec(Spec, frozen=True, kw_only=True):
    """A rollout of several turns, in which an environment answers the policy."""

    # What makes an environment, called once per episode: see asyncrl.episodes.environments. A class of SkyRL-Gym's or
    # gymnasium's, or TRL's `environment_factory`, works as it is. Without it and tools a rollout is one answer.
    environment: Function = ""
    # Instead, an agent: `async def f(task, *, base_url, api_key, model) -> reward | {"score": …} | None`, or a sync one, of any
    # framework that takes the base URL of OpenAI's API or Anthropic's; the policy is behind that.
    agent: Function = ""
    # Python functions that the policy may call until it answers without a call: typed, with a Google-style docstring.
    tools: tuple[Function, ...] = ()
    arguments: dict[str, str | int | float | bool] = {}  # passed by keyword with every call
    # How the model's family writes conversations and calls of tools, by its name in the package `renderers`: llama-3, glm-5,
    # deepseek-v3, kimi-k2, gpt-oss, gemma4, qwen3.5 and others. Empty: by the tokenizer's chat template.
    chat: str = ""
    max_turns: int = 8  # answers of the policy
    max_turn_tokens: int | None = None  # tokens of one of them; null: sampling.max_response_length
    max_tokens: int | None = None  # tokens of all of them; null: as many as fit
    # Wall clock in seconds for the whole of it. Past it its process is killed; what was sampled is kept, and not trained.
    deadline_s: float = 300.0
    step_deadline_s: float = 60.0  # the same for the environment's answer to one turn
    # Episodes that each generator has under way at most, with a process for each: as many as its engine has slots, and one more
    # for each that waits for its environment, up to this. null: four times the slots.
    in_flight: int | None = None
    # The Python that runs environments; it needs asyncrl and msgspec. Empty: the generators' own.
    python: str = ""
    # Memory that each process of an episode may have for itself, its code included; past it allocations fail. null: any.
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        name_functions(self, "environment agent tools")
        rules: list[Rule] = [
            ("max_turns", lambda x: x >= 1, "< 1: nothing could be answered; use at least 1"),
            ("max_turn_tokens max_tokens", lambda x: x >= 1, "< 1: no token could be sampled; use at least 1, or null"),
            ("deadline_s step_deadline_s", lambda x: x > 0, "<= 0: every episode would time out; use seconds > 0"),
            ("in_flight", lambda x: x >= 1, "< 1: no episode could begin; use at least sampling.n, or null"),
            MEMORY_RULE,
        ]
        require_fields(self, "episode.", rules)
        if not self.what:
            settings = "chat max_turns max_turn_tokens max_tokens deadline_s step_deadline_s in_flight python memory_bytes"
            require_unset(self, "episode.", settings, "no episode.environment, agent or tools: there is no episode; name one")

        require(
            not (self.agent and (self.environment or self.tools)),
            "episode.agent with an environment or tools: an agent brings its own, so they would be ignored; leave them out",
        )

    @property
    def what(self) -> str:
        """What answers the policy, by name; empty: nothing, a rollout is one answer."""
        return ", ".join(filter(None, (self.environment, self.agent, *self.tools)))

    @property
    def found_here(self) -> list[tuple[str, str]]:
        """Its functions, each after its field, but for those of modules that only `python` may have."""
        named = [("environment", self.environment), ("agent", self.agent), *(("tools", tool) for tool in self.tools)]
        return [(field, name) for field, name in named if name and not (self.python and not is_file(name.rpartition(":")[0]))]


class SamplingSpec(Spec, frozen=True, kw_only=True):
    """How responses are sampled, and which groups of them are worth training."""

    n: int = 8  # rollouts per prompt
    temperature: float = 1.0  # logits are divided by it
    # 1 is off. Truncation by top_p or top_k renormalizes the behaviour policy.
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    max_response_length: int = 1024  # tokens
    min_valid: int = 2  # a group with fewer `ok` rollouts is `failed`
    # How often one prompt may be tried: after failures, and again after deaths of generators that worked on it.
    max_attempts: int = 3
    # Which complete groups are trained: `all`, `varied` (rewards not all equal), or your own `keep(rewards) -> bool`.
    keep: Function = "all"
    # The run ends when the reward failed on all of so many first samples, by errors, passed deadlines or dead processes. null:
    # a batch's worth, and at least 16; after a minute of failures 16.
    max_first_failures: int | None = None
    # The run ends, with a message, when so many times learner.batch_groups groups in a row gave nothing to train on. null:
    # 32 times, and at least 1024 groups.
    max_empty_batches: int | None = None

    def __post_init__(self) -> None:
        name_functions(self, "keep")
        rules: list[Rule] = [
            ("n", lambda x: x >= 1, "< 1: a group needs at least one rollout"),
            ("temperature", lambda x: x > 0, "<= 0: training needs a stochastic policy; use > 0"),
            ("temperature", lambda x: x < math.inf, "would sample any token as often as any other; use a number"),
            ("top_p", lambda x: 0 < x <= 1, "is outside (0, 1]; 1 turns it off"),
            ("top_k", lambda x: x >= 0, "< 0; 0 turns it off"),
            ("max_response_length", lambda x: x >= 1, "< 1: no token could be sampled"),
            ("max_attempts", lambda x: x >= 1, "< 1: no prompt could be tried"),
            ("max_first_failures", lambda x: x >= 1, "< 1: the run would end before its first reward; use >= 1, or null"),
            ("max_empty_batches", lambda x: x >= 1, "< 1: the run would end before its first group; use >= 1, or null"),
        ]
        require_fields(self, "sampling.", rules)
        require(
            1 <= self.min_valid <= self.n,
            f"sampling.min_valid={self.min_valid} is outside [1, n={self.n}]: no group could ever be complete; lower it",
        )
        require(
            self.n > 1 or self.keep != "varied",
            "sampling.keep='varied' with sampling.n=1: a single reward never varies, so every group would be filtered; use "
            "keep='all', or n >= 2",
        )


class StalenessSpec(Spec, frozen=True, kw_only=True):
    """How stale the tokens of a batch may be, and usually are."""

    # η: the most versions between a token and the update that trains it, ever; 0 is synchronous on-policy.
    max_lag: int = 16
    # Batches that are in flight, ready and in training at the most. Tokens are usually about one less versions old. `auto`:
    # two more than the slots of all engines hold, or `episode.in_flight`, if that is more: these count as four batches at most.
    reserve_ahead: int | Literal["auto"] = "auto"
    # What happens when a slow group would pass the bound. `hold` (always for max_lag 0): the learner waits, but only if some
    # group would certainly be late otherwise. `wait`: the same with as much reserved ahead as the bound admits. `mask`: overdue
    # tokens leave the loss. `drop`: the group is cancelled and its prompt tried again.
    on_stale: OnStale = "hold"
    # The share of all groups that `hold` goes on without, rather than wait; their overdue tokens leave the loss.
    max_masked_share: float = 0.0
    # Which ready groups are trained first, with `mask` and `drop`: those with the oldest tokens (`oldest`), those with the
    # freshest, or any (`uniform`).
    selector: SelectorName = "oldest"


class EvalSettingSpec(Spec, frozen=True, kw_only=True):
    """A further way to sample from held-out prompts, in the same evaluation."""

    name: str  # its metrics are `eval/<name>/…`
    n: int = 1  # rollouts per prompt
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("name", lambda x: re.fullmatch(r"[\w.-]+", x) is not None, "names no metrics; use letters, digits and ._-"),
            ("name", lambda x: x not in ("score", "metric"), "is taken; use another one"),
            ("n", lambda x: x >= 1, "< 1: there would be no response to score; use at least 1"),
            ("temperature", lambda x: 0 <= x < math.inf, "is outside [0, ∞); 0 is greedy"),
            ("top_p", lambda x: 0 < x <= 1, "is outside (0, 1]; 1 turns it off"),
            ("top_k", lambda x: x >= 0, "< 0; 0 turns it off"),
        ]
        require_fields(self, "evaluation.also: ", rules)
        require(
            self.n == 1 or self.temperature > 0,
            f"evaluation.also: n={self.n} with temperature=0: greedy decoding would give {self.n} equal responses; set one",
        )


class EvaluationSpec(Spec, frozen=True, kw_only=True):
    """Evaluation on held-out prompts, through the same hops; also at the start and at the end."""

    files: tuple[str, ...] = ()  # with the keys of `data`; none turns it off
    freq: int = 10  # updates between two evaluations
    n: int = 1  # rollouts per prompt
    temperature: float = 0.0  # 0 is greedy
    limit: int | None = None  # the first so many prompts only
    also: tuple[EvalSettingSpec, ...] = ()  # further settings, in the same pass over the prompts
    # Your own `metric(responses) -> dict of numbers`, called with all responses to a prompt (asyncrl.report.scores.Scored):
    # means over prompts are logged as `eval/metric/<name>`. They are called in the store's process, which waits for them.
    metrics: tuple[Function, ...] = ()

    def __post_init__(self) -> None:
        name_functions(self, "metrics")
        rules: list[Rule] = [
            ("freq", lambda x: x >= 1, "< 1; to turn it off leave evaluation.files empty"),
            ("n", lambda x: x >= 1, "< 1: there would be no response to score; use at least 1"),
            ("temperature", lambda x: x >= 0, "< 0: logits are divided by it; use > 0, or 0 for greedy decoding"),
            ("limit", lambda x: x >= 1, "< 1; to turn it off leave evaluation.files empty, for all prompts use null"),
        ]
        require_fields(self, "evaluation.", rules)
        names = [setting.name for setting in self.also]
        require(len(names) == len(set(names)), f"evaluation.also: {names}: two settings of one name; name each of them")


class CheckpointSpec(Spec, frozen=True, kw_only=True):
    """When checkpoints are written. step_000000 is written at the start."""

    save_freq: int = 50  # updates between two checkpoints
    keep_last_n: int = 2  # complete ones that are kept, and can be gone on from
    # Those of updates that are multiples of it stay for ever, to be evaluated and exported, as those do that are saved by hand.
    keep_every: int | None = None

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("save_freq", lambda x: x >= 1, "< 1: a killed learner could not be restored"),
            ("keep_last_n", lambda x: x >= 1, "< 1: there would be nothing to resume from"),
            (
                "keep_every",
                lambda x: x >= 1 and x % self.save_freq == 0,
                f"is no multiple of checkpoint.save_freq={self.save_freq}: there would be no checkpoint to keep; use one",
            ),
        ]
        require_fields(self, "checkpoint.", rules)


class Recipe(Spec, frozen=True, kw_only=True):
    """What to learn."""

    name: str  # the run's, unless --name says otherwise
    model: ModelSpec  # the policy
    data: DataSpec  # the prompts
    reward: RewardSpec  # what scores the responses
    total_steps: int  # updates
    seed: int = 0  # of the order of prompts, of sampling and of whatever `prepare` makes
    # Optional `prepare(recipe, run_dir)`, called before any actor starts: it makes data and models.
    prepare: Function = ""
    arguments: dict[str, str | int | float | bool] = {}  # settings of your own, for `prepare`
    sampling: SamplingSpec = SamplingSpec()  # how groups of rollouts are made
    episode: EpisodeSpec = EpisodeSpec()  # rollouts of several turns, with an environment
    staleness: StalenessSpec = StalenessSpec()  # how old their tokens may be
    algorithm: AlgorithmSpec = AlgorithmSpec()  # estimator, loss, corrections and KL
    learner: LearnerSpec = LearnerSpec()  # batches and the policy's optimizer
    critic: CriticSpec = CriticSpec()  # only with algorithm.adv_estimator="gae"
    evaluation: EvaluationSpec = EvaluationSpec()  # on held-out prompts
    checkpoint: CheckpointSpec = CheckpointSpec()  # how often, and how many are kept
    # What is watched for while it goes on, by name; needs the extra `[sentinels]`.
    sentinels: dict[str, SentinelSpec] = {}

    def __post_init__(self) -> None:
        name_functions(self, "prepare")
        rules: list[Rule] = [
            ("total_steps", lambda x: x >= 1, "< 1: nothing would be trained; use at least 1"),
            SEED_RULE,
        ]
        require_fields(self, "", rules)
        unsayable = [name for name in self.sentinels if not re.fullmatch(r"[\w-]+", name)]
        require(not unsayable, f"sentinels: {unsayable} could not be overridden by name; use letters, digits, _ and -")
        buffer, longest = self.reward.shaping.overlong_buffer, self.sampling.max_response_length
        require(
            buffer <= longest,
            f"reward.shaping.overlong_buffer={buffer} > sampling.max_response_length={longest}: every response would be "
            "punished for its length; lower the buffer",
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
        self.staleness_rule()

    @property
    def rollouts_per_group(self) -> int:
        """Those generated together: the sampled ones and, where the estimator wants it, their baseline."""
        return self.sampling.n + self.algorithm.wants_baseline

    def staleness_rule(self, slots: int | None = None, generators: int = 1) -> Staleness:
        """The staleness rule that the store and the learner both run. slots: of all engines together, which `reserve_ahead:
        auto` is made from; None, where only the bound matters, leaves it out."""
        spec, batch = self.staleness, self.learner.batch_groups
        ahead = None if spec.reserve_ahead == "auto" else spec.reserve_ahead
        if ahead is None and slots is not None and spec.on_stale != "wait":
            rollouts = max(slots, generators * (self.episode.in_flight or 0))
            in_flight = math.ceil(rollouts / (batch * self.rollouts_per_group))
            ahead = min(spec.max_lag + 1, min(in_flight, AUTO_IN_FLIGHT) + 2)
        return Staleness(batch_groups=batch, **asdict(spec) | {"reserve_ahead": ahead})
