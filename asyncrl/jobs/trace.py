"""`asyncrl trace RUN --out trace.json`: who did what when, for https://ui.perfetto.dev, from the log alone."""

import argparse
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

import asyncrl.replay
import asyncrl.replay.log.events as ev
from asyncrl.disk import as_size
from asyncrl.errors import ConfigError, DataError
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.report.lifecycles import COLUMNS, EVENT_COLUMNS, EVENT_KINDS, Hops
from asyncrl.report.trace import RunTrace
from asyncrl.rundir import atomic_file, output_file

_BYTES = 1 << 20  # written at a time


def trace_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl trace`, and sets what runs."""
    parser.add_argument("run", metavar="RUN", help="a run directory; the run may be going on")
    out = "Trace Event Format, JSON, compressed if it ends in .gz; open it in https://ui.perfetto.dev or chrome://tracing"
    parser.add_argument("--out", type=Path, required=True, metavar="trace.json", help=out)
    parser.add_argument("--from", dest="first", type=int, metavar="N", help="from this update on (default: from the start)")
    parser.add_argument("--to", dest="last", type=int, metavar="N", help="up to this update (default: to the end)")
    parser.set_defaults(job=_trace)


def _trace(args: argparse.Namespace) -> int:
    """Writes the file whole or not at all; standard error says what is in it."""
    for flag, update in (("--from", args.first), ("--to", args.last)):
        if update is not None and update < 0:
            raise ConfigError(f"{flag} {update} < 0: no update has that number; the first is 1")
    if args.first is not None and args.last is not None and args.first > args.last:
        raise ConfigError(f"--from {args.first} > --to {args.last}: nothing lies between them")
    out = output_file(args.out)
    log, hops = asyncrl.replay.open(args.run), Hops()
    events = log.events(EVENT_COLUMNS, EVENT_KINDS)
    steps = {(e.version.incarnation, e.version.update): _timings(e) for e in _commits(log)}
    trace = RunTrace(log.rollouts(COLUMNS, each=hops), events, hops.swaps, steps, first=args.first, last=args.last)
    if not trace.updates and (args.first, args.last) != (None, None):
        known = sorted(update for _, update in steps)
        there = f"updates {known[0]} to {known[-1]}" if known else "no update yet"
        raise DataError(f"{args.run}: none of the updates asked for (--from, --to): there are {there}")
    if not len(events):
        raise DataError(f"{args.run}: nothing has happened yet: its log holds no event")
    with atomic_file(out) as beside:
        count = _write_file(beside, trace, args.run, packed=args.out.suffix == ".gz")
    size = as_size(out.stat().st_size)
    print(
        f"{args.out}: {count:,} events, {size}, {len(trace.updates):,} updates; open it in https://ui.perfetto.dev",
        file=sys.stderr,
    )
    return 0


def _commits(log: ReplayReader) -> Iterator[ev.BatchCommitted]:
    return (event for event in log.decoded(ev.BatchCommitted) if isinstance(event, ev.BatchCommitted))


def _timings(commit: ev.BatchCommitted) -> dict[str, float]:
    return {name: value for name, value in commit.metrics.items() if name.startswith("timing_s/")}


def _write_file(path: Path, trace: RunTrace, run: str, *, packed: bool) -> int:
    with path.open("wb") as file:
        if not packed:
            return _write(file, trace, run)
        with gzip.GzipFile("", "wb", 1, file) as packer:
            return _write(packer, trace, run)


def _write(file: IO[bytes] | gzip.GzipFile, trace: RunTrace, run: str) -> int:
    """How many events it wrote, each on a line."""
    encode = msgspec.json.Encoder().encode
    file.write(b'{"displayTimeUnit":"ms","otherData":' + encode({"run": run, "zero": trace.zero}) + b',"traceEvents":[')
    count, lines = 0, bytearray()
    for event in trace.events():
        lines += b",\n" if count else b"\n"
        lines += encode(event)
        count += 1
        if len(lines) >= _BYTES:
            file.write(lines)
            lines.clear()
    file.write(lines + b"\n]}\n")
    return count
