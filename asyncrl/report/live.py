"""The live view as a screen of text: as many lines as the terminal has room for, none wider than it is.

name ━━━━━━━━━╸        40/100      progress, then the newest figures with how they came to be,
reward ▁▃▅▆ 0.671   held-out …     the lags of trained tokens, what became of groups,
learner ██████░░░░ busy 60% …      where each actor's time goes, whom it waits for;
s newest samples  …                or the newest samples, while they are asked for
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.jupyter import JupyterMixin
from rich.text import Text

from asyncrl.report.pace import Pace, Shares, clock, episodes, lags, ordered, outcomes, restarts, stops, unscored
from asyncrl.report.summary import RunSummary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from asyncrl.report.samples import RolloutSample

    Samples = Sequence[RolloutSample] | str | None

KEPT = 512  # points of a curve
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_CURVES = {  # by label: the metric, and how its newest value is written
    "reward": ("reward/mean", "{:.3g}"),
    "held-out": ("eval/score", "{:.3f}"),
    "samples/s": ("samples_per_s", "{:,.3g}"),
    "response": ("response_length/mean", "{:.3g} tokens"),
    "lag": ("staleness/lag_mean", "{:.2g} mean"),
    "gap": ("gap/logprob_mean_abs", "{:.2g} nats"),
}
_SPARED = 4  # lines of a terminal that the view leaves to the log


class History:
    """The newest KEPT values of what curves show, by update."""

    def __init__(self) -> None:
        self._points: dict[str, deque[tuple[int, float]]] = {name: deque(maxlen=KEPT) for name, _ in _CURVES.values()}

    def update(self, run: RunSummary, pace: Pace) -> None:
        rate = {} if pace.samples_per_s is None else {"samples_per_s": pace.samples_per_s}
        newest = {run.committed: run.metrics | rate} if run.committed in run.steps else {}
        for update, figures in [*newest.items(), *((update, record.metrics) for update, record in sorted(run.evals.items()))]:
            for name, points in self._points.items():
                if name in figures and (not points or update > points[-1][0]):
                    points.append((update, figures[name]))
        for points in self._points.values():  # a learner that was restored to an earlier update makes the later ones anew
            while points and points[-1][0] > run.committed:
                points.pop()

    def values(self, name: str) -> list[float]:
        return [value for _, value in self._points[name] if math.isfinite(value)]


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """A curve of at most `width` characters, from the lowest value to the highest; neighbours are averaged to fit."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


class Screen(JupyterMixin):
    """What a terminal shows of a run at a time; a renderable of rich's, laid out for the terminal that it meets."""

    def __init__(
        self,
        run: RunSummary,
        pace: Pace,
        history: History,
        samples: "Sequence[RolloutSample] | str | None" = None,
        keys: str = "",
    ) -> None:
        """samples: the newest, or why there are none; None: nobody asked. keys: what may be pressed."""
        self._run, self._pace, self._history, self._samples, self._keys = run, pace, history, samples, keys

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator[Text]:
        width, height = options.max_width, options.size.height if console.is_terminal else 100
        blocks = _PLAIN if options.ascii_only else _BLOCKS
        for line in self.lines(width, max(3, height - _SPARED), blocks):
            line.truncate(width, overflow="crop" if options.ascii_only else "ellipsis")
            yield line

    def lines(self, width: int, height: int, blocks: str = _BLOCKS) -> list[Text]:
        """At most `height` lines; what counts least is left out first."""
        head, last = self._head(width, blocks), [Text(self._keys, "dim")] if self._keys else []
        if self._samples is not None:
            return [head, *self._newest(width)][: height - len(last)] + last
        curves, facts = self._curves(width, blocks), self._facts(width, blocks)
        actors = self._actors(width, blocks, alone=True)
        room = height - 1 - len(last)
        if len(curves) + len(facts) + len(actors) > room:
            actors = self._actors(width, blocks, alone=False)
        if (over := len(curves) + len(facts) + len(actors) - room) > 0:
            curves = curves[: max(1, len(curves) - over)]
        return [head, *curves, *facts, *actors][: room + 1] + last

    def _head(self, width: int, blocks: str) -> Text:
        run = self._run
        time = f"{clock(run.elapsed_s)} elapsed, {clock(self._pace.left_s)} left"
        said = f" {run.committed}/{run.total_steps}  {time}"
        bar = max(4, min(40, width - len(run.name) - len(said) - 2))
        share = run.committed / max(run.total_steps, 1)
        return Text.assemble((run.name, "bold"), " ", *_bar([(share, "cyan")], bar, blocks), said)

    def _curves(self, width: int, blocks: str) -> list[Text]:
        """Two beside each other, where there is room."""
        columns = 2 if width >= 76 else 1
        each = (width - 2 * (columns - 1)) // columns
        cells = []
        for label, (name, form) in _CURVES.items():
            values = self._history.values(name)
            if not values:
                continue
            said = form.format(values[-1])
            if name == "eval/score" and len(values) > 1:
                said = f"{form.format(values[0])} → {said}"
            curve = sparkline(values, max(0, each - 12 - len(said)), blocks)
            cells.append(Text.assemble((f"{label:<10} ", "dim"), (curve, "green"), " ", (said, "bold")))
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        for row in rows:
            for cell in row[:-1]:
                cell.truncate(each, pad=True)
        return [Text("  ").join(row) for row in rows]

    def _facts(self, width: int, blocks: str) -> list[Text]:
        run = self._run
        said = {
            "groups": outcomes(run),
            "episodes": episodes(run.metrics),
            "stopped": "  ".join(f"{why} {share:.0%}" for why, share in stops(run.metrics).items()),
            "unscored": unscored(run),
            "restarts": restarts(run),
        }
        facts = [_labelled(label, Text(value)) for label, value in said.items() if value]
        return [*([_labelled("lags", _histogram(found, width - 11, blocks))] if (found := lags(run)) else []), *facts]

    def _actors(self, width: int, blocks: str, *, alone: bool) -> list[Text]:
        """A line for each actor, or of those of a role one, with the mean."""
        shares = {name: shares for name, shares in sorted(self._pace.shares.items()) if shares}
        if not alone:
            shares = _by_role(shares)
        label = min(14, max(map(len, shares), default=0))
        lines = []
        for name, states in shares.items():
            bar = max(6, min(24, (width - label) // 4))
            parts = [(share, _STYLES.get(state, "bright_black")) for state, share in ordered(states).items()]
            said = "  ".join(f"{state} {share:.0%}" for state, share in ordered(states).items())
            lines.append(Text.assemble((f"{name:<{label}.{label}} ", "dim"), *_bar(parts, bar, blocks), " ", said))
        return lines

    def _newest(self, width: int) -> Iterator[Text]:
        if isinstance(self._samples, str):
            yield Text(self._samples, "dim")
            return
        for sample in self._samples or ():
            scored = "not scored yet" if sample.status is None else f"{sample.status}"
            reward = "" if sample.reward is None else f" {sample.reward:.3g}"
            lag = "" if sample.lag is None else f", lag {sample.lag}"
            yield Text.assemble((f"{sample.name}  ", "dim"), f"{scored}{reward}, {sample.length} tokens{lag}")
            yield Text.assemble(("  › ", "cyan"), _one_line(sample.prompt, width))
            yield Text.assemble(("  ‹ ", "green"), _one_line(sample.response, width))


_STYLES = {"busy": "green", "sync": "yellow"}


def _bar(parts: Sequence[tuple[float, str]], width: int, blocks: str) -> Iterator[tuple[str, str]]:
    """Shares of 1 side by side, each in its style; the rest is blank."""
    full, used, upto = ("█" if blocks is _BLOCKS else "#"), 0, 0.0
    for share, style in parts:
        upto += share
        end = min(width, round(upto * width))
        dim = style == "bright_black"
        yield (("░" if blocks is _BLOCKS else ".") if dim else full) * max(0, end - used), style
        used = max(used, end)
    yield "·" * (width - used) if blocks is _BLOCKS else " " * (width - used), "bright_black"


def _histogram(lags: dict[int, float], width: int, blocks: str) -> Text:
    """A bar over each lag; a column is four characters wide, and past the last that fits stands the rest."""
    shown = list(lags.items())
    room = max(1, width // 9)
    rest = sum(share for _, share in shown[room - 1 :]) if len(shown) > room else 0.0
    cells = [(str(lag), share) for lag, share in (shown[: room - 1] if rest else shown)]
    cells += [(f"{shown[room - 1][0]}+", rest)] if rest else []
    text = Text()
    for name, share in cells:
        level = blocks[min(len(blocks) - 1, int(share * len(blocks)))] if share else " "
        text.append(f"{name}").append(level, "magenta").append(f" {share:.0%}  ")
    return text


def _labelled(label: str, value: Text) -> Text:
    return Text.assemble((f"{label:<10} ", "dim"), value)


def _by_role(shares: dict[str, Shares]) -> dict[str, Shares]:
    """Of those whose names differ by a number alone, the mean."""
    together: dict[str, list[Shares]] = {}
    for name, states in shares.items():
        role, _, place = name.rpartition("-")
        together.setdefault(role if place.isdigit() else name, []).append(states)
    found = {}
    for role, of in together.items():
        names = dict.fromkeys(state for one in of for state in one)
        mean = {state: sum(one.get(state, 0.0) for one in of) / len(of) for state in names}
        found[f"{role} ×{len(of)}" if len(of) > 1 else role] = mean
    return found


def _one_line(text: str, width: int) -> str:
    """Its beginning, and its end; line breaks and control characters are spelt."""
    room = max(8, width - 8)
    if len(text) > 2 * room:
        text = text[:room] + text[-room:]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= room else f"{line[: room // 2]} … {line[-(room - room // 2 - 3) :]}"
