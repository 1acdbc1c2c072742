"""No setting is ignored: beside each choice of a recipe it changes what is learned, or the recipe is refused."""

from functools import cache
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from asyncrl.algorithms.advantages import advantages
from asyncrl.algorithms.corrections import Columns, m2po
from asyncrl.algorithms.objective import AGGREGATIONS, mean_weight, objective
from asyncrl.algorithms.preferences import preference_loss
from asyncrl.algorithms.rewards import Outcomes, RewardNormalizer
from asyncrl.config import (
    ESTIMATOR_NAMES,
    LOSS_NAMES,
    SETTINGS,
    AggregationName,
    AlgorithmSpec,
    CorrectionName,
    MaskName,
)
from asyncrl.errors import ConfigError
from asyncrl.learn.kl_control import KLControl

# A value of every field that no choice has by itself.
OTHERWISE: dict[str, Any] = {
    "adv_estimator": "rloo",
    "reward_normalization": "batch",
    "gamma": 0.7,
    "lam": 0.7,
    "bootstrap_truncated": True,
    "policy_loss": "sapo",
    "ratio_to": "behaviour",
    "correction": "tis_sequence",
    "normalize_weights": True,
    "masks": ("geometric",),
    "clip_ratio": 0.01,
    "clip_ratio_high": 0.02,
    "clip_ratio_c": 1.01,
    "sapo_tau_positive": 2.0,
    "sapo_tau_negative": 2.0,
    "behaviour_cap": 1.1,
    "tis_cap": 1.1,
    "icepop_bounds": (0.9, 1.1),
    "icepop_sequence_bounds": (0.9, 1.1),
    "geometric_bounds": (0.5, 1.5),
    "kpop_bound": 0.01,
    "off_policy_sequence_bound": 0.01,
    "m2po_bound": 0.1,
    "kl_coef": 0.3,
    "kl_estimator": "k2",
    "kl_in": "reward",
    "kl_control": "adaptive",
    "kl_target": 9.0,
    "kl_horizon": 10,
    "entropy_coef": 0.1,
    "loss_agg": "seq-mean-token-sum",
    "loss_scale_factor": 7,
    "preference_beta": 0.5,
    "dpo_pairs": "all",
    "kto_desirable_weight": 2.0,
    "kto_undesirable_weight": 2.0,
}
KL = {"kl_coef": 0.1}
CHOICES: list[dict[str, Any]] = [
    *({"adv_estimator": name} for name in ESTIMATOR_NAMES),
    *({"policy_loss": name} for name in LOSS_NAMES),
    *({"policy_loss": name, **KL} for name in ("ppo", "dpo", "kto")),
    {**KL, "kl_estimator": "k3_unbiased"},
    # Where one bound is said, clip_ratio does not stand in for it.
    *(
        {"policy_loss": name, "clip_ratio_high": 0.3}
        for name, read in SETTINGS["policy_loss"].items()
        if "clip_ratio_high" in read
    ),
    *({"correction": name} for name in get_args(CorrectionName)),
    *({"masks": (name,)} for name in get_args(MaskName)),
    {"ratio_to": "behaviour", "correction": "none"},
    *({"loss_agg": name} for name in get_args(AggregationName) if name != "seq-mean-token-sum-norm"),
    {"loss_agg": "seq-mean-token-sum-norm", "loss_scale_factor": 4},
    *({**KL, "kl_in": where, "kl_control": how} for where in ("loss", "reward") for how in ("fixed", "adaptive")),
]
S, N = 12, 60  # rollouts, in groups of four; five tokens each


@cache
def data() -> SimpleNamespace:
    """Rewards, and a policy that has moved about 0.4 a token since the proximal one, which is as far from behaviour."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float, size: int = N) -> Tensor:
        return scale * torch.randn(size, dtype=torch.float64, generator=generator)

    behaviour = -2 + draw(0.5)
    proximal = behaviour + draw(0.4)
    proximal[:10] = behaviour[:10] + torch.tensor([0.15, -0.15, 0.05, -0.05, 0.0] * 2)  # two sequences that every mask leaves
    return SimpleNamespace(
        behaviour=behaviour,
        proximal=proximal,
        logp=proximal + draw(0.4),
        reference=proximal + draw(0.6),
        entropy=draw(1.0).abs(),
        lag=torch.arange(N) % 3,
        sequence=torch.arange(N) // 5,
        outcomes=Outcomes(
            rewards_s=draw(1.0, S),
            groups_s=torch.arange(S) // 4,
            lengths_s=5 + torch.arange(S) % 3,
            sequence_n=torch.arange(N) // 5,
            token_rewards_n=draw(0.1),
            before_s=torch.zeros(S, dtype=torch.float64),
            ranked_s=draw(1.0, S),
            baselines_s=draw(1.0, S),
            values_n=draw(1.0),
        ),
        ends=draw(1.0, S),
    )


def learned(spec: AlgorithmSpec) -> Tensor:
    """All that a recipe makes of the data: loss and gradient of a minibatch, and the coefficient of the KL after it."""
    d, kl = data(), KLControl(spec)
    batch = SimpleNamespace(behaviour_n=d.behaviour)
    update: Any = SimpleNamespace(proximal_n=d.proximal, reference_n=d.reference, batch=batch)
    logp = d.logp.clone().requires_grad_()
    if spec.learns_preferences:
        h_s = spec.preference_beta * torch.zeros(S, dtype=torch.float64).index_add(0, d.sequence, logp - d.reference)
        loss = preference_loss(spec, d.outcomes, torch.arange(S), h_s)[0]
        advantages_n = torch.zeros(N, dtype=torch.float64)
    else:
        loss = 0.0
        outcomes = d.outcomes._replace(rewards_s=RewardNormalizer(spec.reward_normalization, {})(d.outcomes.rewards_s))
        if spec.kl_in == "reward":
            outcomes = outcomes._replace(token_rewards_n=outcomes.token_rewards_n + kl.penalty(update))
        advantages_n = advantages(spec, outcomes._replace(ends_s=d.ends if spec.bootstrap_truncated else None))[0]
    columns = Columns(
        coefficients_t=AGGREGATIONS[spec.setting("loss_agg")](spec, torch.full((S,), 5.0).double() + torch.arange(S))[
            d.sequence
        ],
        advantages_t=advantages_n,
        behaviour_t=d.behaviour,
        proximal_t=d.proximal,
        sequence_t=d.sequence,
        lag_t=d.lag,
        reference_t=d.reference if spec.kl_coef and spec.kl_in == "loss" else None,
        kept_t=m2po(d.proximal - d.behaviour, spec.m2po_bound) if "m2po" in spec.masks else None,
    )
    weight_mean = 1.0
    if spec.normalize_weights:
        weight_mean = mean_weight(spec, d.proximal, d.behaviour, d.sequence, torch.full((S,), 5.0))
    loss = loss + objective(spec, columns, logp, d.entropy, kl.coef, weight_mean)[0]
    (gradient,) = torch.autograd.grad(loss, logp)
    kl.control(update, S)
    return torch.cat((loss.detach()[None], gradient, torch.tensor([kl.coef])))


def test_every_field_has_another_value() -> None:
    assert set(OTHERWISE) == set(AlgorithmSpec.__struct_fields__)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_setting_is_read_or_refused(choice: dict[str, Any]) -> None:
    before = learned(AlgorithmSpec(**choice))
    names = {(field, *value) if isinstance(value, tuple) else (field, value) for field, value in choice.items()}
    read = " ".join(SETTINGS.get(field, {}).get(name, "") for field, name in names).split()
    for field, value in OTHERWISE.items():
        if choice.get(field) == value:
            continue
        try:
            spec = AlgorithmSpec(**{**choice, field: value})
        except ConfigError:
            assert field not in read
            continue
        assert not torch.equal(learned(spec), before), f"{field}={value!r} changes nothing with {choice}"
