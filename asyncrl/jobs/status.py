"""`asyncrl status RUN …`: how runs stand: led by whom, at which update, how fast, and what went wrong. Reads files alone."""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from asyncrl.control import leader
from asyncrl.errors import ConfigError
from asyncrl.jobs.attach import said_end
from asyncrl.report.followed import FollowedRun, newest_error, run_end
from asyncrl.report.pace import clock, number
from asyncrl.report.pace import restarts as said_restarts
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir, redact

_NEWEST_BYTES = 1 << 20  # of metrics.jsonl: some hundred lines
_RECENT = 20  # updates that the rate is of


class RunStanding(Struct, frozen=True, kw_only=True):
    """What is said of a run; `--json` prints a line of it for each."""

    run: str
    state: str  # starting, running, done, stopped, failed; killed: nobody said how it ended
    led_by: str  # pid and host; empty: nobody
    since_s: float | None  # for how long it has been led
    heard_s: float | None  # since it wrote its metrics last; it does so every 5 s
    update: int
    total_steps: int
    samples_per_s: float | None
    reward: float | None
    score: float | None  # the newest held-out one
    restarts: dict[str, int]
    members: dict[str, int]  # actors by role
    checkpoint: str
    error: str


def status_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl status`, and sets what runs."""
    several = "run directories, or folders of runs (default: runs)"
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], metavar="RUN", help=several)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.set_defaults(job=_status)


def _status(args: argparse.Namespace) -> int:
    for place, paths in enumerate(_found(args.runs or [Path("runs")])):
        standing = run_standing(paths)
        if args.json:
            print(msgspec.json.encode(standing).decode())
        else:
            print("\n" * bool(place) + "\n".join(_lines(paths, standing)))
    return 0


def _found(named: list[Path]) -> Iterator[RunDir]:
    """The runs themselves, and those in folders of runs. Raises ConfigError for what is neither."""
    for path in named:
        folder = path.expanduser().resolve()
        inside = [folder] if (folder / "recipe.json").exists() or leader(RunDir(folder)) else sorted(folder.glob("*/"))
        runs = [RunDir(one) for one in inside if (one / "recipe.json").exists() or leader(RunDir(one))]
        if not runs:
            raise ConfigError(f"{path} is neither a run directory nor a folder of runs; name one, such as runs or runs/NAME")
        yield from runs


def run_standing(paths: RunDir) -> RunStanding:
    """How a run stands, from what its leader writes."""
    who, now = leader(paths), time.time()
    followed = FollowedRun(paths, who.since if who else 0.0, _NEWEST_BYTES)
    run = followed.read()
    end, steps = run_end(paths), paths.steps()
    heard = now - followed.heard if followed.heard and (who is None or followed.heard >= who.since) else None
    state = "running" if heard is not None else "starting"
    if who is None:
        state = "killed" if end is None else {0: "done", 130: "stopped"}.get(end.status, "failed")
    failed = end.error if end is not None and state == "failed" else ""
    return RunStanding(
        run=str(paths.path),
        state=state,
        led_by=str(who or ""),
        since_s=now - who.since if who else None,
        heard_s=heard,
        update=run.committed,
        total_steps=run.total_steps,
        samples_per_s=_rate(run),
        reward=run.metrics.get("reward/mean"),
        score=run.scores[-1] if run.evals else None,
        restarts=run.restarts,
        members=dict(sorted(Counter(report.role for report in run.reports.values()).items())),
        checkpoint=steps[-1].name if steps else "",
        error=redact(failed or newest_error(paths)),
    )


def _rate(run: RunSummary) -> float | None:
    """Trained samples per second over the newest updates."""
    recent = [run.steps[update] for update in sorted(run.steps)][-_RECENT:]
    passed = recent[-1].time - recent[0].time if recent else 0.0
    return sum(step.metrics.get("samples", 0.0) for step in recent[1:]) / passed if passed > 0 else None


def _lines(paths: RunDir, run: RunStanding) -> Iterator[str]:
    yield f"{paths.path.name}: {run.state}" + (f", led by {run.led_by} for {clock(run.since_s)}" if run.led_by else "")
    heard = "" if run.heard_s is None or not run.led_by else f", heard {max(0.0, run.heard_s):.0f} s ago"
    figures = [f"update {run.update}/{run.total_steps or '–'}", f"{number(run.samples_per_s)} samples/s"]
    figures += [f"{name} {of:.3g}" for name, of in (("reward", run.reward), ("held-out", run.score)) if of is not None]
    yield "  " + " · ".join(figures) + heard
    told = {
        "members": ", ".join(f"{role} ×{count}" for role, count in run.members.items()),
        "restarts": said_restarts(RunSummary(name="", total_steps=0, restarts=run.restarts)),
        "checkpoint": run.checkpoint,
        "error": _short(run.error),
        "end": said_end(run_end(paths)).splitlines()[0] if run.state == "killed" else "",
    }
    yield from (f"  {name:<11} {text}" for name, text in told.items() if text)


def _short(error: str) -> str:
    """What went wrong and, after a page of how, what came of it or what mends it."""
    lines = [line.strip() for line in error.strip().splitlines()] or [""]
    first, last = lines[0], lines[-1]
    return last if last == first or "Traceback" in first else f"{first} … {last}"
