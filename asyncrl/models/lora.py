"""Low-rank adapters (Hu et al. 2021; by peft) in a causal LM, which are trained in place of its weights.

    W x  becomes  W x + (alpha ÷ rank) B A x       W frozen; A random, B zero: at the start nothing has changed

The model stays the same object, with adapters inside. Engines and folders get it as if it had none: W + (alpha ÷ rank) B A
under the name of W, made anew from W each time. (To merge into W, and take back out, would drift it, rounding by rounding.)
"""

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from asyncrl.config import LoraSpec, ModelSpec
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.models.loading import fingerprints, load_model, named_weights
from asyncrl.models.packed import Pack, PackedModel
from asyncrl.models.pieces import Piece, module_pieces, read_pieces
from asyncrl.models.ranks import Ranks
from asyncrl.models.shards import same_bits
from asyncrl.models.stored import StoredTensors

log = logging.getLogger(__name__)
_ADAPTER = "default"  # as peft names the only one
_PREFIX = "base_model.model."  # peft's, in files
_FILE = "adapters.json"
_FIELD = "lora.target_modules"


class Adapters(Struct, frozen=True, kw_only=True):
    """What a model's adapters are, and were added to: their weights alone say nothing without."""

    lora: LoraSpec
    base: ModelSpec
    fingerprint: str  # of the base's weights

    @staticmethod
    def of(model: torch.nn.Module) -> "Adapters | None":
        """Those of a model; None if it has none."""
        return getattr(model, "adapters", None)


def add_adapters(model: PreTrainedModel, spec: LoraSpec, base: ModelSpec, seed: int, ranks: Ranks | None = None) -> None:
    """Freezes a model, which `base` names, and adds adapters in place, in float32. The same seed gives the same ones.

    Not of a model that is sharded already. ranks: that it will be divided among; the first one's weights count. Raises
    ConfigError: there is no peft; a module that the model has not, or that can't have an adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"lora needs peft ({error}): pip install 'asyncrl[lora]', or train the whole model") from error
    named = None if spec.target_modules == ("all-linear",) else list(spec.target_modules)
    _require_adaptable(model, named or [])
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,  # or the learner would be another policy than the generators'
        target_modules=named or "all-linear",
        task_type="CAUSAL_LM",
    )
    ranks = ranks or Ranks()
    content = ranks.lead_text(repr(sorted(fingerprints(model).items())) if ranks.leads else "-").encode()
    with torch.random.fork_rng(devices=[]):  # adapters are made on the CPU, and moved
        torch.manual_seed(seed)
        try:
            get_peft_model(model, config, _ADAPTER)  # what it returns wraps the model, which goes on as it is
        except ValueError as error:
            raise ConfigError(f"{_FIELD}={named or 'all-linear'}: {error}") from error
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info("adapters: %d parameters are trained of %d", learned, model.num_parameters())
    model.adapters = Adapters(lora=spec, base=base, fingerprint=hashlib.blake2b(content, digest_size=16).hexdigest())


def _require_adaptable(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuses names that peft would pass over in silence, and the layers that are read without calling them."""
    modules = dict(model.named_modules())
    ends = {model.get_input_embeddings(): "the embedding", model.get_output_embeddings(): "the output layer"}
    for target in targets:
        chosen = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if not chosen:
            known = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
            raise ConfigError(
                f"{_FIELD}: {target!r} is no module of this model, and would get no adapter; its linear layers are "
                f"{', '.join(sorted(known))}"
            )
        if found := [ends[module] for module in chosen if module in ends]:
            raise ConfigError(f"{_FIELD}: {target!r} is {found[0]}, whose adapter would not be trained; leave it out")


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def learned_pieces(module: torch.nn.Module, ranks: Ranks) -> list[Piece]:
    """What a checkpoint holds of a module: `module_pieces`; of a model with adapters, these alone."""
    pieces = module_pieces(module, ranks)
    return pieces if Adapters.of(module) is None else [piece for piece in pieces if ".lora_" in piece.name]


def merged_pieces(model: torch.nn.Module, ranks: Ranks) -> list[Piece]:
    """`module_pieces` of the model as if it had no adapters: what they add is made where a piece is read, one at a time.

    Where ranks share weights all of them must read all pieces, in their order: to read one gathers that layer's adapter (and
    nothing as large as a weight).
    """
    layers, merged = adapted_layers(model), []
    for piece in module_pieces(model, ranks):
        layer, inside, rest = piece.name.partition(".base_layer.")
        if inside and rest == "weight":
            piece = piece._replace(added=partial(_added, layers[layer], piece))
        if ".lora_" not in piece.name:
            merged.append(piece._replace(name=f"{layer}.{rest}" if inside else piece.name))
    return merged


@torch.no_grad()
def _added(layer: Any, piece: Piece) -> torch.Tensor:
    """The part of (alpha ÷ rank) B A that belongs to a piece of W."""
    a, b = _whole(layer.lora_A[_ADAPTER].weight), _whole(layer.lora_B[_ADAPTER].weight) * layer.scaling[_ADAPTER]
    rows, columns = (a.T, b.T) if layer.fan_in_fan_out else (b, a)  # as GPT-2 has its weights
    (top, left), (height, width) = piece.offsets, piece.local.shape
    return rows[top : top + height] @ columns[:, left : left + width]


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


# ------------------------------------------------------------------------------------------------ in files


def adapter_texts(model: torch.nn.Module) -> dict[str, str]:
    """What a checkpoint says of a model's adapters, by file, beside what `learned_pieces` names."""
    own = Adapters.of(model)
    return {} if own is None else {_FILE: msgspec.json.format(msgspec.json.encode(own)).decode() + "\n"}


def stored_adapters(folder: Path) -> Adapters | None:
    """What the policy's folder in a checkpoint says of adapters; None if it has whole weights."""
    file = folder / _FILE
    return msgspec.json.decode(file.read_bytes(), type=Adapters) if file.is_file() else None


def require_adapters(model: torch.nn.Module, folder: Path) -> None:
    """Raises CheckpointError unless the weights in a checkpoint can be gone on with: whole ones by a model without adapters,
    adapters by one with the same, on the same base."""
    own, found = Adapters.of(model), stored_adapters(folder)
    if (own and own.lora) != (found and found.lora):
        raise CheckpointError(
            f"{folder} is of a run with lora={found and found.lora}, not {own and own.lora}: its weights would be another "
            "policy's; resume as it began, or export it and start a new run from that"
        )
    if own and found and own.fingerprint != found.fingerprint:
        raise CheckpointError(
            f"{folder} has adapters of {found.base.path!r} ({found.base.dtype}) as it was then; the weights of "
            f"{own.base.path!r} ({own.base.dtype}) are others now: together they would be a policy that nobody trained; put "
            "the old ones back"
        )


def load_adapted(folder: Path) -> PreTrainedModel:
    """The base that a checkpoint's adapters were added to, with these. Raises ConfigError or CheckpointError."""
    found = stored_adapters(folder)
    assert found is not None, f"{folder} has whole weights"
    model = load_model(found.base, field="the adapters' base")
    add_adapters(model, found.lora, found.base, seed=0)
    require_adapters(model, folder)
    read_pieces(learned_pieces(model, Ranks()), StoredTensors(folder), "policy")
    return model


def export_adapters(model: PreTrainedModel, base: ModelSpec, folder: Path) -> None:
    """Writes the adapters alone, as a folder that `peft.PeftModel.from_pretrained` adds to the base; and has it do that.

    Raises CheckpointError unless the same model comes back.
    """
    from peft import PeftModel

    model.peft_config[_ADAPTER].save_pretrained(folder)
    tensors = {f"{_PREFIX}{piece.name.replace(f'.{_ADAPTER}.', '.')}": piece.local for piece in learned_pieces(model, Ranks())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = named_weights(PeftModel.from_pretrained(load_model(base), folder))
    if differ := [name for name, own in named_weights(model).items() if not same_bits(own, loaded[f"{_PREFIX}{name}"])]:
        raise CheckpointError(f"weights {differ[:3]} come back otherwise from the folder written, which was given up")


def merge_adapters(model: PreTrainedModel) -> None:
    """Makes it an ordinary model again, whose weights hold what adapters added, and can all be trained. One rank only."""
    merged = {piece.name: piece for piece in merged_pieces(model, Ranks())}
    for name, layer in adapted_layers(model).items():
        layer.base_layer.weight.data = merged[f"{name}.weight"].read()
        model.set_submodule(name, layer.base_layer)
    del model.peft_config, model.adapters
    model.requires_grad_(True)


class WithoutAdapters(PackedModel):
    """The model as it was before its adapters learned anything, without a copy of the weights. Only `score` may be asked."""

    def score(self, packs: Sequence[Pack], out_n: torch.Tensor) -> torch.Tensor:
        """As PackedModel's, with all adapters switched off meanwhile."""
        layers = adapted_layers(self.model).values()
        for layer in layers:
            layer.enable_adapters(False)
            for name, parameter in layer.named_parameters():  # which peft froze too: FSDP would keep them so
                parameter.requires_grad_(name.startswith("lora_"))
        try:
            return super().score(packs, out_n)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
