"""Policy losses by name, with the recipe's bounds filled in.

The user's own is named in the recipe as `file.py:name`: `f(logp_t, old_t, advantages_t, sequence_t) -> (loss_t, figures)`,
as described in `losses`; figures may be {}. Weights, masks, KL, entropy and aggregation are added around it.
"""

from collections.abc import Callable
from functools import cache

import torch

from asyncrl.algorithm import PREFERENCE_LOSSES, AlgorithmSpec
from asyncrl.callables import load_callable
from asyncrl.errors import ConfigError
from asyncrl.learn.losses import Loss, cispo, clipped_ppo, dppo_kl, dppo_tv, policy_gradient, sapo
from asyncrl.learn.sequence_losses import gmpo, gspo

PolicyLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Loss]

POLICY_LOSSES: dict[str, Callable[[AlgorithmSpec], PolicyLoss]] = {
    "ppo": lambda spec: (
        lambda logp_t, old_t, advantages_t, _: clipped_ppo(
            logp_t, old_t, advantages_t, clip_low=spec.clip_ratio, clip_high=spec.clip_high, dual=spec.clip_ratio_c
        )
    ),
    "gspo": lambda spec: lambda *columns: gspo(*columns, clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "gmpo": lambda spec: lambda *columns: gmpo(*columns, clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "cispo": lambda spec: lambda *columns: cispo(*columns[:3], clip_high=spec.clip_high),
    "dppo_tv": lambda spec: lambda *columns: dppo_tv(*columns[:3], clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "dppo_kl": lambda spec: lambda *columns: dppo_kl(*columns[:3], clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "sapo": lambda spec: (
        lambda *columns: sapo(*columns[:3], tau_positive=spec.sapo_tau_positive, tau_negative=spec.sapo_tau_negative)
    ),
    "pg": lambda spec: lambda logp_t, _, advantages_t, __: policy_gradient(logp_t, advantages_t),
}
POLICY_LOSSES |= dict.fromkeys(PREFERENCE_LOSSES, POLICY_LOSSES["pg"])  # with the advantages of preference_step


@cache
def policy_loss(spec: AlgorithmSpec) -> PolicyLoss:
    """The recipe's loss. Raises ConfigError where a user's can't be loaded, or (when called) gives no loss per token."""
    if spec.policy_loss in POLICY_LOSSES:
        return POLICY_LOSSES[spec.policy_loss](spec)
    function = load_callable(spec.policy_loss, "algorithm.policy_loss")

    def checked(logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor, sequence_t: torch.Tensor) -> Loss:
        found = function(logp_t, old_t, advantages_t, sequence_t)
        if not (isinstance(found, tuple) and len(found) == 2 and getattr(found[0], "shape", None) == logp_t.shape):
            raise ConfigError(
                f"algorithm.policy_loss={spec.policy_loss!r} did not return (loss_t, figures) with one loss for each of "
                f"{len(logp_t)} tokens: it could not be weighed or aggregated; return a tensor of shape "
                f"{tuple(logp_t.shape)} and a dict, which may be empty"
            )
        return found

    return checked
