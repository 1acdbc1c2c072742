"""Policy losses, by the names that a recipe has for them, and the critic's. Flat layout [T]; pure.

logp_t: logprobs under the current policy, with gradient. old_t: under the policy that the ratio r = exp(logp − old) is
taken to, without gradient: the proximal one, or behaviour (`algorithm.ratio_to`). advantages_t: of each token. sequence_t
[T] int64, in any order: the sequence of each token. A pack holds its sequences whole, so sums and means over a sequence are
those of all its trained tokens.

Each returns the loss [T], differentiable in logp_t, and figures by name [T], logged as actor/<name>, their mean over tokens.
Correction weights, masks, KL, entropy and aggregation are added around it (objective.py). The user's own is named in the
recipe as `file.py:name`, and is of this kind: `f(logp_t, old_t, advantages_t, sequence_t) -> (loss_t, figures)`; figures may
be {}.

To add one: its function and its line in POLICY_LOSSES here, its name and its settings in config/algorithm.py.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from asyncrl.config import PREFERENCE_LOSSES, AlgorithmSpec
from asyncrl.config.callables import load_callable
from asyncrl.errors import ConfigError

LOG_RATIO_LIMIT = 20.0  # exp(20) is still finite in float32 after products; beyond it a token has no gradient

Loss = tuple[Tensor, dict[str, Tensor]]
PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Loss]


def sequence_sum(values_t: Tensor, sequence_t: Tensor) -> Tensor:
    """For each token [T], the sum over its sequence."""
    if not len(values_t):
        return values_t
    sums_s = values_t.new_zeros(int(sequence_t.max()) + 1).index_add(0, sequence_t, values_t)
    return sums_s[sequence_t]


def sequence_mean(values_t: Tensor, sequence_t: Tensor) -> Tensor:
    """For each token [T], the mean over its sequence."""
    return sequence_sum(values_t, sequence_t) / sequence_sum(torch.ones_like(values_t), sequence_t)


def log_ratio(logp_t: Tensor, old_t: Tensor) -> Tensor:
    """logp − old, clamped to ±20."""
    return (logp_t - old_t).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_ppo(
    logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, *, clip_low: float, clip_high: float, dual: float | None = None
) -> Loss:
    """max(−r·A, −clip(r, 1 − clip_low, 1 + clip_high)·A). PPO (Schulman et al. 2017).

    A larger `clip_high` than `clip_low` is DAPO's clip-higher (Yu et al. 2025). dual: c > 1 bounds the loss of a bad token
    at −c·A, however likely it became (dual clip, Ye et al. 2020); None: off. pg_clipfrac are the tokens whose clipped term
    is the larger one, pg_clipfrac_lower those that the dual clip holds: neither has a gradient.
    """
    ratio_t = log_ratio(logp_t, old_t).exp()
    unclipped_t = -ratio_t * advantages_t
    clipped_t = -ratio_t.clamp(1 - clip_low, 1 + clip_high) * advantages_t
    loss_t, was_clipped_t = torch.maximum(unclipped_t, clipped_t), clipped_t > unclipped_t
    if dual is None:
        return loss_t, {"pg_clipfrac": was_clipped_t}
    bound_t = -dual * advantages_t
    lower_t = (advantages_t < 0) & (loss_t > bound_t)
    return torch.where(lower_t, bound_t, loss_t), {"pg_clipfrac": was_clipped_t, "pg_clipfrac_lower": lower_t}


def cispo(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, *, clip_high: float) -> Loss:
    """−sg(min(r, 1 + clip_high))·A·logp. CISPO (MiniMax-M1, 2025): clips the weight, so that no token loses its gradient.

    Only from above, as in the paper, whose lower bound is set where it never binds. pg_clipfrac: weights that were clipped.
    """
    ratio_t = log_ratio(logp_t, old_t).detach().exp()
    return -ratio_t.clamp(max=1 + clip_high) * advantages_t * logp_t, {"pg_clipfrac": ratio_t > 1 + clip_high}


def sapo(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, *, tau_positive: float, tau_negative: float) -> Loss:
    """−(4/τ)·σ(τ·(r − 1))·A. SAPO (Gao et al. 2025): a smooth gate in place of the clip; its slope at r = 1 is 1.

    τ is tau_positive where A > 0, else tau_negative: a larger one fades bad tokens out sooner. Nothing is clipped.
    """
    tau_t = torch.full_like(advantages_t, tau_negative).masked_fill(advantages_t > 0, tau_positive)
    gate_t = (tau_t * (log_ratio(logp_t, old_t).exp() - 1)).sigmoid() * 4 / tau_t
    return -gate_t * advantages_t, {}


def policy_gradient(logp_t: Tensor, advantages_t: Tensor) -> Loss:
    """−A·logp. REINFORCE (Williams 1992). Takes no ratio: what behaviour was is for the correction's weights alone."""
    return -advantages_t * logp_t, {}


def dppo_tv(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, *, clip_low: float, clip_high: float, cap: float) -> Loss:
    """−r·A, but 0 where p − p_old already went further than the bound in A's direction. DPPO (Qi et al. 2026), binary TV.

    p = exp(logp). clip_high bounds p − p_old where A > 0, clip_low bounds p_old − p where A < 0: differences of
    probabilities, so that rare tokens may still move by a large ratio. pg_clipfrac: tokens left out so.

    cap, as in verl: a token of a larger ratio counts as if it had this one, with a gradient of cap·A·∇logp. Without it a
    token that rose from 1e-7 to 1e-3, which no bound on p notices, has one 10,000 times as large as its neighbours. The
    paper's own runs have none, or 5; its section 5.4 finds that a small cap does harm. pg_clipfrac_lower: tokens capped.
    """
    moved_t = (logp_t.exp() - old_t.exp()).detach()
    out_t = torch.where(advantages_t > 0, moved_t > clip_high, moved_t < -clip_low)
    return _without(out_t, logp_t, old_t, advantages_t, cap)


def dppo_kl(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, *, clip_low: float, clip_high: float, cap: float) -> Loss:
    """As dppo_tv, with KL(p_old ‖ p) of "this token or another" as the distance, in nats. DPPO (Qi et al. 2026), binary KL."""
    p_t, old_p_t = logp_t.detach().exp(), old_t.exp()
    other_t = ((1 - old_p_t).clamp(min=1e-8) / (1 - p_t).clamp(min=1e-8)).log()
    kl_t = old_p_t * (old_t - logp_t.detach()) + (1 - old_p_t) * other_t
    out_t = torch.where(advantages_t > 0, (kl_t > clip_high) & (p_t > old_p_t), (kl_t > clip_low) & (p_t < old_p_t))
    return _without(out_t, logp_t, old_t, advantages_t, cap)


def _without(out_t: Tensor, logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, cap: float) -> Loss:
    ratio_t = log_ratio(logp_t, old_t).detach().exp()
    slope_t = 1 + logp_t - logp_t.detach()  # 1, with the gradient of logp
    loss_t = torch.where(out_t, 0.0, -ratio_t.clamp(max=cap) * advantages_t * slope_t)
    return loss_t, {"pg_clipfrac": out_t, "pg_clipfrac_lower": (ratio_t > cap) & ~out_t}


def gspo(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, sequence_t: Tensor, *, clip_low: float, clip_high: float) -> Loss:
    """PPO's clip on s = exp(mean of logp − old over the sequence). GSPO (Zheng et al. 2025), its token form:

    every token holds sg(s)·exp(logp − sg(logp)), whose value is s and whose gradient is s·∇logp, so that advantages may
    differ within a sequence. Means move little: the paper's bounds are 3e-4 and 4e-4. It averages over a sequence, then over
    sequences: loss_agg="seq-mean-token-mean".
    """
    mean_t = sequence_mean(log_ratio(logp_t.detach(), old_t), sequence_t)
    own_t = mean_t + logp_t - logp_t.detach()
    return clipped_ppo(own_t, torch.zeros_like(own_t), advantages_t, clip_low=clip_low, clip_high=clip_high)


def gmpo(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, sequence_t: Tensor, *, clip_low: float, clip_high: float) -> Loss:
    """−A·(geometric mean of the ratios, each clipped in A's direction). GMPO (Zhao et al. 2025); its bounds are ±0.4.

    clip_low and clip_high bound the log-ratio of a token. Every token holds its sequence's loss; A is the sequence's mean.
    Aggregated as GSPO. pg_clipfrac: tokens whose log-ratio was clipped: they have no gradient.
    """
    unclipped_t = log_ratio(logp_t, old_t)
    clipped_t = unclipped_t.clamp(-clip_low, clip_high)
    mean_advantage_t = sequence_mean(advantages_t, sequence_t)
    was_clipped_t = torch.where(advantages_t > 0, clipped_t < unclipped_t, clipped_t > unclipped_t) & (advantages_t != 0)
    ratio_t = sequence_mean(torch.where(was_clipped_t, clipped_t, unclipped_t), sequence_t).exp()
    return -mean_advantage_t * ratio_t, {"pg_clipfrac": was_clipped_t}


def _of_tokens(loss: Callable[..., Loss], **bounds: float | None) -> PolicyLoss:
    """Makes a loss whose tokens stand alone take, and ignore, the sequence of each."""
    return lambda logp_t, old_t, advantages_t, _: loss(logp_t, old_t, advantages_t, **bounds)


def _clips(spec: AlgorithmSpec) -> dict[str, Any]:
    return {"clip_low": spec.setting("clip_ratio"), "clip_high": spec.setting("clip_ratio_high")}


# the recipe -> its loss, with its settings
POLICY_LOSSES: dict[str, Callable[[AlgorithmSpec], PolicyLoss]] = {
    "ppo": lambda s: _of_tokens(clipped_ppo, **_clips(s), dual=s.clip_ratio_c),
    "gspo": lambda s: partial(gspo, **_clips(s)),
    "gmpo": lambda s: partial(gmpo, **_clips(s)),
    "cispo": lambda s: _of_tokens(cispo, clip_high=s.setting("clip_ratio_high")),
    "dppo_tv": lambda s: _of_tokens(dppo_tv, **_clips(s), cap=s.setting("clip_ratio_c")),
    "dppo_kl": lambda s: _of_tokens(dppo_kl, **_clips(s), cap=s.setting("clip_ratio_c")),
    "sapo": lambda s: _of_tokens(sapo, tau_positive=s.sapo_tau_positive, tau_negative=s.sapo_tau_negative),
    "pg": lambda s: lambda logp_t, _, advantages_t, __: policy_gradient(logp_t, advantages_t),
}
POLICY_LOSSES |= dict.fromkeys(PREFERENCE_LOSSES, POLICY_LOSSES["pg"])  # with the slopes of preferences.py as advantages


@cache
def policy_loss(spec: AlgorithmSpec) -> PolicyLoss:
    """The recipe's loss. Raises ConfigError where a user's can't be loaded, or (when called) gives no loss per token."""
    if spec.policy_loss in POLICY_LOSSES:
        return POLICY_LOSSES[spec.policy_loss](spec)
    function = load_callable(spec.policy_loss, "algorithm.policy_loss")

    def checked(logp_t: Tensor, old_t: Tensor, advantages_t: Tensor, sequence_t: Tensor) -> Loss:
        if not len(logp_t):  # a rank's dummy pack: not every function can do without a token
            _, figures = checked(*(column_t.new_zeros(1) for column_t in (logp_t, old_t, advantages_t, sequence_t)))
            return logp_t, {name: values_t[:0] for name, values_t in figures.items()}
        found = function(logp_t, old_t, advantages_t, sequence_t)
        if not (isinstance(found, tuple) and len(found) == 2 and getattr(found[0], "shape", None) == logp_t.shape):
            raise ConfigError(
                f"algorithm.policy_loss={spec.policy_loss!r} did not return (loss_t, figures) with one loss for each of "
                f"{len(logp_t)} tokens: it could not be weighed or aggregated; return a tensor of shape "
                f"{tuple(logp_t.shape)} and a dict, which may be empty"
            )
        return found

    return checked


# ---------------------------------------------------------------------------------------- the critic's


def clipped_value_loss(values_t: Tensor, old_t: Tensor, returns_t: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """½·max((V − R)², (V_clip − R)²), V_clip = old + clamp(V − old, ±clip); and where the clipped one is larger, bool.

    PPO's reference implementation (OpenAI baselines, ppo2) and verl. values_t: with gradient. old_t: values at the start of
    the update. returns_t: what they should be. A value that has moved towards its return by more than `clip` has no gradient.
    clip None: ½(V − R)².
    """
    unclipped_t = (values_t - returns_t).square()
    if clip is None:
        return 0.5 * unclipped_t, torch.zeros_like(unclipped_t, dtype=torch.bool)
    clipped_t = (old_t + (values_t - old_t).clamp(-clip, clip) - returns_t).square()
    return 0.5 * torch.maximum(unclipped_t, clipped_t), clipped_t > unclipped_t


def explained_variance(values_n: Tensor, returns_n: Tensor) -> float | None:
    """1 − Var(R − V) / Var(R): 1 is perfect, 0 what a constant does, below 0 is worse. None where returns don't vary."""
    if len(returns_n) < 2:
        return None
    variance = float(returns_n.double().var())
    return 1.0 - float((returns_n - values_n).double().var()) / variance if variance > 0 else None
