"""Why actors failed: which of their errors is the cause, whether a restart may mend it, and what to say of it."""

import re

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from asyncrl.cluster.members import Member
from asyncrl.errors import CheckpointError, ConfigError, DataError, DiskFull, NonFinite

TELL_S = 1.0  # in which other ranks fail too, if one has failed
NON_RETRYABLE = (ConfigError, DataError, CheckpointError, NonFinite)  # the next try would meet the same


def first_failure(member: Member, error: Exception) -> tuple[Member, Exception]:
    """Of a gang's failures the one that came first, as far as can be told: who loses a peer in a collective fails of that too.

    Waits for others to fail no longer than TELL_S. A rank that died comes before those that raised an error, and what no
    restart will mend before all.
    """
    others = {other.task: other for other in member.lead.gang if other is not member and other.task is not None}
    failed = [(member, error)]
    if others and isinstance(error, RayTaskError):
        for ref in ray.wait([*others], num_returns=len(others), timeout=TELL_S)[0]:
            try:
                ray.get(ref)
            except RayError as of_other:
                failed.append((others[ref], of_other))

    def order(failure: tuple[Member, Exception]) -> int:
        cause = getattr(failure[1], "cause", failure[1])
        return 0 if isinstance(cause, (*NON_RETRYABLE, DiskFull)) else 1 if isinstance(cause, RayActorError) else 2

    return min(failed, key=order)


def brief(error: Exception) -> str:
    """A died process in one line (Ray's text holds a page of guesses); anything else as it is, traceback and all."""
    if not isinstance(error, RayActorError) or error.actor_init_failed:
        return str(error)
    detail = re.search(r"(exit type: \w+|killed by|exit code|SIG[A-Z]+)[^.]*", str(error))
    return f"the process died ({detail.group(0) if detail else type(error).__name__})"
