"""The whole pipeline on recipes/arithmetic.py: `python tests/bench/bench_pipeline.py [--updates N]`. Prints ratios.

async / sync       samples/s of max_lag=4 over max_lag=0, the same recipe, in turns (each twice, the better one counts)
efficiency         samples/s of the whole run ÷ the slower of engine alone and learner alone; these two run by themselves,
                   on one thread each, on the same prompts and the same rollouts
publish to swap    from the commit of an update to the moment the generator decodes with it; pause: when no token is made

Run it on a quiet machine: everything shares its cores.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from msgspec.structs import replace

from asyncrl import Recipe, Trainer
from asyncrl.config import EvaluationSpec, StalenessSpec
from asyncrl.config.paths import resolve_paths
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.loading import load_model, named_weights
from asyncrl.models.packed import PackedModel
from asyncrl.prompts.dataset import PromptFile
from asyncrl.rundir import RunDir
from asyncrl.types import GenerationRequest, Sampling, TrainRollout, Version

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "arithmetic.py"
WARM_UP = 15  # updates before the clock runs


def load_recipe_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arithmetic", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch:
    """Pairs each commit with the generator's swap to it, as far as reports catch it."""

    def __init__(self) -> None:
        self.committed_at: dict[int, float] = {}
        self.delays: dict[int, float] = {}
        self.pauses: dict[int, float] = {}

    def __call__(self, run) -> None:  # type: ignore[no-untyped-def]
        self.committed_at |= {update: record.time for update, record in run.steps.items()}
        for report in run.reports.values():
            update = int(report.gauges.get("update", -1))
            if report.role == "generator" and update in self.committed_at:
                self.delays.setdefault(update, report.gauges["swapped_at"] - self.committed_at[update])
                self.pauses.setdefault(update, report.gauges["pause_s_last"])


def samples_per_s(recipe: Recipe, folder: Path, updates: int, watch: Watch) -> float:
    with Trainer(recipe, runs_dir=folder.parent, name=folder.name, observe=watch) as trainer:
        trainer.fit()
    seconds = watch.committed_at[WARM_UP + updates] - watch.committed_at[WARM_UP]
    return updates * recipe.learner.batch_groups * recipe.sampling.n / seconds


def engine_alone(recipe: Recipe, prompts: PromptFile, slots: int, count: int) -> tuple[float, list[TrainRollout]]:
    """Rollouts per second of the engine with its slots kept full, and what it made."""
    engine = TorchEngine(load_model(recipe.model), slots=slots, max_length=64)
    engine.update_weights(Version(1, 0), named_weights(load_model(recipe.model)))
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,))
    n, began = recipe.sampling.n, time.monotonic()
    futures = []
    for group in range(count // n):
        prompt = prompts[group % len(prompts)]
        futures += engine.submit_group(
            [
                GenerationRequest(id=f"{group}-{i}", group=group, prompt_ids=prompt.ids, sampling=sampling, seed=group * n + i)
                for i in range(n)
            ]
        )
    while engine.step():
        pass
    seconds = time.monotonic() - began
    rng = np.random.default_rng(0)
    made = [
        TrainRollout(
            group=index // n,
            rollout=index % n,
            attempt=0,
            data_source="bench",
            prompt_ids=np.array(prompts[(index // n) % len(prompts)].ids),
            response_ids=np.array(answer.token_ids),
            loss_mask=np.ones(len(answer.token_ids), dtype=bool),
            logprobs=np.array(answer.logprobs, dtype=np.float32),
            kept_logmass=None,
            updates=np.zeros(len(answer.token_ids), dtype=np.int64),
            reward=float(rng.integers(2)),
            parts={},
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(future.result() for future in futures)
    ]
    return len(made) / seconds, made


def learner_alone(recipe: Recipe, rollouts: list[TrainRollout], folder: Path) -> float:
    """Samples per second of the learner fed from memory."""
    trainer = PolicyTrainer(
        PackedModel(load_model(recipe.model)),
        recipe.learner,
        recipe.algorithm,
        recipe.staleness_rule(),
        total_steps=recipe.total_steps,
        refused_dir=folder,
    )
    size = recipe.learner.batch_groups * recipe.sampling.n
    batches = [rollouts[i : i + size] for i in range(0, len(rollouts) - size + 1, size)]
    trainer.update(batches[0], 0)
    began = time.monotonic()
    for batch in batches[1:]:
        trainer.update(batch, 0)
    return (len(batches) - 1) * size / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=60)
    updates = parser.parse_args().updates
    torch.set_num_threads(1)
    module = load_recipe_module()
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDir(Path(scratch) / "bench").create()
        base = replace(module.recipe, evaluation=EvaluationSpec(), total_steps=WARM_UP + updates)
        recipe = resolve_paths(base, run, RECIPE.parent)
        module.prepare(recipe, run.path)
        rates: dict[int, list[float]] = {0: [], 4: []}
        watches = []
        for _ in range(2):
            for max_lag in rates:
                watch = Watch()
                lagged = replace(recipe, staleness=StalenessSpec(max_lag=max_lag))
                rates[max_lag].append(samples_per_s(lagged, run.path, updates, watch))
                watches += [watch] if max_lag else []
        engine, rollouts = engine_alone(recipe, PromptFile(run.data / "train.arrow"), slots=64, count=256 * 12)
        learner = learner_alone(recipe, rollouts, run.logs)
    fast, slow = max(rates[4]), max(rates[0])
    print(f"asynchronous, max_lag=4     {fast:8.0f} samples/s   (runs: {', '.join(f'{r:.0f}' for r in rates[4])})")
    print(f"synchronous,  max_lag=0     {slow:8.0f} samples/s   (runs: {', '.join(f'{r:.0f}' for r in rates[0])})")
    print(f"engine alone                {engine:8.0f} samples/s")
    print(f"learner alone               {learner:8.0f} samples/s")
    print(f"async / sync                {fast / slow:8.2f} ×")
    print(f"pipeline efficiency         {fast / min(engine, learner):8.2f} ×")
    if watch.delays:
        delays, pauses = sorted(watch.delays.values()), sorted(watch.pauses.values())
        print(
            f"publish to swap             {1e3 * statistics.median(delays):8.1f} ms median, {1e3 * delays[-1]:.1f} worst seen"
        )
        print(
            f"pause of generation         {1e3 * statistics.median(pauses):8.1f} ms median, {1e3 * pauses[-1]:.1f} worst seen"
        )


if __name__ == "__main__":
    main()
