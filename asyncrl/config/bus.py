"""The weight bus of a deployment."""

from typing import Literal

from asyncrl.config.base import Rule, Spec, require_fields

# `auto` and what an engine can compute in.
ServedDtype = Literal["auto", "float32", "bfloat16", "float16"]


class BusSpec(Spec, frozen=True, kw_only=True):
    """How weights travel from the learner to the generators."""

    transport: Literal["auto", "tcp"] = "auto"  # `auto`: shared memory within a node, TCP between nodes
    # To which the learner casts its weights, once, before they travel. auto: the engines'. What isn't floating, or is kept in
    # float32 by the model, stays as it is.
    dtype: ServedDtype = "auto"
    bucket_bytes: int = 1 << 20  # sent and checked as one; at most 64 MiB. What a core's cache holds is fastest
    # Buckets that a receiver asks for ahead. Of those on their way at most 64 MiB count for one receiver, 256 MiB for all.
    credit: int = 16
    # Over TCP. `full`: every version whole. `delta`: the elements that changed, compressed, to receivers that hold an earlier
    # version, which they keep for that on the host; whole where that is not less than half. Lossless.
    codec: Literal["full", "delta"] = "full"
    anchor_freq: int = 100  # with `delta`: every so many versions are whole
    # Nodes to which the learner sends weights itself; a generator of each passes them on as they come, to its node and as many
    # others. For this it keeps the newest on the host. 0: every generator takes them from the learner.
    fanout: int = 0

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            (
                "bucket_bytes",
                lambda x: 1 <= x <= 64 << 20,
                "is outside 1 to 67108864: the learner would hold too much for slow receivers; some MiB are fast enough",
            ),
            ("credit", lambda x: x >= 1, "< 1: no bucket would ever be asked for; use at least 1"),
            (
                "anchor_freq",
                lambda x: x >= 1,
                "< 1: every version is whole at the most; use 1 for that, or some hundreds",
            ),
            ("fanout", lambda x: x >= 0, "< 0: use 0 for no relays, or some nodes (1 to 8)"),
        ]
        require_fields(self, "bus.", rules)
