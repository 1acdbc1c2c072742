"""`asyncrl samples RUN`: rollouts of a run, also while it goes on: prompts, responses, rewards.

On a terminal panels, one for each group; else, or with --json, a line of JSON for each rollout.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import get_args

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

import asyncrl.replay
from asyncrl.errors import ConfigError, DataError
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.report.samples import (
    DETAILS,
    SCALARS,
    SCALARS_AND_TOKENS,
    Order,
    RolloutSample,
    by_group,
    chosen,
    compared,
    groups_of,
    ranked,
    samples_of,
    summed,
    visible,
)
from asyncrl.types import Purpose, Status

_SHOWN = 16  # on a terminal, where --limit does not say
_AT_ONCE = 1 << 14  # samples that are samples_of together: their tokens are held
_PER_TOKEN = ("token_ids", "chosen", "logprobs")


def samples_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl samples`, and sets what runs."""
    parser.add_argument("run", metavar="RUN", help="a run directory; the run may be going on")
    parser.add_argument("--update", type=int, metavar="N", help="only what update N was trained on")
    parser.add_argument("--group", type=int, metavar="G", help="only the responses of one group")
    parser.add_argument("--status", choices=get_args(Status), help="only rollouts with this verdict")
    parser.add_argument("--data-source", default="", metavar="S", help="only prompts of this data source")
    parser.add_argument("--eval", action="store_true", help="held-out rollouts, not those for training")
    order = "gain: reward less the group's mean; surprise: mean −logprob; length: response tokens; lag: in updates"
    parser.add_argument(
        "--sort", choices=get_args(Order), help=f"largest first; of --worst and --best instead of reward ({order})"
    )
    parser.add_argument("--worst", type=int, default=0, metavar="K", help="the K with the smallest reward (or --sort)")
    parser.add_argument("--best", type=int, default=0, metavar="K", help="the K with the largest")
    limit = f"at most so many, 0: all (default: {_SHOWN} in panels, all in JSON). Without anything said: of the newest update"
    parser.add_argument("--limit", type=int, metavar="N", help=limit)
    parser.add_argument("--json", action="store_true", help="JSON lines, as when standard output is no terminal")
    parser.add_argument("--tokens", action="store_true", help="JSON lines with token ids and logprobs (nats)")
    parser.set_defaults(job=_samples)


def _samples(args: argparse.Namespace) -> int:
    """Prints them; standard error says how many there are if not all are shown."""
    for flag in ("worst", "best", "limit", "update", "group"):
        if (getattr(args, flag) or 0) < 0:
            raise ConfigError(f"--{flag} {getattr(args, flag)} < 0: say which, or how many")
    log = asyncrl.replay.open(args.run)
    lines = _picked(args, log)
    in_json = args.json or args.tokens or not sys.stdout.isatty()
    limit = args.limit if args.limit is not None else 0 if in_json or args.worst or args.best else _SHOWN
    shown = lines.slice(0, limit) if limit else lines
    console = Console(highlight=False, markup=False, emoji=False)
    for samples in _in_parts(log, shown):
        if in_json:
            sys.stdout.writelines(_as_json(sample, args.tokens) for sample in samples)
        else:
            console.print(*_panels(samples), sep="\n")
    if len(shown) < len(lines):
        print(f"{len(shown)} of {len(lines)} rollouts; --limit 0 shows all", file=sys.stderr)
    return 0


def _picked(args: argparse.Namespace, log: ReplayReader) -> pa.Table:
    """The lines asked for, in order. Raises DataError where that update or group has none, and says what has."""
    columns, groups = SCALARS_AND_TOKENS if args.sort == "surprise" else SCALARS, None if args.group is None else [args.group]
    lines = compared(log.rollouts(columns, groups=groups, each=summed))
    if not len(lines):
        known = "" if groups is None else _span(log.rollouts(["group"]).column("group"))
        there = f"no rollout of group {args.group}; there are groups {known}" if known else "no rollout yet: none was submitted"
        raise DataError(f"{args.run}: {there}")
    updates, update = _span(lines.column("trained_update")), args.update
    if update is not None and not len(chosen(lines, update=update)):
        of = "" if groups is None else f" of group {args.group}"
        raise DataError(f"{args.run}: --update {update} trained no rollout{of}; updates that did: {updates or 'none yet'}")
    if updates and not any((args.update, groups, args.status, args.data_source, args.sort, args.worst, args.best, args.eval)):
        update = pc.max(lines.column("trained_update")).as_py()
    if args.data_source and args.data_source not in lines.column("data_source").unique().to_pylist():
        known = _said_counts(lines.column("data_source"))
        raise DataError(f"{args.run}: no rollout of --data-source {args.data_source}; there are {known}")
    purpose: Purpose | None = "eval" if args.eval else "train" if groups is None else None
    found = chosen(lines, update=update, status=args.status or "", source=args.data_source, purpose=purpose)
    if not len(found):
        known = f"status: {_said_counts(lines.column('status'))}; data source: {_said_counts(lines.column('data_source'))}"
        print(f"{args.run}: none of these among {len(lines)} rollouts ({known})", file=sys.stderr)
    return ranked(found, by=args.sort, worst=args.worst, best=args.best)


def _span(column: pa.ChunkedArray) -> str:
    """The smallest and the largest, in words; empty if there is none."""
    ends = pc.min_max(column).as_py()
    return "" if ends["min"] is None else f"{ends['min']} to {ends['max']}"


def _said_counts(column: pa.ChunkedArray) -> str:
    return ", ".join(f"{one['counts']} {one['values'] or 'not scored yet'}" for one in pc.value_counts(column).to_pylist())


def _in_parts(log: ReplayReader, lines: pa.Table) -> Iterator[list[RolloutSample]]:
    for first in range(0, len(lines), _AT_ONCE):
        part = lines.slice(first, _AT_ONCE)
        yield samples_of(log.rollouts(DETAILS, groups=groups_of(part)), part)


def _as_json(sample: RolloutSample, with_tokens: bool) -> str:
    told = msgspec.to_builtins(sample)
    for name in () if with_tokens else _PER_TOKEN:
        del told[name]
    return msgspec.json.encode(told).decode() + "\n"


# ------------------------------------------------------------------------------------------------- panels


def _panels(samples: Sequence[RolloutSample]) -> Iterator[Panel]:
    """One for each group: its prompt, then its responses."""
    for together in by_group(samples):
        first = together[0]
        trained = "held out" if first.purpose == "eval" else f"trained by update {first.trained_update}"
        became = trained if first.trained_update is not None or first.purpose == "eval" else first.outcome or "pending"
        title = f"group {first.group} · {became} · {visible(first.data_source)} · row {first.row}"
        prompt = Text(visible(first.prompt), style="bold")
        truth = Text(f"expected: {visible(first.ground_truth)}", style="dim")
        parts = [part for sample in together for part in _response(sample)]
        yield Panel(Group(prompt, truth, *parts), title=Text(title, overflow="ellipsis"), title_align="left")


def _response(sample: RolloutSample) -> Iterator[Text | Rule]:
    figures = [
        f"reward {_number(sample.reward)}",
        f"gain {_number(sample.gain, '+')}",
        f"{sample.length} tokens",
        sample.finish_reason,
    ]
    figures += [f"surprise {_number(sample.surprise)}", f"weights {', '.join(str(span.update) for span in sample.spans)}"]
    figures += [f"lag {sample.lag}"] if sample.lag is not None else []
    figures += [sample.worker, *(f"{visible(name)} {_number(value)}" for name, value in sample.parts.items())]
    style = {"ok": "green", None: "yellow"}.get(sample.status, "red")
    yield Rule(
        Text(f"{sample.name} {sample.status or 'not scored yet'}{' baseline' if sample.baseline else ''}", style), align="left"
    )
    yield Text(" · ".join(figures), style="dim")
    for message in sample.messages:
        yield Text(f"{visible(message.role)}: ", style="bold").append(visible(message.content), style="not bold")
    if not sample.messages:
        yield Text(visible(sample.response))
    for name, said in sample.said.items():
        yield Text(f"{visible(name)} says: ", style="magenta").append(visible(said))
    if sample.error:
        yield Text(visible(sample.error), style="red")


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4g}"
