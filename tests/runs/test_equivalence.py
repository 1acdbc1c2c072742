"""max_lag = 0 in deterministic mode is plain synchronous RL: to the bit the same as a loop without Ray, store or bus."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from asyncrl import Trainer
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, StalenessSpec
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.loading import load_model, named_weights
from asyncrl.models.packed import PackedModel
from asyncrl.models.tokenizing import load_tokenizer
from asyncrl.prompts.dataset import PromptFile
from asyncrl.replay import open as open_replay
from asyncrl.replay.plan import Source, ticket_seed
from asyncrl.types import GenerationRequest, Sampling, TrainRollout, Version

STEPS, GROUPS, N = 5, 4, 4
ENGINE = EngineSpec(slots=8, max_length=32, deterministic=True)


def reward(text: str) -> float:
    return text.count("7") / 6


def plain_loop(recipe, prompts, refused_dir):
    """Generate, score, train; one process, one thread, in order. Yields each update's token ids and loss; then the weights."""
    tokenizer = load_tokenizer(recipe.model)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=6, stop_token_ids=(tokenizer.eos_token_id,))
    engine = TorchEngine(load_model(recipe.model), slots=ENGINE.slots, max_length=ENGINE.max_length, deterministic=True)
    trainer = PolicyTrainer(
        PackedModel(load_model(recipe.model)),
        recipe.learner,
        recipe.algorithm,
        recipe.staleness_rule(),
        total_steps=recipe.total_steps,
        refused_dir=refused_dir,
    )
    source = Source(prompts=prompts, sampling=sampling, seed=recipe.seed)
    tokens, losses = [], []
    for update in range(STEPS):
        engine.update_weights(Version(1, update), named_weights(trainer.model))
        batch, answers = [], []
        for position in range(update * GROUPS, (update + 1) * GROUPS):
            prompt = prompts[source.index(position)]
            requests = [
                GenerationRequest(
                    id=f"{position}-{rollout}",
                    group=position,
                    prompt_ids=prompt.ids,
                    sampling=sampling,
                    seed=ticket_seed(recipe.seed, "train", position, 0, rollout),
                )
                for rollout in range(N)
            ]
            futures = engine.submit_group(requests)
            while engine.step():
                pass
            for rollout, future in enumerate(futures):
                answer = future.result(timeout=0)
                answers.append(answer.token_ids)
                batch.append(
                    TrainRollout(
                        group=position,
                        rollout=rollout,
                        attempt=0,
                        data_source=prompt.data_source,
                        prompt_ids=np.array(prompt.ids),
                        response_ids=np.array(answer.token_ids),
                        loss_mask=np.ones(len(answer.token_ids), dtype=bool),
                        logprobs=np.array(answer.logprobs, dtype=np.float32),
                        kept_logmass=None,
                        updates=np.full(len(answer.token_ids), update),
                        reward=reward(tokenizer.decode(answer.token_ids, skip_special_tokens=True)),
                        parts={},
                        finish_reason=answer.finish_reason,
                    )
                )
        losses.append(trainer.update(batch, update)["actor/pg_loss"])
        tokens.append(answers)
    return tokens, losses, {name: tensor.clone() for name, tensor in named_weights(trainer.model).items()}


@pytest.mark.ray
def test_synchronous_deterministic_run_equals_a_plain_loop(local_ray, tiny_recipe, tmp_path, metrics_of):
    recipe = tiny_recipe(
        staleness=StalenessSpec(max_lag=0), learner=LearnerSpec(batch_groups=GROUPS, lr=1e-2), total_steps=STEPS, seed=3
    )
    deployment = Deployment(generators=GeneratorsSpec(engine=ENGINE))
    with Trainer(recipe, deployment, runs_dir=tmp_path) as trainer:
        trainer.fit()
        result = trainer.finish()
    assert (result.steps, result.max_trained_lag) == (STEPS, 0)

    prompts = PromptFile(trainer.paths.data / "train.arrow")
    expected_tokens, expected_losses, expected_weights = plain_loop(recipe, prompts, tmp_path / "refused")

    rows = open_replay(trainer.paths.path).rollouts().to_pylist()
    trained = sorted((row for row in rows if row["outcome"] == "trained"), key=lambda row: (row["group"], row["rollout"]))
    assert [row["response_ids"] for row in trained] == [answer for answers in expected_tokens for answer in answers]
    assert [line["actor/pg_loss"] for line in metrics_of(trainer.paths.path, "step")] == expected_losses
    weights = load_file(trainer.paths.checkpoint(STEPS) / "policy" / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    moved = load_model(recipe.model).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected_weights[name]), name
        assert not torch.equal(tensor, moved[name]), f"{name} was never trained"
