"""The part of a recipe that names the algorithm: estimator × policy loss × correction × masks × KL × aggregation. No torch.

The functions themselves are in asyncrl/learn: advantages, losses, corrections, masks, kl, aggregate.
"""

import difflib
from typing import Literal, get_args

from asyncrl.config.base import Spec, require

BuiltinEstimator = Literal[
    "grpo", "grpo_no_std", "dr_grpo", "rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "gae"
]
BuiltinLoss = Literal["ppo", "gspo", "gmpo", "cispo", "dppo_tv", "dppo_kl", "sapo", "pg", "dpo", "kto"]
CorrectionName = Literal["decoupled", "decoupled_loglinear", "tis", "tis_sequence", "none"]
MaskName = Literal["icepop", "geometric", "m2po"]
AggregationName = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

ESTIMATOR_NAMES: tuple[str, ...] = get_args(BuiltinEstimator)
LOSS_NAMES: tuple[str, ...] = get_args(BuiltinLoss)
UNGROUPED = ("reinforce_plus_plus", "remax", "gae")  # those that learn from a group of one
PREFERENCE_LOSSES = ("dpo", "kto")


class AlgorithmSpec(Spec, frozen=True, kw_only=True):
    """Pure functions composed by name. adv_estimator and policy_loss may also name the user's own: `file.py:name`.

    A user's estimator is `f(rewards_s, groups_s) -> advantages_s`, a loss `f(logp_t, old_t, advantages_t, sequence_t) ->
    (loss_t, {figure: values_t})`: see learn/estimators.py and learn/policy_loss.py.

    gamma, lam: of gae, the only estimator with a critic (CriticSpec). Both 1, as in verl: return − value.
    clip_ratio, clip_ratio_high: ε below and above (None: the same), around the policy that `ratio_to` names: the `proximal`
    one (at the start of the update), or `behaviour` (that sampled). For dppo_* they bound a divergence instead, for gmpo a
    log-ratio; gspo wants about 3e-4. clip_ratio_c: dual clip of ppo, > 1; None: off. sapo_tau_*: temperatures of sapo.
    correction: weights that bring behaviour to proximal. behaviour_cap: truncation of exp(proximal − behaviour) for
    decoupled*; tis_cap: for tis*. masks: tokens left out of the policy loss, any number, within *_bounds and m2po_bound.
    kl_coef: weight of the KL to the reference (the starting policy); 0 loads no reference. kl_in: a term of the `loss`, or
    a price on the `reward` (of the tokens that are trained). kl_control `adaptive` moves the coefficient so that the KL per
    token nears kl_target; kl_horizon: rollouts over which it changes by 20 % at most.
    loss_scale_factor: tokens that seq-mean-token-sum-norm divides by; usually sampling.max_response_length.
    policy_loss `dpo` or `kto` learns from how rewards rank a group's rollouts, against the reference, which they load whatever
    kl_coef is. preference_beta: β of the implied reward β·log(π/π_ref). dpo_pairs: best against worst of a group, or all of
    different rewards. kto_*_weight: λ. They take no estimator, correction or mask; loss_agg is for KL and entropy only.
    reward_normalization: to mean 0 and standard deviation 1, of the `batch`, or of all rollouts trained so far (`running`).
    Token and turn rewards, and the price of a KL, are not: they then weigh against a reward of standard deviation 1.
    """

    adv_estimator: str = "grpo"
    reward_normalization: Literal["none", "batch", "running"] = "none"
    gamma: float = 1.0
    lam: float = 1.0
    policy_loss: str = "ppo"
    ratio_to: Literal["proximal", "behaviour"] = "proximal"
    correction: CorrectionName = "decoupled"
    masks: tuple[MaskName, ...] = ()
    clip_ratio: float = 0.2
    clip_ratio_high: float | None = None
    clip_ratio_c: float | None = None
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    behaviour_cap: float = 5.0
    tis_cap: float = 2.0
    icepop_bounds: tuple[float, float] = (0.5, 5.0)
    geometric_bounds: tuple[float, float] = (0.99, 1.01)
    m2po_bound: float = 0.04
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 0.1
    kl_horizon: int = 10000
    entropy_coef: float = 0.0
    loss_agg: AggregationName = "token-mean"
    loss_scale_factor: int | None = None
    preference_beta: float = 0.1
    dpo_pairs: Literal["best_worst", "all"] = "best_worst"
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _known("adv_estimator", self.adv_estimator, ESTIMATOR_NAMES)
        _known("policy_loss", self.policy_loss, LOSS_NAMES)
        _check_discounts(self)
        _check_ratio(self)
        _check_masks(self)
        _check_kl(self)
        _check_aggregation(self)
        _check_preferences(self)
        _check_baseline(self)

    @property
    def learns_preferences(self) -> bool:
        return self.policy_loss in PREFERENCE_LOSSES

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

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

    @property
    def clip_high(self) -> float:
        return self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high


def _known(field: str, name: str, names: tuple[str, ...]) -> None:
    """Passes built-in names and what may be a user's function: that has a dot or a colon in it."""
    if name in names or ":" in name or "." in name:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)},"
    require(False, f"algorithm.{field}={name!r} is unknown; {hint} or name your own function: path/to/file.py:name")


def _check_discounts(spec: AlgorithmSpec) -> None:
    for field in ("gamma", "lam"):
        value = getattr(spec, field)
        require(0 <= value <= 1, f"algorithm.{field}={value} is outside [0, 1]: returns would grow with length; 1 turns it off")
        require(
            value == 1 or spec.needs_critic,
            f"algorithm.{field}={value} with adv_estimator={spec.adv_estimator!r}: it would be ignored; use 'gae', or 1",
        )


def _check_ratio(spec: AlgorithmSpec) -> None:
    require(
        spec.ratio_to == "proximal" or spec.correction == "none",
        f"algorithm.correction={spec.correction!r} with ratio_to='behaviour': the ratio already holds the step from behaviour "
        "to proximal, so the weight would correct for it twice; use correction='none', or ratio_to='proximal'",
    )
    require(
        spec.ratio_to == "proximal" or spec.policy_loss != "pg",
        "algorithm.ratio_to='behaviour' with policy_loss='pg': it takes no ratio, so stale tokens would not be corrected for; "
        "use ratio_to='proximal' with a correction",
    )
    for field, value in (("clip_ratio", spec.clip_ratio), ("clip_ratio_high", spec.clip_high)):
        require(value >= 0, f"algorithm.{field}={value} < 0: every token would be clipped; use >= 0")
    c = spec.clip_ratio_c
    require(c is None or c > 1, f"algorithm.clip_ratio_c={c} <= 1: ratios that never moved would be clipped; use > 1, or null")
    require(
        c is None or spec.policy_loss == "ppo",
        f"algorithm.clip_ratio_c={c} with policy_loss={spec.policy_loss!r}: it would be ignored; use 'ppo', or null",
    )
    for field in ("behaviour_cap", "tis_cap", "sapo_tau_positive", "sapo_tau_negative"):
        value = getattr(spec, field)
        require(value > 0, f"algorithm.{field}={value} <= 0: no token would be learned from; use > 0")


def _check_masks(spec: AlgorithmSpec) -> None:
    require(
        len(set(spec.masks)) == len(spec.masks),
        f"algorithm.masks={spec.masks} names one twice: a second pass of the same mask changes nothing; name each once",
    )
    for field in ("icepop_bounds", "geometric_bounds"):
        low, high = getattr(spec, field)
        require(
            0 <= low < high and low <= 1 <= high,
            f"algorithm.{field}={(low, high)} must enclose the ratio 1: tokens of the policy itself would be masked; "
            "use 0 <= low <= 1 <= high",
        )
    require(spec.m2po_bound > 0, f"algorithm.m2po_bound={spec.m2po_bound} <= 0: every token would be masked; use > 0")


def _check_kl(spec: AlgorithmSpec) -> None:
    require(spec.kl_coef >= 0, f"algorithm.kl_coef={spec.kl_coef} < 0: the policy would be driven from the reference; use >= 0")
    for field, plain in (("kl_in", "loss"), ("kl_control", "fixed")):
        value = getattr(spec, field)
        require(
            spec.kl_coef > 0 or value == plain,
            f"algorithm.{field}={value!r} with kl_coef=0: there is no KL to speak of, it would be ignored; set kl_coef > 0",
        )
    require(spec.kl_target > 0, f"algorithm.kl_target={spec.kl_target} <= 0: the coefficient would grow for ever; use > 0")
    require(spec.kl_horizon >= 1, f"algorithm.kl_horizon={spec.kl_horizon} < 1: the coefficient would leap; use >= 1")


def _check_aggregation(spec: AlgorithmSpec) -> None:
    scale, normed = spec.loss_scale_factor, spec.loss_agg == "seq-mean-token-sum-norm"
    require(
        scale is not None or not normed,
        "algorithm.loss_agg='seq-mean-token-sum-norm' without loss_scale_factor: there is nothing to divide by; set it to "
        "sampling.max_response_length",
    )
    require(
        scale is None or normed,
        f"algorithm.loss_scale_factor={scale} with loss_agg={spec.loss_agg!r}: it would be ignored; "
        "use loss_agg='seq-mean-token-sum-norm', or null",
    )
    require(scale is None or scale >= 1, f"algorithm.loss_scale_factor={scale} < 1: use the longest response in tokens, >= 1")


def _check_baseline(spec: AlgorithmSpec) -> None:
    require(
        not (spec.wants_baseline and spec.reward_normalization != "none"),
        f"algorithm.reward_normalization={spec.reward_normalization!r} with adv_estimator='remax': rewards would be compared "
        "with a greedy rollout's on another scale; use 'none'",
    )


def _check_preferences(spec: AlgorithmSpec) -> None:
    for field in ("preference_beta", "kto_desirable_weight", "kto_undesirable_weight"):
        value = getattr(spec, field)
        require(value > 0, f"algorithm.{field}={value} <= 0: nothing would be learned from what is preferred; use > 0")
    loss = spec.policy_loss
    require(
        spec.dpo_pairs == "best_worst" or loss == "dpo",
        f"algorithm.dpo_pairs={spec.dpo_pairs!r} with policy_loss={loss!r}: there are no pairs, it would be ignored; use 'dpo'",
    )
    if not spec.learns_preferences:
        return
    may_be: dict[str, tuple[object, ...]] = {"adv_estimator": ("grpo",), "reward_normalization": ("none",)}
    may_be |= {"ratio_to": ("proximal",), "correction": ("decoupled", "none"), "masks": ((),), "kl_in": ("loss",)}
    if not spec.kl_coef and not spec.entropy_coef:
        may_be["loss_agg"] = ("token-mean",)
    for field, values in may_be.items():
        found = getattr(spec, field)
        require(
            found in values,
            f"algorithm.{field}={found!r} with policy_loss={loss!r}: it learns from how rewards rank a group's rollouts alone, "
            f"so this would be ignored; leave it at {values[0]!r}",
        )
