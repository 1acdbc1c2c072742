"""What training a model takes of a device's memory, from figures alone: before anything is loaded, and without torch."""

from msgspec import Struct

from asyncrl.config import Layout
from asyncrl.models.sizes import ModelSize

FEWEST_ROWS = 256  # of a chunk of logits: each adds to a gradient as large as the output layer's weights
CHUNK_LOGITS = 2**24  # logits that are worked on at a time: 64 MiB in float32, and as much for each step of the work
_STEPS = 5  # such chunks at a time: logits, probabilities, their gradient, and what comes between
_MOMENTS = 2  # of AdamW
_WIDE = 4  # bytes of float32


class Work(Struct, frozen=True, kw_only=True):
    """What is done with a model."""

    tokens: int  # of the longest pack
    master_bytes: int = 4  # of a weight at rest, of its gradient and of each of its moments
    compute_bytes: int = 4  # of a number in a pass
    adapters: int | None = None  # rank of LoRA's, which alone are trained; None: the whole model is
    trains: bool = True  # else it only scores, as a reference does
    values: bool = False  # whether a value head stands in place of the output layer


class Footprint(Struct, frozen=True, kw_only=True):
    """Bytes that a rank takes, at the most."""

    loading: int  # of one host: the whole model, which the first rank of the group loads there for all
    weights: int
    optimizer: int
    gradients: int
    gathered: int  # weights of the layers under way, whole, and their gradients before these are divided
    activations: int
    logits: int

    @property
    def resting(self) -> int:
        """What stays between passes."""
        return self.weights + self.optimizer

    @property
    def moving(self) -> int:
        """What a step adds, and gives back."""
        return self.gradients + self.gathered + self.activations + self.logits


def footprint(size: ModelSize, work: Work, layout: Layout) -> Footprint:
    """What a rank of this layout takes. Of that, with `offload`, weights, optimizer and gradients are the host's.

    Activations are those of a Llama-like layer in transformers' own code: SDPA, and norms computed in float32.
    """
    parts, tokens = layout.shard * layout.sp * layout.tp, -(-work.tokens // layout.sp)
    master, wide = work.master_bytes, work.compute_bytes
    adapters = size.widths * (work.adapters or 0)
    model = size.parameters - work.values * size.output
    trained = 0 if not work.trains else model if work.adapters is None else adapters
    under_way = model - size.inner + 2 * size.inner // size.layers  # both ends, a layer, and the next one
    gathered = 0
    if layout.ranks > 1 or wide != master or layout.offload:
        gathered = wide * (under_way if layout.reshard_after_forward and size.packed else model)
        if trained == model:
            gathered += (wide + _WIDE) * under_way  # gradients, and the buffer in which they are summed over ranks
    kept = size.hidden * (24 if wide == _WIDE else 16) + wide * size.divided // layout.tp  # of a token in a layer
    in_layers = kept * (size.layers if work.trains else 1)
    if work.trains and layout.checkpoint_activations:
        in_layers = kept + size.layers * size.hidden * wide
    rows = min(tokens, max(FEWEST_ROWS, CHUNK_LOGITS // size.vocabulary)) if size.packed else tokens
    logits = _STEPS * rows * size.vocabulary * _WIDE
    if trained == model:
        logits += size.vocabulary * size.hidden * _WIDE // layout.tp  # the gradient of the output layer, summed over chunks
    return Footprint(
        loading=master * size.parameters,
        weights=master * (model + adapters) // parts,
        optimizer=_MOMENTS * master * trained // parts,
        gradients=master * trained // parts,
        gathered=gathered // layout.tp,
        activations=in_layers * tokens,
        logits=0 if work.values else logits,
    )
