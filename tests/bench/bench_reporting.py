"""What a run's figures cost: CPU of an update, of the part of it that makes figures, and of the driver's line with TensorBoard.

    asyncrl run recipes/arithmetic.py
    python tests/bench/bench_reporting.py runs/arithmetic [--beside TREE] [--updates 24]

The learner of the arithmetic recipe trains that run's own batches again, from its starting weights, on one thread. --beside:
another checkout of asyncrl, measured in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.packed import PackedModel
from asyncrl.replay.log.history import open_history
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.rundir import RunDir
from asyncrl.staleness import Staleness
from asyncrl.types import Record, Version

LINES = 400


def measure(run: Path, updates: int) -> dict[str, float]:
    """Milliseconds."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(RunDir(run).checkpoint(0) / "policy", dtype=torch.float32)
    folder = Path(tempfile.mkdtemp())
    trainer = PolicyTrainer(
        PackedModel(model, 1.0),
        LearnerSpec(batch_groups=32, lr=2e-4),
        AlgorithmSpec(),
        Staleness(max_lag=4, batch_groups=32),
        total_steps=200,
        refused_dir=folder,
    )
    history, cpu, figures = open_history(run), [], []
    for update in sorted(history.commits)[:updates]:
        rollouts = history.rollouts(history.commits[update].groups)
        began = time.process_time()
        metrics = trainer.update(rollouts, update - 1)
        cpu.append(time.process_time() - began)
        figures.append(metrics.get("timing_s/metrics", 0.0))
    began = time.process_time()
    log = _log(folder)
    for number in range(1, LINES + 1):
        log.append(Record(sequence=number, time=float(number), kind="step", version=Version(0, number), metrics=metrics))
    log.close()
    line = (time.process_time() - began) / LINES
    found = {"update": statistics.median(cpu[2:]), "its figures": statistics.median(figures[2:]), "line": line}
    return {name: round(1e3 * seconds, 2) for name, seconds in found.items()} | {"figures": len(metrics)}


def _log(folder: Path) -> MetricsLog:
    try:
        from asyncrl.report.trackers import RunFacts, Trackers
    except ImportError:  # an older tree
        return MetricsLog(folder / "metrics.jsonl", folder / "tensorboard")  # type: ignore[arg-type]
    return MetricsLog(folder / "metrics.jsonl", Trackers(["tensorboard"], RunFacts(name="run", run_dir=str(folder))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    here = Path(__file__).parents[2]
    if args.rounds == 0:
        print(json.dumps(measure(args.run, args.updates)))
        return
    for _ in range(args.rounds):
        for tree in filter(None, (here, args.beside)):
            again = [sys.executable, __file__, str(args.run), "--updates", str(args.updates), "--rounds", "0"]
            done = subprocess.run(
                again, env={**os.environ, "PYTHONPATH": str(tree)}, check=True, stdout=subprocess.PIPE, text=True
            )
            print(tree, done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
