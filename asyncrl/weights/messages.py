"""What publisher and subscribers say to each other: msgpack structs, tagged by kind. Tensor bytes travel as raw frames.

    subscriber (DEALER)                         publisher (ROUTER)
    Hello ─────────────────────────────────────► Announce           also sent unasked, as a hint, at each publish
    GetManifest, with what it holds ───────────► Manifest | Gone    of the whole version, or of what changed since
    GetBucket × credit ────────────────────────► Bucket + raw bytes | Gone
    Bye

Requests of one peer are answered in their order. So an `Announce` that answers a `Hello` proves that everything this peer
asked for earlier, and has not got, was dropped: loss is found by order, not by a timer that a slow link would trip.

A version is cut into buckets of equal size. A bucket border may cut a tensor: buckets bound memory in flight, whatever the
sizes of the layers. They are numbered for each connection; a subscriber confirms the last that came with whatever it says.
Deltas (weights/delta.py) travel in the same way.

A publisher may name another receiver, to take versions from (weights/tree.py). That one speaks the publisher's side of the same
protocol, while it receives itself. The publisher still hears every receiver's `Hello`.
"""

import math

import msgspec
import xxhash
from msgspec import Struct
from msgspec.structs import replace

from asyncrl.errors import BadTransfer
from asyncrl.models.layout import ALIGN, DTYPES, TensorSpec, total_bytes
from asyncrl.models.memory import Place
from asyncrl.types import Version

MAX_BUCKET_BYTES = 64 << 20
_MAX_BYTES = 1 << 60  # of one version: sizes and strides below fit into 64 bits
_MAX_DIMENSIONS = 64

# XXH3, 64 bits. It guards against damage, not against an enemy: peers are authenticated by CURVE. zlib.crc32 takes three times
# as long, and of random damage misses one in 2^32, not one in 2^64.
_digest = xxhash.xxh3_64_intdigest


class Manifest(Struct, frozen=True, kw_only=True, tag="manifest"):
    """All that is needed to receive one version, and to tell when it is whole.

    With a `base` the deltas since that version travel, one after another, and not the version itself.
    """

    version: Version
    tensors: tuple[TensorSpec, ...]
    total_bytes: int
    bucket_bytes: int
    place: Place | None = None  # where the same bytes can be opened by processes of the publisher's node
    base: Version | None = None
    steps: tuple[int, ...] = ()  # bytes of each of the deltas
    own_checksum: int = 0  # of this manifest with 0 here, and without the place: whoever passes the version on has another one

    @property
    def sent_bytes(self) -> int:
        """What travels."""
        return sum(self.steps) if self.steps else self.total_bytes

    @property
    def bucket_count(self) -> int:
        return -(-self.sent_bytes // self.bucket_bytes)

    def bucket(self, index: int) -> slice:
        """The bytes of one bucket; the last one may be shorter."""
        return slice(index * self.bucket_bytes, min((index + 1) * self.bucket_bytes, self.sent_bytes))

    def checksum(self, index: int, payload: memoryview) -> int:
        """Of the bytes of one bucket. None of another bucket, nor of another version, has the same."""
        return _digest(payload, self.own_checksum ^ index)

    def signed(self) -> "Manifest":
        """The same with its own checksum."""
        blank = replace(self, own_checksum=0, place=None)
        return replace(self, own_checksum=_digest(encode(blank)))

    def check(self) -> None:
        """Refuses a manifest that is damaged or contradicts itself, before any memory is taken for it. Raises BadTransfer."""
        self._require(self.own_checksum == self.signed().own_checksum, "its checksum doesn't match")
        names = set()
        for spec in self.tensors:
            self._require(spec.dtype in DTYPES, f"{spec.name}: unknown dtype {spec.dtype}")
            self._require(spec.name not in names, f"{spec.name} is named twice")
            self._require(min(spec.shape, default=0) >= 0, f"{spec.name}: negative dimension in {spec.shape}")
            small = len(spec.shape) <= _MAX_DIMENSIONS and math.prod(max(size, 1) for size in spec.shape) <= _MAX_BYTES
            self._require(small, f"{spec.name}: its shape {spec.shape} is of no tensor")
            fits = 0 <= spec.offset < _MAX_BYTES and spec.offset % ALIGN == 0 if spec.nbytes else spec.offset == 0
            self._require(fits, f"{spec.name}: offset {spec.offset}")
            names.add(spec.name)
        end = total_bytes(self.tensors)
        self._require(self.total_bytes == end, f"total_bytes={self.total_bytes}, its tensors end at {end}")
        self._require(1 <= self.bucket_bytes <= MAX_BUCKET_BYTES, f"bucket_bytes={self.bucket_bytes}")
        self._require((self.base is None) == (not self.steps), f"base {self.base} and deltas of {self.steps} bytes")
        self._require(min(self.steps, default=1) >= 1 and sum(self.steps) <= end, f"deltas of {self.steps} bytes for {end}")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise BadTransfer(f"manifest of weights {self.version}: {message}; not used")


class RelayAddress(Struct, frozen=True, kw_only=True):
    """Where versions can be had from another receiver, for those whose keys it was told."""

    endpoint: str
    server_key: bytes


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """A subscriber asks for the newest version. Its key says who it is."""

    sequence: int
    holds: Version | None = None
    pulling: Version | None = None  # the version that it takes over the socket
    here: str = ""  # it opens memory of this Place.here; empty: it takes all over the socket
    confirms: int = 0  # number of the last bucket that came on this connection
    serves: RelayAddress | None = None  # what it has can be had there


class Bye(Struct, frozen=True, kw_only=True, tag="bye"):
    """A subscriber leaves on purpose: it isn't counted as lost."""


class GetManifest(Struct, frozen=True, kw_only=True, tag="get_manifest"):
    version: Version
    base: Version | None = None  # deltas since this one will do


class GetBucket(Struct, frozen=True, kw_only=True, tag="get_bucket"):
    version: Version
    index: int
    base: Version | None = None  # as in the manifest
    confirms: int = 0


class Announce(Struct, frozen=True, kw_only=True, tag="announce"):
    """The publisher names the version that the subscriber had best take: the newest whole one, or one shortly before."""

    version: Version | None  # None before the first
    echo: int = 0  # `sequence` of the Hello that this answers; 0 if it is only a hint
    buckets: int | None = None  # the first so many of the whole version are there; None: all
    source: RelayAddress | None = None  # where the subscriber had best take it; None: here
    guests: dict[bytes, str] = {}  # who may take versions from the subscriber: public keys, and whose they are


class Bucket(Struct, frozen=True, kw_only=True, tag="bucket"):
    """Header of one bucket; its bytes follow as a second frame."""

    version: Version
    index: int
    checksum: int  # Manifest.checksum of the bytes
    number: int = 0  # of this bucket among all that were sent on this connection; to be confirmed


class Gone(Struct, frozen=True, kw_only=True, tag="gone"):
    """The publisher no longer (or not yet) holds that version; the subscriber asks for the newest."""

    version: Version


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """The request made no sense to the publisher. Asking again would not help."""

    reason: str


Request = Hello | Bye | GetManifest | GetBucket
Reply = Announce | Manifest | Bucket | Gone | Refused

# What decoding raises for damaged bytes. msgspec tells more than it documents: of strings, and of nesting without end.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
