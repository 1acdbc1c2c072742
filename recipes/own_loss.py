"""A policy loss of your own: the arithmetic recipe with a quadratic trust region in place of PPO's clip.

SPO (Simple Policy Optimization, Xie et al. 2024) takes r·A − |A|/(2ε)·(r − 1)², which is largest at r = 1 + ε·sign(A): a
token that went further is drawn back, where PPO's clip only lets go of it. Here r is the ratio to the policy that sampled,
so staleness counts as distance; no correction may then weigh it a second time.

    asyncrl run recipes/own_loss.py
"""

from typing import TYPE_CHECKING

import msgspec
from arithmetic import recipe as arithmetic

from asyncrl.config import AlgorithmSpec

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 0.2

recipe = msgspec.structs.replace(
    arithmetic,
    name="own_loss",
    algorithm=AlgorithmSpec(policy_loss="own_loss.py:my_loss", ratio_to="behaviour", correction="none"),
)


def my_loss(
    logp_t: "Tensor", old_t: "Tensor", advantages_t: "Tensor", sequence_t: "Tensor"
) -> tuple["Tensor", dict[str, "Tensor"]]:
    """Loss per token [T], and what to log as actor/outside: the share of tokens that are further than ε from r = 1."""
    ratio_t = (logp_t - old_t).clamp(max=20.0).exp()
    distance_t = ratio_t - 1
    loss_t = advantages_t.abs() / (2 * EPSILON) * distance_t**2 - ratio_t * advantages_t
    return loss_t, {"outside": distance_t.abs() > EPSILON}
