"""How the learner's ranks divide a model and its work. No torch."""

from typing import Literal

from msgspec import Struct

from asyncrl.config.base import Rule, Spec, require, require_fields

Auto = Literal["auto"]


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

    def __post_init__(self) -> None:
        rule: Rule = ("tp sp fsdp", lambda x: x == "auto" or x >= 1, "< 1: there is no rank; use 1 to turn it off, or auto")
        require_fields(self, "learner.parallel.", [rule])


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


def chosen(spec: ParallelSpec, ranks: int) -> Layout:
    """The layout of so many ranks, where nothing is known of the model: what is `auto` is off, and fsdp takes all that is left.

    Raises ConfigError if the parts do not make up the ranks.
    """
    tp, sp = (1 if part == "auto" else part for part in (spec.tp, spec.sp))
    left = ranks // (tp * sp)
    require(
        left * tp * sp == ranks,
        f"learner.parallel: tp={tp} × sp={sp} does not divide learner.ranks={ranks}: some would be idle; use divisors",
    )
    sharded = left * sp if spec.fsdp == "auto" else spec.fsdp
    require(
        sharded % sp == 0 and (left * sp) % sharded == 0,
        f"learner.parallel: fsdp={sharded} with sp={sp} does not divide the {left * sp} ranks that tp={tp} leaves of "
        f"learner.ranks={ranks}; weights are sharded over sp too: use a multiple of sp that divides them",
    )
    return Layout(
        replicate=left * sp // sharded,
        shard=sharded // sp,
        sp=sp,
        tp=tp,
        reshard_after_forward=spec.reshard_after_forward,
        checkpoint_activations=spec.checkpoint_activations is True,
        offload=spec.offload is True,
    )
