"""How the learner's ranks divide a model and its work. No torch."""

from itertools import product
from typing import Literal

from msgspec import Struct

from asyncrl.config.base import Rule, Spec, require, require_fields

Auto = Literal["auto"]
# The ranks that train the policy, and those that hold a critic or a reference model for it.
Group = Literal["learner", "critic", "reference"]


class ParallelSpec(Spec, frozen=True, kw_only=True):
    """How ranks divide a model. What is `auto` is chosen from the size of the model, the devices and their memory."""

    # Ranks that split every layer's matrices (tensor parallel, by the model's own plan); best within a node.
    tp: int | Auto = "auto"
    # Ranks that share the tokens of each pack (sequence parallel, Ulysses), for packs that are too long for one.
    sp: int | Auto = "auto"
    # Ranks over which weights, gradients and optimizer are sharded (FSDP2); where more are left, each group of so many holds a
    # whole copy (hybrid sharding).
    fsdp: int | Auto = "auto"
    # Whether weights that were gathered for a layer's forward pass are dropped until its backward pass.
    reshard_after_forward: bool = True
    # Whether a layer's activations are made again in the backward pass instead of kept.
    checkpoint_activations: bool | Auto = "auto"
    # Whether weights, gradients and optimizer rest in the host's memory, where the optimizer also steps.
    offload: bool | Auto = "auto"
    # Memory of each rank's device that what is `auto` may count on; null: nine tenths of what the device has.
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("tp sp fsdp", lambda x: x == "auto" or x >= 1, "< 1: there is no rank; use 1 to turn it off, or auto"),
            ("memory_bytes", lambda x: x >= 1, "< 1: nothing would fit; use null for what the device has"),
        ]
        require_fields(self, "parallel.", rules)


class Layout(Struct, frozen=True, kw_only=True):
    """A ParallelSpec with everything chosen. Ranks are numbered with tp innermost: neighbours split matrices."""

    replicate: int = 1  # copies of the sharded model
    shard: int = 1  # dp ranks over which one copy is sharded, besides sp
    sp: int = 1
    tp: int = 1
    reshard_after_forward: bool = True
    checkpoint_activations: bool = False
    offload: bool = False

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.sp * self.tp


def layouts(spec: ParallelSpec, ranks: int, per_node: int | None = None) -> list[Layout]:
    """All layouts of so many ranks that the settings leave, cheapest first: each is for what does not fit by those before it.

    Weights are sharded over the ranks of a node (per_node of them; None: there is one node), and each node holds a copy; then
    over more nodes; then activations are made again; then tp, within a node, and sp; at last offload.
    Raises ConfigError where the parts that are pinned do not make up the ranks.
    """
    per_node = min(per_node or ranks, ranks)
    divisors = [part for part in range(1, ranks + 1) if ranks % part == 0]
    found = []
    for tp, sp, again, offload in product(
        [part for part in divisors if part <= per_node] if spec.tp == "auto" else [spec.tp],
        divisors if spec.sp == "auto" else [spec.sp],
        [False, True] if spec.checkpoint_activations == "auto" else [spec.checkpoint_activations],
        [False, True] if spec.offload == "auto" else [spec.offload],
    ):
        left = ranks // tp  # over which weights may be sharded
        fewest = min(left, max(sp, per_node // tp))
        for over in [part for part in divisors if part >= fewest] if spec.fsdp == "auto" else [spec.fsdp]:
            if left * tp == ranks and left % over == 0 and over % sp == 0:
                found.append(
                    Layout(
                        replicate=left // over,
                        shard=over // sp,
                        sp=sp,
                        tp=tp,
                        reshard_after_forward=spec.reshard_after_forward,
                        checkpoint_activations=again,
                        offload=offload,
                    )
                )
    require(
        bool(found),
        f"parallel: tp={spec.tp}, sp={spec.sp} and fsdp={spec.fsdp} do not make up ranks={ranks}: some would "
        "be idle; tp × fsdp has to divide them, and fsdp, over which weights are sharded, is a multiple of sp",
    )
    return sorted(found, key=lambda at: (at.offload, at.tp * at.sp, at.sp, at.checkpoint_activations, at.shard))
