"""A whole run with a critic: GAE through every hop, and what it leaves in metrics and checkpoints."""

import pytest
from safetensors.torch import load_file

from asyncrl import launch
from asyncrl.config import AlgorithmSpec, CheckpointSpec, CriticSpec, LearnerSpec
from asyncrl.rundir import RunDir

pytestmark = pytest.mark.ray


def test_a_run_with_a_critic(local_ray, tiny_recipe, metrics_of, tmp_path):
    recipe = tiny_recipe(
        algorithm=AlgorithmSpec(adv_estimator="gae", lam=0.95, kl_coef=0.01, kl_in="reward"),
        learner=LearnerSpec(batch_groups=4, mini_batch_groups=2, lr=1e-3),
        critic=CriticSpec(lr=1e-3, critic_warmup=2),
        checkpoint=CheckpointSpec(save_freq=2, keep_last_n=3),
        total_steps=4,
    )
    run = RunDir(launch(recipe, runs_dir=tmp_path).run_dir)
    steps = metrics_of(run.path, "step")
    assert [line["actor/optimizer_steps"] for line in steps] == [0.0, 0.0, 2.0, 2.0]
    assert [line["critic/optimizer_steps"] for line in steps] == [2.0] * 4
    assert steps[0]["critic/values_mean"] == 0.0 != steps[1]["critic/values_mean"]
    assert "actor/reward_kl_penalty" in steps[3]
    start, warm, end = (load_file(run.checkpoint(update) / "policy" / "model.safetensors") for update in (0, 2, 4))
    assert all(tensor.equal(warm[name]) for name, tensor in start.items())
    assert any(not tensor.equal(end[name]) for name, tensor in start.items())
    heads = [load_file(run.checkpoint(update) / "critic" / "model.safetensors") for update in (0, 2, 4)]
    assert heads[0]["lm_head.weight"].abs().max() == 0.0
    assert not heads[1]["lm_head.weight"].equal(heads[2]["lm_head.weight"])
