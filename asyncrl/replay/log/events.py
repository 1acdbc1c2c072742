"""Everything that can happen to the store. State changes only by applying these, live and when rebuilt from the log.

Each event is one row of the event log: typed columns for readers, and the whole event as msgpack for the rebuild.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Union

import msgspec
import pyarrow as pa
from msgspec import Struct

from asyncrl.types import EvalResult, Outcome, Purpose, Status, Version


class Event(Struct, frozen=True, array_like=True, tag_field="kind", gc=False):
    """Base. Positional on the wire: new fields go last, with a default."""

    def concerned(self) -> Sequence[int] | None:
        """The groups that it changes; None: any."""
        group = getattr(self, "group", None)
        return getattr(self, "groups", None) if group is None else (group,)


class GroupReserved(Event, tag="reserved", frozen=True):
    """A slot was taken. A prompt that was not reserved before moves the dataset cursor past `position`."""

    group: int
    purpose: Purpose
    position: int  # in the order of prompts, or of the eval set
    retry: int  # earlier groups of this prompt
    n: int
    update: int  # of the holder's weights
    worker: str
    incarnation: int
    baseline: bool = False  # the rollout after the `n` sampled ones is a greedy one


class GroupReissued(Event, tag="reissued", frozen=True):
    """A lost group went to another holder, with a new attempt; only its missing rollouts are generated again."""

    group: int
    attempt: int
    update: int  # of the holder's weights, as far as they count
    worker: str
    incarnation: int
    dropped: tuple[int, ...] = ()  # rollouts that begin anew: what was streamed of them is too old
    lost: int = 0  # tokens, at the most, that were sampled and are sampled again


class HolderDied(Event, tag="died", frozen=True):
    """A worker died with these groups in flight: they have no holder until they are reissued, and each counts a death."""

    worker: str
    incarnation: int
    groups: tuple[int, ...]


class RolloutStreamed(Event, tag="streamed", frozen=True):
    """More of an unfinished rollout is in the log: if its holder is lost, another one goes on from there."""

    group: int
    rollout: int
    attempt: int
    piece: int  # its number in the stream of pieces
    oldest: int  # updates of its tokens
    newest: int
    length: int


class RolloutSubmitted(Event, tag="submitted", frozen=True):
    """A row of the log counts."""

    group: int
    rollout: int
    attempt: int
    row: int  # its number
    oldest: int  # updates of the tokens that the policy chose
    newest: int
    length: int
    figures: dict[str, float] | None = None  # how its episode went; None: a single turn


class RolloutScored(Event, tag="scored", frozen=True):
    """A rollout got its verdict."""

    group: int
    rollout: int
    attempt: int
    status: Status
    reward: float | None
    parts: dict[str, float] = {}
    error: str = ""
    row: int | None = None  # of the log, where the rollout stands once more, with what each token earned; None: only `reward`
    token_sum: float = 0.0  # of what they earned
    said: dict[str, str] = {}  # what judges wrote, by the name of their term
    scoring: tuple[str, float, float] | None = None  # as in `Score`


class GroupSettled(Event, tag="settled", frozen=True):
    """A training group ended untrained; or any group whose prompt was given up, which `error` says."""

    group: int
    outcome: Outcome
    retry: bool  # its prompt goes back to the queue
    error: str = ""  # why its prompt was given up: whoever worked on it died, too often


class GroupExcused(Event, tag="excused", frozen=True):
    """Nobody waits for a group any more that would be too late (`max_masked_share`)."""

    group: int


class BatchLeased(Event, tag="leased", frozen=True):
    """`groups` are trained as the update after `update`, by the learner's present incarnation."""

    lease: int
    update: int
    groups: tuple[int, ...]
    replayed: bool


class BatchCommitted(Event, tag="committed", frozen=True):
    """The groups of `lease` were trained by `version`: their outcome is `trained`."""

    lease: int
    version: Version
    groups: tuple[int, ...]
    metrics: dict[str, float]
    time: float  # seconds since the epoch
    outcome: ClassVar[Outcome] = "trained"


class LearnerFenced(Event, tag="fenced", frozen=True):
    """A learner restarted from checkpoint `committed`. Older leases are void, later commits are reopened."""

    incarnation: int
    committed: int
    time: float


class CheckpointRetained(Event, tag="retained", frozen=True):
    """No checkpoint before `oldest` will be restored any more."""

    oldest: int


class EvalRequested(Event, tag="eval_requested", frozen=True):
    """A learner asked for an evaluation; it runs next, or replaces the one that waits."""

    version: Version


class EvalPinned(Event, tag="eval_pinned", frozen=True):
    """The running evaluation starts over at `version`: every generator had moved past the one it was pinned to."""

    version: Version


class Evaluated(Event, tag="evaluated", frozen=True):
    """The running evaluation has all of its verdicts."""

    result: EvalResult  # of the first setting
    time: float
    also: dict[str, EvalResult] = {}  # of the others


class Ended(Event, tag="ended", frozen=True):
    """The run reached its last update. Whatever is outstanding is not used."""


class GroupsUnused(Event, tag="groups_unused", frozen=True):
    """These groups are not used; their prompts come first, with the same seeds. What a fork took over of another run's log ends
    so when the behaviour in it has drifted too far."""

    groups: tuple[int, ...]


class LogForked(Event, tag="forked", frozen=True):
    """What stands before came from another run's log (derived.py). This one begins at its checkpoint of `update`. The batches
    that were trained after it come first, until one of them has an effective sample size below `min_ess`."""

    source: str  # that run's directory
    update: int
    incarnation: int  # the newest of that run's learners
    batches: tuple[tuple[int, ...], ...]  # the groups of the updates after `update`, in order
    min_ess: float = 0.0  # of `gap/ess`


class SegmentClosed(Event, tag="segment_closed", frozen=True):
    """A segment of a stream became an immutable file. Only the log itself needs this."""

    stream: str  # "rows", "pieces" or "events"
    number: int
    first: int  # number of its first row
    count: int  # rows
    crc32: int


class SegmentDropped(Event, tag="segment_dropped", frozen=True):
    """No retained checkpoint needs this segment of rows, or no unfinished rollout this one of pieces; its file is deleted after
    this event."""

    number: int
    stream: str = "rows"


_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Union[tuple(Event.__subclasses__())])  # noqa: UP007
_encode = msgspec.msgpack.Encoder().encode
decode = _decoder.decode

EVENTS = pa.schema(
    [
        ("seq", pa.int64()),
        ("time", pa.float64()),  # seconds since the epoch
        ("kind", pa.string()),
        ("group", pa.int64()),
        ("rollout", pa.int32()),
        ("attempt", pa.int32()),
        ("row", pa.int64()),  # of the row stream
        ("update", pa.int64()),
        ("incarnation", pa.int64()),
        ("outcome", pa.string()),
        ("status", pa.string()),
        ("reward", pa.float64()),
        ("worker", pa.string()),
        ("payload", pa.binary()),  # the whole event, msgpack
    ],
    metadata={"asyncrl.events": "1"},
)


_STRUCT = pa.struct(list(EVENTS))


def to_batch(events: Sequence[Event], first: int, time: float) -> pa.RecordBatch:
    """Rows of EVENTS; a column is null where an event has no such field. A version fills `update` and `incarnation`.

    first: `seq` of the first event; time: seconds since the epoch, when they are written.
    """
    rows = [_row(event, seq, time) for seq, event in enumerate(events, first)]
    batch = pa.RecordBatch.from_struct_array(pa.array(rows, _STRUCT))  # a call for each column would cost three times as much
    return batch.replace_schema_metadata(EVENTS.metadata)


def _row(event: Event, seq: int, time: float) -> tuple[Any, ...]:
    """An event in the order of EVENTS."""
    version = event.result.version if isinstance(event, Evaluated) else getattr(event, "version", event)
    return (
        seq, time, event.__struct_config__.tag,
        getattr(event, "group", None), getattr(event, "rollout", None), getattr(event, "attempt", None),
        getattr(event, "row", None), getattr(version, "update", None), getattr(version, "incarnation", None),
        getattr(event, "outcome", None), getattr(event, "status", None), getattr(event, "reward", None),
        getattr(event, "worker", None), _encode(event),
    )  # fmt: skip
