"""Whole updates: against a plain float64 step, and invariant to everything that must not matter."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from asyncrl.algorithms.advantages import grpo
from asyncrl.errors import ConfigError, NonFinite
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.rundir import RunDir
from asyncrl.types import Version

TEMPERATURE = 0.8  # as in make_trainer


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor], **tolerance: float) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **(tolerance or {"atol": 0, "rtol": 0}))


def plain_step(model, rollouts, committed: int, max_lag: int, aggregation: str, lr: float) -> tuple[float, float]:
    """One update as in a textbook: one sequence at a time, float64, no packs. Returns the loss and the gradient norm."""
    model = model.double()
    advantages = grpo(
        torch.tensor([r.reward for r in rollouts], dtype=torch.float64), torch.tensor([r.group for r in rollouts])
    )
    losses = []
    for r, advantage in zip(rollouts, advantages, strict=True):
        ids = torch.tensor(np.concatenate((r.prompt_ids, r.response_ids)))[None]
        logp = (model(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)
        start = len(r.prompt_ids)
        logp = logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
        weight = (logp.detach() - torch.tensor(r.logprobs).double()).exp().clamp(max=5.0)
        loss = -weight * (logp - logp.detach()).exp() * advantage
        mask = torch.tensor(r.loss_mask & (committed - r.updates <= max_lag))
        if mask.any():
            losses.append(loss[mask])
    total = {
        "token-mean": lambda: torch.cat(losses).mean(),
        "seq-mean-token-sum": lambda: torch.stack([x.sum() for x in losses]).mean(),
        "seq-mean-token-mean": lambda: torch.stack([x.mean() for x in losses]).mean(),
        "seq-mean-token-sum-norm": lambda: torch.stack([x.sum() / 6 for x in losses]).mean(),
    }[aggregation]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, eps=1e-3)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total.item(), norm.item()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_one_update_equals_a_plain_float64_step(aggregation: str, make_trainer, make_model, make_rollouts) -> None:
    rollouts = make_rollouts(oldest=-1)  # at committed = 2 the first token of every rollout lags by 3
    algorithm = {"loss_agg": aggregation, "loss_scale_factor": 6 if aggregation.endswith("norm") else None}
    trainer = make_trainer(learner={"weight_decay": 0.1, "eps": 1e-3}, algorithm=algorithm)
    metrics = trainer.update(rollouts, 2)
    model = make_model()
    loss, norm = plain_step(model, rollouts, 2, 2, aggregation, 1e-2)
    assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_same(weights(trainer), list(model.parameters()), atol=2e-6, rtol=1e-4)


def run(make_trainer, rollouts, committed: int = 1, **options) -> list[torch.Tensor]:
    trainer = make_trainer(**options)
    trainer.update(rollouts, committed)
    return weights(trainer)


SEVERAL_STEPS = {"mini_batch_groups": 2, "ppo_epochs": 2, "eps": 1e-3}


def test_the_same_update_gives_the_same_bits(make_trainer, make_rollouts) -> None:
    options = {"learner": SEVERAL_STEPS, "algorithm": {"entropy_coef": 0.01}}
    assert_same(run(make_trainer, make_rollouts(), **options), run(make_trainer, make_rollouts(), **options))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_packing_does_not_change_the_step(aggregation: str, make_trainer, make_rollouts) -> None:
    algorithm = {"loss_agg": aggregation, "entropy_coef": 0.01}
    whole = run(make_trainer, make_rollouts(), learner=SEVERAL_STEPS, algorithm=algorithm)
    small = run(make_trainer, make_rollouts(), learner={**SEVERAL_STEPS, "max_tokens_per_pack": 9}, algorithm=algorithm)
    assert_same(whole, small, atol=2e-6, rtol=1e-4)


def test_the_order_of_rollouts_does_not_change_the_step(make_trainer, make_rollouts) -> None:
    rollouts = make_rollouts()
    permuted = [rollouts[i] for i in np.random.default_rng(0).permutation(len(rollouts))]
    learner = {"eps": 1e-3}
    assert_same(
        run(make_trainer, rollouts, learner=learner), run(make_trainer, permuted, learner=learner), atol=2e-6, rtol=1e-4
    )


def test_a_single_step_and_recomputed_proximal_logprobs_agree(make_trainer, make_rollouts) -> None:
    """Skipping the extra pass changes nothing: the first of two epochs starts from exactly the same ratio, 1."""
    trainer = make_trainer(learner={"ppo_epochs": 2, "lr": 0.0})
    again = trainer.update(make_rollouts(), 1)
    once = make_trainer(learner={"lr": 0.0}).update(make_rollouts(), 1)
    assert again["actor/ppo_kl"] == once["actor/ppo_kl"] == 0.0
    assert again["actor/pg_loss"] == once["actor/pg_loss"]
    assert again["gap/k3"] == once["gap/k3"]
    assert (again["actor/optimizer_steps"], once["actor/optimizer_steps"]) == (2.0, 1.0)


def test_data_of_masked_tokens_is_never_used(make_trainer, make_rollouts) -> None:
    rollouts = make_rollouts(oldest=-5)  # the first token of each lags by 6 > 2

    def spoilt(rollout):
        return replace(rollout, logprobs=np.concatenate(([np.float32("nan")], rollout.logprobs[1:])))

    first, second = make_trainer(), make_trainer()
    metrics = first.update(rollouts, 1)
    second.update([spoilt(r) for r in rollouts], 1)
    assert_same(weights(first), weights(second))
    tokens = sum(len(r.response_ids) for r in rollouts)
    assert metrics["staleness/masked_share"] == pytest.approx(len(rollouts) / tokens)
    assert metrics["staleness/lag_max"] == 1.0


def test_a_batch_without_trainable_tokens_leaves_the_weights(make_trainer, make_rollout) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    metrics = trainer.update([make_rollout(0, 0, updates=(0, 0))], 9)
    assert_same(before, weights(trainer))
    assert metrics["staleness/masked_share"] == 1.0
    assert trainer.update([], 9)["actor/optimizer_steps"] == 0.0


def test_learning_raises_the_probability_of_rewarded_answers(make_trainer, make_rollout) -> None:
    good, bad = np.array([3, 7, 1]), np.array([9, 2, 4])
    rollouts = [
        make_rollout(0, i, prompt_ids=np.array([5, 6]), response_ids=good if i < 2 else bad, reward=float(i < 2))
        for i in range(4)
    ]
    trainer = make_trainer(max_lag=50)

    def gain() -> float:
        with torch.no_grad():
            logp = trainer.model(input_ids=torch.tensor([[5, 6, 3, 7, 1], [5, 6, 9, 2, 4]])).logits.log_softmax(-1)
        scored = [logp[i, torch.arange(1, 4), torch.tensor(ids)].sum() for i, ids in enumerate((good, bad))]
        return (scored[0] - scored[1]).item()

    before = gain()
    for committed in range(10):
        trainer.update(rollouts, committed)
    assert gain() > before + 1.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_pulls_back_to_the_reference(estimator: str, make_trainer, make_model, make_rollouts) -> None:
    """With equal rewards only the KL term has a gradient."""
    rollouts = [replace(r, reward=1.0) for r in make_rollouts()]
    trainer = make_trainer(
        algorithm={"kl_coef": 1.0, "kl_estimator": estimator},
        learner={"lr": 3e-3},
        model=make_model(seed=1),
        reference=make_model(seed=0),
        max_lag=50,
    )
    gaps = [abs(trainer.update(rollouts, committed)["actor/kl_loss"]) for committed in range(15)]
    assert gaps[-1] < 0.7 * gaps[0]


def test_half_precision_weights_are_warned_of_because_they_lose_small_steps(
    make_trainer, make_model, make_rollouts, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer()
    assert caplog.records == []
    trainer = make_trainer(model=make_model().bfloat16(), learner={"lr": 1e-6})
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "bfloat16 rounds away every optimizer step below 1/512 of a weight: learner.lr=1e-06 may train nothing" in warned
    before = torch.cat([weight.flatten() for weight in weights(trainer)])
    trainer.update(make_rollouts(), 1)
    after = torch.cat([weight.flatten() for weight in weights(trainer)])
    assert (before == after).float().mean() > 0.99


def test_a_reference_is_required_for_kl(make_trainer) -> None:
    with pytest.raises(ConfigError, match=r"kl_coef=0\.1 needs a reference"):
        make_trainer(algorithm={"kl_coef": 0.1})


# ------------------------------------------------------------------------------------------ non-finite guard


@pytest.mark.parametrize(
    ("field", "cause"), [({"logprobs": np.float32([-1, np.nan, -1])}, "behaviour logprob"), ({"reward": math.nan}, "loss")]
)
def test_a_non_finite_step_changes_nothing_and_keeps_its_batch(
    field: dict, cause: str, make_trainer, make_rollout, tmp_path: Path
) -> None:
    trainer = make_trainer(learner={"max_refused_steps": 3})
    trainer.update([make_rollout(1, i) for i in range(3)], 0)
    before, moments = weights(trainer), [state["exp_avg"].clone() for state in trainer.trained["policy"].adamw.state.values()]
    bad = [make_rollout(0, 0, **field), make_rollout(0, 1)]
    assert trainer.update(bad, 1)["actor/refused_steps"] == 1.0
    assert_same(before, weights(trainer))
    assert_same(moments, [state["exp_avg"] for state in trainer.trained["policy"].adamw.state.values()])
    (saved,) = (tmp_path / "refused").iterdir()
    with np.load(saved) as columns:  # allow_pickle stays off
        assert cause in str(columns["cause"])
        assert columns["groups"].tolist() == [0, 0]
        assert columns["behaviour"].shape == (6,)


def test_only_the_bad_minibatch_is_refused(make_trainer, make_rollout) -> None:
    trainer = make_trainer(learner={"mini_batch_groups": 1})
    bad = make_rollout(0, 0, logprobs=np.float32([np.inf] * 3))
    metrics = trainer.update([bad, *(make_rollout(1, i) for i in range(3))], 0)
    assert (metrics["actor/refused_steps"], metrics["actor/optimizer_steps"]) == (1.0, 1.0)
    assert all(math.isfinite(value) for value in metrics.values())


def test_too_many_refused_steps_in_a_row_stop_the_run(make_trainer, make_rollout) -> None:
    trainer = make_trainer(learner={"max_refused_steps": 2}, max_lag=9)
    bad, good = [make_rollout(0, 0, reward=math.nan), make_rollout(0, 1)], [make_rollout(0, i) for i in range(3)]
    trainer.update(bad, 0)
    trainer.update(good, 1)  # a good step in between: the count starts anew
    trainer.update(bad, 2)
    with pytest.raises(NonFinite, match="the loss is nan in update 4: 2 optimizer steps refused in a row"):
        trainer.update(bad, 3)


def test_the_estimator_sees_normalized_rewards_and_the_log_the_real_ones(make_trainer, make_rollouts) -> None:
    """`grpo_no_std` keeps the scale: advantages are those of rewards divided by the batch's standard deviation."""
    rollouts = make_rollouts()
    spread = statistics.stdev(r.reward for r in rollouts)
    plain, scaled = (
        make_trainer(algorithm={"adv_estimator": "grpo_no_std", "reward_normalization": kind}, learner={"lr": 0.0})
        for kind in ("none", "batch")
    )
    first, second = plain.update(rollouts, 1), scaled.update(rollouts, 1)
    assert second["actor/pg_loss"] == pytest.approx(first["actor/pg_loss"] / spread, rel=1e-5)
    assert second["reward/mean"] == first["reward/mean"] == pytest.approx(statistics.fmean(r.reward for r in rollouts))


def test_running_moments_survive_a_checkpoint_to_the_bit(make_trainer, make_rollouts, tmp_path) -> None:
    algorithm = {"adv_estimator": "rloo", "reward_normalization": "running"}
    going, resumed = make_trainer(algorithm=algorithm, max_lag=9), make_trainer(algorithm=algorithm, max_lag=9)
    going.update(make_rollouts(seed=1), 0)
    checkpoints = Checkpoints(RunDir(tmp_path / "run"), 1)
    checkpoints.save(going, Version(1, 1))
    checkpoints.wait()
    resumed.update(make_rollouts(seed=5), 0)  # what a restore must overwrite
    assert checkpoints.restore(resumed) == 1
    for trainer in (going, resumed):
        trainer.update(make_rollouts(seed=2), 1)
    assert resumed.state == going.state
    assert going.state["reward_count"] == 24
    for a, b in zip(going.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_packs_of_every_model_are_counted(backbone: str, make_trainer, make_model, make_rollouts) -> None:
    reference, calls = make_model(), []
    algorithm = {"adv_estimator": "gae", "kl_coef": 0.1}
    trainer = make_trainer(learner=SEVERAL_STEPS, algorithm=algorithm, reference=reference, critic={"backbone": backbone})
    own = [trainer.trained["critic"].module] if backbone == "own" else []
    for model in (trainer.model, reference, *own):
        model.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.update(make_rollouts(), 1)
    assert trainer.packs == len(calls) >= 8


def test_an_answer_is_scored_without_a_trace(make_trainer, make_rollouts) -> None:
    """By the same policy that an update starts from; and the update after it is the same to the bit."""
    rollouts, trainer, other = make_rollouts(), make_trainer(), make_trainer()
    one = rollouts[0]
    made = trainer.logprobs_of(one.prompt_ids.tolist(), one.response_ids.tolist())
    ids = torch.tensor(np.concatenate((one.prompt_ids, one.response_ids)))[None]
    logp = (other.model.double()(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)
    start = len(one.prompt_ids)
    expected = logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
    np.testing.assert_allclose(made, expected.tolist(), atol=1e-5)
    first, second = trainer.update(rollouts, 0), (fresh := make_trainer()).update(rollouts, 0)
    assert_same(weights(trainer), weights(fresh))
    assert first["actor/pg_loss"] == second["actor/pg_loss"]


def test_what_a_rank_holds_in_bytes(make_trainer, make_model) -> None:
    parameters = sum(parameter.numel() for parameter in make_model().parameters())
    held = make_trainer(reference=make_model(), algorithm={"kl_coef": 0.1}).holds()
    assert held == {
        "policy_bytes": 4.0 * parameters,
        "policy_moments_bytes": 8.0 * parameters,
        "parameters": parameters,
        "trained_parameters": parameters,
        "reference_bytes": 4.0 * parameters,
    }
