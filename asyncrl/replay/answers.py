"""What the store is told about its log, and what it answers: rows as Arrow IPC bytes, the rest as small structs."""

from typing import Literal

from msgspec import Struct


class LogSettings(Struct, frozen=True, kw_only=True):
    """folder: the run's `replay/`. fsync and keep_segments: see `config.StoreSpec`."""

    folder: str
    segment_bytes: int = 64 << 20
    fsync: Literal["segment", "call"] = "segment"
    keep_segments: Literal["checkpoint", "all"] = "checkpoint"


class RowLease(Struct, frozen=True):
    """Arrow rows (schema.UNSCORED_COLUMNS) leased to a reward worker; no bytes: nothing to score before the deadline."""

    lease: int
    lease_s: float
    rows: bytes = b""
    ended: bool = False


class TrainScore(Struct, frozen=True):
    """What the learner gets beside a row. baseline: what its group's greedy rollout earned, if it has one."""

    reward: float
    parts: dict[str, float]
    baseline: float | None = None


class TrainRows(Struct, frozen=True):
    """Arrow rows (schema.TRAIN_COLUMNS) and, parallel to them, their scores."""

    rows: bytes
    scores: list[TrainScore]
