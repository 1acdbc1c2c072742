"""One scoring process: a fork of `python -m asyncrl.reward.process TERMS …`, reward terms as JSON; see `asyncrl.forks`.

    Scorer ── list[Sample] ──► fork       a batch, scored one at a time, in order
    Scorer ◄── Verdict ─────── fork       one per sample, in order; it also says that the next sample starts

No numpy, no torch: it must start quickly.
"""

import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

import msgspec

from asyncrl.config import RewardTerm
from asyncrl.forks import LONGEST, Broken, Died, Loaded, fork_for
from asyncrl.processes import HEADER, framed, read_frame
from asyncrl.reward.functions import load_terms
from asyncrl.reward.results import Sample, Verdict

Reply = Verdict | Loaded | Broken | Died
_samples = msgspec.msgpack.Decoder(list[Sample])
_replies = msgspec.msgpack.Decoder(Reply)


def to_frame(message: list[Sample] | Reply) -> bytes:
    return framed(msgspec.msgpack.encode(message))


def take_replies(received: bytearray) -> list[Reply]:
    """Cuts the whole frames off the front of `received`; the rest waits for more, however the socket split it.

    Raises ValueError if that is no frame of a reply, or one too long.
    """
    replies = []
    while len(received) >= HEADER and len(received) >= (end := HEADER + int.from_bytes(received[:HEADER])):
        replies.append(_replies.decode(received[HEADER:end]))
        del received[:end]
    if len(received) >= HEADER and end > LONGEST:
        raise ValueError(f"{end:,} bytes at once; at most {LONGEST:,} are read")
    return replies


def load_scoring(terms: str) -> Callable[[socket.socket], None]:
    """What scores in a fork. Raises ConfigError if a function can't be loaded."""
    return partial(serve, load_terms(msgspec.json.decode(terms, type=tuple[RewardTerm, ...])))


def serve(judge: Callable[[Sample], Verdict], peer: socket.socket) -> None:
    """Scores batches until the owner closes its end."""
    stream = peer.makefile("rb")
    while frame := read_frame(stream):
        for sample in _samples.decode(frame):
            verdict = judge(sample)
            # An alarm that the function left running would hit the next sample.
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                reply = to_frame(verdict)
            except (UnicodeEncodeError, TypeError) as error:  # e.g. a lone surrogate in the error's text
                reply = to_frame(Verdict("invalid", error=f"the verdict could not be encoded: {error!a}"))
            peer.sendall(reply)


if __name__ == "__main__":
    fork_for(partial(load_scoring, sys.argv[1]), *map(int, sys.argv[2:]))
