"""Non-finite guard: keeps the batch of a refused step for inspection, and stops the run after too many in a row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asyncrl.errors import NonFinite
from asyncrl.learn.batch import Batch


class RefusedSteps:
    """Counts refused optimizer steps in a row. folder: where their batches go, one .npz each (no pickle inside)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._in_a_row = 0

    def accepted(self) -> None:
        self._in_a_row = 0

    def refuse(self, batch: Batch, members: Sequence[int], update: int, cause: str) -> None:
        """Saves the minibatch of a refused step. Raises NonFinite when it is the `limit`-th in a row."""
        self._in_a_row += 1
        path = self._folder / f"update_{update:06d}_refused_{self._in_a_row}.npz"
        _save(path, batch, members, cause)
        if self._in_a_row >= self._limit:
            raise NonFinite(
                f"{cause} in update {update}: {self._in_a_row} optimizer steps refused in a row "
                f"(learner.max_refused_steps={self._limit}), weights are as before them; the batch is in {path}. "
                "Look for a model that diverged (lower its lr), or logprobs that the engine did not report"
            )


def _save(path: Path, batch: Batch, members: Sequence[int], cause: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [batch.sequences[i] for i in members]
    tokens = np.isin(batch.sequence_n.cpu().numpy(), members)
    np.savez(
        path,
        cause=np.array(cause),
        groups=batch.groups[list(members)],
        ids=np.concatenate([s.ids for s in chosen]),
        id_counts=np.array([len(s.ids) for s in chosen]),
        scored=np.concatenate([s.scored for s in chosen]),
        scored_counts=np.array([len(s.scored) for s in chosen]),
        behaviour=batch.behaviour_n.cpu().numpy()[tokens],
        advantages=batch.advantages_n.cpu().numpy()[tokens],
        lags=batch.lag_n.cpu().numpy()[tokens],
    )
