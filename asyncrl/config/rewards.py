"""The part of a recipe that says what scores: functions, reward models and judges. No torch."""

import math
import re
from pathlib import PurePath
from typing import Literal
from urllib.parse import urlsplit

from msgspec.structs import replace

from asyncrl.config.base import MEMORY_RULE, Rule, Spec, require, require_fields, require_unset
from asyncrl.config.callables import Function, name_functions
from asyncrl.config.learner import ModelSpec
from asyncrl.errors import ConfigError

RewardStyle = Literal["auto", "verl", "trl"]
# Under these names shaping logs what it adds, and the reward before it.
SHAPING_PARTS = ("unshaped", "overlong_penalty", "length_penalty", "repetition_penalty")
QUESTIONS = 64  # to a model or judge that a reward worker has under way at a time
_TAKEN = ("mean", "std", "token_sum", "baseline", *SHAPING_PARTS)


class JudgeSpec(Spec, frozen=True, kw_only=True):
    """A language model that is asked, in words, what a response is worth, or which of two is better."""

    # A text file: what the judge is asked. `{prompt}`, `{response}`, `{ground_truth}` and the other columns of the row are
    # filled in; for a pairwise judge `{response_a}` and `{response_b}`.
    prompt: str
    # Where an OpenAI-compatible API is, as https://HOST/v1. Empty: the run serves `model`.
    url: str = ""
    served_name: str = ""  # what that API calls its model
    key_env: str = ""  # the environment variable, on the reward workers' nodes, that holds the API's key
    model: ModelSpec | None = None  # a causal language model that the run serves, as deploy.rewards.models says
    # A regular expression, whose last match in the judge's text counts: its first group is the score, of a pairwise judge A, B
    # or whatever else for a tie. Empty: `score: 7`; of a pairwise judge [[A]], [[B]] or [[C]].
    pattern: str = ""
    parse: Function = ""  # your own `parse(text)` instead of the pattern: the score, or for a pairwise judge A, B or else
    n: int = 1  # texts that are asked for
    aggregate: Literal["mean", "median", "majority"] = "mean"  # what becomes of their scores
    temperature: float = 0.0  # 0 is greedy
    max_tokens: int = 1024  # of a text
    # The reward is the share of its own group that a response is better than: each two are compared in both orders, and count
    # half each time; so does a tie. Evaluations leave it out: their score is that of the other terms.
    pairwise: bool = False

    def __post_init__(self) -> None:
        name_functions(self, "parse")
        rules: list[Rule] = [
            ("prompt", bool, "names no file: the judge would be asked nothing"),
            ("n max_tokens", lambda x: x >= 1, "< 1: there would be nothing to read; use at least 1"),
            ("temperature", lambda x: 0 <= x < math.inf, "is outside [0, ∞); 0 is greedy"),
            ("url", lambda x: not x or urlsplit(x).scheme in ("http", "https"), "is no address; write http(s)://HOST/v1"),
        ]
        require_fields(self, "reward.judge.", rules)
        require(
            bool(self.url) != (self.model is not None),
            f"reward.judge.url={self.url!r} and model={self.model and self.model.path!r}: it is not clear who judges; set "
            "one of the two (what an API calls its model is `served_name`)",
        )
        if not self.url:
            require_unset(self, "reward.judge.", "served_name key_env", "a model of the run's own: it would be ignored")
        require(
            self.n == 1 or (self.temperature > 0 and not self.pairwise),
            f"reward.judge.n={self.n} with temperature={self.temperature:g} and pairwise={self.pairwise}: greedy texts would "
            "be equal, and pairs are asked about in both orders anyway; use n=1, or a temperature > 0",
        )
        try:
            groups = re.compile(self.pattern or "()").groups
        except re.error as error:
            raise ConfigError(f"reward.judge.pattern={self.pattern!r} is no regular expression: {error}") from error
        require(groups > 0, f"reward.judge.pattern={self.pattern!r} has no group: put the score into parentheses")


class RewardTerm(Spec, frozen=True, kw_only=True):
    """One of several rewards, whose weighted sum is the reward: a function, a model or a judge."""

    function: Function = ""  # as RewardSpec.function
    # A sequence-classification model with one label; its logit is the reward. The run serves it, as deploy.rewards.models says.
    model: ModelSpec | None = None
    judge: JudgeSpec | None = None  # a language model whose texts say what the reward is
    weight: float = 1.0  # times its value enters the sum
    # Its unweighted value is logged as `reward/<name>`. Empty: the function's own name; rm/ and the model's; judge/ and the
    # prompt file's.
    name: str = ""
    style: RewardStyle = "auto"  # of a function, as RewardSpec.style
    arguments: dict[str, str | int | float | bool] = {}  # passed by keyword with every call of a function

    def __post_init__(self) -> None:
        name_functions(self, "function")
        require_fields(self, "reward.functions: ", [("weight", math.isfinite, "would make no sum; use a finite number")])
        kinds = [kind for kind in ("function", "model", "judge") if getattr(self, kind)]
        require(
            len(kinds) == 1,
            f"reward.functions: {' and '.join(kinds) or 'nothing'} in one term: it is not clear what scores; set one of "
            "function, model and judge",
        )
        if not self.function:
            require_unset(self, "reward.functions: ", "style arguments", f"a {kinds[0]}: only functions have it")
        for model in filter(None, (self.model, self.judge and self.judge.model)):
            why = "a reward's model, which is served as it is: it would be ignored"
            require_unset(model, "reward model: ", "override_config builder", why)

    @property
    def served(self) -> ModelSpec | None:
        """The model that the run serves for it, if it needs one."""
        return self.judge.model if self.judge else self.model

    @property
    def what(self) -> str:
        """What scores, for errors and plans."""
        if self.judge:
            return f"judge {self.judge.prompt} by {self.judge.url or self.served.path}"  # type: ignore[union-attr]
        return f"model {self.model.path}" if self.model else self.function

    @property
    def named(self) -> str:
        """Its name, or what it is called without one."""
        if self.name or self.function:
            return self.name or self.function.replace(":", ".").rpartition(".")[2]
        path, kind = (self.judge.prompt, "judge") if self.judge else (self.model.path, "rm")  # type: ignore[union-attr]
        return f"{kind}/{PurePath(path).stem if self.judge else PurePath(path).name}"


class ShapingSpec(Spec, frozen=True, kw_only=True):
    """What is added to the rewards of training rollouts, after the functions.

    Evaluation is never shaped, nor are turn- and token-level rewards.
    """

    # DAPO's soft punishment: nothing up to max_response_length − overlong_buffer tokens, then linear down to
    # −overlong_penalty at max_response_length. 0 turns it off.
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0  # what that costs at most
    # What a response of max_response_length tokens costs, shorter ones in proportion. 0 turns it off.
    length_penalty: float = 0.0
    # What a response costs by the share of its token n-grams that stood in it before. 0 turns it off.
    repetition_penalty: float = 0.0
    repetition_ngram: int = 4  # tokens of such an n-gram
    clip: tuple[float, float] | None = None  # [low, high]: bounds of the result, last of all

    def __post_init__(self) -> None:
        penalties = "overlong_penalty length_penalty repetition_penalty"
        rules: list[Rule] = [
            ("overlong_buffer", lambda x: x >= 0, "< 0 tokens; 0 turns it off"),
            (penalties, lambda x: x >= 0, "< 0: it is subtracted, so this would pay for it; use >= 0"),
            ("repetition_ngram", lambda x: x >= 1, "< 1 token: nothing could repeat; use at least 1"),
        ]
        require_fields(self, "reward.shaping.", rules)
        require(
            self.clip is None or self.clip[0] < self.clip[1],
            f"reward.shaping.clip={self.clip}: low is not below high, so all rewards would be equal; write [low, high]",
        )


class RewardSpec(Spec, frozen=True, kw_only=True):
    """What scores a response: one function, or the weighted sum of several rewards."""

    # verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`, a float or a dict with `score` and, for
    # turn- and token-level rewards, `turn_rewards` or `token_rewards`; or TRL's `f(prompts, completions, **columns) ->
    # list[float | None]`, called with lists of one.
    function: Function = ""
    # Several instead, or a model or judge: the reward is their weighted sum.
    functions: tuple[RewardTerm, ...] = ()
    # The convention of `function`; `auto` tells it by the names of the parameters.
    style: RewardStyle = "auto"
    shaping: ShapingSpec = ShapingSpec()  # penalties for length and repetition, and bounds
    # Wall clock in seconds for a function on one sample, past which its process is killed, and for each answer of a model; the
    # sample is `timeout` then.
    deadline_s: float = 10.0
    # Memory that each process which scores may have for itself, its code included; past it allocations fail. null: any.
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        name_functions(self, "function")
        deadline: Rule = ("deadline_s", lambda x: x > 0, "<= 0: every sample would time out; use seconds > 0")
        require_fields(self, "reward.", [deadline, MEMORY_RULE])
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
        if taken:
            raise ConfigError(
                f"reward.functions: the name {taken[0]!r} is taken, so two figures would be logged as one; set the function's "
                "`name`"
            )

    def terms(self) -> tuple[RewardTerm, ...]:
        """What scores: the terms, each with a name; or the one function, whose name is empty: its parts keep theirs."""
        if self.function:
            return (RewardTerm(function=self.function, style=self.style),)
        return tuple(replace(term, name=term.named) for term in self.functions)

    @property
    def served(self) -> list[RewardTerm]:
        """The terms that ask a model of this run's own."""
        return [term for term in self.terms() if term.served]

    @property
    def pairwise(self) -> bool:
        """Whether a group's responses are compared with each other."""
        return any(term.judge is not None and term.judge.pairwise for term in self.functions)
