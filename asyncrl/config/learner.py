"""The parts of a recipe that say which models learn, and how they are optimized. No torch."""

import math
from typing import Any, Literal

from asyncrl.config.base import Rule, Spec, require, require_fields, require_unset
from asyncrl.config.callables import Function, name_functions
from asyncrl.errors import ConfigError

CPU_PACK_TOKENS = 2048  # beyond it a CPU only loses its caches (measured: 16,384 is a third slower)


class ModelSpec(Spec, frozen=True, kw_only=True):
    """A causal language model and its tokenizer."""

    path: str  # Hugging Face id, or a folder
    revision: str = ""  # of an id: branch, tag or commit
    tokenizer: str = ""  # likewise an id or a folder; empty: the model's own
    tokenizer_revision: str = ""  # of that id
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that are trained
    trust_remote_code: bool = False  # whether code that comes with the model may run
    # Fields of its configuration to change, as its class knows them: {"attention_dropout": 0.1}, also nested.
    override_config: dict[str, Any] = {}
    # Your own `make(spec) -> PreTrainedModel`, called wherever the model is loaded, in place of AutoModelForCausalLM: in the
    # learner, for a reference and in the torch engine. Configuration, stop tokens and tokenizer are still those of `path`.
    builder: Function = ""

    def __post_init__(self) -> None:
        name_functions(self, "builder")
        if self.builder and self.override_config:
            raise ConfigError(
                f"model.override_config={self.override_config} with a builder, which makes its own configuration: it would be "
                "ignored; change the configuration in the builder"
            )
        if self.tokenizer_revision and not self.tokenizer:
            raise ConfigError(
                f"model.tokenizer_revision={self.tokenizer_revision!r} without a tokenizer would be ignored: the model's own "
                "is of `revision`; name both, or set revision"
            )


class OptimizerSpec(Spec, frozen=True, kw_only=True):
    """AdamW and its schedule."""

    lr: float = 1e-6  # learning rate, at its highest
    betas: tuple[float, float] = (0.9, 0.999)  # decay of AdamW's two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled from the gradient
    warmup_steps: int = 0  # updates over which lr rises
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: lr decays to min_lr_ratio·lr over all updates
    min_lr_ratio: float = 0.0  # share of lr at which a cosine ends
    max_grad_norm: float = 1.0  # norm to which the gradient is clipped; 0: no clipping


OPTIMIZER_RULES: tuple[Rule, ...] = (
    ("lr weight_decay", lambda x: x != math.inf, "would make every weight infinite; use a number"),
    ("warmup_steps min_lr_ratio weight_decay max_grad_norm", lambda x: x >= 0, "< 0; use 0 to turn it off"),
    ("min_lr_ratio", lambda x: x <= 1, "> 1: the rate would rise to its end; it is a share of lr, in [0, 1]"),
    (
        "betas",
        lambda x: all(0 <= beta < 1 for beta in x),
        "is outside [0, 1): moments would grow for ever; use shares",
    ),
    ("eps", lambda x: x >= 0, "< 0: a step could be divided by 0; use a small number, for example 1e-8"),
)


class PrecisionSpec(Spec, frozen=True, kw_only=True):
    """What is computed in which dtype. Master weights, gradients and optimizer have `model.dtype`, whatever is said here."""

    # Of the forward and backward passes; the weights are cast for them. auto: bfloat16 on GPUs, float32 on CPUs.
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    # In which gradients are summed over ranks.
    reduce: Literal["float32", "bfloat16"] = "float32"
    # Whether matrix products in float32 may round their factors to 10 bits of mantissa (TensorFloat-32, on GPUs).
    tf32: bool = False

    def compute_of(self, master: str, *, gpu: bool) -> str:
        """The dtype, never auto, in which a model computes whose weights are `master` (model.dtype)."""
        return ("bfloat16" if gpu else master) if self.compute == "auto" else self.compute


class LoraSpec(Spec, frozen=True, kw_only=True):
    """Low-rank adapters (Hu et al. 2021, by peft) that are trained in place of the model's own weights."""

    rank: int = 16  # of each adapter
    alpha: float = 32.0  # adapters count alpha ÷ rank
    target_modules: tuple[str, ...] = ("all-linear",)  # names of layers, as peft knows them

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("rank", lambda x: x >= 1, "< 1: nothing could be learned; use 8 or more"),
            ("alpha", lambda x: x > 0, "<= 0: adapters would not count; use about twice the rank"),
            ("target_modules", lambda x: len(x) > 0, "names no layer: nothing would be learned; use all-linear"),
            (
                "target_modules",
                lambda x: len(x) == 1 or "all-linear" not in x,
                "names all layers, and some; use all-linear alone",
            ),
        ]
        require_fields(self, "lora.", rules)


class LearnerSpec(OptimizerSpec, frozen=True, kw_only=True):
    """How the policy is trained on a batch."""

    batch_groups: int = 64  # groups per update
    mini_batch_groups: int | None = None  # groups per optimizer step; None: the whole batch
    ppo_epochs: int = 1  # passes over each batch
    max_tokens_per_pack: int = 16384  # tokens in one forward pass (on CPU at most 2,048, which is faster)
    max_refused_steps: int = 3  # non-finite steps in a row before the run stops
    precision: PrecisionSpec = PrecisionSpec()  # also of a critic and a reference
    lora: LoraSpec | None = None  # adapters to train; null: the whole model

    def __post_init__(self) -> None:
        require_fields(self, "learner.", _LEARNER_RULES)
        mini = self.mini_batch_groups
        require(
            mini is None or (mini >= 1 and self.batch_groups % mini == 0),
            f"learner.mini_batch_groups={mini} does not divide learner.batch_groups={self.batch_groups}: "
            "the last minibatch would weigh more; choose a divisor",
        )


_LEARNER_RULES: tuple[Rule, ...] = (
    *OPTIMIZER_RULES,
    ("batch_groups", lambda x: x >= 1, "< 1: an update would train nothing; use at least one group"),
    ("ppo_epochs", lambda x: x >= 1, "< 1: nothing would be trained; use at least 1"),
    ("max_tokens_per_pack", lambda x: x >= 1, "< 1: no token would fit into a forward pass; use some thousand"),
    ("max_refused_steps", lambda x: x >= 1, "< 1: the run would stop before its first step; use at least 1"),
    ("lr", lambda x: x >= 0, "< 0: the policy would be driven away from reward; use >= 0"),
)


class CriticSpec(OptimizerSpec, frozen=True, kw_only=True):
    """The value function, which algorithm.adv_estimator="gae" turns on. The optimizer's settings are the critic's alone."""

    lr: float = 1e-5  # as in verl; of a shared critic, the head's: its backbone learns under learner.lr
    # `own` is a causal LM whose output layer is a value head. `shared` is a value head on the policy's hidden states: its loss
    # joins the policy's, and its gradient flows into the backbone.
    backbone: Literal["own", "shared"] = "own"
    model: ModelSpec | None = None  # of an own critic; None: the policy's starting weights
    value_clip: float | None = 0.5  # how far a value may move in an update before its gain is clipped, as in verl; None: off
    value_coef: float = 0.1  # weight of a shared critic's loss in the policy's
    ppo_epochs: int = 1  # passes of an own critic over each batch, in the learner's minibatches
    critic_warmup: int = 0  # first updates, in which only the critic (shared: the head) learns; the policy's versions count on

    def __post_init__(self) -> None:
        require_fields(self, "critic.", _CRITIC_RULES)
        model = self.model
        if model is not None and model.tokenizer:
            raise ConfigError(
                f"critic.model.tokenizer={model.tokenizer!r}: it would be ignored, for the critic reads the policy's tokens; "
                "leave it out"
            )
        if self.backbone == "own":
            why = "backbone='own': it would be ignored, for an own critic's loss joins no other; set critic.lr instead"
            require_unset(self, "critic.", "value_coef", why)
            return
        if model is not None:
            raise ConfigError(
                f"critic.model={model.path!r} with backbone='shared': it would be ignored; use backbone='own', or null"
            )
        why = "backbone='shared': it would be ignored, for the head learns in the policy's passes"
        require_unset(self, "critic.", "ppo_epochs", f"{why}; set learner.ppo_epochs instead")


_CRITIC_RULES: tuple[Rule, ...] = (
    *OPTIMIZER_RULES,
    ("lr", lambda x: x >= 0, "< 0: values would be driven away from returns; use >= 0"),
    ("value_clip", lambda x: x > 0, "<= 0: no value could move; use > 0, or null to turn it off"),
    ("value_coef", lambda x: x > 0, "<= 0: the critic would not learn; use > 0"),
    ("ppo_epochs", lambda x: x >= 1, "< 1: the critic would not learn; use >= 1"),
    ("critic_warmup", lambda x: x >= 0, "< 0 updates; 0 turns it off"),
)
