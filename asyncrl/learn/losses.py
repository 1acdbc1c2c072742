"""Policy losses token by token, before correction weights and aggregation. Flat layout [T]; pure.

logp_t: logprobs under the current policy, with gradient. old_t: under the policy that the ratio r = exp(logp − old) is
taken to, without gradient: the proximal one, or behaviour (`algorithm.ratio_to`). advantages_t: of each token.

Each returns the loss [T], differentiable in logp_t, and figures by name [T], logged as actor/<name>, their mean over tokens.
"""

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) is still finite in float32 after products; beyond it a token has no gradient

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


def log_ratio(logp_t: torch.Tensor, old_t: torch.Tensor) -> torch.Tensor:
    """logp − old, clamped to ±20."""
    return (logp_t - old_t).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_ppo(
    logp_t: torch.Tensor,
    old_t: torch.Tensor,
    advantages_t: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual: float | None = None,
) -> Loss:
    """max(−r·A, −clip(r, 1 − clip_low, 1 + clip_high)·A). PPO (Schulman et al. 2017).

    A larger `clip_high` than `clip_low` is DAPO's clip-higher (Yu et al. 2025). dual: c > 1 bounds the loss of a bad token
    at −c·A, however likely it became (dual clip, Ye et al. 2020); None: off. pg_clipfrac are the tokens whose clipped term
    is the larger one, pg_clipfrac_lower those that the dual clip holds: neither has a gradient.
    """
    ratio_t = log_ratio(logp_t, old_t).exp()
    free_t = -ratio_t * advantages_t
    held_t = -ratio_t.clamp(1 - clip_low, 1 + clip_high) * advantages_t
    loss_t, clipped_t = torch.maximum(free_t, held_t), held_t > free_t
    if dual is None:
        return loss_t, {"pg_clipfrac": clipped_t}
    bound_t = -dual * advantages_t
    lower_t = (advantages_t < 0) & (loss_t > bound_t)
    return torch.where(lower_t, bound_t, loss_t), {"pg_clipfrac": clipped_t, "pg_clipfrac_lower": lower_t}


def cispo(logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor, *, clip_high: float) -> Loss:
    """−sg(min(r, 1 + clip_high))·A·logp. CISPO (MiniMax-M1, 2025): clips the weight, so that no token loses its gradient.

    Only from above, as in the paper, whose lower bound is set where it never binds. pg_clipfrac: weights that were clipped.
    """
    ratio_t = log_ratio(logp_t, old_t).detach().exp()
    return -ratio_t.clamp(max=1 + clip_high) * advantages_t * logp_t, {"pg_clipfrac": ratio_t > 1 + clip_high}


def sapo(
    logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor, *, tau_positive: float, tau_negative: float
) -> Loss:
    """−(4/τ)·σ(τ·(r − 1))·A. SAPO (Gao et al. 2025): a smooth gate in place of the clip; its slope at r = 1 is 1.

    τ is tau_positive where A > 0, else tau_negative: a larger one fades bad tokens out sooner. Nothing is clipped.
    """
    tau_t = torch.full_like(advantages_t, tau_negative).masked_fill(advantages_t > 0, tau_positive)
    gate_t = (tau_t * (log_ratio(logp_t, old_t).exp() - 1)).sigmoid() * 4 / tau_t
    return -gate_t * advantages_t, {}


def policy_gradient(logp_t: torch.Tensor, advantages_t: torch.Tensor) -> Loss:
    """−A·logp. REINFORCE (Williams 1992). Takes no ratio: what behaviour was is for the correction's weights alone."""
    return -advantages_t * logp_t, {}


def dppo_tv(
    logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor, *, clip_low: float, clip_high: float
) -> Loss:
    """−r·A, but 0 where p − p_old already went further than the bound in A's direction. DPPO (Qi et al. 2026), binary TV.

    p = exp(logp). clip_high bounds p − p_old where A > 0, clip_low bounds p_old − p where A < 0: differences of
    probabilities, so that rare tokens may still move by a large ratio. pg_clipfrac: tokens left out so.
    """
    moved_t = (logp_t.exp() - old_t.exp()).detach()
    out_t = torch.where(advantages_t > 0, moved_t > clip_high, moved_t < -clip_low)
    return _without(out_t, logp_t, old_t, advantages_t)


def dppo_kl(
    logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor, *, clip_low: float, clip_high: float
) -> Loss:
    """As dppo_tv, with KL(p_old ‖ p) of "this token or another" as the distance, in nats. DPPO (Qi et al. 2026), binary KL."""
    p_t, old_p_t = logp_t.detach().exp(), old_t.exp()
    other_t = ((1 - old_p_t).clamp(min=1e-8) / (1 - p_t).clamp(min=1e-8)).log()
    kl_t = old_p_t * (old_t - logp_t.detach()) + (1 - old_p_t) * other_t
    out_t = torch.where(advantages_t > 0, (kl_t > clip_high) & (p_t > old_p_t), (kl_t > clip_low) & (p_t < old_p_t))
    return _without(out_t, logp_t, old_t, advantages_t)


def _without(out_t: torch.Tensor, logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor) -> Loss:
    loss_t = -log_ratio(logp_t, old_t).exp() * advantages_t
    return torch.where(out_t, 0.0, loss_t), {"pg_clipfrac": out_t}
