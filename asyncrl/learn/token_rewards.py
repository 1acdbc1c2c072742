"""Rewards of single tokens, brought to the tokens that are trained. Pure."""

import numpy as np


def credited(rewards: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, float]:
    """What each trained token of a rollout earned, float64, and what was earned before the first of them.

    rewards [T] float64, due at each response token; trained [T] bool. A reward that is due at a token out of the loss (a
    tool's, or too old) belongs to the last trained token before it: that is the action which it followed. One that no
    trained token precedes is no consequence of any: it counts for the rollout as a whole alone.
    """
    owner = np.cumsum(trained)  # 0: before the first trained token; k: at or after the k-th
    earned = np.bincount(owner, weights=rewards, minlength=int(trained.sum()) + 1)
    return earned[1:], float(earned[0])
