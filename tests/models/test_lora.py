"""Adapters in a model: their gradients against plain peft and transformers, what is published of them, and their absence."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from asyncrl.config import Layout, LoraSpec, ModelSpec, PrecisionSpec
from asyncrl.errors import ConfigError
from asyncrl.models.loading import load_weights, named_weights
from asyncrl.models.lora import WithoutAdapters, add_adapters, merge_adapters, merged_pieces
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.models.shards import same_bits

ARCHITECTURES = ["qwen3, tied", "gpt2, tied", "gemma2, by rows, soft caps", "qwen2_moe, by rows, sliding window 5"]


def trained(model: PreTrainedModel, spec: LoraSpec = LoraSpec(rank=4, alpha=6.0)) -> PreTrainedModel:
    """Adapters whose B is no longer zero."""
    add_adapters(model, spec, ModelSpec(path="base"), seed=1)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [TokenSequence(rng.integers(1, 32, length), np.arange(3, length)) for length in (9, 5, 9, 14)]


def read(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {piece.name: piece.read() for piece in merged_pieces(model, Ranks())}


def logprobs(model: PackedModel) -> torch.Tensor:
    packs = [make_pack(sequences(), range(4))]
    return model.score(packs, torch.empty(sum(len(s.scored) for s in sequences())))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_peft_and_transformers(make: Callable[[str], PreTrainedModel], name: str) -> None:
    ours, theirs = trained(make(name)), make(name)
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6.0, target_modules="all-linear"))
    values = {name: p.detach() for name, p in ours.named_parameters() if p.requires_grad}
    learned = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert values.keys() == learned.keys()
    for parameter_name, parameter in learned.items():
        parameter.data.copy_(values[parameter_name])
    for ids, scored, _ in sequences():
        logits = peft(input_ids=torch.from_numpy(ids)[None]).logits[0, scored - 1]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids)[scored], reduction="sum").backward()
    (-PackedModel(ours).logprobs(make_pack(sequences(), range(4))).sum()).backward()
    for parameter_name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        expected = learned[parameter_name].grad
        assert (parameter.grad - expected).abs().max() <= 2e-6 * expected.abs().max(), parameter_name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_published_is_the_model_with_what_adapters_add(make: Callable[[str], PreTrainedModel], name: str) -> None:
    plain, model = make(name), make(name)
    before = {name: tensor.clone() for name, tensor in named_weights(plain).items()}
    add_adapters(model, LoraSpec(), ModelSpec(path="base"), seed=0)
    at_start = read(model)
    assert list(at_start) == list(before)
    assert all(same_bits(at_start[name], before[name]) for name in before)

    model = trained(make(name))
    first = read(model)
    for _ in range(20):
        assert all(same_bits(first[name], tensor) for name, tensor in read(model).items())
    load_weights(plain, first)
    assert (logprobs(PackedModel(plain)) - logprobs(PackedModel(model))).abs().max() < 5e-5
    assert any(not same_bits(first[name], before[name]) for name in before)
    assert same_bits(logprobs(WithoutAdapters(model)), logprobs(PackedModel(make(name))))

    merge_adapters(model)
    assert list(named_weights(model)) == list(first)
    assert all(same_bits(first[name], tensor) for name, tensor in named_weights(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_in_bfloat16_only_the_base_is_rounded(make: Callable[[str], PreTrainedModel]) -> None:
    model = trained(make("llama").to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {tensor.dtype for tensor in read(model).values()} == {torch.bfloat16}


def test_a_pass_without_adapters_leaves_them_learning(make: Callable[[str], PreTrainedModel]) -> None:
    model = trained(make("llama"))
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen: list[set[str]] = []

    def note(*_: object) -> None:
        seen.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

    model.model.layers[0].register_forward_pre_hook(note)
    logprobs(WithoutAdapters(model))
    assert seen == [before]  # also while it runs: FSDP would keep what it sees then
    note()
    assert seen == [before] * 2
    assert logprobs(PackedModel(model)).ne(logprobs(WithoutAdapters(model))).any()


def test_equal_seeds_make_equal_adapters_and_leave_the_random_state(make: Callable[[str], PreTrainedModel]) -> None:
    one, same, other = make("llama"), make("llama"), make("llama")
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    for model, seed in ((one, 3), (same, 3), (other, 4)):
        add_adapters(model, LoraSpec(), ModelSpec(path="base"), seed)
        assert torch.get_rng_state().equal(expected)
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert one.get_parameter(name).equal(same.get_parameter(name))
    assert not one.get_parameter(name).equal(other.get_parameter(name))


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", ("q_proj", "kv_proj"), r"target_modules: 'kv_proj' is no module .* down_proj, gate_proj, k_proj, .*, v_proj"),
        ("llama", ("lm_head",), "'lm_head' is the output layer, whose adapter would not be trained"),
        ("llama", ("embed_tokens",), "'embed_tokens' is the embedding"),
        ("llama", ("mlp",), r"target_modules=\['mlp'\]: Target module LlamaMLP"),
        ("mamba, by rows", ("all-linear",), r"target_modules=all-linear: .*'out_proj' is incompatible with Mamba"),
    ],
)
def test_layers_that_can_not_have_an_adapter_are_refused(make, name: str, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(make(name), LoraSpec(target_modules=targets), ModelSpec(path="base"), seed=0)


def test_only_the_named_layers_get_adapters(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    add_adapters(model, LoraSpec(rank=2, target_modules=("q_proj", "layers.1.mlp.up_proj")), ModelSpec(path="base"), seed=0)
    learned = {name.partition(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} | {"model.layers.1.mlp.up_proj"}


def test_without_peft_the_extra_is_named(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'asyncrl\[lora\]'"):
        add_adapters(make("llama"), LoraSpec(), ModelSpec(path="base"), seed=0)


def learned(ranks: Ranks, model: PreTrainedModel) -> tuple[dict, dict[str, torch.Tensor], torch.Tensor]:
    """Of what is published, the block of this rank and where it begins, by name; whole gradients; scores without adapters."""
    shard(model, ranks, PrecisionSpec())
    blocks = {piece.name: (piece.read().clone(), piece.offsets) for piece in merged_pieces(model, ranks)}
    shares = [range(4)] if ranks.dealt == 1 else [range(2), range(2, 4)]
    pack = make_pack(sequences(), shares[ranks.share])
    scored = WithoutAdapters(model, ranks=ranks).score(
        [pack], torch.full((sum(len(s.scored) for s in sequences()),), torch.nan)
    )
    PackedModel(model, ranks=ranks).logprobs(pack).sum().backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in gradient)
    assert all((parameter.grad is not None) == (name in gradient) for name, parameter in model.named_parameters())
    return blocks, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradient.items()}, scored


def learned_by_all(ranks: Ranks, models: list[PreTrainedModel]) -> list[tuple]:
    return [learned(ranks, model) for model in models]


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (Layout(shard=2), ["qwen3, tied", "gpt2, tied", "qwen2_moe, by rows, sliding window 5"]),
        (Layout(shard=2, tp=2), ["qwen3, tied"]),
        (Layout(sp=2, offload=True, checkpoint_activations=True), ["llama"]),
    ],
)
def test_ranks_publish_learn_and_score_what_one_does(gang, make, layout: Layout, names: list[str]) -> None:
    alone = [learned(Ranks(), trained(make(name))) for name in names]
    for of_rank in gang(layout, learned_by_all, [trained(make(name)) for name in names]):
        for (blocks, gradient, scored), (whole, whole_gradient, whole_scored) in zip(of_rank, alone, strict=True):
            torch.testing.assert_close(scored, whole_scored, rtol=2e-6, atol=2e-6)
            assert list(blocks) == list(whole)
            for name, (block, offsets) in blocks.items():
                place = tuple(slice(at, at + size) for at, size in zip(offsets, block.shape, strict=True))
                torch.testing.assert_close(block, whole[name][0][place], rtol=2e-6, atol=1e-7)
            for name, expected in whole_gradient.items():
                assert (gradient[name] - expected).abs().max() <= 2e-6 * expected.abs().max(), name
