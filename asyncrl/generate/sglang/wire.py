"""What an SGLang server says, as types. Decoding checks the type and the range of every value.

Whether an answer fits its request is not decided here, but in segments.py.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
# Nats. A sampled token's are nowhere near the lower bound, which float32 still holds; rounding may lift one above 0. SGLang
# writes NaN and infinities as null, which is no float.
LogProb = Annotated[float, msgspec.Meta(ge=-1e6, le=1e-2)]


class Unreadable(ValueError):
    """Bytes that are not what they should be."""


class Labelled(Struct, frozen=True):
    """Says that tokens `start` to `end` of a segment came from the weights that were labelled `version`."""

    version: str
    start: Count
    end: Count


class Finish(Struct, frozen=True):
    """Why a segment ended."""

    type: Literal["stop", "length", "abort"]
    message: str | None = None  # why, where it was aborted by the server itself


class Meta(Struct, frozen=True):
    """What a server says of a segment beside its tokens. The lists hold all tokens of the segment so far (and maybe later
    ones), or only the newest."""

    completion_tokens: Count = 0  # of the segment so far
    finish_reason: Finish | None = None
    # Per token: nats after temperature but before top-p and top-k, token id, …
    output_token_logprobs: list[tuple[LogProb, Count, Any]] = []
    # Per token: nats of the distribution sampled from; only where the request wants it.
    output_token_sampling_logprobs: list[LogProb] = []
    weight_versions: list[Labelled] | None = None  # with the last chunk
    num_retractions: Count = 0  # times that the server took the request out of its batch


class Chunk(Struct, frozen=True):
    """One server-sent event of a batch: news of its row `index`."""

    meta_info: Meta
    output_ids: list[Count] = []
    index: Count = 0


class Refusal(Struct, frozen=True):
    """What comes in place of a Chunk where the server can't serve a request."""

    error: str | dict[str, Any]


class Facts(Struct, frozen=True):
    """What asyncrl must know of a server, as the server itself says it."""

    tp_size: Annotated[int, msgspec.Meta(ge=1)] = 1
    dp_size: int = 1
    pp_size: int = 1
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False


class ServerLoad(Struct, frozen=True):
    """One entry of /v1/loads."""

    num_waiting_reqs: Count = 0
    token_usage: float = 0.0


class Loads(Struct, frozen=True):
    """/v1/loads: an entry per data-parallel rank, of which a server has one (`SGLangServer.open`)."""

    loads: list[ServerLoad]


CHUNK = msgspec.json.Decoder(Chunk)
BATCH = msgspec.json.Decoder(list[Chunk])
REFUSAL = msgspec.json.Decoder(Refusal)
FACTS = msgspec.json.Decoder(Facts)
LOADS = msgspec.json.Decoder(Loads)
ANYTHING = msgspec.json.Decoder()


def decode(decoder: msgspec.json.Decoder[T], text: bytes) -> T:
    """Raises Unreadable, and nothing else, unless the text is what the decoder reads."""
    try:
        return decoder.decode(text)
    # RecursionError: a million brackets. ValueError: more digits than Python turns into an int, or no UTF-8.
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise Unreadable(str(error)) from error
