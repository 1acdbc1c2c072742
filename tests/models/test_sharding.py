"""A model that is divided among ranks scores, and learns, what one rank's plain model does: over real process groups."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from asyncrl.config import Layout, PrecisionSpec
from asyncrl.errors import ConfigError
from asyncrl.models.packed import Pack, PackedModel, TokenSequence, make_pack
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import _layers, compute_dtype, shard
from asyncrl.models.value import OwnValues, SharedValues, value_model

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
    "pad_token_id": 0,
}
KINDS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config),
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
}
BY_ROWS = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


def make(name: str, **changes: Any) -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    model, config = KINDS[name.split(",")[0]]
    rope = BY_ROWS if "by rows" in name else {}
    odd = {"vocab_size": 33} if "odd" in name else {}
    return model(config(tie_word_embeddings="tied" in name, **{**SIZES, **rope, **odd, **changes})).eval()


def packs_of_rollouts(packs: Sequence[Sequence[int]] = ([11, 3, 0, 7], [1, 2, 4, 5, 6], [8, 9, 10])) -> tuple[list[Pack], int]:
    """Three rollouts of each of four prompts, packed so, and how many tokens are scored in them."""
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(4):
        prompt = generator.integers(0, 32, 6)
        for _ in range(3):
            length = int(generator.integers(1, 10))
            ids = np.concatenate((prompt, generator.integers(0, 32, length)))
            sequences.append(TokenSequence(ids, np.arange(6, 6 + length), 5))
    return [make_pack(sequences, members) for members in packs], sum(len(s.scored) for s in sequences)


def dealt(packs: list[Pack], ranks: Ranks) -> list[Pack]:
    """This share's; ones that score nothing where others have more."""
    none = {name: getattr(packs[0], name)[:0] for name in ("select_t", "target_ids_t", "flat_t")}
    packs = packs + [packs[0]._replace(**none)] * (-len(packs) % ranks.dealt)
    return packs[ranks.share :: ranks.dealt]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


Case = tuple[str, str]  # what of which model
Made = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # columns [N], gradients


def learned(ranks: Ranks, name: str) -> Made:
    """What a batch's packs make, of a policy and a critic on its hidden states, and the gradient of a loss over all tokens."""
    model = make(name)
    shard(model, ranks, PrecisionSpec())
    packed, head = PackedModel(model, 0.8, ranks), SharedValues(model, ranks)
    packs, count = packs_of_rollouts()
    weights_n = torch.from_numpy(np.random.default_rng(1).normal(size=(3, count))).float()
    columns = {name: torch.full((count,), torch.nan) for name in ("logprobs", "entropies", "values")}
    mine = dealt(packs, ranks)
    scored_n = packed.score(mine, torch.full((count,), torch.nan))
    assert all(isinstance(weight, DTensor) == (ranks.layout != Layout()) for weight in model.parameters())  # between passes
    for pack in mine:
        made = packed.forward(pack, entropy_grad=True)
        of_pack = made.logp_t, made.entropy_t, head.of(made.hidden_th, pack) + 1  # a head starts at zero
        torch.stack(of_pack).mul(weights_n[:, pack.flat_t]).sum().backward()
        for column, part in zip(columns.values(), of_pack, strict=True):
            column[pack.flat_t] = part.detach()
    for column in columns.values():
        ranks.merge_(column)
    gradients = {
        f"{kind} {name}": w.grad for kind, m in (("policy", model), ("head", head.module)) for name, w in m.named_parameters()
    }
    return {**columns, "scored": scored_n}, {name: whole(gradient) for name, gradient in gradients.items()}


def valued(ranks: Ranks, name: str) -> Made:
    """The same of a critic of its own."""
    model = value_model(make(name))
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    shard(model, ranks, PrecisionSpec())
    values = OwnValues(model, ranks)
    packs, count = packs_of_rollouts()
    weights_n = torch.from_numpy(np.random.default_rng(1).normal(size=count)).float()
    values_n = torch.full((count,), torch.nan)
    for pack in dealt(packs, ranks):
        values_t = values(pack)
        (values_t @ weights_n[pack.flat_t]).backward()
        values_n[pack.flat_t] = values_t.detach()
    return {"own": ranks.merge_(values_n)}, {name: whole(weight.grad) for name, weight in model.named_parameters()}


def made(ranks: Ranks, cases: list[Case]) -> list[Made]:
    return [{"policy": learned, "critic": valued}[kind](ranks, name) for kind, name in cases]


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[str, float]:
    """The largest difference in a tensor, as a part of the largest number in it."""
    assert found.keys() == expected.keys()
    apart = {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected}
    return max(apart.items(), key=lambda item: item[1])


FEW = [("policy", "qwen3, tied"), ("policy", "llama")]
MANY = [*FEW, ("critic", "qwen3, tied"), ("policy", "qwen3"), ("policy", "llama, tied")]
BY_ROWS_TOO = [*MANY, ("policy", "llama, by rows"), ("critic", "llama, by rows")]
PLANS = [*MANY, ("policy", "llama, odd"), ("policy", "olmo2")]
CASES = {
    "fsdp": (Layout(shard=2), BY_ROWS_TOO),
    "fsdp, gathered till the backward pass": (Layout(shard=2, reshard_after_forward=False), FEW),
    "offload, activations made again": (Layout(shard=2, offload=True, checkpoint_activations=True), MANY),
    "hybrid": (Layout(replicate=2, shard=2), FEW),
    "tp": (Layout(tp=2), PLANS),
    "sp": (Layout(sp=2), MANY),
    "sp, more ranks than heads of keys": (Layout(sp=4), FEW),
    "fsdp, tp": (Layout(shard=2, tp=2), FEW),
    "fsdp, sp": (Layout(shard=2, sp=2), FEW),
    "sp, tp": (Layout(sp=2, tp=2), FEW[:1]),
}


@pytest.fixture(scope="module")
def alone() -> dict[Case, Made]:
    """What one rank makes, by plain torch."""
    torch.set_num_threads(1)
    every = dict.fromkeys(case for _, cases in CASES.values() for case in cases)
    return dict(zip(every, made(Ranks(), list(every)), strict=True))


@pytest.mark.parametrize(("layout", "cases"), CASES.values(), ids=CASES)
def test_columns_and_gradients_are_those_of_one_rank(
    layout: Layout, cases: list[Case], gang: Callable[..., Any], alone: dict[Case, Made]
) -> None:
    for of_rank in gang(layout, made, cases):
        for case, found in zip(cases, of_rank, strict=True):
            for ours, expected in zip(found, alone[case], strict=True):
                which, apart = furthest(ours, expected)
                assert apart <= 2e-6, f"{case}: {which}"


def test_one_rank_is_left_as_it_is() -> None:
    model = make("qwen3")
    before = list(model.parameters())
    shard(model, Ranks(), PrecisionSpec())
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert type(model) is Qwen3ForCausalLM
    assert not dist.is_initialized()


def test_products_in_float32_are_exact_unless_said_otherwise() -> None:
    for tf32 in (True, False):
        shard(make("llama"), Ranks(), PrecisionSpec(tf32=tf32))
        assert torch.backends.cuda.matmul.allow_tf32 == tf32


def again(ranks: Ranks) -> list[Made]:
    return [
        (learned(one, "qwen3, tied"))
        for one in (ranks, Ranks(msgspec.structs.replace(ranks.layout, checkpoint_activations=True)))
    ]


def test_activations_made_again_are_the_same_to_the_bit(gang: Callable[..., Any]) -> None:
    for kept, made_again in gang(Layout(shard=2), again):
        for ours, theirs in zip(kept, made_again, strict=True):
            assert furthest(ours, theirs)[1] == 0.0


@pytest.mark.parametrize(
    ("name", "changes", "layout", "told"),
    [
        (
            "llama",
            {"num_key_value_heads": 1},
            Layout(tp=2),
            "tp=2 with LlamaForCausalLM: tp does not divide its 4 attention heads",
        ),
        ("llama", {"intermediate_size": 49}, Layout(tp=2), r"gate_proj has a weight of \(49, 32\), which tp does not divide"),
        ("gpt2", {"n_head": 4}, Layout(tp=2), "tp=2 with GPT2LMHeadModel: it has no plan for tensor parallelism"),
        (
            "qwen3_moe",
            {"num_experts": 4},
            Layout(tp=2),
            r"mlp.experts \(Qwen3MoeExperts\) can't be divided as its plan says, moe",
        ),
        ("llama", {}, Layout(sp=3), "sp=3 with LlamaForCausalLM: it does not divide the 4 attention heads"),
        ("llama", {}, Layout(sp=4, tp=2), "it does not divide the 2 attention heads that a rank has with tp=2"),
        ("llama, by rows", {}, Layout(sp=2), "sp=2 with LlamaForCausalLM: it is trained by rows"),
    ],
)
def test_what_ranks_cant_divide_is_refused(name: str, changes: dict[str, Any], layout: Layout, told: str) -> None:
    ranks = Ranks()
    ranks.layout = layout  # refused before any of them is asked
    model = make(name, **changes)
    with pytest.raises(ConfigError, match=rf"parallel.*{told}"):
        shard(model, ranks, PrecisionSpec())


def test_parts_of_layers_are_no_layers() -> None:
    model = AriaTextForCausalLM(AriaTextConfig(moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1, **SIZES))
    assert "AriaGroupedExpertsGemm" in model._no_split_modules
    assert _layers(model) == list(model.model.layers)


def test_the_dtype_of_the_compute() -> None:
    auto, half, single = (PrecisionSpec(compute=compute) for compute in ("auto", "bfloat16", "float32"))
    for precision, master, device, compute in [
        (auto, torch.float32, "cpu", torch.float32),
        (auto, torch.float32, "cuda", torch.bfloat16),
        (auto, torch.bfloat16, "cpu", torch.bfloat16),
        (half, torch.float32, "cpu", torch.bfloat16),
        (single, torch.float32, "cuda", torch.float32),
    ]:
        assert compute_dtype(precision, master, device) == compute


def trained(ranks: Ranks, master: torch.dtype, compute: str) -> float:
    """How far 200 steps at lr 1e-6 move the weights, on average."""
    model = make("qwen3, tied", num_hidden_layers=1).to(master)
    before = [weight.detach().float().clone() for weight in model.parameters()]
    shard(model, ranks, PrecisionSpec(compute=compute))
    packed, adamw = PackedModel(model, ranks=ranks), torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    pack = packs_of_rollouts()[0][0]
    for _ in range(200):
        packed.logprobs(pack).mean().backward()
        adamw.step()
        adamw.zero_grad()
    assert all(weight.dtype == master for weight in model.parameters())
    moved = [(whole(weight.detach()).float() - start).abs() for weight, start in zip(model.parameters(), before, strict=True)]
    return torch.cat([part.flatten() for part in moved]).mean().item()


@pytest.mark.slow
def test_master_weights_move_as_those_that_compute_in_float32(gang: Callable[..., Any]) -> None:
    single = trained(Ranks(), torch.float32, "float32")
    (mixed,) = gang(Layout(), trained, torch.float32, "bfloat16")
    pure = trained(Ranks(), torch.bfloat16, "bfloat16")
    assert mixed == pytest.approx(single, rel=0.05)
    assert pure < 0.2 * single


def gradient(members: list[list[int]], compute: str) -> torch.Tensor:
    """Of the mean logprob of all rollouts, packed so."""
    model = make("qwen3, tied")
    shard(model, Ranks(), PrecisionSpec(compute=compute))
    packed = PackedModel(model)
    for pack in packs_of_rollouts(members)[0]:
        packed.logprobs(pack).sum().backward()
    return torch.cat([whole(weight.grad).flatten() for weight in model.parameters()])


def test_one_rank_computes_in_bfloat16_in_a_group_of_its_own_and_packing_only_rounds() -> None:
    try:
        together, apart = (gradient(members, "bfloat16") for members in ([list(range(12))], [[i] for i in range(12)]))
        exact = gradient([list(range(12))], "float32")
    finally:
        dist.destroy_process_group()
    assert together.dtype == torch.float32
    assert 1e-3 < (together - exact).norm() / exact.norm() < 0.02
    assert (together - apart).norm() <= (together - exact).norm()
