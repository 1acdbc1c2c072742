"""What publisher and subscribers say to each other: msgpack structs, tagged by kind. Tensor bytes travel as raw frames.

    subscriber (DEALER)                         publisher (ROUTER)
    Hello ─────────────────────────────────────► Announce           also sent unasked, as a hint, at each publish
    GetManifest ───────────────────────────────► Manifest | Gone
    GetBucket × credit ────────────────────────► Bucket + raw bytes | Gone
    Bye

Requests of one peer are answered in their order. So an `Announce` that answers a `Hello` proves that everything this peer
asked for earlier, and has not got, was dropped: loss is found by order, not by a timer that a slow link would trip.
"""

from typing import Literal

import msgspec
from msgspec import Struct

from asyncrl.types import Version


class TensorSpec(Struct, frozen=True, array_like=True):
    """One tensor in the flat byte layout: C order, from byte `offset` on. Tied tensors share an offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Manifest(Struct, frozen=True, kw_only=True, tag="manifest"):
    """All that is needed to receive one version, and to prove that it is whole.

    checksums: one per bucket of `bucket_bytes` (the last may be shorter). node, file: where the same bytes lie in shared
    memory; file None: nowhere. codec: `full` is every byte of every tensor; a delta codec would add its base here.
    """

    codec: Literal["full"] = "full"
    version: Version
    tensors: tuple[TensorSpec, ...]
    total_bytes: int
    bucket_bytes: int
    checksums: tuple[int, ...]
    node: str = ""
    file: str | None = None


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """Who I am, what I hold, what I am pulling over the socket; asks for the newest version."""

    receiver: str
    sequence: int
    holds: Version | None = None
    pulling: Version | None = None


class Bye(Struct, frozen=True, kw_only=True, tag="bye"):
    """I leave on purpose: don't count me as lost."""


class GetManifest(Struct, frozen=True, kw_only=True, tag="get_manifest"):
    version: Version


class GetBucket(Struct, frozen=True, kw_only=True, tag="get_bucket"):
    version: Version
    index: int


class Announce(Struct, frozen=True, kw_only=True, tag="announce"):
    """The newest whole version; None before the first. sequence: versions announced so far.

    echo: `sequence` of the Hello that this answers; 0 if it is only a hint.
    """

    version: Version | None
    sequence: int
    echo: int = 0


class Bucket(Struct, frozen=True, kw_only=True, tag="bucket"):
    """Header of one bucket; its bytes follow as a second frame."""

    version: Version
    index: int


class Gone(Struct, frozen=True, kw_only=True, tag="gone"):
    """That version is no longer (or not yet) held; ask for the newest."""

    version: Version


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """The request made no sense to the publisher. Asking again would not help."""

    reason: str


Request = Hello | Bye | GetManifest | GetBucket
Reply = Announce | Manifest | Bucket | Gone | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
