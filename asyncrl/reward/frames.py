"""What travels between a pool and its scoring processes: length-prefixed msgpack frames over two pipes.

    pool ── list[Sample] ──► process          (a batch, scored one at a time, in order)
    pool ◄── Ready | Broken ── process        (once, when the function is loaded or can't be)
    pool ◄── Verdict ── process               (one per sample, in order; it also says that the next sample starts)

No numpy, no torch: a scoring process must start quickly.
"""

import struct
from typing import Literal

import msgspec
from msgspec import Struct

_HEADER = struct.Struct("<I")


class Sample(Struct, frozen=True, array_like=True):
    """One response to score. ground_truth, extra_info and record are JSON texts.

    record: an object, the dataset row by column, its prompt under "prompt". response_ids: the response's tokens. TRL's
    functions may ask for both. turns: offsets in response_ids where turns start.
    """

    data_source: str
    solution_str: str
    ground_truth: str
    extra_info: str
    record: str = "{}"
    response_ids: list[int] = []
    turns: tuple[int, ...] = (0,)


class Verdict(Struct, frozen=True, array_like=True, tag="verdict"):
    """Only `ok` carries a reward; `parts` are the other numbers that the function returned, by name.

    answer: what the function took out of the response as its answer (`pred` in its dict); majority votes count these.
    token_rewards: what each response token earns beside the reward, or None.
    """

    status: Literal["ok", "invalid", "timeout"]
    reward: float | None = None
    parts: dict[str, float] = {}
    error: str = ""
    answer: str | None = None
    token_rewards: list[float] | None = None


class Ready(Struct, frozen=True, array_like=True, tag="ready"):
    """The function is loaded."""


class Broken(Struct, frozen=True, array_like=True, tag="broken"):
    """The function can't be loaded: no process of this pool ever could."""

    error: str


_samples = msgspec.msgpack.Decoder(list[Sample])
_replies = msgspec.msgpack.Decoder(Verdict | Ready | Broken)
_encoder = msgspec.msgpack.Encoder()


def frame(message: list[Sample] | Verdict | Ready | Broken) -> bytes:
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


def samples(body: bytes) -> list[Sample]:
    return _samples.decode(body)


def reply(body: bytes) -> Verdict | Ready | Broken:
    return _replies.decode(body)


class FrameReader:
    """Cuts a byte stream into frames, however the pipe split it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes; the rest waits for more."""
        self._buffer += data
        bodies, start = [], 0
        while len(self._buffer) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return bodies
