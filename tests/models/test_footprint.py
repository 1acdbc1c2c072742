"""Memory by hand for one small model, and what each part of a layout takes off it."""

import pytest
from msgspec.structs import replace

from asyncrl.config import Layout
from asyncrl.models.footprint import Work, footprint
from asyncrl.models.sizes import size_of

# Measured with it: the highest resident memory of the second step, beyond what the process had before the model; two packs,
# one thread, torch 2.13 on a CPU, float32. In the suite it would take a minute.
QWEN = size_of(
    {
        "model_type": "qwen3",
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
)
assert QWEN is not None
MEASURED_MIB = [
    (Layout(), 1865),
    (Layout(checkpoint_activations=True), 1100),
    (Layout(shard=2), 1954),
    (Layout(shard=2, checkpoint_activations=True), 1220),
]


@pytest.mark.parametrize(("layout", "measured_mib"), MEASURED_MIB)
def test_against_what_was_measured(layout: Layout, measured_mib: float) -> None:
    foot = footprint(QWEN, Work(tokens=2048), layout)
    assert (foot.resting + foot.moving) / 2**20 == pytest.approx(measured_mib, rel=0.2)


def test_by_hand() -> None:
    foot = footprint(QWEN, Work(tokens=2048), Layout())
    assert (foot.weights, foot.optimizer, foot.gradients) == tuple(count * 4 * QWEN.parameters for count in (1, 2, 1))
    assert foot.gathered == 0
    # of a token in a layer: 6 × 512; queries and what comes of them, 5 × 512; keys and values, 4 × 256; the MLP, 4 × 1536
    assert foot.activations == 8 * 2048 * 4 * (6 * 512 + 5 * 512 + 4 * 256 + 4 * 1536)
    assert foot.logits == 5 * 524 * 32_000 * 4 + 32_000 * 512 * 4  # chunks of 2**24 // 32_000 rows; the head's gradient


def test_what_a_layout_takes_off() -> None:
    whole = footprint(QWEN, Work(tokens=8192), Layout())
    four = footprint(QWEN, Work(tokens=8192), Layout(shard=2, tp=2))
    assert (four.weights, four.optimizer) == (whole.weights // 4, whole.optimizer // 4)
    assert footprint(QWEN, Work(tokens=8192), Layout(sp=4)).activations == whole.activations // 4
    again = footprint(QWEN, Work(tokens=8192), Layout(checkpoint_activations=True))
    assert again.activations == 8 * 8192 * 512 * 4 + whole.activations // 8
    kept = footprint(QWEN, Work(tokens=8192), Layout(shard=2, reshard_after_forward=False))
    assert kept.gathered > footprint(QWEN, Work(tokens=8192), Layout(shard=2)).gathered


def test_what_is_not_trained_has_no_optimizer() -> None:
    reference = footprint(QWEN, Work(tokens=2048, trains=False), Layout())
    assert (reference.optimizer, reference.gradients) == (0, 0)
    adapters = footprint(QWEN, Work(tokens=2048, adapters=16), Layout())
    assert adapters.optimizer == 2 * 4 * 16 * QWEN.widths
    assert adapters.weights == 4 * (QWEN.parameters + 16 * QWEN.widths)
    critic = footprint(QWEN, Work(tokens=2048, values=True), Layout())
    assert (critic.logits, critic.weights) == (0, 4 * QWEN.parameters)
    untied = replace(QWEN, output=QWEN.embedding)
    assert footprint(untied, Work(tokens=2048, values=True), Layout()).weights == 4 * QWEN.parameters


def test_bfloat16_computes_on_copies_of_the_master_weights() -> None:
    half = footprint(QWEN, Work(tokens=2048, compute_bytes=2), Layout())
    assert half.weights == 4 * QWEN.parameters
    under_way = QWEN.embedding + 2 * QWEN.inner // 8
    assert half.gathered == (2 + 2 + 4) * under_way
