"""What other algorithms would have made of a batch, against plain autograd, a sequence at a time; what they leave alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import grpo, grpo_no_std
from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.learn.alternatives import audited_update, dot, length_shares
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.packed import PackedModel
from asyncrl.staleness import Staleness

TEMPERATURE, COMMITTED = 0.8, 2  # as in make_trainer
CLIP = 0.3
OTHERS = {
    "gspo": {"policy_loss": "gspo"},
    "gspo to behaviour": {
        "policy_loss": "gspo",
        "ratio_to": "behaviour",
        "correction": "none",
        "clip_ratio": CLIP,
        "clip_ratio_high": CLIP,
    },
    "icepop": {"masks": ("icepop",)},
    "no std": {"adv_estimator": "grpo_no_std", "correction": "none"},
}


def logprobs(model, rollout) -> torch.Tensor:
    """[T], with gradient: the model's on this rollout alone."""
    ids = torch.tensor(np.concatenate((rollout.prompt_ids, rollout.response_ids)))[None]
    logp = (model(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)
    start = len(rollout.prompt_ids)
    return logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]


@pytest.fixture
def batch(make_model, make_rollout):
    """Twelve rollouts of 1 to 6 tokens of lag 2, then 1, then 0, whose behaviour was the model's but for some noise."""
    model, generator = make_model(), np.random.default_rng(5)
    found = []
    for group in range(4):
        for index in range(3):
            length = 1 + (5 * group + 3 * index) % 6
            updates = sorted(generator.integers(0, COMMITTED + 1, length))
            r = make_rollout(group, index, updates=updates)
            with torch.no_grad():
                noise = 0.6 * generator.standard_normal(length)
                own = (logprobs(model, r).numpy() + noise).astype(np.float32)
            found.append(make_rollout(group, index, updates=updates, logprobs=np.minimum(own, -1e-3)))
    return found


def by_hand(model, rollouts, setting: str, lag: int | None = None) -> torch.Tensor:
    """The flat gradient of a setting's loss, or of the tokens of one lag in it, as a textbook has it."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    estimator = grpo_no_std if setting == "no std" else grpo
    advantages = estimator(rewards, torch.tensor([r.group for r in rollouts])).float()
    tokens = sum(len(r.response_ids) for r in rollouts)
    total = torch.zeros(())
    for r, advantage in zip(rollouts, advantages, strict=True):
        logp, behaviour = logprobs(model, r), torch.tensor(r.logprobs)
        chosen = torch.ones(len(logp)) if lag is None else torch.tensor(COMMITTED - r.updates == lag).float()
        ratio = (logp.detach() - behaviour).exp()
        weight = torch.ones_like(ratio) if setting == "no std" else ratio.clamp(max=5.0)
        if setting == "icepop":
            weight = weight * ((ratio >= 0.5) & (ratio <= 5.0))
        share = 1 / (len(rollouts) * len(logp)) if "gspo" in setting else 1 / tokens
        if setting == "gspo to behaviour":
            s = (logp - behaviour).mean().exp()
            loss = -torch.minimum(s * advantage, s.clamp(1 - CLIP, 1 + CLIP) * advantage) / len(rollouts)
            assert lag is None
        else:
            loss = -(share * chosen * weight * advantage * (logp - logp.detach()).exp()).sum()
        total = total + loss
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


@pytest.fixture
def make_others(tmp_path: Path):
    def make(own: PolicyTrainer, learner: LearnerSpec, settings: dict) -> dict[str, PolicyTrainer]:
        rule = Staleness(max_lag=2, batch_groups=4)
        made = {"total_steps": 20, "refused_dir": tmp_path}
        policy: PackedModel = own.actor.policy
        return {name: PolicyTrainer(policy, learner, AlgorithmSpec(**spec), rule, **made) for name, spec in settings.items()}

    return make


def test_gradients_and_their_angles_are_those_of_plain_autograd(batch, make_model, make_trainer, make_others) -> None:
    model, own = make_model(), make_trainer()
    others = make_others(own, LearnerSpec(batch_groups=4), OTHERS)
    metrics, found = audited_update(own, others, batch, COMMITTED)
    mine = by_hand(model, batch, "")
    close = {"rel": 1e-6}
    assert found[""]["gradient/cosine"] == pytest.approx(1, **close)
    assert found[""]["gradient/norm"] == pytest.approx(metrics["actor/grad_norm"], **close)
    cosines = {}
    for setting, figures in found.items():
        gradient = by_hand(model, batch, setting)
        cosines[setting] = cosine(gradient, mine)
        assert figures["gradient/norm"] == pytest.approx(math.sqrt(dot(gradient, gradient)), **close)
        assert figures["gradient/cosine"] == pytest.approx(cosines[setting], **close)
        if setting != "gspo to behaviour":
            parts = {lag: by_hand(model, batch, setting, lag) for lag in range(3)}
            for lag, part in parts.items():
                assert figures[f"gradient/norm_lag_{lag}"] == pytest.approx(math.sqrt(dot(part, part)), **close)
                assert figures[f"gradient/cosine_lag_{lag}"] == pytest.approx(cosine(part, mine), **close)
                assert figures[f"gradient/cosine_to_fresh_lag_{lag}"] == pytest.approx(cosine(part, parts[0]), **close)
    assert all(-1 < of < 0.999 for setting, of in cosines.items() if setting), f"settings that don't differ: {cosines}"

    with torch.no_grad():
        delta = torch.cat([logprobs(model, r) - torch.tensor(r.logprobs) for r in batch]).double()
    kept = (delta.exp() >= 0.5) & (delta.exp() <= 5)
    weights = delta.exp().clamp(max=5)
    assert 0 < kept.sum() < len(kept)
    for setting, chosen in (("", weights), ("icepop", weights * kept)):
        ess = float(chosen.sum() ** 2 / (len(chosen) * chosen.square().sum()))
        assert found[setting]["correction/ess"] == pytest.approx(ess, rel=1e-5)
    assert found["icepop"]["correction/masked_share"] == pytest.approx(1 - float(kept.double().mean()))
    assert found[""]["gap/k1"] == pytest.approx(-float(delta.mean()), abs=1e-6)
    assert found["icepop"]["gap/k3"] == pytest.approx(float((delta.exp() - 1 - delta)[kept].mean()), rel=1e-4)


def test_lags_of_a_loss_over_sequences_add_up_to_it(batch, make_model, make_trainer, make_others) -> None:
    """gmpo's tokens all hold their sequence's loss: what a token of one lag does can't be told by leaving out the others."""
    own = make_trainer()
    settings = {"gmpo": {"policy_loss": "gmpo", "ratio_to": "behaviour", "correction": "none", "entropy_coef": 0.1}}
    _, found = audited_update(own, make_others(own, LearnerSpec(batch_groups=4), settings), batch, COMMITTED)
    figures = found["gmpo"]
    lengths = {lag: figures[f"gradient/norm_lag_{lag}"] for lag in range(3)}
    projected = sum(lengths[lag] * figures[f"gradient/cosine_lag_{lag}"] for lag in range(3))
    assert projected == pytest.approx(figures["gradient/norm"] * figures["gradient/cosine"], rel=1e-5)
    assert sum(figures[f"gradient/weight_lag_{lag}"] for lag in range(3)) == pytest.approx(1)


SEVERAL = {"mini_batch_groups": 2, "ppo_epochs": 2}


@pytest.mark.parametrize("learner", [{}, SEVERAL])
@pytest.mark.parametrize("reference", [False, True])
def test_asking_changes_nothing_of_the_update(learner, reference, batch, make_model, make_trainer, make_others) -> None:
    algorithm = {"kl_coef": 0.05, "kl_control": "adaptive", "entropy_coef": 0.01} if reference else {"masks": ("m2po",)}
    options = {"learner": learner, "algorithm": algorithm}
    plain, asked = (make_trainer(**options, reference=make_model(seed=3) if reference else None) for _ in range(2))
    expected = plain.update(batch, COMMITTED)
    spec = LearnerSpec(batch_groups=4, **learner)
    metrics, found = audited_update(asked, make_others(asked, spec, OTHERS), batch, COMMITTED)
    same, before = ({n: v for n, v in of.items() if not n.startswith(("timing_s/", "perf/"))} for of in (metrics, expected))
    assert same == before
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), asked.model.parameters(), strict=True))
    assert plain.state == asked.state
    # Several steps: the mean over them, each at the weights that the run had there.
    assert found[""]["gradient/norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-6)


# ----------------------------------------------------------------------------------------------------- length


def test_lengths_that_share_the_weight() -> None:
    lengths, rollout_n = np.array([1, 2, 3, 6]), np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3])
    even = length_shares(lengths, rollout_n, np.ones(12))  # a mean over tokens
    assert [even[f"length/weight_q{q}"] for q in range(1, 5)] == [1 / 12, 2 / 12, 3 / 12, 6 / 12]
    alike = length_shares(lengths, rollout_n, 1 / lengths[rollout_n])  # a mean over sequences
    assert [alike[f"length/weight_q{q}"] for q in range(1, 5)] == pytest.approx([0.25] * 4)
    assert [alike[f"length/tokens_q{q}"] for q in range(1, 5)] == [1 / 12, 2 / 12, 3 / 12, 6 / 12]


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 10)), min_size=1, max_size=30), st.randoms())
def test_shares_add_up_and_do_not_depend_on_the_order(rollouts: list[tuple[int, float]], random) -> None:
    def shares(of: list[tuple[int, float]]) -> dict[str, float]:
        lengths = np.array([length for length, _ in of])
        return length_shares(lengths, np.repeat(np.arange(len(of)), lengths), np.repeat([weight for _, weight in of], lengths))

    found = shares(rollouts)
    assert sum(found[f"length/tokens_q{q}"] for q in range(1, 5)) == pytest.approx(1)
    random.shuffle(rollouts)
    assert shares(rollouts) == pytest.approx(found, nan_ok=True)
