"""Model FLOPs against a count by hand, and what becomes of them."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from asyncrl.learn.cost import cost_metrics, flops_utilization, peak_flops, training_flops
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.models.ranks import Ranks

# tiny_model: two layers of width 16, heads of 2 × 8, 1 of keys and values; MLP 32
MATRICES = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)
NORMS = 2 * (2 * 16 + 2 * 8) + 16


def packs(*lengths: int):
    sequences = [TokenSequence(torch.arange(length).numpy() % 16, torch.arange(1, length).numpy(), 0) for length in lengths]
    return [make_pack(sequences, range(len(sequences)))]


def test_flops_are_those_of_each_matrix_and_of_causal_attention(make_model) -> None:
    """Sequences of 5 and 9 tokens: 4 and 8 are computed, as many are scored; three times as much as a forward pass."""
    attention = 2 * 2 * 2 * 16 * (4**2 + 8**2) / 2  # layers, products, multiply and add, width, half of the squares
    forward = 2 * 12 * (MATRICES + NORMS) + 2 * 12 * 16 * 16 + attention
    assert training_flops(PackedModel(make_model()), packs(5, 9)) == 3 * forward


def test_frozen_weights_beside_adapters_need_no_gradient(make_model) -> None:
    model = make_model()
    for weight in list(model.parameters())[1:]:
        weight.requires_grad_(False)
    attention = 3 * 2 * 2 * 2 * 16 * 8**2 / 2
    whole = training_flops(PackedModel(make_model()), packs(9))
    assert training_flops(PackedModel(model), packs(9)) - attention == pytest.approx((whole - attention) * 2 / 3)


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    def flops(chosen: int, experts: int) -> float:
        config = Qwen3MoeConfig(
            vocab_size=16, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=experts, num_experts_per_tok=chosen,
        )  # fmt: skip
        return training_flops(PackedModel(Qwen3MoeForCausalLM(config)), packs(9))

    assert flops(2, 4) - flops(1, 4) == 3 * 2 * 8 * (3 * 16 * 8)  # one expert more, for each of 8 tokens


def test_a_share_of_what_a_known_device_can_do(make_model) -> None:
    policy = PackedModel(make_model())
    assert flops_utilization(policy, packs(9), 1e-6, "NVIDIA H100 80GB HBM3") == training_flops(policy, packs(9)) / 989e6
    assert flops_utilization(policy, packs(9), 1.0) == 0.0  # of a CPU nobody says
    found = [peak_flops(f"NVIDIA {name}") for name in ("H200", "H100 PCIe", "A100-SXM4-80GB", "RTX A4000", "GeForce")]
    assert found == [989e12, 756e12, 312e12, None, None]


def test_memory_is_told_and_utilization_where_it_is_known() -> None:
    found = cost_metrics(Ranks(), torch.device("cpu"), 0.0)
    assert found.keys() == {"perf/max_rss_gb"}
    assert 0.05 < found["perf/max_rss_gb"] < 64
    assert cost_metrics(Ranks(), torch.device("cpu"), 0.4)["perf/mfu/actor"] == 0.4
