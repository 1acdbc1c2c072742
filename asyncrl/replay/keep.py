"""Dynamic sampling: which complete groups are worth training, by name. Pure functions of the rewards of `ok` rollouts."""

from collections.abc import Sequence

from asyncrl.interfaces import Keep


def keep_all(rewards: Sequence[float]) -> bool:
    return True


def keep_varied(rewards: Sequence[float]) -> bool:
    """DAPO's dynamic sampling: equal rewards give a group no relative advantage, so no gradient."""
    return max(rewards) > min(rewards)


KEEPS: dict[str, Keep] = {"all": keep_all, "varied": keep_varied}
