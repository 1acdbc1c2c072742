"""Off-policy corrections, by the names that a recipe has for them: weights, and masks. Flat layout [T]; pure.

For tokens that the proximal policy (start of this update) did not sample itself, a correction weighs the policy loss per
token, without gradient. One per recipe, so none is applied twice. proximal_t, behaviour_t: full-softmax logprobs at the
sampling temperature, of the same tokens under both policies.

Rejection masks leave tokens out of the policy loss, where learner and behaviour are too far apart. delta = proximal −
behaviour [T]. True: the token stays. Masks combine, with each other and with a correction: a token must pass all. A masked
token counts in the normalizer of the aggregation, as in the papers: masking shrinks a step and never moves weight onto the
tokens that stay. KL and entropy terms still see it.

To add one: its function and its line in CORRECTIONS or MASKS here, its name and its settings in config/algorithm.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algorithms.losses import LOG_RATIO_LIMIT, log_ratio, sequence_mean, sequence_sum
from asyncrl.config import AlgorithmSpec


class Columns(NamedTuple):
    """What the loss needs of each trained token, [T] each."""

    coefficients_t: Tensor  # what its loss weighs in the minibatch's: see objective.AGGREGATIONS
    advantages_t: Tensor
    behaviour_t: Tensor  # logprob under the policy that sampled it
    proximal_t: Tensor  # at the start of the update; may be NaN where `needs_proximal` says that nothing asks for it
    sequence_t: Tensor  # int64
    lag_t: Tensor  # int64, versions
    reference_t: Tensor | None = None  # logprob under the reference; None without a KL in the loss
    kept_t: Tensor | None = None  # bool: what a mask over the whole minibatch leaves (m2po); None without

    def take(self, index_t: Tensor) -> "Columns":
        """The columns of some tokens."""
        return Columns._make(None if column is None else column[index_t] for column in self)

    def delta(self) -> Tensor:
        return self.proximal_t - self.behaviour_t


class Weights(NamedTuple):
    """A correction of each token, [T] each."""

    weights_t: Tensor  # multiply the policy loss
    capped_t: Tensor  # bool: where the weight was truncated


def behaviour_ratio(proximal_t: Tensor, behaviour_t: Tensor) -> Tensor:
    """exp(proximal − behaviour) [T], its logarithm clamped to ±20, without gradient."""
    return log_ratio(proximal_t, behaviour_t).detach().exp()


def decoupled(proximal_t: Tensor, behaviour_t: Tensor, cap: float) -> Weights:
    """min(exp(proximal − behaviour), cap). Decoupled PPO (Hilton et al. 2022), truncated as in AReaL (Fu et al. 2025).

    TIS at token level (Yao et al. 2025) is the same weight, by custom with the cap 2.
    """
    ratio_t = behaviour_ratio(proximal_t, behaviour_t)
    return Weights(ratio_t.clamp(max=cap), ratio_t > cap)


def tis_sequence(proximal_t: Tensor, behaviour_t: Tensor, sequence_t: Tensor, cap: float) -> Weights:
    """min(exp(Σ over the sequence of proximal − behaviour), cap), for all its tokens. TIS at sequence level (verl; Liu et
    al. 2025): unbiased for whole responses, at a variance that grows with their length. The sum is over trained tokens."""
    ratio_t = behaviour_ratio(sequence_sum((proximal_t - behaviour_t).detach(), sequence_t), torch.zeros_like(behaviour_t))
    return Weights(ratio_t.clamp(max=cap), ratio_t > cap)


def uncorrected(proximal_t: Tensor) -> Weights:
    """1 everywhere: stale tokens are trained as if the policy that the ratio is taken to had sampled them."""
    return Weights(torch.ones_like(proximal_t), torch.zeros_like(proximal_t, dtype=torch.bool))


def interpolated_proximal(logp_t: Tensor, behaviour_t: Tensor, lag_t: Tensor) -> Tensor:
    """A proximal policy without a forward pass: between behaviour and current logprobs, by lag. A-3PO (Li et al. 2025; AReaL).

    behaviour + α·(logp − behaviour), α = (v_prox − v_behaviour) / (v_current − v_behaviour). An update starts at version
    v_prox and makes v_prox + 1; with lag = v_prox − v_behaviour, α = lag / (lag + 1). Lag 0: behaviour, which is then the
    proximal policy; the older a token, the nearer to the current one. (AReaL's code has 1 − 1/lag: it takes the version that
    an update starts at for the current one, so that tokens of lag 1 keep the behaviour policy.)
    lag_t [T] in versions. Without gradient.
    """
    share_t = lag_t / (lag_t + 1).to(logp_t.dtype)
    return behaviour_t + share_t * (logp_t.detach() - behaviour_t)


# (recipe, proximal_t, behaviour_t, sequence_t) -> weights
CORRECTIONS: dict[str, Callable[[AlgorithmSpec, Tensor, Tensor, Tensor], Weights]] = {
    "decoupled": lambda spec, proximal_t, behaviour_t, _: decoupled(proximal_t, behaviour_t, spec.behaviour_cap),
    "decoupled_loglinear": lambda spec, proximal_t, behaviour_t, _: decoupled(proximal_t, behaviour_t, spec.behaviour_cap),
    "tis": lambda spec, proximal_t, behaviour_t, _: decoupled(proximal_t, behaviour_t, spec.tis_cap),
    "tis_sequence": lambda spec, new_t, old_t, sequence_t: tis_sequence(new_t, old_t, sequence_t, spec.tis_cap),
    "none": lambda spec, proximal_t, *_: uncorrected(proximal_t),
}

# ----------------------------------------------------------------------------------------------- masks


def icepop(delta_t: Tensor, low: float, high: float) -> Tensor:
    """Tokens with low <= exp(delta) <= high. IcePop (Ling team, Ant Group 2025)."""
    ratio_t = delta_t.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return (ratio_t >= low) & (ratio_t <= high)


def geometric(delta_t: Tensor, sequence_t: Tensor, low: float, high: float) -> Tensor:
    """Sequences, whole, with low <= exp(mean of delta) <= high: their length makes no difference (Li et al. 2025; verl)."""
    return icepop(sequence_mean(delta_t.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), sequence_t), low, high)


def icepop_sequence(delta_t: Tensor, sequence_t: Tensor, low: float, high: float) -> Tensor:
    """Sequences, whole, with low <= exp(Σ of delta) <= high: IcePop on the ratio of a whole response.

    As in verl (rollout_is "sequence" with two bounds) and TRL ("sequence_mask"). The sum is over trained tokens: the longer a
    sequence, the sooner it is masked, as with tis_sequence, whose weights it bounds from below too.
    """
    return icepop(sequence_sum(delta_t, sequence_t), low, high)


def kpop(proximal_t: Tensor, behaviour_t: Tensor, bound: float) -> Tensor:
    """Tokens with max(KL(p ‖ q), KL(q ‖ p)) <= bound, of "this token or another", in nats. KPop (Guo et al. 2026); AReaL.

    p = exp(proximal), q = exp(behaviour), in float64 and within [1e-8, 1 − 1e-8].
    """
    p_t, q_t = (logp_t.double().exp().clamp(1e-8, 1 - 1e-8) for logp_t in (proximal_t, behaviour_t))
    this_t, other_t = (p_t / q_t).log(), ((1 - p_t) / (1 - q_t)).log()
    forward_t, backward_t = (x_t * this_t + (1 - x_t) * other_t for x_t in (p_t, q_t))
    return torch.maximum(forward_t, -backward_t) <= bound


def off_policy_sequence(drift_t: Tensor, advantages_t: Tensor, sequence_t: Tensor, bound: float) -> Tensor:
    """All but tokens with an advantage < 0 in sequences whose mean of drift is > bound. DeepSeek-V3.2 (2025, equation 9); TRL.

    drift_t: behaviour − present logprobs, so that engine, staleness and the steps of this update count together. What the
    policy has left behind is not pushed away any further.
    """
    mean_t = sequence_mean(drift_t.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), sequence_t)
    return (advantages_t >= 0) | (mean_t <= bound)


def m2po(delta_m: Tensor, bound: float) -> Tensor:
    """Drops the largest delta² of the minibatch until the mean of the rest is < bound. M2PO (Zheng et al. 2025).

    delta_m [M]: every trained token of the minibatch, not of a pack. Of tokens with equal delta² at the edge all are
    dropped: which of them stay may not hang on their order.
    """
    squared_m = delta_m.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).square()
    ordered_m = squared_m.sort().values
    means_m = ordered_m.cumsum(0) / torch.arange(1, len(ordered_m) + 1, device=delta_m.device)
    stay = int((means_m < bound).sum())  # the mean of the k smallest grows with k
    return torch.ones_like(squared_m, dtype=torch.bool) if stay == len(ordered_m) else squared_m < ordered_m[stay]


# (recipe, a pack's columns, logprobs under the policy as it is at this step [T]) -> what stays; m2po, which sees a whole
# minibatch, is made before its packs
MASKS: dict[str, Callable[[AlgorithmSpec, Columns, Tensor], Tensor]] = {
    "icepop": lambda spec, seen, _: icepop(seen.delta(), *spec.icepop_bounds),
    "icepop_sequence": lambda spec, seen, _: icepop_sequence(seen.delta(), seen.sequence_t, *spec.icepop_sequence_bounds),
    "geometric": lambda spec, seen, _: geometric(seen.delta(), seen.sequence_t, *spec.geometric_bounds),
    "kpop": lambda spec, seen, _: kpop(seen.proximal_t, seen.behaviour_t, spec.kpop_bound),
    "off_policy_sequence": lambda spec, seen, present_t: off_policy_sequence(
        seen.behaviour_t - present_t, seen.advantages_t, seen.sequence_t, spec.off_policy_sequence_bound
    ),
}


def rejection_mask(spec: AlgorithmSpec, columns: Columns, present_t: Tensor) -> Tensor:
    """What of a pack stays by all of the recipe's masks [T] bool. present_t: logprobs at this step, without gradient."""
    kept_t = torch.ones_like(present_t, dtype=torch.bool) if columns.kept_t is None else columns.kept_t
    for name in spec.masks:
        if name in MASKS:
            kept_t = kept_t & MASKS[name](spec, columns, present_t)
    return kept_t
