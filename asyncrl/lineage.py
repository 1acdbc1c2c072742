"""From where a learner goes on, as the replay log says it."""

from msgspec import Struct

from asyncrl.types import Version


class Lineage(Struct, frozen=True, kw_only=True):
    """What the log holds for a learner that starts: which versions it can go on from."""

    oldest: int  # updates of the oldest retained checkpoint
    newest: dict[int, int]  # by incarnation of the learner: its last update that was neither undone nor lost

    def refusal(self, version: Version) -> str:
        """Why a learner can't go on from a checkpoint of `version`; empty if it can."""
        newest = self.newest.get(version.incarnation)
        if newest is None:
            return f"the replay log knows no incarnation {version.incarnation} of the learner, which wrote it"
        if version.update > newest:
            return (
                f"it is ahead of the replay log, which holds {newest} updates of the learner that wrote it (incarnation "
                f"{version.incarnation}): the log lost its end, or another learner took over there"
            )
        if version.update < self.oldest:
            return (
                f"the replay log goes back to update {self.oldest}: rows that only checkpoints before the newest keep_last_n "
                "need are deleted; `asyncrl export` and `asyncrl eval` take it, and a new run can start from what they export"
            )
        return ""


class Fence(Struct, frozen=True, kw_only=True):
    """Reply to a learner's `fence`: its new incarnation, and where the surviving lineage stands."""

    incarnation: int
    committed: int
    reopened: int
