"""How many actors of a kind there are, and where: what each of them reserves of a cluster. No torch."""

import math
from typing import Any

from asyncrl.config.base import Rule, Spec, require, require_fields


class PlaceSpec(Spec, frozen=True, kw_only=True):
    """What one actor process reserves of the cluster, and the torch threads it computes with."""

    cpus: float = 0.0  # 0: it runs anywhere and reserves none
    gpus: float = 0.0  # 0: it computes on the CPU
    threads: int = 1  # of torch
    resources: dict[str, float] = {}  # Ray's custom resources, by name
    # Labels that its node must have, as Ray's label selectors say them: `{ray.io/market-type: spot}`, `{gpu: "in(T4, L4)"}`.
    labels: dict[str, str] = {}
    # Where no node with these labels has room, those of the first of these are asked for, then of the next; {} is any node.
    fallback: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("cpus gpus", lambda x: x >= 0, "< 0: there is nothing less than none; use 0 to reserve none"),
            ("threads", lambda x: x >= 1, "< 1: nothing could be computed; use at least 1"),
            ("resources", lambda x: all(0 <= n < math.inf for n in x.values()), "asks for less than none; use amounts >= 0"),
        ]
        require_fields(self, "place.", rules)
        require(
            bool(self.labels) or not self.fallback,
            f"place.fallback={list(self.fallback)} without place.labels: any node would do already; name the labels to prefer",
        )

    @property
    def choices(self) -> tuple[dict[str, str], ...]:
        """The labels to ask for, the best first."""
        return (self.labels, *self.fallback)


class CountRange(Spec, frozen=True, kw_only=True):
    """How many actors a run may have: it begins with the fewest, and takes more and gives them up as it needs them."""

    min: int  # the run begins with so many, and never plans for fewer
    max: int  # never more than these, whatever nodes there are

    def __post_init__(self) -> None:
        said = f"count={{min: {self.min}, max: {self.max}}}"
        require(self.min >= 1, f"{said}: min={self.min} < 1: nothing would be done while there is none; use at least 1")
        require(self.min <= self.max, f"{said}: max={self.max} < min={self.min}: no number is both; raise max, or lower min")


def is_some(count: Any) -> bool:
    """Whether there are any at all."""
    return isinstance(count, CountRange) or count >= 1


class Several(Spec, frozen=True, kw_only=True):
    """Actors of a kind, of which there may be several."""

    # Actors of the run. `{min: 2, max: 16}`: as many as it has use for, while it runs.
    count: int | CountRange = 1

    @property
    def least(self) -> int:
        """How many a run begins with."""
        return self.count.min if isinstance(self.count, CountRange) else self.count

    @property
    def most(self) -> int:
        """How many it may have without being told to."""
        return self.count.max if isinstance(self.count, CountRange) else self.count
