import numpy as np
import pytest
import torch

from asyncrl.errors import ConfigError
from asyncrl.learn.sft import fit


def successor_task(count: int = 64) -> list[tuple[list[int], list[int]]]:
    """Prompt: zero to two fillers (14), then a digit; response: the next digit, then the stop token 15."""
    generator = np.random.default_rng(0)
    return [([14] * generator.integers(0, 3) + [digit], [digit + 1, 15]) for digit in generator.integers(0, 8, count).tolist()]


def test_it_learns_the_successor(make_model) -> None:
    model = make_model()
    losses = fit(model, successor_task(), steps=100, batch=32, lr=1e-2)
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[14, 6]])).logits[0, -1].argmax() == 7


def test_first_loss_is_the_mean_over_response_tokens_whatever_the_packs(make_model) -> None:
    examples = successor_task(8)
    model = make_model()
    with torch.no_grad():
        expected = []
        for prompt, response in examples:
            logp = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            expected += [-logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
    for tokens in (4, 2048):
        (loss,) = fit(make_model(), examples, steps=1, batch=8, lr=0.0, max_tokens_per_pack=tokens)
        assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_seeded_and_may_end_early(make_model) -> None:
    first = fit(make_model(), successor_task(), steps=3, batch=16, lr=1e-3, seed=1)
    assert first == fit(make_model(), successor_task(), steps=3, batch=16, lr=1e-3, seed=1)
    assert first != fit(make_model(), successor_task(), steps=3, batch=16, lr=1e-3, seed=2)
    assert len(fit(make_model(), successor_task(), steps=9, batch=16, lr=1e-3, on_step=lambda step, loss: step == 2)) == 2


def test_useless_examples_are_named(make_model) -> None:
    with pytest.raises(ConfigError, match="example 1 has 2 prompt and 0 response tokens"):
        fit(make_model(), [([1], [2]), ([1, 2], [])], steps=1, batch=1, lr=0.1)
