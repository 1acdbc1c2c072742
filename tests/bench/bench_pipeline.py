"""The whole pipeline on recipes/arithmetic.py: `python tests/bench/bench_pipeline.py [--updates N]`. Prints ratios.

async / sync       samples/s of max_lag=4 over max_lag=0, the same recipe, in turns (each twice, the better one counts)
efficiency         samples/s of the whole run ÷ what the machine could do at most: the slowest of engine alone, learner alone,
                   and cores ÷ the CPU time of both per sample. They run by themselves, on one thread each, on the same prompts
                   and the same rollouts; for the last figure side by side, as cores that share caches and clock are slower then
CPU per sample     of each actor of the asynchronous run, from its process's own times; overhead: what is left of all of them
                   without that of engine and learner side by side
publish to swap    from the commit of an update to the moment the generator decodes with it; pause: when no token is made

Run it on a quiet machine: everything shares its cores.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from msgspec.structs import replace

from asyncrl import Deployment, Recipe, Trainer
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


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far; 0 if it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Watch:
    """Pairs each commit with the generator's swap to it, as far as reports catch it; and sees what CPU time the actors use."""

    def __init__(self) -> None:
        self.spent: list[tuple[int, dict[str, float]]] = []  # updates committed, CPU seconds by actor, since WARM_UP
        self.committed_at: dict[int, float] = {}
        self.delays: dict[int, float] = {}
        self.pauses: dict[int, float] = {}

    def __call__(self, run) -> None:  # type: ignore[no-untyped-def]
        self.committed_at |= {update: record.time for update, record in run.steps.items()}
        if WARM_UP <= run.committed < run.total_steps:
            self.spent.append((run.committed, {name: cpu_s(pid) for name, pid in {**run.pids, "driver": os.getpid()}.items()}))
        for report in run.reports.values():
            update = int(report.gauges.get("update", -1))
            if report.role == "generator" and update in self.committed_at:
                self.delays.setdefault(update, report.gauges["swapped_at"] - self.committed_at[update])
                self.pauses.setdefault(update, report.gauges["pause_s_last"])

    def cpu_ms(self, samples: int) -> dict[str, float]:
        """CPU milliseconds per sample by actor. samples: of one update."""
        (before, first), (after, last) = self.spent[0], self.spent[-1]
        return {name: 1e3 * (last[name] - spent) / ((after - before) * samples) for name, spent in first.items()}


def samples_per_s(recipe: Recipe, folder: Path, updates: int, watch: Watch) -> float:
    with Trainer(recipe, runs_dir=folder.parent, name=folder.name, observe=watch) as trainer:
        trainer.fit()
    seconds = watch.committed_at[WARM_UP + updates] - watch.committed_at[WARM_UP]
    return updates * recipe.learner.batch_groups * recipe.sampling.n / seconds


def engine_alone(recipe: Recipe, file: Path, slots: int, count: int) -> tuple[float, list[TrainRollout]]:
    """CPU seconds per rollout of the engine with its slots kept full, and what it made."""
    prompts = PromptFile(file)
    engine = TorchEngine(load_model(recipe.model), slots=slots, max_length=64)
    engine.update_weights(Version(1, 0), named_weights(load_model(recipe.model)))
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,))
    n, began = recipe.sampling.n, time.process_time()
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
    seconds = time.process_time() - began
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
    return seconds / len(made), made


def learner_alone(recipe: Recipe, rollouts: list[TrainRollout], folder: Path) -> float:
    """CPU seconds per sample of the learner fed from memory."""
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
    began = time.process_time()
    for batch in batches[1:]:
        trainer.update(batch, 0)
    return (time.process_time() - began) / ((len(batches) - 1) * size)


def forever(under_way: Event, work: Callable[..., object], *args: object) -> None:
    torch.set_num_threads(1)
    while True:
        work(*args)
        under_way.set()


@contextlib.contextmanager
def beside(work: Callable[..., object], *args: object) -> Iterator[None]:
    """While another process does `work`, again and again."""
    spawning = multiprocessing.get_context("spawn")
    under_way = spawning.Event()
    process = spawning.Process(target=forever, args=(under_way, work, *args))
    process.start()
    try:
        assert under_way.wait(120)  # what it imports is not what it does
        yield
    finally:
        process.kill()
        process.join()


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
        decoding = recipe, run.data / "train.arrow", Deployment().generators.slots, 256 * 12
        engine, rollouts = engine_alone(*decoding)
        learner = learner_alone(recipe, rollouts, run.logs)
        with beside(learner_alone, recipe, rollouts, run.logs):
            both = engine_alone(*decoding)[0]
        with beside(engine_alone, *decoding):
            both += learner_alone(recipe, rollouts, run.logs)
    fast, slow = max(rates[4]), max(rates[0])
    print(f"asynchronous, max_lag=4     {fast:8.0f} samples/s   (runs: {', '.join(f'{r:.0f}' for r in rates[4])})")
    print(f"synchronous,  max_lag=0     {slow:8.0f} samples/s   (runs: {', '.join(f'{r:.0f}' for r in rates[0])})")
    cores = len(os.sched_getaffinity(0))
    limit = min(1 / engine, 1 / learner, cores / both)
    print(f"engine alone                {1 / engine:8.0f} samples/s   ({1e3 * engine:.3f} ms of CPU per sample)")
    print(f"learner alone               {1 / learner:8.0f} samples/s   ({1e3 * learner:.3f} ms of CPU per sample)")
    print(f"both on {cores:2d} cores            {cores / both:8.0f} samples/s   ({1e3 * both:.3f} ms each, side by side)")
    print(f"async / sync                {fast / slow:8.2f} ×")
    print(f"pipeline efficiency         {fast / limit:8.2f} ×")
    spent = watch.cpu_ms(recipe.learner.batch_groups * recipe.sampling.n)
    print("CPU per sample              " + ", ".join(f"{name} {ms:.3f}" for name, ms in spent.items()) + " ms")
    print(f"overhead                    {sum(spent.values()) - 1e3 * both:8.3f} ms of CPU per sample")
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
