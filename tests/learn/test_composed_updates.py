"""Whole optimizer steps of composed algorithms: nothing that is only layout may change them."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncrl.algorithms.kl import adapted
from asyncrl.learn.batch import make_batch, make_packs
from asyncrl.models.packed import PackedModel
from asyncrl.models.ranks import Ranks
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout

TEMPERATURE = 0.8  # as in make_trainer
# Bounds of each mask; behaviour here is random.
WIDE: dict[str, dict] = {
    "icepop": {"icepop_bounds": (0.1, 4.0)},
    "icepop_sequence": {"icepop_sequence_bounds": (0.2, 9.0)},
    "geometric": {"geometric_bounds": (0.3, 3.0)},
    "kpop": {"kpop_bound": 0.1},
    "off_policy_sequence": {"off_policy_sequence_bound": 0.2},
    "m2po": {"m2po_bound": 0.5},
}
KL = {"kl_coef": 0.2, "kl_in": "reward", "kl_estimator": "k1"}

ALGORITHMS: dict[str, dict] = {
    "dual clip": {"clip_ratio_c": 1.2, "clip_ratio_high": 0.28},
    "dr_grpo": {"adv_estimator": "dr_grpo", "loss_agg": "seq-mean-token-sum-norm", "loss_scale_factor": 6},
    "rloo": {"adv_estimator": "rloo", "correction": "decoupled_loglinear"},
    "opo": {"adv_estimator": "opo", "correction": "none", "loss_agg": "seq-mean-token-sum"},
    "gspo": {"policy_loss": "gspo", "correction": "tis_sequence", "loss_agg": "seq-mean-token-mean"},
    "gmpo": {"policy_loss": "gmpo", "correction": "none", "ratio_to": "behaviour", "loss_agg": "seq-mean-token-mean"},
    "cispo": {"policy_loss": "cispo", "correction": "tis", "masks": ("icepop",)},
    "dppo_tv": {"policy_loss": "dppo_tv", "correction": "none", "ratio_to": "behaviour"},
    "dppo_kl": {"policy_loss": "dppo_kl", "masks": ("geometric",)},
    "sapo": {"policy_loss": "sapo", "masks": ("m2po", "geometric"), "loss_agg": "seq-mean-token-mean"},
    "pg": {"policy_loss": "pg", "masks": ("m2po", "icepop"), "entropy_coef": 0.01},
    "kpop": {"masks": ("kpop",), "correction": "tis", "normalize_weights": True, "loss_agg": "token-sum"},
    "icepop_sequence": {"masks": ("icepop_sequence",), "correction": "tis_sequence", "normalize_weights": True},
    "deepseek": {"masks": ("off_policy_sequence",), "kl_coef": 0.2, "kl_estimator": "k3_unbiased", "kl_control": "adaptive"},
    "grpo_passk": {"adv_estimator": "grpo_passk"},
    "gpg": {"adv_estimator": "gpg", "policy_loss": "pg"},
    "discounted": {"adv_estimator": "reinforce_plus_plus", "gamma": 0.9},
    "reinforce_plus_plus": {"adv_estimator": "reinforce_plus_plus", **KL},
    "baseline form": {"adv_estimator": "reinforce_plus_plus_baseline", "kl_control": "adaptive", **KL},
    "remax": {"adv_estimator": "remax", **KL},
    "grpo, adaptive KL in the loss": {"kl_control": "adaptive", "kl_coef": 0.2},
    "running rewards": {"adv_estimator": "rloo", "reward_normalization": "running"},
    "dpo": {"policy_loss": "dpo"},
    "dpo, all pairs": {"policy_loss": "dpo", "dpo_pairs": "all", "entropy_coef": 0.01, "kl_coef": 0.2},
    "kto": {"policy_loss": "kto", "kto_undesirable_weight": 0.5, "loss_agg": "seq-mean-token-sum", "kl_coef": 0.2},
}


@pytest.fixture
def step(make_trainer, make_model) -> Callable[..., tuple[list[torch.Tensor], dict[str, float]]]:
    """Weights after two updates with the named algorithm, and the metrics of the second."""

    def run(name: str, rollouts: list[TrainRollout], **learner) -> tuple[list[torch.Tensor], dict[str, float]]:
        algorithm = dict(ALGORITHMS[name])
        for mask in algorithm.get("masks", ()):
            algorithm |= WIDE[mask]
        trainer = make_trainer(
            algorithm=algorithm,
            learner={"eps": 1e-3, "ppo_epochs": 2, **learner},
            reference=make_model(seed=3),
        )
        trainer.update(rollouts, 2)
        metrics = trainer.update(rollouts, 2)
        return [parameter.detach().clone() for parameter in trainer.model.parameters()], metrics

    return run


def assert_same(first: tuple, second: tuple) -> None:
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    layout = ("timing_s/", "response_length/", "staleness/", "tokens/", "perf/", "samples")
    names = {name for name in first[1] if not name.startswith(layout)}
    assert {name: first[1][name] for name in names} == pytest.approx({n: second[1][n] for n in names}, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_size_of_a_pack_does_not_change_the_step(name: str, step, awkward) -> None:
    whole = step(name, awkward, mini_batch_groups=2)
    assert_same(whole, step(name, awkward, mini_batch_groups=2, max_tokens_per_pack=9))
    assert all(np.isfinite(value) for value in whole[1].values())
    if ALGORITHMS[name].get("masks"):
        assert 0 < whole[1]["correction/masked_share"] < 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_neither_the_order_of_rows_nor_masked_tokens_at_their_ends_change_the_step(name: str, step, awkward, padded) -> None:
    whole = step(name, awkward)
    permuted = [awkward[i] for i in np.random.default_rng(0).permutation(len(awkward))]
    assert_same(whole, step(name, permuted))
    assert_same(whole, step(name, padded))


def in_segments(r: TrainRollout, *cuts: int) -> TrainRollout:
    """The same rollout, its tokens from each cut on in a segment of their own, behind all that stood before them."""

    def spread(column: np.ndarray | None, context: np.ndarray | None = None) -> np.ndarray | None:
        """context: what each segment begins with, so much of it as stands before."""
        if column is None:
            return None
        if context is None:
            context = np.zeros(len(r.prompt_ids) + len(column), dtype=column.dtype)
        parts = [
            (context[: len(r.prompt_ids) + start], column[start:end])
            for start, end in itertools.pairwise((0, *cuts, len(column)))
        ]
        return np.concatenate([piece for part in parts for piece in part][1:])  # the first one's prompt stands outside

    columns = {name: spread(getattr(r, name)) for name in ("loss_mask", "logprobs", "kept_logmass", "updates", "token_rewards")}
    ids = spread(r.response_ids, np.concatenate((r.prompt_ids, r.response_ids)))
    starts = itertools.accumulate((len(r.prompt_ids) + cut for cut in cuts[1:]), initial=cuts[0])
    return replace(r, response_ids=ids, segments=(0, *starts), **columns)


OF_SEQUENCES = ("gspo", "gmpo", "dppo_kl", "sapo", "icepop_sequence", "deepseek")  # a ratio or a mask is of a whole segment


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in OF_SEQUENCES])
def test_rollouts_cut_into_segments_make_the_same_step(name: str, step, awkward) -> None:
    """Advantages, aggregation and preferences are a rollout's, however many contexts it has."""
    rng = np.random.default_rng(0)
    cut = [
        in_segments(r, *sorted(rng.permutation(np.arange(1, len(r.response_ids)))[: rng.integers(1, 4)].tolist()))
        if len(r.response_ids) > 1
        else r
        for r in awkward
    ]
    assert sum(len(r.segments) for r in cut) > len(awkward) + 5
    assert_same(step(name, awkward), step(name, cut))


@st.composite
def cut_at_turns(draw: st.DrawFn) -> tuple[TrainRollout, TrainRollout]:
    """A rollout of several turns, and the same one cut at some of them, or all: where an answer begins, or what follows it."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=2, max_size=7))  # of answers and of what is read, in turn
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    mask, count = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths), sum(lengths)
    turns = np.cumsum(lengths)[:-1].tolist()
    whole = TrainRollout(
        group=0,
        rollout=0,
        attempt=0,
        data_source="test",
        prompt_ids=rng.integers(0, 16, 3),
        response_ids=rng.integers(0, 16, count),
        loss_mask=mask,
        logprobs=np.where(mask, rng.uniform(-4, -1, count), 0.0).astype(np.float32),
        kept_logmass=None,
        updates=rng.integers(0, 3, count),
        reward=1.0,
        parts={},
        finish_reason="stop",
    )
    return whole, in_segments(whole, *sorted(draw(st.sets(st.sampled_from(turns), min_size=1))))


@given(st.lists(cut_at_turns(), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_at_any_turn_loss_and_gradient_are_the_same(make_model, pairs: list[tuple[TrainRollout, TrainRollout]]) -> None:
    """Of a ratio for each token, which weighs as much as its number says: where it stands must not matter."""
    model = PackedModel(make_model(), TEMPERATURE)
    found = []
    for rollouts in zip(*pairs, strict=True):
        batch = make_batch(rollouts, Staleness(max_lag=2, batch_groups=1), 2)
        packs = make_packs(batch.sequences, range(len(batch.sequences)), 64, torch.device("cpu"), Ranks())
        model.model.zero_grad()
        ratios = [(model.logprobs(pack) - batch.behaviour_n[pack.flat_t]).exp() for pack in packs]
        loss = sum((ratio_t.square() * (pack.flat_t + 1.0)).sum() for ratio_t, pack in zip(ratios, packs, strict=True))
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in model.model.parameters()], batch))
    (loss, gradients, batch), (cut_loss, cut_gradients, cut_batch) = found
    torch.testing.assert_close(loss, cut_loss, rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    torch.testing.assert_close(gradients, cut_gradients, rtol=1e-4, atol=2e-5 * largest)
    assert torch.equal(batch.behaviour_n, cut_batch.behaviour_n)
    assert torch.equal(batch.rollouts_s[batch.sequence_n], cut_batch.rollouts_s[cut_batch.sequence_n])
    assert len(cut_batch.sequences) >= len(batch.sequences)


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_what_is_of_a_sequence_is_of_a_segment(name: str, step, make_rollout) -> None:
    """Segments of a rollout compare as rollouts of their own do, under the same advantages."""
    pair = [make_rollout(0, i, updates=(2,) * 4, reward=float(i)) for i in range(2)]
    cut = [in_segments(r, 2) for r in pair]
    _, metrics = step(name, cut)
    assert metrics["samples"] == 2
    assert metrics["response_length/mean"] == 4.0
    assert np.isfinite(metrics["actor/pg_loss"])


# ------------------------------------------------------------------------------------------ KL in the reward


def token_kl(model, reference, r: TrainRollout) -> torch.Tensor:
    """k1 of each response token, one sequence at a time, in float64."""
    ids = torch.tensor(np.concatenate((r.prompt_ids, r.response_ids)))[None]
    start = len(r.prompt_ids)
    logp, against = (
        (m.double()(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)[
            torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]
        ]
        for m in (model, reference)
    )
    return (logp - against).detach()


def test_kl_in_the_reward_equals_rewards_less_their_kl(make_trainer, make_model, make_rollouts) -> None:
    rollouts = make_rollouts()
    algorithm = {"adv_estimator": "rloo"}
    priced = make_trainer(algorithm={**algorithm, **KL}, learner={"eps": 1e-3}, reference=make_model(seed=3))
    metrics = priced.update(rollouts, 1)
    kls = [token_kl(make_model(), make_model(seed=3), r) for r in rollouts]
    lowered = [replace(r, reward=r.reward - 0.2 * float(kl.sum())) for r, kl in zip(rollouts, kls, strict=True)]
    plain = make_trainer(algorithm=algorithm, learner={"eps": 1e-3})
    plain.update(lowered, 1)
    for a, b in zip(priced.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.2
    assert "actor/kl_loss" not in metrics  # it is not in the loss a second time


def test_the_kl_is_charged_beside_what_tokens_earned(make_trainer, make_model, make_rollouts) -> None:
    """Both as token rewards: one number per token that holds them together trains the same."""
    rng = np.random.default_rng(0)
    earning = [replace(r, token_rewards=rng.normal(size=len(r.response_ids))) for r in make_rollouts()]
    algorithm = {"adv_estimator": "reinforce_plus_plus"}
    priced = make_trainer(algorithm={**algorithm, **KL}, learner={"eps": 1e-3}, reference=make_model(seed=3))
    metrics = priced.update(earning, 1)
    kls = [token_kl(make_model(), make_model(seed=3), r).numpy() for r in earning]
    together = [replace(r, token_rewards=r.token_rewards - 0.2 * kl) for r, kl in zip(earning, kls, strict=True)]
    plain = make_trainer(algorithm=algorithm, learner={"eps": 1e-3})
    plain.update(together, 1)
    for a, b in zip(priced.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    assert metrics["reward/token_sum"] == pytest.approx(np.mean([r.token_rewards.sum() for r in earning]))


def test_an_adaptive_coefficient_follows_the_kl(make_trainer, make_model, make_rollouts) -> None:
    algorithm = {"kl_coef": 0.2, "kl_control": "adaptive", "kl_target": 0.05, "kl_horizon": 100}
    trainer = make_trainer(algorithm=algorithm, reference=make_model(seed=3), max_lag=9)
    first, second = (trainer.update(make_rollouts(), committed) for committed in (0, 1))
    assert first["actor/kl_coef"] == 0.2
    expected = adapted(0.2, first["actor/kl_loss"], target=0.05, horizon=100, rollouts=12)
    assert second["actor/kl_coef"] == pytest.approx(expected)
    assert expected > 0.2  # the two models are far apart
    fixed = make_trainer(algorithm={"kl_coef": 0.2}, reference=make_model(seed=3))
    assert fixed.state == {}


def test_reinforce_plus_plus_learns_from_groups_of_one(make_trainer, make_rollout) -> None:
    rollouts = [make_rollout(group, 0, reward=float(group % 2)) for group in range(4)]
    trainer = make_trainer(algorithm={"adv_estimator": "reinforce_plus_plus"})
    assert trainer.update(rollouts, 0)["actor/grad_norm"] > 0.1
    assert make_trainer().update(rollouts, 0)["actor/grad_norm"] == 0.0  # grpo has nothing to compare with
