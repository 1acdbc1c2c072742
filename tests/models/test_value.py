"""Values of packs equal those of each sequence alone, for any causal LM, own or on the policy's hidden states."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from asyncrl.models.loading import load_weights, named_weights
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.models.value import OwnValues, SharedValues

MODELS = ["qwen3, tied", "llama", "gpt2, tied", "gemma2, by rows, soft caps"]
GENERATOR = np.random.default_rng(0)
PROMPT = GENERATOR.integers(0, 32, 4)
SEQUENCES = [
    TokenSequence(np.concatenate((PROMPT, GENERATOR.integers(0, 32, length))), np.arange(4, 4 + length)[:: 1 + length % 2], 3)
    for length in (1, 5, 2, 5, 7)
]


def randomized(head: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def hidden_alone(model: PreTrainedModel) -> torch.Tensor:
    """What predicts each scored token, by the decoder alone, one sequence at a time."""
    return torch.cat(
        [model.base_model(input_ids=torch.tensor(s.ids)[None]).last_hidden_state[0, s.scored - 1] for s in SEQUENCES]
    )


def packed(values: OwnValues | SharedValues) -> torch.Tensor:
    packs = [make_pack(SEQUENCES, members) for members in ([4, 0, 2], [1, 3])]
    return torch.cat([values(pack) for pack in packs])[torch.cat([pack.flat_t for pack in packs]).argsort()]


@pytest.mark.parametrize("name", MODELS)
def test_an_own_model_packed_equals_its_decoder_and_head_alone(name: str, make) -> None:
    own = OwnValues(make(name))
    head = randomized(own.module.get_output_embeddings())
    expected = head(hidden_alone(own.module))[:, 0]
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in own.module.named_parameters()}
    own.module.zero_grad()
    found = packed(own)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in own.module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_on_the_policy_reads_the_same_hidden_states_and_leaves_its_logprobs(name: str, make) -> None:
    policy = make(name)
    pack = make_pack(SEQUENCES, [1, 3])
    logprobs = PackedModel(policy).logprobs(pack)
    shared = SharedValues(policy)
    randomized(shared.module)
    expected = shared.module(hidden_alone(policy))[:, 0]
    found = packed(shared)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert all(p.grad is None for p in policy.parameters())  # by itself it trains the head alone
    made = PackedModel(policy).forward(pack)
    assert made.logp_t.equal(logprobs)
    shared.of(made.hidden_th, pack).sum().backward()
    assert sum(p.grad is not None for p in policy.parameters()) >= 8  # in the policy's pass, the backbone too


@pytest.mark.parametrize("name", MODELS)
def test_values_start_at_zero_and_the_head_can_leave_it(name: str, make) -> None:
    own, shared = OwnValues(make(name)), SharedValues(make(name))
    for values in (own, shared):
        found = packed(values)
        assert found.dtype == torch.float32
        assert found.tolist() == [0.0] * len(found)
        (found - 1).square().sum().backward()
    assert own.module.get_output_embeddings().weight.grad.abs().max() > 0.1
    assert shared.module.weight.grad.abs().max() > 0.1


def test_weights_of_a_tied_model_hold_embedding_and_head(make) -> None:
    first, second = OwnValues(make("qwen3, tied")), OwnValues(make("qwen3, tied"))
    randomized(first.module)
    weights = named_weights(first.module)
    assert (weights["model.embed_tokens.weight"].shape, weights["lm_head.weight"].shape) == ((32, 32), (1, 32))
    load_weights(second.module, weights)
    assert packed(first).equal(packed(second))
