"""Online DPO and KTO in whole optimizer steps: against the direct loss on an unpacked model in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from asyncrl.algorithms.preferences import desirability, dpo, kto, rank_pairs
from asyncrl.errors import ConfigError
from asyncrl.types import TrainRollout

TEMPERATURE = 0.8  # as in make_trainer
BETA = 0.3


def logprobs(model, r: TrainRollout) -> torch.Tensor:
    """Of each response token [T], with gradient: one sequence at a time."""
    ids, start = torch.tensor(np.concatenate((r.prompt_ids, r.response_ids)))[None], len(r.prompt_ids)
    logp = (model(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)
    return logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]


def direct_step(model, reference, rollouts: Sequence[TrainRollout], optimizer, spec: dict) -> tuple[float, float]:
    """One optimizer step of the loss as it is written, all sequences in one graph. Returns the loss and the gradient norm.

    Tokens of lag > 2 at update 2, and those that the policy did not choose, are in neither logprob.
    """
    trained = [torch.tensor(r.loss_mask & (2 - r.updates <= 2)) for r in rollouts]
    kept = [i for i, mask in enumerate(trained) if mask.any()]
    policy, against = ([logprobs(m, rollouts[i])[trained[i]] for i in kept] for m in (model, reference))
    h_s = BETA * torch.stack([(p - a.detach()).sum() for p, a in zip(policy, against, strict=True)])
    earned = [r.reward + (0.0 if r.token_rewards is None else r.token_rewards.sum()) for r in rollouts]
    rewards, groups = torch.tensor(earned, dtype=torch.float64), torch.tensor([r.group for r in rollouts])
    if spec["policy_loss"] == "dpo":
        loss, _ = dpo(h_s, rank_pairs(rewards[kept], groups[kept], spec["dpo_pairs"]))
    else:
        loss, _ = kto(h_s, desirability(rewards, groups)[kept], desirable_weight=1.5, undesirable_weight=0.5)
    optimizer.zero_grad()
    total = loss
    if spec.get("kl_coef"):  # k3, mean over tokens
        delta = torch.cat(policy) - torch.cat(against).detach()
        total = loss + spec["kl_coef"] * (torch.expm1(-delta) + delta).mean()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item()


SPECS = {
    "dpo": {"policy_loss": "dpo", "dpo_pairs": "best_worst"},
    "dpo, all pairs": {"policy_loss": "dpo", "dpo_pairs": "all"},
    "dpo with a KL term": {"policy_loss": "dpo", "dpo_pairs": "best_worst", "kl_coef": 0.2},
    "kto": {"policy_loss": "kto", "kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.5},
}


@pytest.mark.parametrize("max_tokens", [16384, 9])
@pytest.mark.parametrize("name", SPECS)
def test_steps_equal_the_direct_loss_however_packed(name: str, max_tokens: int, make_trainer, make_model, awkward) -> None:
    """Two epochs over two minibatches: the first step reuses the proximal logprobs, the others score anew."""
    learner = {"eps": 1e-3, "ppo_epochs": 2, "mini_batch_groups": 2, "max_tokens_per_pack": max_tokens}
    trainer = make_trainer(
        learner=learner, algorithm={**SPECS[name], "preference_beta": BETA}, model=make_model(), reference=make_model(seed=3)
    )
    metrics = trainer.update(awkward, 2)
    model, reference = make_model().double(), make_model(seed=3).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    halves = [[r for r in awkward if r.group in half] for half in ((0, 1), (2, 3))]
    figures = [direct_step(model, reference, half, optimizer, SPECS[name]) for half in halves * 2]
    assert metrics["actor/pg_loss"] == pytest.approx(np.mean([loss for loss, _ in figures]), rel=1e-4)
    assert metrics["actor/grad_norm"] == pytest.approx(np.mean([norm for _, norm in figures]), rel=1e-4)
    assert metrics["actor/optimizer_steps"] == 4
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=2e-6, rtol=1e-4)


def test_figures_have_trls_names(make_trainer, make_model, make_rollout) -> None:
    """The policy is the reference, so all h are 0: ln 2 a pair, and KTO's value 1/2."""
    rollouts = [make_rollout(0, i, reward=float(i)) for i in range(3)] + [make_rollout(1, i, reward=1.0) for i in range(2)]
    found = {}
    for loss in ("dpo", "kto"):
        trainer = make_trainer(algorithm={"policy_loss": loss}, model=make_model(), reference=make_model())
        found[loss] = trainer.update(rollouts, 0)
        assert found[loss]["objective/kl"] == pytest.approx(0, abs=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert found[loss][name] == pytest.approx(0, abs=1e-5)
        assert "actor/kl_coef" not in found[loss]  # no KL term was asked for
        assert found[loss]["actor/grad_norm"] > 0.01
    assert found["dpo"]["actor/pg_loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert (found["dpo"]["preferences"], found["kto"]["preferences"]) == (1, 2)  # a pair; the rollouts of reward 2 and 0
    assert found["kto"]["actor/pg_loss"] == pytest.approx(0.5, rel=1e-4)
    assert "rewards/accuracies" in found["dpo"]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_equal_rewards_teach_nothing(loss: str, make_trainer, make_model, make_rollout) -> None:
    trainer = make_trainer(algorithm={"policy_loss": loss}, model=make_model(), reference=make_model(seed=3))
    metrics = trainer.update([make_rollout(0, i, reward=1.0) for i in range(3)], 0)
    assert (metrics["actor/pg_loss"], metrics["actor/grad_norm"]) == (0, 0)
    assert "rewards/margins" not in metrics


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("earned", [((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)), ((0.1, 0.2, -0.3), (-0.3, 0.2, 0.1))])
def test_token_rewards_that_come_to_the_same_are_a_tie(loss: str, earned, make_trainer, make_model, make_rollout) -> None:
    """Added up in the order of the tokens, these differ by rounding."""
    trainer = make_trainer(algorithm={"policy_loss": loss}, model=make_model(), reference=make_model(seed=3))
    rollouts = [make_rollout(0, i, response_ids=np.array([3, 7, 1 + i]), reward=0.0) for i in range(2)]
    rollouts = [replace(r, token_rewards=np.array(tokens)) for r, tokens in zip(rollouts, earned, strict=True)]
    assert trainer.update(rollouts, 0)["actor/grad_norm"] == 0


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_is_preferred_becomes_likelier(loss: str, make_trainer, make_model, make_rollout) -> None:
    good, bad = np.array([3, 7, 1]), np.array([9, 2, 4])
    rollouts = [
        make_rollout(0, i, prompt_ids=np.array([5, 6]), response_ids=good if i < 2 else bad, reward=float(i < 2))
        for i in range(4)
    ]
    trainer = make_trainer(algorithm={"policy_loss": loss}, model=make_model(), reference=make_model(), max_lag=50)
    margins = [trainer.update(rollouts, committed)["rewards/margins"] for committed in range(10)]
    assert margins[-1] > 0.3  # β·3 nats


def test_a_reference_is_required(make_trainer) -> None:
    with pytest.raises(ConfigError, match=r"policy_loss='dpo' needs a reference"):
        make_trainer(algorithm={"policy_loss": "dpo"})
