"""The stages put together by hand, as README shows it: one process, threads, no Ray."""

import threading

import pytest

from asyncrl.config import AlgorithmSpec, DataSpec, LearnerSpec, ModelSpec, SamplingSpec
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.generate.generator import Generator
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.learner import Learner
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.loading import load_model
from asyncrl.models.packed import PackedModel
from asyncrl.models.tokenizing import load_tokenizer
from asyncrl.prompts.dataset import PromptFile, prepare
from asyncrl.prompts.encoding import encoder, identity
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.replay.store import LocalTransport, ReplayStore
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.worker import RewardWorker
from asyncrl.rundir import RunDir
from asyncrl.staleness import Staleness
from asyncrl.types import Sampling
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.subscriber import WeightSubscriber

STEPS = 6


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("estimator", "n"), [("grpo", 4), ("remax", 1)], ids=["grpo", "remax, n = 1 as in the paper"])
def test_stages_composed_by_hand(tiny_recipe, tmp_path, estimator, n):
    recipe, run = tiny_recipe(), RunDir(tmp_path / "by-hand").create()
    model = ModelSpec(path=recipe.model.path)
    tokenizer = load_tokenizer(model)
    data = DataSpec(files=recipe.data.files, answer_key="answer")
    prepare(data, encoder(tokenizer), run.data / "train.arrow", identity(tokenizer))

    rule = Staleness(max_lag=2, batch_groups=4)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=6, stop_token_ids=(tokenizer.eos_token_id,))
    source = Source(prompts=PromptFile(run.data / "train.arrow"), sampling=sampling)
    algorithm = AlgorithmSpec(adv_estimator=estimator)
    groups = SamplingSpec(n=n, min_valid=min(n, 2))
    plan = StorePlan(rule=rule, source=source, sampling=groups, baseline=algorithm.wants_baseline)
    store = LocalTransport(ReplayStore(plan, run.replay))
    driver = ReplayClient(store, "driver", 1)

    trainer = PolicyTrainer(
        PackedModel(load_model(model)),
        LearnerSpec(batch_groups=4, lr=1e-3),
        algorithm,
        rule,
        total_steps=STEPS,
        refused_dir=run.logs,
    )
    buses = []

    def open_bus(incarnation: int) -> WeightPublisher:
        buses.append(WeightPublisher(incarnation))
        return buses[-1]

    learner = Learner(
        trainer,
        ReplayClient(store, "learner", 1),
        open_bus,
        Checkpoints(run, keep_last_n=2),
        tokenizer=tokenizer,
        save_freq=3,
        eval_freq=None,
        poll_s=1.0,
    )
    engine = TorchEngine(load_model(model), slots=16, max_length=32)
    engine.start()
    weights = WeightSubscriber(lambda: buses[-1].address if buses else None)
    size = n + plan.baseline
    generator = Generator(
        engine,
        ReplayClient(store, "generator", 1),
        weights,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        name="generator",
        poll_s=1.0,
        group_size=size,
    )
    rewards = RewardWorker(ReplayClient(store, "reward", 1), RewardPool(recipe.reward.function), name="reward")

    workers = [threading.Thread(target=stage.run, name=stage.report().name) for stage in (generator, rewards)]
    for worker in workers:
        worker.start()
    assert learner.run(until=STEPS) == STEPS
    driver.finish()
    for worker in workers:
        worker.join(timeout=30)
        assert not worker.is_alive(), worker.name
    report = driver.report(0)
    for resource in (learner, weights, engine, store):
        resource.close()

    assert report.counts.trained == STEPS * 4
    assert report.counts.pending == 0
    assert report.counts.reserved == report.counts.trained + report.counts.unused
    assert max(record.metrics["staleness/lag_max"] for record in report.records) <= 2
    assert [record.metrics["samples"] for record in report.records] == [4.0 * n] * STEPS
    assert all(("reward/baseline" in record.metrics) == (estimator == "remax") for record in report.records)
    assert [step.name for step in run.steps()] == ["step_000003", "step_000006"]
