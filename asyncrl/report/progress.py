"""What a person sees while a run or a warm start goes on: a live view on a terminal, else plain lines. On standard error."""

import contextlib
import math
import os
import re
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncrl.report.notebook import CellView, in_notebook
from asyncrl.report.summary import RunSummary
from asyncrl.report.timing import time_shares

if TYPE_CHECKING:  # rich takes a while to import, and only a terminal needs it
    from rich.table import Table

WINDOW_S = 30.0  # rates and shares describe about this long
LINE_EVERY_S = 5.0
QUIET_S = 30.0  # without a new step a plain line comes only this often

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


def dashboard(run: RunSummary, pace: Pace) -> "Table":
    """The live view: the facts, and where each actor's time goes, with a bar for every share."""
    from rich.columns import Columns
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    def bars(shares: Shares, width: int = 6) -> Columns:
        """Side by side as far as the terminal is wide."""
        cells = []
        for name, share in shares.items():
            cells.append(Table.grid(padding=(0, 1)))
            cells[-1].add_row(name, ProgressBar(total=1.0, completed=share, width=width), f"{share:.0%}")
        return Columns(cells, padding=(0, 2))

    view = Table.grid(padding=(0, 2), expand=True)
    view.add_column()
    view.add_column(ratio=1)
    view.add_row(run.name, bars({f"{run.committed}/{run.total_steps}": run.committed / max(run.total_steps, 1)}, width=28))
    for label, value in [*_facts(run, pace), *((name, _ordered(shares)) for name, shares in sorted(pace.shares.items()))]:
        if value:
            view.add_row(label, value if isinstance(value, str) else bars(value))
    return view


def one_line(run: RunSummary, pace: Pace) -> str:
    """The same, on the one line that a log file gets; of each actor's time only the share in which it was busy."""
    busy = {name: shares.get("busy", 0.0) for name, shares in sorted(pace.shares.items()) if shares}
    parts = [f"step {run.committed}/{run.total_steps}"]
    for label, value in [*_facts(run, pace), ("busy", busy)]:
        if value:
            shown = value if isinstance(value, str) else " ".join(f"{name}:{share:.0%}" for name, share in value.items())
            parts.append(f"{label} {shown}")
    return " · ".join(parts)


def _facts(run: RunSummary, pace: Pace) -> list[tuple[str, str | Shares]]:
    """What there is to say of a run, each under its name; empty: nothing yet."""
    ends = [f"{score:.3f}" for score in run.scores]
    outcomes = ("trained", "filtered", "evicted", "failed", *["unused"] * bool(run.counts.unused), "pending")
    groups = " + ".join(f"{getattr(run.counts, outcome)} {outcome}" for outcome in outcomes)
    lags = sorted((int(match[1]), share) for name, share in run.metrics.items() if (match := _LAG.match(name)))
    unscored = {"invalid": run.failures.invalid, "timeout": run.failures.timeout}
    errors = "; ".join(f"{count} × {_brief(error)}" for error, count in run.failures.errors.items())
    return [
        ("time", f"{clock(run.elapsed_s)} elapsed, {clock(pace.left_s)} left, {number(pace.samples_per_s)} samples/s"),
        ("reward", f"{run.metrics['reward/mean']:.3g}" if "reward/mean" in run.metrics else ""),
        ("held-out", " → ".join(ends[:1] + ends[1:][-1:])),
        ("response", f"{run.metrics['response_length/mean']:.3g} tokens" if "response_length/mean" in run.metrics else ""),
        ("episodes", _episodes(run.metrics) if "num_turns/mean" in run.metrics else ""),
        ("stopped", _shares(run.metrics, "episode/stop/")),
        ("lag", {str(lag): share for lag, share in lags}),
        ("groups", f"{run.counts.reserved} = {groups}" if run.counts.reserved else ""),
        (
            "unscored",
            " + ".join(f"{count} {status}" for status, count in unscored.items() if count) + f" ({errors})" * bool(errors),
        ),
        ("restarts", ", ".join(f"{name} ×{count}" for name, count in sorted(run.restarts.items()))),
    ]


def _episodes(figures: Shares) -> str:
    """How many turns and calls of tools, and how long each side took."""
    turns = f"{figures['num_turns/mean']:.3g} turns ({figures['num_turns/max']:.0f} at most)"
    calls, failed = figures["tools/call_frequency"], figures["tools/failure_frequency"]
    tools = f", {calls:.3g} calls of tools ({failed:.0%} failed)" if calls else ""
    seconds = f"{figures['episode/environment_s']:.3g} s outside and {figures['episode/engine_s']:.3g} s in the engine"
    return f"{turns}{tools}, {seconds}"


def _shares(figures: Shares, prefix: str) -> Shares:
    """Those of that name that are not 0, without it."""
    return {name.removeprefix(prefix): share for name, share in figures.items() if name.startswith(prefix) and share}


def _brief(error: str) -> str:
    """Its beginning, and its end, which says where."""
    return error if len(error) <= 100 else f"{error[:50]} … {error[-47:]}"


class Progress:
    """Shows a run as it goes on: live on a terminal that can move its cursor, and in a notebook's cell. `update` never waits
    for the terminal longer than a write does."""

    def __init__(self) -> None:
        self._pace = Pace()
        self.newest: RunSummary | None = None  # as `update` got it
        self._printed: tuple[float, int] | None = None  # seconds elapsed and step of the newest plain line
        self._live: Any = CellView() if in_notebook() else None
        if self._live is None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=sys.stderr, markup=False, highlight=False), auto_refresh=False)

    def update(self, run: RunSummary) -> None:
        """Takes the run's newest state, and shows it if it is time to; nothing before the run is up: rates count from there."""
        if run.starting:
            return
        self.newest = run
        self._pace.update(run)
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.start()  # once there is something to show
                self._live.update(dashboard(run, self._pace), refresh=True)
        elif self._due(run):
            self._print(run)

    def close(self) -> None:
        """Shows the last state once more, and gives the terminal back. Idempotent."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
        elif self.newest is not None and self._printed != (self.newest.elapsed_s, self.newest.committed):
            self._print(self.newest)

    def _due(self, run: RunSummary) -> bool:
        if self._printed is None:
            return True
        elapsed_s, step = self._printed
        waited = run.elapsed_s - elapsed_s
        return waited >= QUIET_S or (waited >= LINE_EVERY_S and run.committed != step)

    def _print(self, run: RunSummary) -> None:
        self._printed = run.elapsed_s, run.committed
        with contextlib.suppress(OSError):  # the terminal is gone: that ends no run
            print(one_line(run, self._pace), file=sys.stderr, flush=True)


class WarmStartLines:
    """Prints how an SFT warm start goes on: a line every few seconds, the first one and the last."""

    def __init__(self) -> None:
        self._heldout: list[float] = []
        self._began: tuple[float, int] | None = None  # when the first step was done, and which it was
        self._printed = -math.inf
        self._tokens = 0.0

    def __call__(self, step: int, total: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        self._heldout += [metrics["heldout/loss"]] if "heldout/loss" in metrics else []
        if "train/loss" not in metrics:
            return
        if self._began is None:
            self._began = now, step
        seconds, steps = now - self._began[0], step - self._began[1]
        self._tokens += metrics["train/tokens"] if steps else 0.0
        if step < total and now - self._printed < LINE_EVERY_S:
            return
        self._printed = now
        parts = [f"step {step}/{total}", f"loss {metrics['train/loss']:.4g}"]
        if self._heldout:
            ends = dict.fromkeys((self._heldout[0], self._heldout[-1]))
            parts.append("held-out " + " → ".join(f"{loss:.4g}" for loss in ends))
        parts.append(f"{number(self._tokens / seconds if steps else None)} learned tokens/s")
        left = (total - step) * seconds / steps if steps else None
        print(" · ".join([*parts, f"{clock(left)} left"]), file=sys.stderr, flush=True)


def _ordered(shares: Shares) -> Shares:
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
