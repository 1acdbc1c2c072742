"""`asyncrl report RUN`: one HTML page of what runs did, which needs no network; of running ones too. No engine, no Ray."""

import argparse
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import yaml

import asyncrl.replay
from asyncrl import __version__
from asyncrl.control import leader
from asyncrl.errors import ConfigError, DataError
from asyncrl.jobs.picking import picked_samples
from asyncrl.replay.log.digest import RunDigest, digest_events, rollout_keys
from asyncrl.replay.log.events import HolderDied
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.report.advice import advice, standing
from asyncrl.report.figures import flattened, page_figures, settings_table
from asyncrl.report.page import report_page
from asyncrl.report.paired import paired
from asyncrl.report.run_tables import ReadRun, lag_map, run_marks, run_tables, started_again
from asyncrl.report.series import MetricLines, read_metrics
from asyncrl.report.summary import actors_of
from asyncrl.report.tiles import run_tiles
from asyncrl.rundir import RunDir, output_file, redact, write_atomic

log = logging.getLogger(__name__)
_BUCKETS = 400  # of a run's updates on a page, shared by several runs from the third on
_SAMPLE_BYTES = 2 << 20  # of all runs
_SPLIT_COLUMNS = ["group", "rollout", "attempt", "span_updates", "span_lengths"]
_ERROR = re.compile(r"(\d\d):(\d\d):(\d\d) (?:ERROR|CRITICAL) (.*)")
_ERRORS = 100  # of a run
_CORE_SHARE = 0.02  # of a core, that watching takes at most


def report_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl report`, and sets what runs."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, overlaid in one page")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(default report.html)")
    parser.add_argument("--watch", action="store_true", help="write it again while a run goes on; an open page shows it")
    every = "seconds between two writes (default 10); more, where that would take over 2%% of a core"
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help=every)
    parser.set_defaults(job=_report)


def _report(args: argparse.Namespace) -> int:
    """Prints the page's name whenever it was written."""
    if args.every <= 0:
        raise ConfigError(f"--every {args.every:g}: a page can't be written all the time; use seconds > 0, such as 10")
    out = output_file(args.out)
    while True:
        began, computed = time.monotonic(), time.process_time()
        going = args.watch and any(map(is_running, args.runs))
        page = make_report(args.runs, renew_s=args.every if going else None)
        write_atomic(out, page)
        spent = time.monotonic() - began
        of = "1 run" if len(args.runs) == 1 else f"{len(args.runs)} runs"
        print(f"{args.out}: {len(page.encode()) / 1e6:.2f} MB of {of} in {spent:.1f} s", flush=True)
        if not going:
            return 0
        time.sleep(max(args.every, (time.process_time() - computed) / _CORE_SHARE))


def make_report(runs: Sequence[Path], renew_s: float | None = None) -> str:
    """The page. renew_s: how often it shall load itself again; None: never. Raises DataError naming what can't be read."""
    most = _BUCKETS * 2 // max(2, len(runs))
    found = [_run(run, most, _SAMPLE_BYTES // len(runs)) for run in runs]
    facts = [of for of, _ in found]
    known = Counter(of.name for of in facts)
    for run, of in zip(runs, facts, strict=True):
        of.name = of.name if known[of.name] == 1 else str(run)
    tables = [run_tables(of, most) for of in facts]
    pages = [
        {
            "name": of.name,
            "state": of.state,
            "tiles": run_tiles(of),
            "tables": own,
            "lags": lag_map(of, most),
            "marks": run_marks(of),
            "advice": advice(standing(of)),
            "samples": samples,
        }
        for (of, samples), own in zip(found, tables, strict=True)
    ]
    thin = (
        f"Of each run at most {most} buckets of updates are drawn: a line is a bucket's mean, its band the least and greatest "
    )
    thin += "value in it. Where there are fewer updates, each is drawn. Drag to zoom, double-click to go back."
    picked = (
        "A selection of groups: the newest, some spread over the run, those of highest, lowest and most different reward, and "
    )
    picked += "some with failures. `asyncrl samples` shows the others."
    return report_page(
        {
            "runs": pages,
            "figures": page_figures(tables),
            "settings": settings_table([of.settings for of in facts]),
            "paired": _forks(runs, facts),
            "about": thin,
            "picked": picked,
            "made": f"asyncrl {__version__}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}",
            "renew_s": renew_s,
        }
    )


def is_running(run: Path) -> bool:
    """Whether some process leads the run: the one that its lock names, as far as can be seen from this machine."""
    return leader(RunDir(run)) is not None


def _run(run: Path, most: int, sample_bytes: int) -> tuple[ReadRun, list[dict[str, Any]]]:
    """All that is read of a run, and its samples."""
    paths, reader = RunDir(run), asyncrl.replay.open(run)
    going = is_running(run)  # first: what it wrote before it ended is then read
    digest = digest_events(reader)
    recipe, deployment = _settings(paths)
    updates = np.array(sorted(digest.updates), np.int64)
    if not paths.metrics.exists():
        log.warning("%s has no %s: what it measured is missing, but for what its log tells", run, paths.metrics.name)
    lines = paths.metrics.read_bytes().splitlines() if paths.metrics.exists() else []
    metrics = read_metrics(lines, newest=int(updates[-1]) if len(updates) else None)
    rewards = _rewards(digest, recipe)
    split = _split(reader, digest)
    facts = ReadRun(
        name=run.resolve().name,
        state="finished" if digest.over else "running" if going else "stopped before its last update",
        metrics=metrics,
        settings=flattened(recipe) | flattened(deployment, "deploy"),
        began=digest.began or min((line["time"] for line in metrics.actors), default=0.0),
        commit_updates=updates,
        commit_times=np.array([digest.updates[update].time for update in updates.tolist()]),
        reward_updates=rewards[0],
        reward_means=rewards[1],
        split_updates=split[0],
        split_flight=split[1],
        split_queue=split[2],
        lost=digest.lost,
        marks=sorted([*_restarts(digest), *_others(metrics), *_errors(paths, digest), *_scalings(metrics)])[:1000],
        prompts_per_eval=_prompts_per_eval(metrics.evals, recipe),
    )
    return facts, picked_samples(reader, digest, recipe, sample_bytes)


def _forks(runs: Sequence[Path], facts: Sequence[ReadRun]) -> list[dict[str, Any]]:
    """Each run beside the one that it was forked from, where that is on the page too, from the update on at which they part."""
    found = []
    metrics = [_by_update(of) for of in facts]
    places = {str(run.resolve()): place for place, run in enumerate(runs)}
    for place, run in enumerate(runs):
        began = msgspec.json.decode(path.read_bytes()) if (path := RunDir(run).forked).exists() else {}
        if (source := places.get(began.get("source", ""))) is not None:
            after = {update: line for update, line in metrics[place].items() if update > began["update"]}
            pair = {"source": facts[source].name, "fork": facts[place].name, "update": began["update"]}
            found.append(pair | {"metrics": paired(metrics[source], after)})
    return found


def _by_update(run: ReadRun) -> dict[int, dict[str, float]]:
    """What was measured at each update, evaluations included."""
    found: dict[int, dict[str, float]] = {}
    for line in [*run.metrics.steps, *run.metrics.evals]:
        measured = {name: value for name, value in line.items() if isinstance(value, float | int)}
        found[line["step"]] = measured | found.get(line["step"], {})
    return found


def _settings(paths: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recipe and deployment as they were written, secrets masked; empty where there is none."""
    try:
        recipe = msgspec.json.decode(paths.recipe.read_bytes()) if paths.recipe.exists() else {}
        deployment = yaml.safe_load(paths.deployment.read_text()) if paths.deployment.exists() else {}
    except (msgspec.MsgspecError, yaml.YAMLError) as error:
        raise DataError(
            f"{paths.path}: its recipe.json or deployment.yaml can't be read ({error}): restore it from a copy"
        ) from error
    return redact(recipe), redact(deployment or {})


def _prompts_per_eval(evals: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> float:
    n = recipe.get("evaluation", {}).get("n", 1)
    return max((line.get("eval/count", 0) for line in evals), default=0) / n


def _rewards(digest: RunDigest, recipe: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of each trained group, in the order of updates: the update, and the mean reward of its rollouts."""
    sampled = digest.scored_rollouts < recipe.get("sampling", {}).get("n", 1 << 14)  # a greedy baseline comes after these
    groups, place = np.unique(digest.scored_groups[sampled], return_inverse=True)
    updates = digest.updates_of(groups)
    means = np.bincount(place, digest.rewards[sampled], len(groups)) / np.maximum(1, np.bincount(place, minlength=len(groups)))
    order = np.argsort(updates, kind="stable")
    order = order[updates[order] >= 0]
    return updates[order], means[order]


def _split(reader: ReplayReader, digest: RunDigest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each update: the mean over its tokens of the updates made while they were in flight, and while they were queued. Rows
    that were deleted are missing."""
    newest = max(digest.updates, default=0)

    def sums(rows: pa.Table) -> np.ndarray:
        """[3, updates]: tokens, and these times the two."""
        trained, submitted = digest.updates_of(rows["group"].to_numpy()), digest.made_before(rollout_keys(rows))
        lengths, weighted = _row_sums(rows["span_lengths"], rows["span_updates"])
        own = (trained >= 0) & (submitted >= 0)
        parts = (lengths, lengths * submitted - weighted, lengths * (trained - 1 - submitted))
        return np.array([np.bincount(trained[own], part[own], newest + 1) for part in parts])

    tokens, flight, queue = np.sum(reader.pieces("rows", _SPLIT_COLUMNS, sums), axis=0)
    updates = np.flatnonzero(tokens)
    return updates, flight[updates] / tokens[updates], queue[updates] / tokens[updates]


def _row_sums(lengths: pa.ChunkedArray, updates: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row: its tokens, and the sum of their updates."""
    lists = lengths.combine_chunks()
    offsets, own = lists.offsets.to_numpy(), lists.values.to_numpy()
    products = own * updates.combine_chunks().values.to_numpy().astype(np.int64)
    first, second = (np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets] for values in (own, products))
    return np.diff(first), np.diff(second)


def _restarts(digest: RunDigest) -> Iterator[tuple[float, str, str]]:
    for when, event in digest.restarts:
        if isinstance(event, HolderDied):
            yield when, "restart", f"{event.worker} died with {len(event.groups)} groups in flight, which are generated again"
        else:
            yield when, "restart", f"the learner started again from update {event.committed} (incarnation {event.incarnation})"


def _others(metrics: MetricLines) -> Iterator[tuple[float, str, str]]:
    """Restarts that leave no event: of actors that hold nothing of the store's."""
    for when, actor in started_again(metrics.actors):
        if not actor.startswith(("generator", "learner")):
            yield when, "restart", f"{actor} was started again, some seconds before"


def _scalings(metrics: MetricLines) -> Iterator[tuple[float, str, str]]:
    for line in metrics.scalings:
        yield (
            line["time"],
            "scale",
            f"{line['count']} {actors_of(line['role'])} instead of {line['count_before']}: {line['reason']}",
        )


def _errors(paths: RunDir, digest: RunDigest) -> list[tuple[float, str, str]]:
    """The first failure of each actor, and errors in the actors' logs, whose lines tell the time of day alone."""
    found = [(path.stat().st_mtime, "error", f"{path.stem}: {_brief(path)}") for path in sorted(paths.logs.glob("*.error"))]
    day = time.localtime(digest.began)
    midnight = digest.began - 3600 * day.tm_hour - 60 * day.tm_min - day.tm_sec
    for path in sorted(paths.logs.glob("*.log")):
        with path.open(errors="replace") as lines:
            for match in filter(None, map(_ERROR.match, lines)):
                when = midnight + 3600 * int(match[1]) + 60 * int(match[2]) + int(match[3])
                found.append((when + 86400 * (when < digest.began - 60), "error", f"{path.stem}: {redact(match[4])[:1000]}"))
    return found[:_ERRORS]


def _brief(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    text: str = redact("\n".join(lines[-1:] or [""]))
    return text[:1000]
