"""Hugging Face models in, weights by name, Hugging Face folders out."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from asyncrl.config import ModelSpec
from asyncrl.config.callables import describe, load_callable
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.models.architectures import needs_eager, not_causal
from asyncrl.models.configuring import load_config
from asyncrl.models.memory import FlatTensors
from asyncrl.models.pieces import named_tensors
from asyncrl.models.ranks import Ranks
from asyncrl.models.shards import same_bits


def use_threads(count: int) -> None:
    """Sets how many threads this process computes with."""
    torch.set_num_threads(count)


def load_model(spec: ModelSpec, device: str = "cpu", field: str = "model", ranks: Ranks | None = None) -> PreTrainedModel:
    """A causal LM from a Hugging Face id or folder, in eval mode, with the attention that `with_attention` chooses; or what
    `spec.builder` makes.

    Raises ConfigError naming the path, also if weights are not in its files. field: what `spec` is called in the recipe. ranks:
    that it will be divided among, as `made_by_first` says.
    """
    make = _built if spec.builder else _loaded
    return made_by_first(ranks, spec, lambda: make(spec, field).to(device).eval())


def made_by_first(ranks: Ranks | None, spec: ModelSpec, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `make` returns on the first rank; when it has, the others get the model of `spec` on the meta device, to be divided
    (models/sharding.py). With a builder every rank makes all of it.

    An error of the first rank leaves the others waiting: whoever started the ranks ends them, and hears of it once.
    """
    if spec.builder or ranks is None:
        return make()
    model = make() if ranks.leads else None
    ranks.lead_text("made")
    if model is None:
        with torch.device("meta"):
            model = empty_model(spec)
    return model


def _loaded(spec: ModelSpec, field: str) -> PreTrainedModel:
    loaded: dict[str, Any] = {}
    changed = {"config": load_config(spec, field)} if spec.override_config else {}

    def make(attn_implementation: str) -> PreTrainedModel:
        model, info = AutoModelForCausalLM.from_pretrained(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            trust_remote_code=spec.trust_remote_code,
            revision=spec.revision or "main",
            output_loading_info=True,
            attn_implementation=attn_implementation,
            **changed,
        )
        loaded.update(info)
        return model

    try:
        model = with_attention(make)
    except Exception as error:
        if not (changed or isinstance(error, OSError | ValueError)):
            raise
        raise ConfigError(f"{field}.path={spec.path!r}: no causal LM could be loaded: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(
            f"{field}.path={spec.path!r}: {len(missing)} weights, e.g. {missing[:3]}, are not in its files and would "
            "be random; name a causal language model, and leave its sizes as they are"
        )
    if problem := not_causal(model.config.to_dict()):
        raise ConfigError(f"{field}.path={spec.path!r} is no causal language model: {problem}; name one that is")
    return model


def _built(spec: ModelSpec, field: str) -> PreTrainedModel:
    """What the user's builder makes of the spec. Raises ConfigError if it fails, or makes something else."""
    named = f"{field}.builder={spec.builder!r}"
    build = load_callable(spec.builder, f"{field}.builder")
    try:
        model = build(spec)
    except Exception as error:
        raise ConfigError(f"{named} failed: {describe(error)}") from error
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{named} returned a {type(model).__name__}; return a PreTrainedModel of transformers")
    if model.dtype != getattr(torch, spec.dtype):
        raise ConfigError(f"{named} returned a model in {model.dtype}, and model.dtype={spec.dtype!r}; make it in spec.dtype")
    return model


def with_attention(make: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """What `make` returns for an `attn_implementation`: SDPA, or eager where the model refuses that (GPT-OSS has sinks), or
    where it would silently be another model (Gemma 2 caps its scores)."""
    try:
        model = make(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return make(attn_implementation="eager")
    if needs_eager(model.config.to_dict()):
        model.set_attn_implementation("eager")
    return model


def context(spec: ModelSpec) -> tuple[int, int | None]:
    """Size of the vocabulary, and how many positions the model knows (None: no bound), without loading its weights."""
    config = load_config(spec).get_text_config(decoder=True)
    return config.vocab_size, getattr(config, "max_position_embeddings", None)


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, detached, without copies; of tied tensors only the first name."""
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives the model weights. Names and shapes must match `named_weights` exactly.

    Of a version from the bus, which nobody can change, the model uses the memory itself wherever its dtype and device are the
    same; the rest is copied in place.
    """
    own = named_tensors(model)
    if missing := own.keys() ^ weights.keys():
        raise CheckpointError(f"weights do not belong to this model: {len(missing)} names differ, e.g. {sorted(missing)[:3]}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise CheckpointError(f"weight {name}: shape {tuple(weights[name].shape)}, this model has {tuple(tensor.shape)}")
        if isinstance(weights, FlatTensors) and (tensor.dtype, tensor.device) == (weights[name].dtype, weights[name].device):
            tensor.data = weights[name]
        else:
            tensor.copy_(weights[name])


def empty_model(spec: ModelSpec) -> PreTrainedModel:
    """The causal LM that a folder's configuration describes, in eval mode; its weights are whatever the memory held. Of a
    builder: what it makes.

    Raises CheckpointError naming the folder; ConfigError if the builder fails.
    """
    if spec.builder:
        return _built(spec, "model").eval()
    folder, trust = Path(spec.path), spec.trust_remote_code
    try:
        config = load_config(spec)
        with no_init_weights():
            model = with_attention(partial(AutoModelForCausalLM.from_config, config, trust_remote_code=trust))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder}: no causal LM can be made from its configuration: {error}") from error
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def adopt_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Gives the model copies of these weights, one tensor at a time, each in its own dtype, or floating ones cast to `dtype`.

    Casting leaves out what transformers keeps in float32 in any model (a router's bias in GLM and DeepSeek). `weights` may also
    hold the further names of tied tensors. Raises CheckpointError if they belong to another model, or if tensors that the
    model ties differ.
    """
    own, named = named_weights(model), model.state_dict(keep_vars=True)
    if missing := (own.keys() - weights.keys()) | (weights.keys() - named.keys()):
        hint = "; merge the LoRA adapter with peft first" if any("lora_" in name for name in missing) else ""
        raise CheckpointError(
            f"weights do not belong to this model: {len(missing)} names differ, e.g. {sorted(missing)[:3]}{hint}"
        )
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name in sorted(weights, key=lambda name: name not in own):  # tied names last: what they are tied to is there then
        tensor = weights[name]
        if tensor.shape != named[name].shape:
            raise CheckpointError(f"weight {name}: shape {tuple(tensor.shape)}, this model has {tuple(named[name].shape)}")
        casts = dtype and tensor.is_floating_point() and not any(part in name for part in kept)
        cast = tensor.to(dtype) if casts else tensor
        if name in own:
            named[name].data = cast.clone() if cast is tensor else cast
        elif not same_bits(named[name], cast):
            raise CheckpointError(
                f"weight {name} is tied to another one in this model, from which it differs: say otherwise in "
                "its config.json (tie_word_embeddings)"
            )


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    shard_bytes: int = 5 * 10**9,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load, chat template included.

    shard_bytes: of weights in one safetensors file, at most; a larger tensor has a file of its own. weights: whole ones by
    name, where the model's own are not what is to be written, or only parts of it; used up.
    """
    model.save_pretrained(folder, max_shard_size=shard_bytes, state_dict=weights)
    tokenizer.save_pretrained(folder)


def fingerprints(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, str]]:
    """Shape, dtype and a hash of the bits of every tensor that `named_weights` names."""
    found = {}
    for name, tensor in named_weights(model).items():
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        found[name] = (tensor.shape, tensor.dtype, hashlib.blake2b(content).hexdigest())
    return found


def verify_export(folder: Path, expected: Mapping[str, tuple[torch.Size, torch.dtype, str]], trust_remote_code: bool) -> None:
    """Loads an exported folder as its users will. Raises CheckpointError unless it has exactly the `fingerprints` expected."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"what was written can't be loaded by transformers, and was given up: {error}") from error
    found = fingerprints(model)
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            was, now = (", ".join(map(str, of[name][:2])) if name in of else "absent" for of in (expected, found))
            raise CheckpointError(
                f"weight {name} ({was}) comes back otherwise ({now}) from the folder written, which was given up; where the "
                "dtypes differ, ask for one with --dtype"
            )
