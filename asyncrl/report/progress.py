"""What a person sees while a run goes on: one live view on a terminal, plain lines elsewhere. Always on standard error.

Rendering is pure text (`dashboard`, `one_line`); rich only keeps it in place.
"""

import os
import re
import sys
from collections import deque
from collections.abc import Iterable
from typing import TextIO

from msgspec import Struct

from asyncrl.types import GroupCounts, Report

WINDOW_S = 30.0  # rates and shares describe about this long
LINE_EVERY_S = 5.0
QUIET_S = 30.0  # without a new step a plain line comes only this often

_LAG = re.compile(r"^staleness/lag(?:_hist)?[_/=](\d+)$")  # share of trained tokens at that lag


class Snapshot(Struct, frozen=True, kw_only=True):
    """Everything the view shows. step: updates committed; samples: rollouts trained; scores: held-out, oldest first.

    metrics: of the newest update. reports: the newest of every actor; their seconds only grow.
    """

    name: str
    elapsed_s: float
    step: int
    total_steps: int
    samples: int = 0
    metrics: dict[str, float] = {}
    scores: tuple[float, ...] = ()
    counts: GroupCounts | None = None
    reports: tuple[Report, ...] = ()
    restarts: dict[str, int] = {}


class Pace(Struct, frozen=True, kw_only=True):
    """How fast it goes just now. shares: per actor, the part of its recent time in each state; None: not known yet."""

    samples_per_s: float | None = None
    left_s: float | None = None
    shares: dict[str, dict[str, float]] = {}


def pace(old: Snapshot, new: Snapshot) -> Pace:
    """What happened between two snapshots of a run. An actor that was restarted in between is judged since its restart."""
    seconds, steps = new.elapsed_s - old.elapsed_s, new.step - old.step
    before = {report.name: report.seconds for report in old.reports}
    return Pace(
        samples_per_s=(new.samples - old.samples) / seconds if seconds > 0 and steps > 0 else None,
        left_s=(new.total_steps - new.step) * seconds / steps if steps > 0 else None,
        shares={report.name: _shares(before.get(report.name, {}), report.seconds) for report in new.reports},
    )


def dashboard(now: Snapshot, rate: Pace, width: int = 100) -> str:
    """The live view as lines of text of at most `width` columns."""
    done = now.step / max(now.total_steps, 1)
    bar = _bar(done, 28)
    lines = [
        f"{now.name}  {clock(now.elapsed_s)} elapsed · {clock(rate.left_s)} left",
        f"step     {now.step}/{now.total_steps} {bar} {done:4.0%}   {number(rate.samples_per_s)} samples/s",
        f"reward   {_figure(now.metrics, 'reward/mean')}   held-out {_scores(now.scores)}"
        f"   answer {_figure(now.metrics, 'response_length/mean')} tokens",
    ]
    if lags := _lags(now.metrics):
        lines.append("lag      " + "  ".join(f"{lag} {_bar(share, 6)} {share:.0%}" for lag, share in lags))
    if now.counts is not None:
        lines.append("groups   " + _ledger(now.counts))  # fits 80 columns up to thousands
    if unscored := _unscored(now.reports):
        lines.append(f"unscored {unscored}")
    for name, shares in sorted(rate.shares.items()):
        if shares:
            lines.append(f"{name:<14} " + "  ".join(f"{state} {share:.0%}" for state, share in _ordered(shares)))
    if now.restarts:
        lines.append("restarts " + ", ".join(f"{name} ×{count}" for name, count in sorted(now.restarts.items())))
    return "\n".join(line[:width] for line in lines)


def one_line(now: Snapshot, rate: Pace) -> str:
    """The same, on the one line that a log file gets."""
    parts = [
        f"step {now.step}/{now.total_steps}",
        f"reward {_figure(now.metrics, 'reward/mean')}",
        f"held-out {_scores(now.scores)}",
    ]
    if lags := _lags(now.metrics):
        parts.append("lag " + " ".join(f"{lag}:{share:.0%}" for lag, share in lags))
    parts.append(f"{number(rate.samples_per_s)} samples/s")
    busy = {name: shares.get("busy", 0.0) for name, shares in sorted(rate.shares.items())}
    if busy:
        parts.append("busy " + " ".join(f"{name} {share:.0%}" for name, share in busy.items()))
    if now.counts is not None:
        parts.append(f"groups {_ledger(now.counts)}")
    if unscored := _unscored(now.reports):
        parts.append(f"unscored {unscored}")
    if now.restarts:
        parts.append(f"{sum(now.restarts.values())} restarts")
    return " · ".join([*parts, f"{clock(now.elapsed_s)} elapsed", f"{clock(rate.left_s)} left"])


class Progress:
    """Shows snapshots as they come. `update` never waits for the terminal longer than a write does."""

    def __init__(self, stream: TextIO | None = None, live: bool | None = None) -> None:
        """live None: if the stream is a terminal that can move its cursor."""
        self._stream = sys.stderr if stream is None else stream
        if live is None:
            live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._history: deque[Snapshot] = deque()
        self._printed: Snapshot | None = None
        self._live = None
        if live:
            from rich.console import Console
            from rich.live import Live

            self._console = Console(file=self._stream)
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def update(self, snapshot: Snapshot) -> None:
        """Takes the run's newest state, and shows it if it is time to."""
        self._history.append(snapshot)
        # The entry just older than the window stays: rates then span at least the window.
        while len(self._history) > 2 and snapshot.elapsed_s - self._history[1].elapsed_s >= WINDOW_S:
            self._history.popleft()
        if self._live is not None:
            self._draw(snapshot)
        elif self._due(snapshot):
            self._print(snapshot)

    def close(self) -> None:
        """Shows the last state once more, and gives the terminal back. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._history and self._printed is not self._history[-1]:
            self._print(self._history[-1])
        self._history.clear()

    def _draw(self, snapshot: Snapshot) -> None:
        from rich.text import Text

        assert self._live is not None
        text = dashboard(snapshot, pace(self._history[0], snapshot), self._console.width)
        self._live.update(Text(text, no_wrap=True), refresh=True)

    def _due(self, snapshot: Snapshot) -> bool:
        if self._printed is None:
            return True
        waited = snapshot.elapsed_s - self._printed.elapsed_s
        return waited >= QUIET_S or (waited >= LINE_EVERY_S and snapshot.step != self._printed.step)

    def _print(self, snapshot: Snapshot) -> None:
        self._printed = snapshot
        print(one_line(snapshot, pace(self._history[0], snapshot)), file=self._stream, flush=True)


def _shares(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    spent = {state: seconds - before.get(state, 0.0) for state, seconds in after.items()}
    if any(seconds < 0 for seconds in spent.values()):
        spent = after  # restarted: its seconds began anew
    total = sum(spent.values())
    return {state: seconds / total for state, seconds in spent.items()} if total > 0 else {}


def _ordered(shares: dict[str, float]) -> Iterable[tuple[str, float]]:
    """busy, sync, then whom it waits for, longest first; below half a percent is left out."""
    rank = {"busy": 0, "sync": 1}
    shown = [(state, share) for state, share in shares.items() if share >= 0.005 or state == "busy"]
    return sorted(shown, key=lambda item: (rank.get(item[0], 2), -item[1]))


def _lags(metrics: dict[str, float]) -> list[tuple[int, float]]:
    return sorted((int(match[1]), share) for name, share in metrics.items() if (match := _LAG.match(name)))


def _ledger(counts: GroupCounts) -> str:
    ends = ("trained", "filtered", "evicted", "failed", "pending")
    return f"{counts.reserved} = " + " + ".join(f"{getattr(counts, end)} {end}" for end in ends)


def _unscored(reports: Iterable[Report]) -> str:
    """Samples on which the reward function failed; empty while there are none."""
    reports = [report for report in reports if report.role == "reward"]
    counts = {status: sum(report.gauges.get(status, 0.0) for report in reports) for status in ("invalid", "timeout")}
    return " + ".join(f"{count:.0f} {status}" for status, count in counts.items() if count)


def _scores(scores: tuple[float, ...]) -> str:
    if not scores:
        return "–"
    return f"{scores[0]:.3f}" if len(scores) == 1 else f"{scores[0]:.3f} → {scores[-1]:.3f}"


def _figure(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.3g}" if name in metrics else "–"


def number(value: float | None) -> str:
    """A rate in as few characters as it needs, or a dash."""
    return "–" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _bar(share: float, width: int) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    return "█" * full + "░" * (width - full)


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
