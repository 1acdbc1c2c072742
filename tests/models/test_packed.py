"""Packed scoring equals scoring each sequence alone, in values and gradients, for every layout."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from asyncrl.models.logprobs import Head
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack

PACKED = ["qwen3, tied", "llama", "mistral, sliding window 5", "gpt2, tied"]
BY_ROWS = [
    "mamba, by rows",
    "qwen2_moe, by rows, sliding window 5",
    "gpt_oss, by rows, sinks",
]


def groups_of_rollouts() -> list[TokenSequence]:
    """Four prompts of 6 tokens, three rollouts each of 1 to 9 tokens; in some only part of the response is scored."""
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(4):
        prompt = generator.integers(0, 32, 6)
        for rollout in range(3):
            length = int(generator.integers(1, 10))
            scored = np.arange(6, 6 + length)[rollout == 2 and length > 2 :: 1 + (rollout == 1)]
            sequences.append(TokenSequence(np.concatenate((prompt, generator.integers(0, 32, length))), scored, 5))
    return sequences


def alone(model: PreTrainedModel, sequences: list[TokenSequence]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor(s.ids)[None]).logits[0, s.scored - 1] for s in sequences])


def packed(model: PackedModel, sequences: list[TokenSequence], packs: list[list[int]]) -> torch.Tensor:
    parts = [make_pack(sequences, members) for members in packs]
    order = torch.cat([pack.flat_t for pack in parts])
    head = Head.of(model.model)
    return torch.cat([head.logits(model.hidden(pack)) for pack in parts])[order.argsort()]


@pytest.mark.parametrize("name", PACKED + BY_ROWS)
@pytest.mark.parametrize("packs", [[list(range(12))], [[11, 3, 0, 7], [1, 2, 4, 5, 6], [8, 9, 10]]], ids=["one", "three"])
def test_packed_logits_and_gradients_equal_those_of_each_sequence_alone(name: str, packs: list[list[int]], make) -> None:
    model, sequences = make(name), groups_of_rollouts()
    expected = alone(model, sequences)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ours = PackedModel(model)
    assert ours.flat == (name in PACKED)
    found = packed(ours, sequences, packs)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for gradient, parameter in zip(gradients, [p for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_short_sequence_is_the_same_next_to_a_long_one_though_positions_follow_the_length(make) -> None:
    """LongRoPE takes other frequencies for a forward pass of more than 8 tokens, which packed would be everybody's."""
    model = make("phi3, by rows, positions that follow the length")
    ids = np.random.default_rng(0).integers(0, 32, 14)
    sequences = [TokenSequence(ids[:6], np.arange(1, 6)), TokenSequence(ids, np.arange(1, 14))]
    expected = alone(model, sequences)
    assert (expected[1:5] - expected[6:10]).abs().max() > 1e-3  # the same tokens, at other frequencies
    torch.testing.assert_close(packed(PackedModel(model), sequences, [[0, 1]]), expected, atol=1e-6, rtol=0)


def test_shared_prompts_are_computed_once_and_no_padding_ever() -> None:
    sequences = groups_of_rollouts()
    pack = make_pack(sequences, range(12))
    full = sum(int(s.scored[-1]) for s in sequences)
    assert len(pack.expand_s) == full  # every sequence up to its last scored token, and nothing else
    assert len(pack.input_ids_u) == full - 4 * 2 * 5  # of each prompt's three copies, two times 5 tokens are saved
    assert sum(count * length for count, length in pack.runs) == full


def test_order_of_members_changes_nothing(make) -> None:
    model, sequences = PackedModel(make("qwen3, tied")), groups_of_rollouts()
    first = packed(model, sequences, [list(range(12))])
    assert torch.equal(first, packed(model, sequences, [list(range(11, -1, -1))]))


def test_outside_packs_the_model_still_attends_as_with_sdpa(make) -> None:
    model = make("qwen3, tied")
    ids, mask = torch.randint(0, 32, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    model.set_attn_implementation("sdpa")
    expected = model(input_ids=ids, attention_mask=mask).logits[:, 4:]
    PackedModel(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[:, 4:], expected)


def test_a_token_that_nothing_predicts_is_refused() -> None:
    with pytest.raises(ValueError, match="every prompt needs a token"):
        make_pack([TokenSequence(np.array([1, 2]), np.array([0, 1]))], [0])
