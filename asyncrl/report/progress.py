"""What a person sees while a run or a warm start goes on: a live view on a terminal, else plain lines. On standard error."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from asyncrl.report.notebook import CellView, in_notebook
from asyncrl.report.pace import Pace, Shares, clock, episodes, lags, number, outcomes, restarts, stops, unscored
from asyncrl.report.summary import RunSummary

if TYPE_CHECKING:
    from asyncrl.report.samples import RolloutSample

LINE_EVERY_S = 5.0
DRAW_EVERY_S = 1.0
QUIET_S = 30.0  # without a new step a plain line comes only this often


def one_line(run: RunSummary, pace: Pace) -> str:
    """How a run stands, on the one line that a log file gets; of each actor's time only the share in which it was busy."""
    ends = [f"{score:.3f}" for score in run.scores]
    figure = run.metrics.get
    told: list[tuple[str, str | Shares]] = [
        ("time", f"{clock(run.elapsed_s)} elapsed, {clock(pace.left_s)} left, {number(pace.samples_per_s)} samples/s"),
        ("reward", f"{figure('reward/mean'):.3g}" if "reward/mean" in run.metrics else ""),
        ("held-out", " → ".join(ends[:1] + ends[1:][-1:])),
        ("response", f"{figure('response_length/mean'):.3g} tokens" if "response_length/mean" in run.metrics else ""),
        ("episodes", episodes(run.metrics)),
        ("stopped", stops(run.metrics)),
        ("lag", {str(lag): share for lag, share in lags(run).items()}),
        ("groups", outcomes(run)),
        ("unscored", unscored(run)),
        ("restarts", restarts(run)),
        ("busy", {name: shares.get("busy", 0.0) for name, shares in sorted(pace.shares.items()) if shares}),
    ]
    parts = [f"step {run.committed}/{run.total_steps}"]
    for label, value in told:
        if value:
            shown = value if isinstance(value, str) else " ".join(f"{name}:{share:.0%}" for name, share in value.items())
            parts.append(f"{label} {shown}")
    return " · ".join(parts)


class Progress:
    """Shows a run as it goes on: live on a terminal that can move its cursor, and in a notebook's cell. `update` never waits
    for the terminal longer than a write does."""

    def __init__(self, newest_samples: "Callable[[], Sequence[RolloutSample]] | None" = None) -> None:
        """newest_samples: reads some, for whoever presses `s` at the terminal. None: no keys are read."""
        self._pace = Pace()
        self.newest: RunSummary | None = None  # as `update` got it
        self._printed: tuple[float, int] | None = None  # seconds elapsed and step of the newest plain line
        self._drawn: tuple[float, int] = (-math.inf, -1)  # the same of the live view
        self._read = newest_samples
        self._samples: Sequence[RolloutSample] | str | None = None  # what is shown of them; None: nothing
        self._history: Any = None
        self._live: Any = CellView() if in_notebook() else None
        if self._live is None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from asyncrl.report.terminal import TerminalView

            self._live = TerminalView(sys.stderr, keys=newest_samples is not None)

    def update(self, run: RunSummary) -> None:
        """Takes the run's newest state, and shows it if it is time to; nothing before the run is up: rates count from there."""
        if run.starting:
            return
        self.newest = run
        self._pace.update(run)
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.start()  # once there is something to show
                pressed = self._answer(self._live.pressed())
                if pressed or run.elapsed_s - self._drawn[0] >= DRAW_EVERY_S:
                    self._draw(run)
        elif self._due(run):
            self._print(run)

    def close(self) -> None:
        """Shows the last state once more, and gives the terminal back. Idempotent."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                if self.newest is not None and self._drawn != (self.newest.elapsed_s, self.newest.committed):
                    self._draw(self.newest)
                self._live.stop()
        elif self.newest is not None and self._printed != (self.newest.elapsed_s, self.newest.committed):
            self._print(self.newest)

    def _draw(self, run: RunSummary) -> None:
        from asyncrl.report.live import History, Screen

        self._drawn = run.elapsed_s, run.committed
        self._history = self._history or History()
        self._history.update(run, self._pace)
        keys = "" if self._read is None else "s newest samples" if self._samples is None else "s newer samples · q back"
        self._live.update(Screen(run, self._pace, self._history, self._samples, keys), refresh=True)

    def _answer(self, keys: str) -> bool:
        """Does what was asked for; whether anything was."""
        if "s" in keys and self._read is not None:
            self._samples = "reading the newest samples …"
            threading.Thread(target=self._read_samples, name="newest samples", daemon=True).start()
        elif keys:
            self._samples = None
        return bool(keys)

    def _read_samples(self) -> None:
        """In a thread of its own: the log may be large."""
        assert self._read is not None
        try:
            found: Sequence[RolloutSample] | str = self._read() or "no rollout has come yet"
        except Exception as error:
            found = f"they can't be read: {error}"
        if self._samples is not None:  # else nobody wants them any more
            self._samples, self._drawn = found, (-math.inf, -1)

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
