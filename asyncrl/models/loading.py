"""Hugging Face models in, weights by name, Hugging Face folders out."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from asyncrl.config import ModelSpec
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.models.architectures import needs_eager, not_causal


def use_threads(count: int) -> None:
    """Sets how many threads this process computes with."""
    torch.set_num_threads(count)


def load_model(spec: ModelSpec, device: str = "cpu", field: str = "model") -> PreTrainedModel:
    """A causal LM from a Hugging Face id or folder, in eval mode, with the attention that `with_attention` chooses.

    Raises ConfigError naming the path. field: what `spec` is called in the recipe.
    """
    make = partial(
        AutoModelForCausalLM.from_pretrained,
        spec.path,
        dtype=getattr(torch, spec.dtype),
        trust_remote_code=spec.trust_remote_code,
    )
    try:
        model = with_attention(make)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}.path={spec.path!r}: no causal LM could be loaded: {error}") from error
    if problem := not_causal(model.config.to_dict()):
        raise ConfigError(f"{field}.path={spec.path!r} is no causal language model: {problem}; name one that is")
    return model.to(device).eval()


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
    try:
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={spec.path!r}: no configuration could be loaded: {error}") from error
    return config.vocab_size, getattr(config, "max_position_embeddings", None)


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, detached, without copies; of tied tensors only the first name."""
    seen: set[tuple[object, ...]] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and memory in seen:  # empty tensors all have the address 0, and are no ties
            continue
        seen.add(memory)
        weights[name] = tensor.detach()
    return weights


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into the model in place. Names and shapes must match `named_weights` exactly."""
    own = named_weights(model)
    if missing := own.keys() ^ weights.keys():
        raise CheckpointError(f"weights do not belong to this model: {len(missing)} names differ, e.g. {sorted(missing)[:3]}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise CheckpointError(f"weight {name}: shape {tuple(weights[name].shape)}, this model has {tuple(tensor.shape)}")
        tensor.copy_(weights[name])


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load, chat template included."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
