"""What a page of a long run costs: a log of 10,000 updates of 256 rollouts, written by the store's own log.

    python tests/bench/bench_report.py [--updates 10000] [--keep FOLDER]

Prints how long `asyncrl report` takes, its memory at most, and the page's size. Writing the log takes minutes and some GB.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

import asyncrl.replay.log.events as ev
from asyncrl.config import StoreSpec
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.rows import encode_rollouts, read_submitted
from asyncrl.types import Prompt, Rollout, Span, Version

GROUPS, N = 32, 8
LAGS = 5


def write_run(folder: Path, updates: int) -> None:
    """A run directory as a run leaves it: replay log, metrics, settings."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"name": "long", "model": {"path": "none"}, "sampling": {"n": N}, "evaluation": {"n": 1}, "total_steps": updates}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "deployment.yaml").write_text("generators: {count: 4}\n")
    log, draw = ReplayLog(folder / "replay", StoreSpec()), random.Random(0)
    log.append_events([ev.LearnerFenced(1, 0, time.time())])
    with (folder / "metrics.jsonl").open("wb") as metrics:
        for update in range(1, updates + 1):
            write_update(log, draw, update)
            write_lines(metrics, draw, update)
            if update % 2500 == 0:  # a kill of the learner, and of a generator
                log.append_events(
                    [ev.LearnerFenced(1 + update // 2500, update, time.time()), ev.HolderDied("generator-0", 1, ())]
                )
    log.append_events([ev.Ended()])
    log.seal()
    log.close()


def write_update(log: ReplayLog, draw: random.Random, update: int) -> None:
    """What the store writes of one batch, in a few calls."""
    groups = tuple(range(GROUPS * (update - 1), GROUPS * update))
    log.append_events([ev.GroupReserved(g, "train", g, 0, N, update - 1, f"generator-{g % 4}", 1) for g in groups])
    made = [rollout(draw, group, index, update) for group in groups for index in range(N)]
    first = log.append_rows(read_submitted(encode_rollouts(made, "long")))
    log.append_events(
        [
            ev.RolloutSubmitted(r.group, r.rollout, 0, row, r.spans[0].version.update, update - 1, len(r.response_ids))
            for row, r in enumerate(made, first)
        ]
    )
    wrong = 0.3 + 0.5 / (1 + update / 1000)
    verdicts = [(r, float(draw.random() > wrong)) for r in made]
    log.append_events([ev.RolloutScored(r.group, r.rollout, 0, "ok", reward, {"correct": reward}) for r, reward in verdicts])
    leased, made_by = ev.BatchLeased(update, update - 1, groups, False), Version(1, update)
    log.append_events([leased, ev.BatchCommitted(update, made_by, groups, {"reward/mean": 0.5}, time.time())])


def rollout(draw: random.Random, group: int, index: int, update: int) -> Rollout:
    """Of 4 to 60 tokens, from the weights of one or two updates."""
    ids, logprobs, text = draw.choice(RESPONSES)
    length, newest = len(ids), update - 1
    old = max(0, newest - draw.randrange(LAGS))
    cut = draw.randint(1, length)
    spans = (Span(Version(1, old), cut), Span(Version(1, newest), length - cut))
    return Rollout(
        group=group,
        rollout=index,
        attempt=0,
        prompt=PROMPTS[group % len(PROMPTS)],
        response_ids=ids,
        logprobs=logprobs,
        kept_logmass=None,
        loss_mask=[1] * length,
        turns=(0,),
        spans=spans if cut < length else spans[:1],
        finish_reason="stop",
        worker="generator-0",
        times={"reserved": 1.0, "started": 2.0, "finished": 3.0},
        text=text,
        prompt_text="What is 6 times 7?",
    )


def responses(draw: random.Random) -> list[tuple[list[int], list[float], str]]:
    """Tokens, their log-probabilities and a text, of a thousand responses."""
    lengths = [draw.randint(4, 60) for _ in range(1000)]
    return [
        ([draw.randrange(100) for _ in range(n)], [-draw.random() for _ in range(n)], draw.randbytes(2 * n).hex())
        for n in lengths
    ]


RESPONSES = responses(random.Random(1))
PROMPTS = [Prompt(row=row, ids=tuple(range(12)), data_source="sums", ground_truth='"42"') for row in range(1000)]


def write_lines(metrics: object, draw: random.Random, update: int) -> None:
    """Of metrics.jsonl: an update's, now and then an evaluation's and the actors'."""
    figures = {f"staleness/lag_{lag}": 1 / LAGS for lag in range(LAGS)} | {"staleness/lag_mean": 2.0, "staleness/lag_max": 4.0}
    names = [f"actor/{name}" for name in ("entropy", "grad_norm", "pg_clipfrac", "ppo_kl")] + ["correction/ess", "gap/k3"]
    names += [f"timing_s/part_{i}" for i in range(12)] + [f"more/metric_{i}" for i in range(40)]
    figures |= {name: draw.random() for name in names} | {"samples": 256.0, "tokens/trained": 8192.0}
    lines = [{"kind": "step", "step": update, "time": time.time(), **figures}]
    if update % 25 == 0:
        lines.append({"kind": "eval", "step": update, "time": time.time(), "eval/score": draw.random(), "eval/count": 512})
    if update % 5 == 0:
        states = {f"generator-{i}/{state}_s": 0.2 * update for i in range(4) for state in ("busy", "sync", "wait:store")}
        lines.append({"kind": "actors", "step": update, "time": time.time(), "learner/busy_s": 0.5 * update, **states})
    metrics.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="a folder for the run, used as it is if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run, page = args.keep or Path(scratch) / "long", Path(scratch) / "report.html"
        if not run.exists():
            began = time.monotonic()
            write_run(run, args.updates)
            size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
            print(f"written in {time.monotonic() - began:.0f} s: {size / 1e6:.0f} MB of log and metrics", flush=True)
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "asyncrl.cli", "report", str(run), "--out", str(page)], check=True, env=os.environ
        )
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"report: {time.monotonic() - began:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU, "
            f"{used.ru_maxrss / 1024:.0f} MiB at most, page {page.stat().st_size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
