"""The part of a recipe that names the algorithm: estimator × policy loss × correction × masks × KL × aggregation. No torch.

The functions themselves are in asyncrl/algorithms, each in a table by its name here. A choice is added by its name, and its
settings if it has any with its line in SETTINGS, in this file; and by its function and its line in the table in the other.
"""

import contextlib
import difflib
from typing import Any, Literal

from msgspec import structs

from asyncrl.config.base import Rule, Spec, require, require_fields, require_unset
from asyncrl.config.callables import Function, name_functions
from asyncrl.errors import ConfigError

UNGROUPED = ("reinforce_plus_plus", "remax", "gae")  # estimators that learn from a group of one
# algorithms/advantages.py:
ESTIMATOR_NAMES = (
    *("grpo", "grpo_no_std", "dr_grpo", "grpo_passk", "gpg", "rloo", "opo", "reinforce_plus_plus_baseline"),
    *UNGROUPED,
)
PREFERENCE_LOSSES = ("dpo", "kto")  # algorithms/preferences.py
LOSS_NAMES = ("ppo", "gspo", "gmpo", "cispo", "dppo_tv", "dppo_kl", "sapo", "pg", *PREFERENCE_LOSSES)  # algorithms/losses.py
CorrectionName = Literal["decoupled", "decoupled_loglinear", "tis", "tis_sequence", "none"]  # algorithms/corrections.py
MaskName = Literal["icepop", "icepop_sequence", "geometric", "kpop", "off_policy_sequence", "m2po"]  # algorithms/corrections.py
AggregationName = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

# The settings that only some choices read: by the choice's field, then its name. Set without a reader, they are refused.
SETTINGS: dict[str, dict[str, str]] = {
    "adv_estimator": {"gae": "gamma lam bootstrap_truncated", "reinforce_plus_plus": "gamma"},
    "policy_loss": {
        "ppo": "clip_ratio clip_ratio_high clip_ratio_c",
        "gspo": "clip_ratio clip_ratio_high",
        "gmpo": "clip_ratio clip_ratio_high",
        "cispo": "clip_ratio_high",
        "dppo_tv": "clip_ratio clip_ratio_high clip_ratio_c",
        "dppo_kl": "clip_ratio clip_ratio_high clip_ratio_c",
        "sapo": "sapo_tau_positive sapo_tau_negative",
        "dpo": "preference_beta dpo_pairs",
        "kto": "preference_beta kto_desirable_weight kto_undesirable_weight",
    },
    "correction": {
        "decoupled": "behaviour_cap normalize_weights",
        "decoupled_loglinear": "behaviour_cap",
        "tis": "tis_cap normalize_weights",
        "tis_sequence": "tis_cap normalize_weights",
    },
    "masks": {
        "icepop": "icepop_bounds",
        "icepop_sequence": "icepop_sequence_bounds",
        "geometric": "geometric_bounds",
        "kpop": "kpop_bound",
        "off_policy_sequence": "off_policy_sequence_bound",
        "m2po": "m2po_bound",
    },
    "loss_agg": {"seq-mean-token-sum-norm": "loss_scale_factor"},
    "kl_control": {"adaptive": "kl_target kl_horizon"},
}
# What `null` means for a loss that is named: its paper's values, or those its authors run with. loss_agg: token-mean elsewhere.
LOSS_DEFAULTS: dict[str, dict[str, float | str]] = {
    "ppo": {"clip_ratio": 0.2, "clip_ratio_high": 0.2},
    "gspo": {"clip_ratio": 3e-4, "clip_ratio_high": 4e-4, "loss_agg": "seq-mean-token-mean"},
    "gmpo": {"clip_ratio": 0.4, "clip_ratio_high": 0.4, "loss_agg": "seq-mean-token-mean"},
    "cispo": {"clip_ratio_high": 4.0},  # weights up to 5, as in ScaleRL (Khatri et al. 2025); MiniMax-M1 gives no number
    "dppo_tv": {"clip_ratio": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0},
    "dppo_kl": {"clip_ratio": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0},
    "sapo": {"loss_agg": "seq-mean-token-mean"},
}


class AlgorithmSpec(Spec, frozen=True, kw_only=True):
    """The algorithm, composed by name of pure functions. Settings that the choices made here would ignore are refused."""

    # How rewards become advantages: a built-in estimator, or the user's own, `file.py:name`: `f(rewards_s, groups_s) ->
    # advantages_s`, see algorithms/advantages.py.
    adv_estimator: Function = "grpo"
    # Rewards to mean 0 and standard deviation 1: of the batch, or of all rollouts trained so far (`running`). Turn- and
    # token-level rewards, and a KL penalty in the reward, are not: they then weigh against a reward of standard deviation 1.
    reward_normalization: Literal["none", "batch", "running"] = "none"
    gamma: float = 1.0  # discount per trained token, of gae (the only estimator with a critic: CriticSpec), reinforce_plus_plus
    lam: float = 1.0  # λ of gae; with gamma 1 too, as in verl, the advantage is the return minus the value
    # gae: a response that was cut by length also earns gamma × the critic's value after its last token, as if it had gone on;
    # it is trained like any other. Costs a pass of the critic over such responses.
    bootstrap_truncated: bool = False
    # What an advantage does to a token: a built-in loss, or the user's own, `file.py:name`: `f(logp_t, old_t, advantages_t,
    # sequence_t) -> (loss_t, {figure: values_t})`, see algorithms/losses.py. `dpo` and `kto` learn from how rewards rank a
    # group's rollouts, against the reference, which they load whatever kl_coef is; they take no estimator, correction or mask,
    # and loss_agg is for KL and entropy only.
    policy_loss: Function = "ppo"
    # The policy that the ratio is taken to, and that clips go around: that at the start of the update, or that which sampled.
    ratio_to: Literal["proximal", "behaviour"] = "proximal"
    correction: CorrectionName = "decoupled"  # weights that bring the behaviour policy to the proximal one
    normalize_weights: bool = False  # divides those weights by their mean over the batch
    masks: tuple[MaskName, ...] = ()  # tokens left out of the policy loss, by any number of masks
    # How far a ratio may go below 1, ε. For dppo_* it bounds a divergence, for gmpo a log-ratio. null: the loss's own, see
    # the table in docs/algorithms.md; so are the other two.
    clip_ratio: float | None = None
    clip_ratio_high: float | None = None  # ε above 1; the weights of cispo go up to 1 + ε. null: clip_ratio, where that is set
    # Largest ratio, > 1: of a bad token (dual clip of ppo; null: off), and of any token's weight (dppo_*; null: 20).
    clip_ratio_c: float | None = None
    sapo_tau_positive: float = 1.0  # temperature of sapo where the advantage is > 0
    sapo_tau_negative: float = 1.05  # temperature of sapo elsewhere
    behaviour_cap: float = 5.0  # truncation of exp(proximal − behaviour) for decoupled*
    tis_cap: float = 2.0  # truncation of exp(proximal − behaviour) for tis*
    icepop_bounds: tuple[float, float] = (0.5, 5.0)  # least and largest exp(proximal − behaviour) of a token
    icepop_sequence_bounds: tuple[float, float] = (0.5, 5.0)  # likewise of its product over a sequence
    geometric_bounds: tuple[float, float] = (0.99, 1.01)  # likewise of its geometric mean over a sequence
    kpop_bound: float = 2.0  # largest KL of "this token or another" between proximal and behaviour, either way, in nats
    off_policy_sequence_bound: float = 0.5  # largest mean of behaviour − present logprobs over a sequence, for its bad tokens
    m2po_bound: float = 0.04  # largest mean of (proximal − behaviour)² over a minibatch
    kl_coef: float = 0.0  # weight of the KL to the reference, which is the starting policy; 0 loads no reference
    # Of the KL per token, see algorithms/kl.py. null: k3 in the loss, k1 in the reward, which stays unbiased there. k3_unbiased
    # weighs k3 by present ÷ behaviour, in the loss.
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased"] | None = None
    kl_in: Literal["loss", "reward"] = "loss"  # a term of the loss, or a penalty in the reward (of the tokens that are trained)
    kl_control: Literal["fixed", "adaptive"] = "fixed"  # adaptive: kl_coef moves so that the KL per token nears kl_target
    kl_target: float = 0.1  # nats per token
    kl_horizon: int = 10000  # rollouts over which an adaptive kl_coef changes by 20 % at most
    entropy_coef: float = 0.0  # weight of the entropy bonus in the loss
    # How losses of tokens become one number, see algorithms/objective.py. null: the loss's own.
    loss_agg: AggregationName | None = None
    loss_scale_factor: int | None = None  # tokens that seq-mean-token-sum-norm divides by: usually sampling.max_response_length
    preference_beta: float = 0.1  # β of the implied reward β·log(π/π_ref), for dpo and kto
    dpo_pairs: Literal["best_worst", "all"] = "best_worst"  # a group's best against its worst, or all of different rewards
    kto_desirable_weight: float = 1.0  # λ_D of kto
    kto_undesirable_weight: float = 1.0  # λ_U of kto

    def __post_init__(self) -> None:
        name_functions(self, "adv_estimator policy_loss")
        _require_known("adv_estimator", self.adv_estimator, ESTIMATOR_NAMES)
        _require_known("policy_loss", self.policy_loss, LOSS_NAMES)
        require_fields(self, "algorithm.", _RULES)
        _require_read(self)
        _require_sound(self)

    @property
    def learns_preferences(self) -> bool:
        return self.policy_loss in PREFERENCE_LOSSES

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.learns_preferences

    @property
    def needs_critic(self) -> bool:
        return self.adv_estimator == "gae"

    @property
    def wants_baseline(self) -> bool:
        """Whether each prompt gets a greedy rollout more, which is scored and never trained."""
        return self.adv_estimator == "remax"

    def setting(self, field: str) -> Any:
        """A field's value; where it is null, what that means with the other choices."""
        value = getattr(self, field)
        return _null(self, field) if value is None else value

    @property
    def resolved(self) -> "AlgorithmSpec":
        """The same with every null written out that means a value. Of a recipe as it is run, not as it is overridden: what is
        written out stays when another loss is named."""
        return structs.replace(self, **{field: self.setting(field) for field in self.__struct_fields__})

    @property
    def unresolved(self) -> "AlgorithmSpec":
        """The same with null for what null would mean: the one to override, if all that is known is the `resolved` one."""
        spec, resolved = self, self.resolved
        for field in (f.name for f in structs.fields(self) if f.default is None and f.name != "loss_scale_factor"):
            with contextlib.suppress(ConfigError):  # others need what is written there
                bare = structs.replace(spec, **{field: None})
                spec = bare if bare.resolved == resolved else spec
        return spec


_RULES: tuple[Rule, ...] = (
    ("gamma lam", lambda x: 0 <= x <= 1, "is outside [0, 1]: returns would grow with length; 1 turns it off"),
    ("clip_ratio clip_ratio_high", lambda x: x >= 0, "< 0: every token would be clipped; use >= 0"),
    ("clip_ratio_c", lambda x: x > 1, "<= 1: ratios that never moved would be clipped; use > 1, or null"),
    ("behaviour_cap tis_cap", lambda x: x > 0, "<= 0: no token would be learned from; use > 0"),
    ("sapo_tau_positive sapo_tau_negative", lambda x: x > 0, "<= 0: no token would be learned from; use > 0"),
    ("masks", lambda x: len(set(x)) == len(x), "names one twice: a second pass changes nothing; name each once"),
    (
        "icepop_bounds icepop_sequence_bounds geometric_bounds",
        lambda x: 0 <= x[0] <= 1 <= x[1] and x[0] < x[1],
        "must enclose the ratio 1: tokens of the policy itself would be masked; use 0 <= low <= 1 <= high",
    ),
    ("m2po_bound kpop_bound", lambda x: x > 0, "<= 0: every token would be masked; use > 0"),
    ("off_policy_sequence_bound", lambda x: x > 0, "<= 0: the policy's own tokens would be masked; use > 0"),
    ("kl_coef", lambda x: x >= 0, "< 0: the policy would be driven from the reference; use >= 0"),
    ("kl_target", lambda x: x > 0, "<= 0: the coefficient would grow for ever; use > 0"),
    ("kl_horizon", lambda x: x >= 1, "< 1: the coefficient would leap; use >= 1"),
    ("loss_scale_factor", lambda x: x >= 1, "< 1: use the longest response in tokens, >= 1"),
    ("preference_beta", lambda x: x > 0, "<= 0: nothing would be learned from what is preferred; use > 0"),
    ("kto_desirable_weight kto_undesirable_weight", lambda x: x > 0, "<= 0: nothing would be learned from it; use > 0"),
)


def _require_known(field: str, name: str, names: tuple[str, ...]) -> None:
    """Passes built-in names and what may be a user's function: that has a dot or a colon in it."""
    if name in names or ":" in name or "." in name:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)},"
    raise ConfigError(f"algorithm.{field}={name!r} is unknown; {hint} or name your own function: path/to/file.py:name")


def _null(spec: AlgorithmSpec, field: str) -> Any:
    """What null means for a field; None for those where it means nothing, and those that are never null."""
    if field == "clip_ratio_high" and spec.clip_ratio is not None:
        return spec.clip_ratio
    usual = {"loss_agg": "token-mean", "kl_estimator": "k1" if spec.kl_in == "reward" else "k3"}
    return (usual | LOSS_DEFAULTS.get(spec.policy_loss, {})).get(field)


def _require_read(spec: AlgorithmSpec) -> None:
    """Refuses settings that would be ignored, unless they are what they would be if left out."""

    def refuse(names: str, why: str) -> None:
        changed = " ".join(name for name in names.split() if getattr(spec, name) != _null(spec, name))
        require_unset(spec, "algorithm.", changed, why)

    if not spec.kl_coef:
        why = "kl_coef=0: there is no KL to speak of, it would be ignored; set kl_coef > 0"
        refuse("kl_in kl_control kl_estimator", why)
    for choice, reads in SETTINGS.items():
        chosen = spec.setting(choice)
        made = set(chosen) if isinstance(chosen, tuple) else {chosen}
        for setting in dict.fromkeys(" ".join(reads.values()).split()):
            readers = [name for name, settings in reads.items() if setting in settings.split()]
            if not made.intersection(readers):
                use = " or ".join(map(repr, readers))
                refuse(setting, f"{choice}={chosen!r}: it would be ignored; use {use}, or leave it out")
    if spec.adv_estimator == "grpo_passk":
        why = "adv_estimator='grpo_passk': none of its advantages is < 0, so this would be ignored; leave it out"
        refuse("sapo_tau_negative" + (" clip_ratio_c" if spec.policy_loss == "ppo" else ""), why)
        require("off_policy_sequence" not in spec.masks, f"algorithm.masks={spec.masks!r} with {why}")
    if spec.learns_preferences:
        names = "adv_estimator reward_normalization ratio_to normalize_weights masks behaviour_cap kl_in"
        names += " correction" if spec.correction != "none" else ""
        names += "" if spec.kl_coef or spec.entropy_coef else " loss_agg"
        why = f"policy_loss={spec.policy_loss!r}: it learns from how rewards rank a group's rollouts alone"
        refuse(names, f"{why}, so this would be ignored; leave it out")


def _require_sound(spec: AlgorithmSpec) -> None:
    """Refuses choices that would be wrong together."""
    require(
        spec.ratio_to == "proximal" or spec.correction == "none",
        f"algorithm.correction={spec.correction!r} with ratio_to='behaviour': the ratio already holds the step from behaviour "
        "to proximal, so the weight would correct for it twice; use correction='none', or ratio_to='proximal'",
    )
    require(
        spec.kl_estimator != "k3_unbiased" or spec.kl_in == "loss",
        "algorithm.kl_estimator='k3_unbiased' with kl_in='reward': its weight is there for its gradient, which a reward has "
        "not; use 'k1' or 'k3', or kl_in='loss'",
    )
    require(
        spec.ratio_to == "proximal" or spec.policy_loss != "pg",
        "algorithm.ratio_to='behaviour' with policy_loss='pg': it takes no ratio, so stale tokens would not be corrected for; "
        "use ratio_to='proximal' with a correction",
    )
    require(
        spec.loss_scale_factor is not None or spec.loss_agg != "seq-mean-token-sum-norm",
        "algorithm.loss_agg='seq-mean-token-sum-norm' without loss_scale_factor: there is nothing to divide by; set it to "
        "sampling.max_response_length",
    )
    require(
        spec.gamma > 0 or not spec.bootstrap_truncated,
        "algorithm.bootstrap_truncated=true with gamma=0: it would be ignored: what follows the cut counts gamma times; "
        "use gamma > 0, or false",
    )
    require(
        not (spec.wants_baseline and spec.reward_normalization != "none"),
        f"algorithm.reward_normalization={spec.reward_normalization!r} with adv_estimator='remax': rewards would be compared "
        "with a greedy rollout's on another scale; use 'none'",
    )
