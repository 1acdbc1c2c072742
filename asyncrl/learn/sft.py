"""Supervised warm start: next-token loss on responses, through the same packs and forward pass as the learner."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from asyncrl.errors import ConfigError
from asyncrl.learn.packing import split_into_packs
from asyncrl.learn.schedule import learning_rate
from asyncrl.learning import OptimizerSpec
from asyncrl.models.logprobs import sampled_logprobs
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack

Example = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids (with the stop token, if it shall be learned)


def fit(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    steps: int,
    batch: int,
    lr: float,
    warmup_steps: int = 0,
    seed: int = 0,
    max_tokens_per_pack: int = 2048,
    on_step: Callable[[int, float], bool | None] | None = None,
) -> list[float]:
    """Trains in place with AdamW and a cosine to a tenth of `lr`; returns the mean loss per response token of each step.

    Batches go through the examples in a seeded order, anew each epoch. on_step(step, loss), from 1, may return True to
    end early. Raises ConfigError where an example has nothing to learn or nothing to start from.
    """
    sequences = [_sequence(i, prompt, response) for i, (prompt, response) in enumerate(examples)]
    if not sequences:
        raise ConfigError("a warm start on 0 examples would learn nothing; give at least one")
    spec = OptimizerSpec(lr=lr, warmup_steps=warmup_steps, lr_schedule="cosine", min_lr_ratio=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    packed = PackedModel(model)
    order = _Order(len(sequences), seed)
    losses = []
    for step in range(steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(spec, step, steps)
        optimizer.zero_grad()
        losses.append(_backward(packed, [sequences[i] for i in order.take(batch)], max_tokens_per_pack))
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
        optimizer.step()
        if on_step is not None and on_step(step + 1, losses[-1]):
            break
    optimizer.zero_grad()
    return losses


def _sequence(index: int, prompt: Sequence[int], response: Sequence[int]) -> TokenSequence:
    if not len(prompt) or not len(response):
        raise ConfigError(
            f"example {index} has {len(prompt)} prompt and {len(response)} response tokens; both need at least one"
        )
    ids = np.concatenate((np.asarray(prompt, dtype=np.int64), np.asarray(response, dtype=np.int64)))
    return TokenSequence(ids, np.arange(len(prompt), len(ids)))


def _backward(packed: PackedModel, sequences: Sequence[TokenSequence], max_tokens: int) -> float:
    """Accumulates the gradient of the mean loss over all response tokens, pack by pack; returns that loss."""
    tokens = sum(len(sequence.scored) for sequence in sequences)
    total = torch.zeros(())
    for members in split_into_packs(sequences, range(len(sequences)), max_tokens):
        pack = make_pack(sequences, members, packed.model.device)
        loss = -sampled_logprobs(packed.logits(pack), pack.target_ids_t, 1.0).sum() / tokens
        loss.backward()
        total = total + loss.detach().cpu()
    return total.item()


class _Order:
    """Endless shuffled indices: every example once per epoch, across batch borders."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._generator = np.random.default_rng(seed)
        self._left: list[int] = []

    def take(self, batch: int) -> list[int]:
        while len(self._left) < batch:
            self._left += self._generator.permutation(self._count).tolist()
        taken, self._left = self._left[:batch], self._left[batch:]
        return taken
