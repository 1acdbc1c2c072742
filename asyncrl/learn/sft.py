"""Supervised warm start: next-token loss on what is to be learned, by the learner's own packs, forward pass and step."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from asyncrl.config import OptimizerSpec
from asyncrl.errors import ConfigError, NonFinite
from asyncrl.learn.batch import make_packs
from asyncrl.learn.optimizer import Optimization, step
from asyncrl.models.packed import PackedModel, TokenSequence
from asyncrl.models.ranks import Ranks

OnStep = Callable[[int, dict[str, float]], None]


class SupervisedTrainer:
    """Owns the policy and its optimizer. The loss is the mean over a batch's scored tokens, however they are packed.

    total_steps: over which the schedule runs. max_tokens_per_pack: of one forward pass. Deterministic, on the same number of
    threads. ranks: over which `model` is sharded already; all of them must make the same calls.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: OptimizerSpec,
        total_steps: int,
        *,
        max_tokens_per_pack: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self._optimization = Optimization(model, spec, total_steps, "lr")
        self.trained = {"policy": self._optimization}
        self.state: dict[str, float] = {}  # figures for the checkpoint
        self.total_steps = total_steps
        self._packed = PackedModel(model, ranks=ranks)
        self._ranks = self._packed.ranks
        self._max_tokens = max_tokens_per_pack

    def step(self, examples: Sequence[TokenSequence], done: int) -> dict[str, float]:
        """Makes step `done + 1` and returns its figures. Raises NonFinite, weights as before, where it can't be made."""
        rate = self._optimization.schedule(done)
        tokens = sum(len(sequence.scored) for sequence in examples)
        total = torch.zeros(())
        for share in self._losses(examples, tokens):
            share.backward()
            total = total + share.detach().cpu()
        loss = self._ranks.sum_(total.double()).item()
        (norm,), refused = step(loss, self._optimization)
        if refused:
            raise NonFinite(
                f"{refused} in step {done + 1} of {self.total_steps}: the policy would be destroyed, so its weights are as "
                "before that step; lower lr, raise warmup_steps, or look for a starting policy that is broken already"
            )
        return {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": float(tokens)}

    @torch.no_grad()
    def loss(self, examples: Sequence[TokenSequence]) -> float:
        """Mean over all scored tokens of the examples."""
        tokens = sum(len(sequence.scored) for sequence in examples)
        total = sum(share.item() for share in self._losses(examples, tokens))
        return self._ranks.sum_(torch.tensor(total, dtype=torch.float64)).item()

    def _losses(self, examples: Sequence[TokenSequence], tokens: int) -> Iterator[torch.Tensor]:
        """What each pack of this rank's share adds to the mean loss."""
        for pack in make_packs(examples, range(len(examples)), self._max_tokens, self._packed.device, self._ranks):
            yield -self._packed.logprobs(pack).sum() / tokens


def fit(
    trainer: SupervisedTrainer,
    examples: Sequence[TokenSequence],
    *,
    batch: int,
    seed: int = 0,
    done: int = 0,
    on_step: OnStep = lambda step, figures: None,
) -> None:
    """Trains in place from step `done` + 1 to the trainer's total_steps; on_step(number of the step, figures) after each.

    The same seed gives the same batches, also from the middle on. Raises ConfigError without examples, else as `step` does.
    """
    if not examples:
        raise ConfigError("a warm start on 0 examples would learn nothing; give at least one")
    order = itertools.islice(batches(len(examples), batch, seed), done, trainer.total_steps)
    for number, members in enumerate(order, start=done + 1):
        on_step(number, trainer.step([examples[i] for i in members], number - 1))


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of shuffled indices: every one of `count` once per epoch, across batch borders."""
    generator = np.random.default_rng(seed)
    endless = itertools.chain.from_iterable(generator.permutation(count).tolist() for _ in itertools.count())
    while True:
        yield list(itertools.islice(endless, size))
