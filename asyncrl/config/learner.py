"""The parts of a recipe that say which models learn, and how they are optimized. No torch."""

from typing import Literal

from asyncrl.config.base import Spec, require


class ModelSpec(Spec, frozen=True, kw_only=True):
    """path: Hugging Face id or folder. tokenizer: likewise; empty means the model's own."""

    path: str
    tokenizer: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


class OptimizerSpec(Spec, frozen=True, kw_only=True):
    """AdamW. warmup_steps: updates over which lr rises; lr_schedule `cosine` decays to min_lr_ratio·lr over total_steps.

    max_grad_norm 0: no clipping.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0


def check_optimizer(spec: OptimizerSpec, where: str) -> None:
    """where: what its fields begin with, such as `learner.`."""
    for name in ("warmup_steps", "min_lr_ratio", "weight_decay", "max_grad_norm"):
        require(getattr(spec, name) >= 0, f"{where}{name}={getattr(spec, name)} < 0; use 0 to turn it off")


class LearnerSpec(OptimizerSpec, frozen=True, kw_only=True):
    """batch_groups: groups per update. mini_batch_groups: groups per optimizer step (None: the whole batch).

    max_tokens_per_pack: tokens in one forward pass (on CPU at most 2,048, which is faster).
    max_refused_steps: non-finite steps in a row before the run stops.
    """

    batch_groups: int = 64
    mini_batch_groups: int | None = None
    ppo_epochs: int = 1
    max_tokens_per_pack: int = 16384
    max_refused_steps: int = 3

    def __post_init__(self) -> None:
        check_optimizer(self, "learner.")
        mini = self.mini_batch_groups
        require(
            mini is None or (mini >= 1 and self.batch_groups % mini == 0),
            f"learner.mini_batch_groups={mini} does not divide learner.batch_groups={self.batch_groups}: "
            "the last minibatch would weigh more; choose a divisor",
        )
        require(self.ppo_epochs >= 1, f"learner.ppo_epochs={self.ppo_epochs} < 1: nothing would be trained")
        require(self.lr >= 0, f"learner.lr={self.lr} < 0: the policy would be driven away from reward")


VALUE_COEF = 0.1


class CriticSpec(OptimizerSpec, frozen=True, kw_only=True):
    """The value function, which algorithm.adv_estimator="gae" turns on. lr (of the critic alone) and value_clip as in verl.

    backbone: `own` is a causal LM (model; None: the policy's starting weights) whose output layer is a value head. `shared`
    is a value head on the policy's hidden states: value_coef × the value loss joins the policy's, and its gradient flows into
    the backbone, under learner.lr; lr and the other settings of the optimizer are then those of the head.
    value_clip: how far a value may move from that at the start of the update before its gain is clipped; None: off.
    ppo_epochs: passes of an own critic over each batch, in the learner's minibatches.
    critic_warmup: first updates, in which only the critic (shared: the head) learns; the policy's versions count on.
    """

    lr: float = 1e-5
    backbone: Literal["own", "shared"] = "own"
    model: ModelSpec | None = None
    value_clip: float | None = 0.5
    value_coef: float = VALUE_COEF
    ppo_epochs: int = 1
    critic_warmup: int = 0

    def __post_init__(self) -> None:
        check_optimizer(self, "critic.")
        shared, model = self.backbone == "shared", self.model
        require(self.lr >= 0, f"critic.lr={self.lr} < 0: values would be driven away from returns; use >= 0")
        require(
            self.value_clip is None or self.value_clip > 0,
            f"critic.value_clip={self.value_clip} <= 0: no value could move; use > 0, or null to turn it off",
        )
        require(self.value_coef > 0, f"critic.value_coef={self.value_coef} <= 0: the critic would not learn; use > 0")
        require(self.ppo_epochs >= 1, f"critic.ppo_epochs={self.ppo_epochs} < 1: the critic would not learn; use >= 1")
        require(self.critic_warmup >= 0, f"critic.critic_warmup={self.critic_warmup} < 0 updates; 0 turns it off")
        require(
            not shared or model is None,
            f"critic.model={model.path if model else ''!r} with backbone='shared': it would be ignored; use backbone='own', "
            "or null",
        )
        require(
            model is None or not model.tokenizer,
            f"critic.model.tokenizer={model.tokenizer if model else ''!r}: it would be ignored, for the critic reads "
            "the policy's tokens; leave it out",
        )
        require(
            not shared or self.ppo_epochs == 1,
            f"critic.ppo_epochs={self.ppo_epochs} with backbone='shared': it would be ignored, for the head learns in the "
            "policy's passes; set learner.ppo_epochs instead",
        )
        require(
            shared or self.value_coef == VALUE_COEF,
            f"critic.value_coef={self.value_coef} with backbone='own': it would be ignored, for an own critic's loss joins no "
            "other; set critic.lr instead",
        )
