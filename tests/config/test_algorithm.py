"""What the algorithm's part of a recipe refuses: value, consequence, fix; and that names compose freely otherwise."""

import itertools
from typing import Any, get_args

import msgspec
import pytest

from asyncrl.config import (
    ESTIMATOR_NAMES,
    LOSS_NAMES,
    PREFERENCE_LOSSES,
    UNGROUPED,
    AggregationName,
    AlgorithmSpec,
    CorrectionName,
    MaskName,
)
from asyncrl.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adv_estimator": "reinforce++"}, r"adv_estimator='reinforce\+\+' is unknown; did you mean 'reinforce_plus_plus'\?"),
        ({"policy_loss": "ppp"}, r"policy_loss='ppp' is unknown; did you mean 'ppo'\? or name your own function: path"),
        ({"policy_loss": "xyz"}, r"policy_loss='xyz' is unknown; use one of ppo, gspo, "),
        *(
            ({"ratio_to": "behaviour", "correction": name}, f"correction='{name}' with ratio_to='behaviour': .* twice; use")
            for name in get_args(CorrectionName)
            if name != "none"
        ),
        ({"ratio_to": "behaviour", "correction": "none", "policy_loss": "pg"}, r"policy_loss='pg': it takes no ratio"),
        ({"masks": ("m2po", "icepop", "m2po")}, r"masks=\('m2po', 'icepop', 'm2po'\) names one twice"),
        ({"icepop_bounds": (5.0, 0.5)}, r"icepop_bounds=\(5\.0, 0\.5\) must enclose the ratio 1"),
        ({"geometric_bounds": (1.1, 1.2)}, r"geometric_bounds=\(1\.1, 1\.2\) must enclose"),
        ({"m2po_bound": 0.0}, r"m2po_bound=0\.0 <= 0: every token would be masked"),
        ({"clip_ratio": -0.1}, r"clip_ratio=-0\.1 < 0"),
        ({"clip_ratio_high": -0.1}, r"clip_ratio_high=-0\.1 < 0"),
        ({"clip_ratio_c": 1.0}, r"clip_ratio_c=1\.0 <= 1: .* use > 1, or null"),
        ({"clip_ratio_c": 3.0, "policy_loss": "gspo"}, r"clip_ratio_c=3\.0 with policy_loss='gspo': it would be ignored"),
        ({"behaviour_cap": 0.0}, r"behaviour_cap=0\.0 <= 0"),
        ({"tis_cap": -1.0}, r"tis_cap=-1\.0 <= 0"),
        ({"sapo_tau_negative": 0.0}, r"sapo_tau_negative=0\.0 <= 0"),
        ({"kl_coef": -0.1}, r"kl_coef=-0\.1 < 0: the policy would be driven from the reference"),
        ({"adv_estimator": "gae", "gamma": 1.1}, r"gamma=1\.1 is outside \[0, 1\]"),
        ({"adv_estimator": "gae", "lam": -0.1}, r"lam=-0\.1 is outside \[0, 1\]"),
        ({"lam": 0.95}, r"lam=0\.95 with adv_estimator='grpo': it would be ignored; use 'gae', or leave it out"),
        ({"kl_in": "reward"}, r"kl_in='reward' with kl_coef=0: .* set kl_coef > 0"),
        ({"kl_control": "adaptive"}, r"kl_control='adaptive' with kl_coef=0"),
        ({"kl_target": 0.0}, r"kl_target=0\.0 <= 0"),
        ({"kl_horizon": 0}, r"kl_horizon=0 < 1"),
        ({"loss_agg": "seq-mean-token-sum-norm"}, r"without loss_scale_factor: .* set it to sampling\.max_response_length"),
        ({"loss_scale_factor": 8}, r"loss_scale_factor=8 with loss_agg='token-mean': it would be ignored"),
        ({"loss_scale_factor": 0, "loss_agg": "seq-mean-token-sum-norm"}, r"loss_scale_factor=0 < 1"),
        ({"preference_beta": 0.0}, r"preference_beta=0\.0 <= 0: nothing would be learned"),
        ({"kto_undesirable_weight": -1.0}, r"kto_undesirable_weight=-1\.0 <= 0"),
        ({"dpo_pairs": "all"}, r"dpo_pairs='all' with policy_loss='ppo': it would be ignored; use 'dpo'"),
        ({"dpo_pairs": "all", "policy_loss": "kto"}, r"dpo_pairs='all' with policy_loss='kto'"),
        (
            {"policy_loss": "dpo", "adv_estimator": "rloo"},
            r"adv_estimator='rloo' with policy_loss='dpo': .* leave it out",
        ),
        ({"policy_loss": "dpo", "reward_normalization": "batch"}, r"reward_normalization='batch' with policy_loss='dpo'"),
        ({"policy_loss": "dpo", "correction": "tis"}, r"correction='tis' with policy_loss='dpo': .* leave it out"),
        ({"policy_loss": "kto", "masks": ("icepop",)}, r"masks=\('icepop',\) with policy_loss='kto'"),
        ({"policy_loss": "kto", "ratio_to": "behaviour", "correction": "none"}, r"ratio_to='behaviour' with policy_loss='kto'"),
        ({"policy_loss": "kto", "kl_in": "reward", "kl_coef": 0.1}, r"kl_in='reward' with policy_loss='kto'"),
        ({"policy_loss": "dpo", "loss_agg": "seq-mean-token-sum"}, r"loss_agg='seq-mean-token-sum' with policy_loss='dpo'"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlgorithmSpec(**fields)


def test_everything_else_composes() -> None:
    for estimator, loss, correction, mask, aggregation in itertools.product(
        ESTIMATOR_NAMES,
        [name for name in LOSS_NAMES if name not in PREFERENCE_LOSSES],
        get_args(CorrectionName),
        ((), *itertools.combinations(get_args(MaskName), 2)),
        get_args(AggregationName),
    ):
        AlgorithmSpec(
            adv_estimator=estimator,
            policy_loss=loss,
            correction=correction,
            masks=mask,
            loss_agg=aggregation,
            loss_scale_factor=64 if aggregation == "seq-mean-token-sum-norm" else None,
        )


def test_preferences_need_their_name_alone_and_compose_with_kl_and_entropy() -> None:
    for loss in PREFERENCE_LOSSES:
        spec = AlgorithmSpec(policy_loss=loss)
        assert spec.learns_preferences
        assert spec.needs_reference
        AlgorithmSpec(policy_loss=loss, correction="none", kl_coef=0.1, kl_control="adaptive", loss_agg="seq-mean-token-sum")
        AlgorithmSpec(policy_loss=loss, entropy_coef=0.01, loss_agg="seq-mean-token-mean")
    assert AlgorithmSpec(policy_loss="dpo", dpo_pairs="all").dpo_pairs == "all"
    assert AlgorithmSpec(kl_coef=0.1).needs_reference
    assert not AlgorithmSpec().needs_reference


def test_a_users_own_function_is_any_dotted_name() -> None:
    spec = AlgorithmSpec(adv_estimator="mine.py:centered", policy_loss="package.module.loss")
    assert (spec.adv_estimator, spec.policy_loss) == ("mine.py:centered", "package.module.loss")


def test_an_unknown_mask_or_correction_is_refused_at_the_door() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"Invalid enum value 'icepops' - at `\$.masks"):
        msgspec.convert({"masks": ["icepops"]}, AlgorithmSpec)
    with pytest.raises(msgspec.ValidationError, match=r"Invalid enum value 'decouple' - at `\$.correction"):
        msgspec.convert({"correction": "decouple"}, AlgorithmSpec)


def test_the_upper_bound_follows_the_lower_unless_said() -> None:
    assert AlgorithmSpec(clip_ratio=0.1).clip_high == 0.1
    assert AlgorithmSpec(clip_ratio=0.1, clip_ratio_high=0.0).clip_high == 0.0
    assert set(UNGROUPED) < set(ESTIMATOR_NAMES)
