"""In which order prompts are drawn, and with which seed each rollout is sampled. Pure: a plain loop computes the same."""

import numpy as np

from asyncrl.errors import ConfigError
from asyncrl.types import Purpose, derive_seed


class PromptOrder:
    """A seeded permutation per epoch of `size` dataset rows. Positions count through all epochs, from 0.

    epochs None: without end. shuffle False: file order in every epoch.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True, epochs: int | None = None) -> None:
        if size < 1:
            raise ConfigError(f"{size} prompts: there is nothing to train on; check the data files and max_prompt_length")
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, np.ndarray] = {}
        self.total = None if epochs is None else size * epochs

    def index(self, position: int) -> int:
        """The index into the prompts at `position`."""
        epoch, place = divmod(position, self._size)
        return int(self._permutation(epoch)[place]) if self._shuffle else place

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # RandomState's stream is frozen by NumPy's policy; Generator's may change between releases.
            seed = derive_seed(self._seed, epoch) & 0xFFFFFFFF
            # Retries reach back into older epochs, but rarely: two are kept.
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = np.random.RandomState(seed).permutation(self._size)
        return self._epochs[epoch]


def ticket_seed(run_seed: int, purpose: Purpose, position: int, retry: int, rollout: int) -> int:
    """Sampling seed of one rollout.

    It depends on what is generated, never on when or by whom: a reissue of a lost group keeps its seeds, a retry of
    a failed prompt (`retry` 1, 2, …) gets others. position: in the order of prompts, or of the eval set.
    """
    return derive_seed(run_seed, 1 if purpose == "eval" else 0, position, retry, rollout)
