"""What the algorithm's part of a recipe refuses: value, consequence, fix; and that names compose freely otherwise."""

import itertools
from typing import Any, get_args

import msgspec
import pytest

from asyncrl.config import (
    ESTIMATOR_NAMES,
    LOSS_DEFAULTS,
    LOSS_NAMES,
    PREFERENCE_LOSSES,
    SETTINGS,
    UNGROUPED,
    AggregationName,
    AlgorithmSpec,
    CorrectionName,
    MaskName,
)
from asyncrl.config.load import override
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
        (
            {"clip_ratio": 0.2, "policy_loss": "cispo"},
            r"clip_ratio=0\.2 with policy_loss='cispo': it would be ignored; use 'ppo' or 'gspo' or .*, or leave it out",
        ),
        ({"clip_ratio": 0.1, "policy_loss": "pg"}, r"clip_ratio=0\.1 with policy_loss='pg': it would be ignored"),
        ({"clip_ratio_high": 0.3, "policy_loss": "sapo"}, r"clip_ratio_high=0\.3 with policy_loss='sapo'"),
        ({"clip_ratio": 0.1, "policy_loss": "own.py:loss"}, r"clip_ratio=0\.1 with policy_loss='own\.py:loss'"),
        ({"tis_cap": 3.0}, r"tis_cap=3\.0 with correction='decoupled': it would be ignored; use 'tis' or 'tis_sequence'"),
        (
            {"behaviour_cap": 2.0, "correction": "none"},
            r"behaviour_cap=2\.0 with correction='none': .* or leave it out \(its default is 5\.0\)",
        ),
        ({"behaviour_cap": 2.0, "policy_loss": "dpo"}, r"behaviour_cap=2\.0 with policy_loss='dpo'"),
        ({"icepop_bounds": (0.4, 5.0)}, r"icepop_bounds=\(0\.4, 5\.0\) with masks=\(\): it would be ignored; use 'icepop'"),
        ({"m2po_bound": 0.1, "masks": ("icepop",)}, r"m2po_bound=0\.1 with masks=\('icepop',\)"),
        ({"kl_target": 0.2, "kl_coef": 0.1}, r"kl_target=0\.2 with kl_control='fixed': it would be ignored; use 'adaptive'"),
        ({"kl_estimator": "k2"}, r"kl_estimator='k2' with kl_coef=0"),
        ({"behaviour_cap": 0.0}, r"behaviour_cap=0\.0 <= 0"),
        ({"tis_cap": -1.0}, r"tis_cap=-1\.0 <= 0"),
        ({"sapo_tau_negative": 0.0}, r"sapo_tau_negative=0\.0 <= 0"),
        ({"kl_coef": -0.1}, r"kl_coef=-0\.1 < 0: the policy would be driven from the reference"),
        ({"adv_estimator": "gae", "gamma": 1.1}, r"gamma=1\.1 is outside \[0, 1\]"),
        ({"adv_estimator": "gae", "lam": -0.1}, r"lam=-0\.1 is outside \[0, 1\]"),
        ({"gamma": 0.9}, r"gamma=0\.9 with adv_estimator='grpo': it would be ignored; use 'gae' or 'reinforce_plus_plus', or"),
        ({"bootstrap_truncated": True}, r"bootstrap_truncated=True with adv_estimator='grpo': it would be ignored; use 'gae'"),
        *(
            (
                {"normalize_weights": True, "correction": name},
                f"normalize_weights=True with correction='{name}': .* use 'decoupled'",
            )
            for name in ("none", "decoupled_loglinear")
        ),
        ({"policy_loss": "dpo", "normalize_weights": True}, r"normalize_weights=True with policy_loss='dpo'"),
        (
            {"adv_estimator": "grpo_passk", "clip_ratio_c": 3.0},
            r"clip_ratio_c=3\.0 with adv_estimator='grpo_passk': none of its",
        ),
        ({"adv_estimator": "grpo_passk", "masks": ("off_policy_sequence",)}, r"masks=\('off_policy_sequence',\) with adv_est"),
        ({"kpop_bound": 1.0}, r"kpop_bound=1\.0 with masks=\(\): it would be ignored; use 'kpop', or leave it out"),
        (
            {"icepop_sequence_bounds": (0.1, 2.0), "masks": ("icepop",)},
            r"masks=\('icepop',\): .* use 'icepop_sequence', or",
        ),
        ({"off_policy_sequence_bound": 1.0}, r"with masks=\(\): it would be ignored; use 'off_policy_sequence', or"),
        ({"off_policy_sequence_bound": 0.0}, r"off_policy_sequence_bound=0\.0 <= 0: the policy's own"),
        ({"kpop_bound": 0.0}, r"kpop_bound=0\.0 <= 0: every token would be masked"),
        ({"icepop_sequence_bounds": (1.5, 2.0)}, r"icepop_sequence_bounds=\(1\.5, 2\.0\) must enclose"),
        (
            {"kl_estimator": "k3_unbiased", "kl_in": "reward", "kl_coef": 0.1},
            r"kl_estimator='k3_unbiased' with kl_in='reward': .* use 'k1' or 'k3', or kl_in='loss'",
        ),
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
        ({"adv_estimator": "gae", "bootstrap_truncated": True, "gamma": 0.0}, r"bootstrap_truncated=true with gamma=0"),
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
        ((), get_args(MaskName)),
        get_args(AggregationName),
    ):
        if estimator == "grpo_passk" and "off_policy_sequence" in mask:
            continue
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


def test_what_the_user_sets_wins_over_the_losss_own() -> None:
    """Also where it is what another loss has: 0.2 and token-mean are ppo's."""
    assert AlgorithmSpec(policy_loss="gspo").resolved == AlgorithmSpec(
        policy_loss="gspo", clip_ratio=3e-4, clip_ratio_high=4e-4, loss_agg="seq-mean-token-mean", kl_estimator="k3"
    )
    mine = AlgorithmSpec(policy_loss="gspo", clip_ratio=0.2, clip_ratio_high=0.2, loss_agg="token-mean").resolved
    assert (mine.clip_ratio, mine.clip_ratio_high, mine.loss_agg) == (0.2, 0.2, "token-mean")
    assert AlgorithmSpec(policy_loss="gspo", clip_ratio=0.1).setting("clip_ratio_high") == 0.1  # one for both sides
    assert AlgorithmSpec(policy_loss="gspo", clip_ratio_high=0.1).setting("clip_ratio") == 3e-4
    assert AlgorithmSpec(clip_ratio_high=0.0).setting("clip_ratio_high") == 0.0


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({}, {"clip_ratio": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": None, "loss_agg": "token-mean"}),
        ({"policy_loss": "gmpo"}, {"clip_ratio": 0.4, "clip_ratio_high": 0.4, "loss_agg": "seq-mean-token-mean"}),
        ({"policy_loss": "cispo"}, {"clip_ratio": None, "clip_ratio_high": 4.0, "loss_agg": "token-mean"}),
        ({"policy_loss": "dppo_tv"}, {"clip_ratio": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0}),
        ({"policy_loss": "dppo_kl"}, {"clip_ratio": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}),
        ({"policy_loss": "sapo"}, {"clip_ratio": None, "loss_agg": "seq-mean-token-mean"}),
        ({"policy_loss": "mine.py:loss"}, {"clip_ratio": None, "clip_ratio_high": None, "loss_agg": "token-mean"}),
        ({"kl_coef": 0.1}, {"kl_estimator": "k3"}),
        ({"kl_coef": 0.1, "kl_in": "reward"}, {"kl_estimator": "k1"}),
        ({"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k3"}, {"kl_estimator": "k3"}),
    ],
)
def test_naming_a_loss_gives_its_papers_settings(fields: dict[str, Any], values: dict[str, Any]) -> None:
    resolved = AlgorithmSpec(**fields).resolved
    assert {name: getattr(resolved, name) for name in values} == values
    assert resolved.resolved == resolved


def test_a_loss_named_on_the_command_line_has_its_own_settings_too() -> None:
    """The recipe's null stays null until the run: it is not ppo's value by then."""
    assert override(AlgorithmSpec(), ["policy_loss=gmpo"]).resolved.clip_ratio == 0.4
    assert override(AlgorithmSpec(clip_ratio=0.2), ["policy_loss=gmpo"]).resolved.clip_ratio == 0.2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"policy_loss": "gspo"},
        {"policy_loss": "dppo_kl", "clip_ratio": 0.1},
        {"clip_ratio": 0.1, "clip_ratio_high": 0.3, "loss_agg": "seq-mean-token-sum-norm", "loss_scale_factor": 8},
        {"kl_coef": 0.1, "kl_in": "reward"},
    ],
)
def test_what_is_written_out_of_nulls_can_be_taken_back(fields: dict[str, Any]) -> None:
    resolved = AlgorithmSpec(**fields).resolved
    assert resolved.unresolved == AlgorithmSpec(**fields)
    assert resolved.unresolved.resolved == resolved


def test_every_built_in_choice_that_has_settings_is_named_as_it_is_elsewhere() -> None:
    names = {"adv_estimator": ESTIMATOR_NAMES, "policy_loss": LOSS_NAMES, "correction": get_args(CorrectionName)}
    names |= {"masks": get_args(MaskName), "loss_agg": get_args(AggregationName), "kl_control": ("fixed", "adaptive")}
    assert set(SETTINGS) == set(names)
    for choice, reads in SETTINGS.items():
        assert set(reads) <= set(names[choice])
        assert set(" ".join(reads.values()).split()) <= set(AlgorithmSpec.__struct_fields__)
    assert set(LOSS_DEFAULTS) <= set(LOSS_NAMES)
    assert set(UNGROUPED) < set(ESTIMATOR_NAMES)
