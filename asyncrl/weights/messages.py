"""What publisher and subscribers say to each other: msgpack structs, tagged by kind. Tensor bytes travel as raw frames.

    subscriber (DEALER)                         publisher (ROUTER)
    Hello ─────────────────────────────────────► Announce           also sent unasked, as a hint, at each publish
    GetManifest ───────────────────────────────► Manifest | Gone
    GetBucket × credit ────────────────────────► Bucket + raw bytes | Gone
    Bye

Requests of one peer are answered in their order. So an `Announce` that answers a `Hello` proves that everything this peer
asked for earlier, and has not got, was dropped: loss is found by order, not by a timer that a slow link would trip.

A version is cut into buckets of equal size. A bucket border may cut a tensor: buckets bound memory in flight, whatever the
sizes of the layers.
"""

import msgspec
from msgspec import Struct

from asyncrl.errors import BadTransfer
from asyncrl.models.layout import ALIGN, DTYPES, TensorSpec, total_bytes
from asyncrl.models.memory import Place
from asyncrl.types import Version


class Manifest(Struct, frozen=True, kw_only=True, tag="manifest"):
    """All that is needed to receive one version, and to prove that it is whole."""

    version: Version
    tensors: tuple[TensorSpec, ...]
    total_bytes: int
    bucket_bytes: int
    # CRC-32, one per bucket. They guard against damage, not against an enemy: peers are authenticated by CURVE.
    checksums: tuple[int, ...]
    place: Place | None = None  # where the same bytes can be opened by processes of the publisher's node

    @property
    def bucket_count(self) -> int:
        return -(-self.total_bytes // self.bucket_bytes)

    def bucket(self, index: int) -> slice:
        """The bytes of one bucket; the last one may be shorter."""
        return slice(index * self.bucket_bytes, min((index + 1) * self.bucket_bytes, self.total_bytes))

    def check(self) -> None:
        """Refuses a manifest that contradicts itself, before any memory is taken for it. Raises BadTransfer."""
        names = set()
        for spec in self.tensors:
            self._require(spec.dtype in DTYPES, f"{spec.name}: unknown dtype {spec.dtype}")
            self._require(spec.name not in names, f"{spec.name} is named twice")
            self._require(min(spec.shape, default=0) >= 0, f"{spec.name}: negative dimension in {spec.shape}")
            self._require(spec.offset >= 0 and spec.offset % ALIGN == 0, f"{spec.name}: offset {spec.offset}")
            names.add(spec.name)
        end = total_bytes(self.tensors)
        self._require(self.total_bytes == end, f"total_bytes={self.total_bytes}, its tensors end at {end}")
        self._require(self.bucket_bytes >= 1, f"bucket_bytes={self.bucket_bytes}")
        count = len(self.checksums)
        self._require(count == self.bucket_count, f"{count} checksums for {self.bucket_count} buckets")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise BadTransfer(f"manifest of weights {self.version}: {message}; not used")


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """A subscriber says who it is, and asks for the newest version."""

    receiver: str
    sequence: int
    holds: Version | None = None
    pulling: Version | None = None  # the version that it takes over the socket


class Bye(Struct, frozen=True, kw_only=True, tag="bye"):
    """A subscriber leaves on purpose: it isn't counted as lost."""


class GetManifest(Struct, frozen=True, kw_only=True, tag="get_manifest"):
    version: Version


class GetBucket(Struct, frozen=True, kw_only=True, tag="get_bucket"):
    version: Version
    index: int


class Announce(Struct, frozen=True, kw_only=True, tag="announce"):
    """The publisher names its newest whole version."""

    version: Version | None  # None before the first
    echo: int = 0  # `sequence` of the Hello that this answers; 0 if it is only a hint


class Bucket(Struct, frozen=True, kw_only=True, tag="bucket"):
    """Header of one bucket; its bytes follow as a second frame."""

    version: Version
    index: int


class Gone(Struct, frozen=True, kw_only=True, tag="gone"):
    """The publisher no longer (or not yet) holds that version; the subscriber asks for the newest."""

    version: Version


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """The request made no sense to the publisher. Asking again would not help."""

    reason: str


Request = Hello | Bye | GetManifest | GetBucket
Reply = Announce | Manifest | Bucket | Gone | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
