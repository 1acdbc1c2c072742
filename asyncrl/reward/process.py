"""One scoring process: `python -m asyncrl.reward.process TERMS LIFELINE`, started by `Scorer` and by nobody else.

TERMS: the reward terms as JSON. Every message is a frame: its length in bytes, then msgpack.

    Scorer ── list[Sample] ──► standard input       (a batch, scored one at a time, in order)
    Scorer ◄── Ready | Broken ── standard output    (once, when the function is loaded or can't be)
    Scorer ◄── Verdict ── standard output           (one per sample, in order; it also says that the next sample starts)

Both streams are moved away first, so that what the user's function prints goes to standard error, and cannot break a frame.
No numpy, no torch: a scoring process must start quickly.
"""

import os
import signal
import sys
from typing import BinaryIO

import msgspec
from msgspec import Struct

from asyncrl.config import RewardTerm
from asyncrl.errors import ConfigError
from asyncrl.processes import HEADER, end_with_owner, framed, read_frame
from asyncrl.reward.functions import load_terms
from asyncrl.reward.results import Sample, Verdict


class Ready(Struct, frozen=True, array_like=True, tag="ready"):
    """The function is loaded."""


class Broken(Struct, frozen=True, array_like=True, tag="broken"):
    """The function can't be loaded: no process of this pool ever could."""

    error: str


Reply = Verdict | Ready | Broken
_samples = msgspec.msgpack.Decoder(list[Sample])
_replies = msgspec.msgpack.Decoder(Reply)


def to_frame(message: list[Sample] | Reply) -> bytes:
    return framed(msgspec.msgpack.encode(message))


def take_replies(received: bytearray) -> list[Reply]:
    """Cuts the whole frames off the front of `received`; the rest waits for more, however the pipe split it."""
    replies = []
    while len(received) >= HEADER and len(received) >= (end := HEADER + int.from_bytes(received[:HEADER])):
        replies.append(_replies.decode(received[HEADER:end]))
        del received[:end]
    return replies


def serve(terms: str, lifeline: int) -> int:
    """Scores batches until the owner closes its end. Returns the exit code: 1 if the function can't be loaded."""
    end_with_owner(lifeline)
    tasks, results = _private_streams()
    try:
        judge = load_terms(msgspec.json.decode(terms, type=tuple[RewardTerm, ...]))
    except ConfigError as error:
        _send(results, Broken(str(error)))
        return 1
    _send(results, Ready())
    while frame := read_frame(tasks):
        for sample in _samples.decode(frame):
            verdict = judge(sample)
            # An alarm that the function left running would hit the next sample.
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(results, verdict)
    return 0


def _send(results: BinaryIO, reply: Reply) -> None:
    try:
        frame = to_frame(reply)
    except (UnicodeEncodeError, TypeError) as error:  # e.g. a lone surrogate in the error's text
        frame = to_frame(Verdict("invalid", error=f"the verdict could not be encoded: {error!a}"))
    results.write(frame)
    results.flush()


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    tasks, results = os.dup(0), os.dup(1)  # dup'ed descriptors are not inherited by the user's own subprocesses
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return os.fdopen(tasks, "rb"), os.fdopen(results, "wb")


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], int(sys.argv[2])))
