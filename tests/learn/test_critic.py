"""Whole updates with a critic: against plain float64 steps, and invariant to everything that must not matter."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from asyncrl.algorithms.advantages import whitened
from asyncrl.errors import CheckpointError, ConfigError, NonFinite
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.rundir import RunDir
from asyncrl.types import TrainRollout, Version

TEMPERATURE = 0.8  # as in make_trainer
GAE = {"adv_estimator": "gae", "gamma": 0.9, "lam": 0.7}
PRICED = {**GAE, "bootstrap_truncated": True, "kl_coef": 0.2, "kl_in": "reward", "kl_estimator": "k1"}
CRITICS = {
    "own": {"ppo_epochs": 2, "value_clip": 0.05},
    "shared": {"backbone": "shared", "value_coef": 0.5, "value_clip": 0.05},
}


def weights(trainer) -> list[torch.Tensor]:
    modules = (trainer.model, trainer.trained["critic"].module)
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def some_cut(rollouts: list[TrainRollout]) -> list[TrainRollout]:
    return [replace(r, finish_reason="length" if r.rollout == 1 else "stop") for r in rollouts]


def policy_weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------- against plain float64 steps


def plain_columns(model, r: TrainRollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states before each response token, and after the last one, of one sequence."""
    ids = torch.tensor(np.concatenate((r.prompt_ids, r.response_ids)))[None]
    output = model(input_ids=ids, output_hidden_states=True)
    return output.logits[0, len(r.prompt_ids) - 1 :], output.hidden_states[-1][0, len(r.prompt_ids) - 1 :]


def plain_targets(values: list[torch.Tensor], rollouts, masks, gamma: float, lam: float) -> list[list[tuple[float, float]]]:
    """(advantage, return) of each trained token: the textbook recursion, backwards over each rollout's trained tokens.

    values: before each token, and after the last, which counts where the rollout was cut.
    """
    found = []
    for value_t, r, mask in zip(values, rollouts, masks, strict=True):
        trained = value_t.detach()[:-1][mask].tolist()
        tokens, following, following_value = [], 0.0, value_t[-1].item() if r.finish_reason == "length" else 0.0
        for i in reversed(range(len(trained))):
            reward = r.reward if i == len(trained) - 1 else 0.0
            following = reward + gamma * following_value - trained[i] + gamma * lam * following
            following_value = trained[i]
            tokens.insert(0, (following, following + trained[i]))
        found.append(tokens)
    return found


def plain_policy_loss(logits: list[torch.Tensor], rollouts, masks, advantages: torch.Tensor) -> torch.Tensor:
    chosen = [
        (x[:-1] / TEMPERATURE).log_softmax(-1)[torch.arange(len(m)), torch.tensor(r.response_ids)][m]
        for x, r, m in zip(logits, rollouts, masks, strict=True)
    ]
    logp = torch.cat(chosen)
    behaviour = torch.cat([torch.tensor(r.logprobs).double()[m] for r, m in zip(rollouts, masks, strict=True)])
    weight = (logp.detach() - behaviour).exp().clamp(max=5.0)
    return (-weight * (logp - logp.detach()).exp() * advantages).mean()


@pytest.mark.parametrize("backbone", CRITICS)
@pytest.mark.parametrize("cut", [False, True])
def test_one_update_equals_plain_float64_steps(backbone: str, cut: bool, make_trainer, make_rollouts) -> None:
    rollouts = make_rollouts(oldest=-1)  # at committed = 2 the first token of every rollout lags by 3
    rollouts = some_cut(rollouts) if cut else rollouts
    masks = [torch.tensor(2 - r.updates <= 2) for r in rollouts]
    algorithm = {**GAE, "bootstrap_truncated": cut}
    made = {"learner": {"eps": 1e-3}, "algorithm": algorithm, "critic": {**CRITICS[backbone], "ppo_epochs": 1}}
    trainer, plain = make_trainer(**made), make_trainer(**made)
    metrics = trainer.update(rollouts, 2)

    policy, module = plain.model.double(), plain.trained["critic"].module.double()
    columns = [plain_columns(policy, r) for r in rollouts]
    if backbone == "own":
        values = [plain_columns(module, r)[0][:, 0] for r in rollouts]
    else:
        values = [module(hidden)[:, 0] for _, hidden in columns]
    targets = torch.tensor([t for tokens in plain_targets(values, rollouts, masks, 0.9, 0.7) for t in tokens]).double()
    before = torch.cat([v[:-1][m] for v, m in zip(values, masks, strict=True)])
    value_loss = 0.5 * (before - targets[:, 1]).square().mean()  # nothing has moved yet, so nothing is clipped
    policy_loss = plain_policy_loss([logits for logits, _ in columns], rollouts, masks, whitened(targets[:, 0]))
    (policy_loss + (value_loss if backbone == "own" else 0.5 * value_loss)).backward()
    norms = []
    for parameters in (list(policy.parameters()), list(module.parameters())):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, eps=1e-3)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()

    for a, b in zip(weights(trainer), weights(plain), strict=True):
        torch.testing.assert_close(a, b.float(), atol=3e-6, rtol=1e-4)
    assert metrics["actor/pg_loss"] == pytest.approx(policy_loss.item(), rel=1e-4, abs=1e-6)
    assert (metrics["actor/grad_norm"], metrics["critic/grad_norm"]) == pytest.approx(norms, rel=1e-4)
    assert metrics["critic/vf_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    assert metrics["critic/values_mean"] == pytest.approx(before.mean().item(), rel=1e-4)
    assert metrics["critic/returns_mean"] == pytest.approx(targets[:, 1].mean().item(), rel=1e-4)
    residual = (targets[:, 1] - before).var() / targets[:, 1].var()
    assert metrics["critic/vf_explained_var"] == pytest.approx(1 - residual.item(), rel=1e-3)
    assert metrics["critic/lr"] == 1e-2


# ------------------------------------------------------------------------------------------------- invariance


def step(make_trainer, make_model, rollouts, backbone: str, **learner) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Weights of policy and critic after two updates, the first of them of the critic alone; metrics of the second."""
    trainer = make_trainer(
        algorithm=PRICED,
        learner={"eps": 1e-3, "ppo_epochs": 2, **learner},
        reference=make_model(seed=3),
        critic={**CRITICS[backbone], "critic_warmup": 2},
    )
    trainer.update(rollouts, 1)
    metrics = trainer.update(rollouts, 2)
    return weights(trainer), metrics


def assert_same(first: tuple, second: tuple) -> None:
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-4)
    layout = ("timing_s/", "response_length/", "staleness/", "tokens/", "perf/", "samples")
    names = {name for name in first[1] if not name.startswith(layout)}
    assert {n: first[1][n] for n in names} == pytest.approx({n: second[1][n] for n in names}, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("backbone", CRITICS)
def test_the_size_of_a_pack_does_not_change_the_update(backbone: str, make_trainer, make_model, awkward) -> None:
    rollouts = some_cut(awkward)
    whole = step(make_trainer, make_model, rollouts, backbone, mini_batch_groups=2)
    assert_same(whole, step(make_trainer, make_model, rollouts, backbone, mini_batch_groups=2, max_tokens_per_pack=9))
    assert all(np.isfinite(value) for value in whole[1].values())
    assert whole[1]["critic/vf_clipfrac"] > 0
    assert whole[1]["actor/optimizer_steps"] == 4.0


@pytest.mark.parametrize("backbone", CRITICS)
def test_the_order_of_rows_does_not_change_the_update(backbone: str, make_trainer, make_model, awkward) -> None:
    rollouts = some_cut(awkward)
    permuted = [rollouts[i] for i in np.random.default_rng(0).permutation(len(rollouts))]
    assert_same(step(make_trainer, make_model, rollouts, backbone), step(make_trainer, make_model, permuted, backbone))


@pytest.mark.parametrize("backbone", CRITICS)
def test_masked_tokens_at_the_end_do_not_change_the_update(backbone: str, make_trainer, make_model, awkward, padded) -> None:
    """The reward falls due at the last trained token, whatever stands behind it."""
    assert_same(step(make_trainer, make_model, awkward, backbone), step(make_trainer, make_model, padded, backbone))


# ------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("backbone", CRITICS)
def test_in_warm_up_only_the_critic_moves(backbone: str, make_trainer, make_rollouts) -> None:
    trainer = make_trainer(algorithm=GAE, critic={**CRITICS[backbone], "critic_warmup": 2}, max_lag=9)
    policy, head = policy_weights(trainer), trainer.trained["critic"].module.state_dict()
    head = {name: tensor.clone() for name, tensor in head.items()}
    for committed in range(2):
        metrics = trainer.update(make_rollouts(seed=committed), committed)
        assert_equal(policy, policy_weights(trainer))
        assert trainer.trained["policy"].adamw.state == {}
        assert metrics["actor/optimizer_steps"] == 0.0
        assert metrics["critic/optimizer_steps"] >= 1.0
        assert all(math.isfinite(value) for value in metrics.values())
    assert any(not tensor.equal(head[name]) for name, tensor in trainer.trained["critic"].module.state_dict().items())
    assert trainer.update(make_rollouts(seed=2), 2)["actor/optimizer_steps"] == 1.0
    assert any(not a.equal(b) for a, b in zip(policy, policy_weights(trainer), strict=True))


def test_an_adaptive_kl_coefficient_rests_while_the_critic_learns_alone(make_trainer, make_model, make_rollouts) -> None:
    adaptive = {**PRICED, "kl_control": "adaptive", "kl_horizon": 100}
    critic = {**CRITICS["own"], "critic_warmup": 2}
    trainer = make_trainer(algorithm=adaptive, critic=critic, max_lag=9, model=make_model(), reference=make_model())
    for committed in range(2):
        trainer.update(make_rollouts(), committed)
        assert trainer.state["kl_coef"] == 0.2
    trainer.update(make_rollouts(), 2)
    assert trainer.state["kl_coef"] < 0.2  # the policy is still the reference: its KL is below the target


@pytest.mark.parametrize("backbone", CRITICS)
def test_values_learn_the_returns(backbone: str, make_trainer, make_rollouts) -> None:
    critic = {**CRITICS[backbone], "value_clip": None, "critic_warmup": 19 if backbone == "own" else 0}
    trainer = make_trainer(algorithm={"adv_estimator": "gae"}, critic=critic, learner={"lr": 1e-3}, max_lag=50)
    rollouts = make_rollouts()
    figures = [trainer.update(rollouts, committed) for committed in range(19)]
    losses = [figure["critic/vf_loss"] for figure in figures]
    assert losses[-1] < 0.5 * losses[0]
    assert figures[-1]["critic/vf_explained_var"] > figures[0]["critic/vf_explained_var"]
    assert figures[-1]["critic/returns_mean"] == pytest.approx(figures[0]["critic/returns_mean"])  # γ = λ = 1: the rewards


def test_a_critic_learns_from_groups_of_one(make_trainer, make_rollout) -> None:
    rollouts = [make_rollout(group, 0, reward=float(group % 2)) for group in range(4)]
    assert make_trainer(algorithm=GAE, critic={}).update(rollouts, 0)["actor/grad_norm"] > 0.1


def test_gae_and_a_critic_need_each_other(make_trainer) -> None:
    with pytest.raises(ConfigError, match=r"adv_estimator='gae' needs a critic"):
        make_trainer(algorithm=GAE)
    with pytest.raises(ConfigError, match=r"adv_estimator='grpo' has no use for a critic"):
        make_trainer(critic={})


@pytest.mark.parametrize("backbone", CRITICS)
def test_a_batch_without_trainable_tokens_changes_nothing(backbone: str, make_trainer, make_rollout) -> None:
    trainer = make_trainer(algorithm=GAE, critic=CRITICS[backbone])
    before = weights(trainer)
    metrics = trainer.update([make_rollout(0, 0, updates=(0, 0))], 9)
    assert_equal(before, weights(trainer))
    assert (metrics["critic/optimizer_steps"], metrics["critic/refused_steps"]) == (0.0, 0.0)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("backbone", CRITICS)
def test_a_non_finite_step_is_refused_and_its_batch_kept(backbone: str, make_trainer, make_rollout, tmp_path: Path) -> None:
    trainer = make_trainer(algorithm=GAE, critic={**CRITICS[backbone], "ppo_epochs": 1}, max_lag=9)
    trainer.update([make_rollout(1, i) for i in range(3)], 0)
    before = weights(trainer)
    bad = [make_rollout(0, 0, reward=math.nan), make_rollout(0, 1)]
    metrics = trainer.update(bad, 1)
    assert_equal(before, weights(trainer))
    assert metrics["actor/refused_steps"] == 1.0
    kept = sorted(str(path.relative_to(tmp_path / "refused")) for path in (tmp_path / "refused").rglob("*.npz"))
    assert metrics["critic/refused_steps"] == 1.0
    if backbone == "shared":  # one step of both
        assert kept == ["update_000002_refused_1.npz"]
        return
    assert kept == ["critic/update_000002_refused_1.npz", "update_000002_refused_1.npz"]
    trainer.update(bad, 2)
    with pytest.raises(NonFinite, match="critic: the loss is nan in update 4: 3 optimizer steps refused in a row"):
        trainer.update(bad, 3)


# ------------------------------------------------------------------------------------------------ checkpoints


def state(trainer) -> list[torch.Tensor]:
    optimizers = (trainer.trained["policy"].adamw, trainer.trained["critic"].adamw)
    moments = [value.clone() for optimizer in optimizers for entry in optimizer.state.values() for value in entry.values()]
    return [*weights(trainer), *moments]


@pytest.mark.parametrize("backbone", CRITICS)
def test_continuing_equals_never_having_stopped(backbone: str, make_trainer, make_model, make_rollouts, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    critic = {**CRITICS[backbone], "critic_warmup": 1, "lr_schedule": "cosine", "warmup_steps": 5}

    def trainer(seed: int):
        return make_trainer(algorithm=GAE, critic=critic, max_lag=9, model=make_model(seed=seed))

    whole, checkpoints = trainer(0), Checkpoints(run_dir, 2)
    for committed in range(4):
        if committed == 2:
            folder = checkpoints.save(whole, Version(1, 2))
            checkpoints.wait()
            saved = state(whole)
        metrics = whole.update(make_rollouts(seed=committed), committed)
    second = trainer(5)
    second.update(make_rollouts(), 1)
    assert checkpoints.restore(second) == 2
    assert_equal(saved, state(second))
    for committed in (2, 3):
        again = second.update(make_rollouts(seed=committed), committed)
    assert_equal(state(whole), state(second))
    assert again["critic/lr"] == metrics["critic/lr"] != 1e-2
    assert sorted(path.name for path in (folder / "critic").iterdir()) == ["model.safetensors"]
    assert (
        load_file(folder / "critic" / "model.safetensors")["weight" if backbone == "shared" else "lm_head.weight"].shape[0] == 1
    )
    assert AutoModelForCausalLM.from_pretrained(folder / "policy").lm_head.out_features == 16  # the policy is only the policy


def test_a_checkpoint_without_a_critic_is_refused_where_one_is_needed(make_trainer, tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunDir(tmp_path / "run").create(), 2)
    plain, critical = make_trainer(), make_trainer(algorithm=GAE, critic={})
    checkpoints.save(plain, Version(1, 0))
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"step_000000 holds no critic, but the recipe has one: .* start a new run"):
        checkpoints.restore(critical)
    checkpoints.save(critical, Version(1, 1))
    checkpoints.wait()
    assert checkpoints.restore(plain) == 1  # one that is not needed is left alone
    other = make_trainer(algorithm=GAE, critic=CRITICS["shared"])
    with pytest.raises(CheckpointError, match=r"tensors in .*critic do not belong to this critic"):
        checkpoints.restore(other)
