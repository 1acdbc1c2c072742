from collections.abc import Sequence

import numpy as np
import pytest
import torch

from asyncrl.config import OptimizerSpec
from asyncrl.errors import ConfigError, NonFinite
from asyncrl.learn.sft import SupervisedTrainer, batches, fit
from asyncrl.models.packed import TokenSequence


def example(prompt: Sequence[int], response: Sequence[int]) -> TokenSequence:
    ids = np.array([*prompt, *response])
    return TokenSequence(ids, np.arange(len(prompt), len(ids)))


def successor_task(count: int = 64) -> list[TokenSequence]:
    """Prompt: zero to two fillers (14), then a digit; response: the next digit, then the stop token 15."""
    generator = np.random.default_rng(0)
    digits = generator.integers(0, 8, count).tolist()
    return [example([14] * generator.integers(0, 3) + [digit], [digit + 1, 15]) for digit in digits]


def trained(model, *, steps: int, batch: int, seed: int = 0, examples=None, **spec) -> list[float]:
    """The loss of each step."""
    losses: list[float] = []
    trainer = SupervisedTrainer(model, OptimizerSpec(**spec), steps, max_tokens_per_pack=2048)
    examples = successor_task() if examples is None else examples
    fit(trainer, examples, batch=batch, seed=seed, on_step=lambda step, figures: losses.append(figures["loss"]))
    return losses


def test_it_learns_the_successor(make_model) -> None:
    model = make_model()
    losses = trained(model, steps=60, batch=32, lr=1e-2, lr_schedule="cosine", min_lr_ratio=0.1)
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[14, 6]])).logits[0, -1].argmax() == 7


def test_the_loss_is_the_mean_over_learned_tokens_whatever_the_packs(make_model) -> None:
    # the third learns positions 1 and 4 only, as in a conversation
    examples = [
        example([3], [4, 15]),
        example([14, 14, 5], [6, 15]),
        TokenSequence(np.array([1, 2, 3, 4, 5]), np.array([1, 4])),
    ]
    model = make_model()
    expected = []
    with torch.no_grad():
        for sequence in examples:
            logp_ld = model(input_ids=torch.from_numpy(sequence.ids)[None]).logits[0].double().log_softmax(-1)
            expected += [-logp_ld[place - 1, sequence.ids[place]].item() for place in sequence.scored.tolist()]
    for tokens in (4, 2048):
        model = make_model()
        trainer = SupervisedTrainer(model, OptimizerSpec(lr=0.0), 1, max_tokens_per_pack=tokens)
        assert trainer.loss(examples) == pytest.approx(np.mean(expected), rel=1e-5)
        figures = trainer.step(examples, 0)
        assert figures["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert (figures["tokens"], figures["lr"]) == (6, 0)


def test_the_gradient_is_that_of_an_unpacked_float64_loss(make_model) -> None:
    examples = successor_task(5)
    packed, plain = make_model().double(), make_model().double()
    SupervisedTrainer(packed, OptimizerSpec(lr=1e-3, max_grad_norm=0.0), 1, max_tokens_per_pack=4).step(examples, 0)
    logp = [
        plain(input_ids=torch.from_numpy(s.ids)[None]).logits[0].log_softmax(-1)[s.scored - 1, s.ids[s.scored]]
        for s in examples
    ]
    (-torch.cat(logp).mean()).backward()
    torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0).step()
    for one, other in zip(packed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_seeded_to_the_bit(make_model) -> None:
    first = trained(make_model(), steps=3, batch=16, lr=1e-3, seed=1)
    assert first == trained(make_model(), steps=3, batch=16, lr=1e-3, seed=1)
    assert first != trained(make_model(), steps=3, batch=16, lr=1e-3, seed=2)


def test_from_the_middle_on_it_makes_the_same_steps(make_model) -> None:
    whole, parted = make_model(), make_model()
    trained(whole, steps=4, batch=24, lr=1e-3)  # 64 examples: step 3 crosses into the second epoch
    trainer, losses = SupervisedTrainer(parted, OptimizerSpec(lr=1e-3), 4, max_tokens_per_pack=2048), []
    examples = successor_task()
    for step, members in zip(range(2), batches(64, 24, seed=0), strict=False):
        trainer.step([examples[i] for i in members], step)
    fit(trainer, examples, batch=24, done=2, on_step=lambda step, figures: losses.append(step))
    assert losses == [3, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_every_example_once_per_epoch() -> None:
    drawn = [i for members, _ in zip(batches(5, 2, seed=3), range(5), strict=False) for i in members]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:]


def test_a_step_that_is_not_finite_stops_it_before_the_weights_change(make_model) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(NonFinite, match=r"the loss is nan in step 1 of 2: .* weights are as before that step; lower lr"):
        trained(model, steps=2, batch=8, lr=1e-3)
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(model.parameters(), before, strict=True))


def test_nothing_to_learn_is_refused(make_model) -> None:
    with pytest.raises(ConfigError, match="0 examples would learn nothing"):
        trained(make_model(), steps=1, batch=1, lr=0.1, examples=[])
