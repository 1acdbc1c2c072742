"""A model that is divided among ranks scores, and learns, what one rank's plain model does: over real process groups."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import Layout, PrecisionSpec
from asyncrl.models.packed import Pack, PackedModel, TokenSequence, make_pack
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "initializer_range": 0.1,
}
Columns = tuple[torch.Tensor, torch.Tensor]


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if "qwen3" in name else (LlamaForCausalLM, LlamaConfig)
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}} if "by rows" in name else {}
    return kind(config(tie_word_embeddings="tied" in name, **rope, **SIZES)).eval()


def packs_of_rollouts() -> tuple[list[Pack], int]:
    """Three packs of four prompts' rollouts, and how many tokens are scored in them."""
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(4):
        prompt = generator.integers(0, 32, 6)
        for _ in range(3):
            length = int(generator.integers(1, 10))
            ids = np.concatenate((prompt, generator.integers(0, 32, length)))
            sequences.append(TokenSequence(ids, np.arange(6, 6 + length), 5))
    packs = [make_pack(sequences, members) for members in ([11, 3, 0, 7], [1, 2, 4, 5, 6], [8, 9, 10])]
    return packs, sum(len(s.scored) for s in sequences)


def dealt(packs: list[Pack], ranks: Ranks) -> list[Pack]:
    """This share's; ones that score nothing where others have more."""
    none = {name: getattr(packs[0], name)[:0] for name in ("select_t", "target_ids_t", "flat_t")}
    packs = packs + [packs[0]._replace(**none)] * (-len(packs) % ranks.dealt)
    return packs[ranks.share :: ranks.dealt]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def learned(
    ranks: Ranks, model: PreTrainedModel, precision: PrecisionSpec = PrecisionSpec()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Columns [N] that all packs of a batch make, and the gradient of a loss over all of its tokens."""
    shard(model, ranks, precision)
    packed = PackedModel(model, 0.8, ranks)
    packs, count = packs_of_rollouts()
    weights_n = torch.from_numpy(np.random.default_rng(1).normal(size=(2, count))).float()
    columns = {name: torch.full((count,), torch.nan) for name in ("logprobs", "entropies", "scored", "first hidden")}
    mine = dealt(packs, ranks)
    packed.score(mine, columns["scored"])
    assert all(isinstance(weight, DTensor) == ranks.grouped for weight in model.parameters())
    for pack in mine:
        made = packed.forward(pack, entropy_grad=True)
        columns["logprobs"][pack.flat_t], columns["entropies"][pack.flat_t] = made.logp_t.detach(), made.entropy_t.detach()
        columns["first hidden"][pack.flat_t] = packed.join(made.hidden_th[:, 0].detach(), pack)
        of_logp_n, of_entropy_n = weights_n
        (made.logp_t @ of_logp_n[pack.flat_t] + made.entropy_t @ of_entropy_n[pack.flat_t]).backward()
    for name in sorted(columns.keys() - {"scored"}):
        ranks.merge_(columns[name])
    return columns, {name: whole(weight.grad) for name, weight in model.named_parameters()}


def learned_by_all(ranks: Ranks, names: list[str]) -> list[Any]:
    return [learned(ranks, make(name)) for name in names]


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[str, float]:
    """The largest difference in a tensor, as a part of the largest number in it."""
    assert found.keys() == expected.keys()
    apart = {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected}
    return max(apart.items(), key=lambda item: item[1])


NAMES = ["qwen3, tied", "qwen3", "llama", "llama, tied", "llama, by rows"]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one rank makes with each model, by plain torch."""
    torch.set_num_threads(1)
    return {name: learned(Ranks(), make(name)) for name in NAMES}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=2),
        Layout(shard=2, reshard_after_forward=False),
        Layout(shard=2, offload=True, checkpoint_activations=True),
        Layout(replicate=2, shard=2),
        Layout(tp=2),
        Layout(sp=2),
        Layout(shard=2, tp=2),
        Layout(shard=2, sp=2),
        Layout(sp=2, tp=2),
    ],
    ids=lambda layout: " ".join(f"{k}={v}" for k, v in msgspec.structs.asdict(layout).items() if v != getattr(Layout(), k)),
)
def test_columns_and_gradients_are_those_of_one_rank(layout: Layout, gang: Callable[..., Any], alone: dict[str, Any]) -> None:
    names = [name for name in NAMES if layout.sp * layout.tp == 1 or "by rows" not in name]
    for of_rank in gang(layout, learned_by_all, names):
        for name, (columns, gradients) in zip(names, of_rank, strict=True):
            expected_columns, expected_gradients = alone[name]
            assert furthest(columns, expected_columns)[1] <= 2e-6, name
            assert furthest(gradients, expected_gradients)[1] <= 2e-6, name
