"""What there is to say of a run at a time, in numbers and in the words of one line."""

import re
from collections import deque
from typing import NamedTuple

from asyncrl.report.summary import RunSummary
from asyncrl.report.timing import time_shares

WINDOW_S = 30.0  # rates and shares describe about this long

_LAG = re.compile(r"^staleness/lag_(\d+)$")  # share of trained tokens at that lag
Shares = dict[str, float]  # a name, and its part of 1


class _Mark(NamedTuple):
    """What rates are made of, at one moment."""

    elapsed_s: float
    step: int
    samples: int
    seconds: dict[str, dict[str, float]]  # by actor, then by state


class Pace:
    """How fast a run goes just now: what changed over about the last WINDOW_S seconds. None, or empty: not known yet."""

    def __init__(self) -> None:
        self.samples_per_s: float | None = None
        self.left_s: float | None = None
        self.shares: dict[str, Shares] = {}  # per actor, the part of its recent time in each state
        self._marks: deque[_Mark] = deque()

    def update(self, run: RunSummary) -> None:
        seconds = {report.name: report.seconds for report in run.reports.values()}
        now = _Mark(run.elapsed_s, run.committed, run.samples, seconds)
        self._marks.append(now)
        # The mark just older than the window stays: rates then span at least the window.
        while len(self._marks) > 2 and now.elapsed_s - self._marks[1].elapsed_s >= WINDOW_S:
            self._marks.popleft()
        old = self._marks[0]
        passed, steps = now.elapsed_s - old.elapsed_s, now.step - old.step
        self.samples_per_s = (now.samples - old.samples) / passed if passed > 0 and steps > 0 else None
        self.left_s = (run.total_steps - now.step) * passed / steps if steps > 0 else None
        self.shares = {name: time_shares(old.seconds.get(name, {}), after) for name, after in seconds.items()}


def lags(run: RunSummary) -> dict[int, float]:
    """The share of trained tokens at each lag, of the newest update."""
    return dict(sorted((int(match[1]), share) for name, share in run.metrics.items() if (match := _LAG.match(name))))


def outcomes(run: RunSummary) -> str:
    """What became of the groups that were reserved; empty: none was."""
    names = ("trained", "filtered", "evicted", "failed", *["unused"] * bool(run.counts.unused), "pending")
    groups = " + ".join(f"{getattr(run.counts, name)} {name}" for name in names)
    return f"{run.counts.reserved} = {groups}" if run.counts.reserved else ""


def unscored(run: RunSummary) -> str:
    """On how many samples the reward failed, and of what; empty: on none."""
    failures = run.failures
    errors = "; ".join(f"{count} × {_brief(error)}" for error, count in failures.errors.items())
    counts = {"invalid": failures.invalid, "timeout": failures.timeout}
    return " + ".join(f"{count} {status}" for status, count in counts.items() if count) + f" ({errors})" * bool(errors)


def restarts(run: RunSummary) -> str:
    """Which actors were replaced, and how often; and what became of the answers that generators had begun."""
    gauges = run.reports["store"].gauges if "store" in run.reports else {}
    kept, lost = (int(gauges.get(f"handover/{name}_tokens", 0)) for name in ("resumed", "lost"))
    tokens = [f"{kept:,} tokens kept, {lost:,} lost at most"] if kept or lost else []
    return ", ".join([*(f"{name} ×{count}" for name, count in sorted(run.restarts.items())), *tokens])


def episodes(figures: Shares) -> str:
    """How many turns and calls of tools, and how long each side took."""
    if "num_turns/mean" not in figures:
        return ""
    turns = f"{figures['num_turns/mean']:.3g} turns ({figures['num_turns/max']:.0f} at most)"
    calls, failed = figures["tools/call_frequency"], figures["tools/failure_frequency"]
    tools = f", {calls:.3g} calls of tools ({failed:.0%} failed)" if calls else ""
    seconds = f"{figures['episode/environment_s']:.3g} s outside and {figures['episode/engine_s']:.3g} s in the engine"
    return f"{turns}{tools}, {seconds}"


def stops(figures: Shares) -> Shares:
    """Why episodes ended, where that is not 0."""
    prefix = "episode/stop/"
    return {name.removeprefix(prefix): share for name, share in figures.items() if name.startswith(prefix) and share}


def _brief(error: str) -> str:
    """Its beginning, and its end, which says where."""
    return error if len(error) <= 100 else f"{error[:50]} … {error[-47:]}"


def ordered(shares: Shares) -> Shares:
    """busy, sync, then whom it waits for, longest first; below half a percent is left out."""
    rank = {"busy": 0, "sync": 1}
    shown = [(state, share) for state, share in shares.items() if share >= 0.005 or state == "busy"]
    return dict(sorted(shown, key=lambda item: (rank.get(item[0], 2), -item[1])))


def number(value: float | None) -> str:
    """A rate in as few characters as it needs, or a dash."""
    return "–" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
