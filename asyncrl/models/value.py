"""Values from any causal LM: a linear head of one output in place of, or beside, the output layer.

A value head starts at zero. All values are then 0, and the first advantages plain returns: random values would only be
noise, which whitening blows up to the size of a signal. The head's own gradient, Σ (V − R)·h, is not zero there.
"""

import torch
from transformers import PreTrainedModel

from asyncrl.models.packed import Pack, PackedModel
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard_head


def value_head(model: PreTrainedModel) -> torch.nn.Linear:
    """A zero head [H] -> [1] for the hidden states that the model's output layer reads; float32."""
    output = model.get_output_embeddings()
    head = torch.nn.Linear(output.weight.shape[-1], 1, device=output.weight.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def value_model(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a causal LM into a value model, in place, if it is none yet: its output layer becomes the head."""
    if model.get_output_embeddings().weight.shape[0] != 1:
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.set_output_embeddings(value_head(model).to(model.dtype))
    return model


class OwnValues(PackedModel):
    """A causal LM made into a value model. Takes the model over; `module` is all of it.

    ranks: that `shard` has divided it among; it must have been made a `value_model` before.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks | None = None) -> None:
        self.module: torch.nn.Module = value_model(model)
        super().__init__(model, ranks=ranks)

    def __call__(self, pack: Pack) -> torch.Tensor:
        """V [T] before each scored token of the pack, float32, with gradient."""
        return self.join(self.outputs(pack)[:, 0].float(), pack)


class SharedValues(PackedModel):
    """A head on the policy's last hidden states. `module` is the head alone, which is divided among the policy's ranks here."""

    def __init__(self, policy: PreTrainedModel, ranks: Ranks | None = None) -> None:
        super().__init__(policy, ranks=ranks)
        self.module: torch.nn.Module = value_head(policy).to(self.device)
        shard_head(self.module, self.ranks)

    def __call__(self, pack: Pack) -> torch.Tensor:
        """As with OwnValues, but the gradient stops at the policy's hidden states."""
        with torch.no_grad():
            hidden_th = self.hidden(pack)
        return self.of(hidden_th, pack)

    def of(self, hidden_th: torch.Tensor, pack: Pack) -> torch.Tensor:
        """V [T] of the hidden states that a pass over the pack made, float32; the gradient goes on into them."""
        return self.join(self.module(hidden_th.float())[:, 0], pack)
