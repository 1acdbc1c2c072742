"""Why actors failed: which of their errors is the cause, whether a restart may mend it, and what to say of it."""

import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfDiskError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asyncrl.cluster.members import Member
from asyncrl.cluster.transport import call_store
from asyncrl.disk import full_disk
from asyncrl.errors import CheckpointError, ConfigError, DataError, DiskFull, NonFinite, Unavailable
from asyncrl.report.summary import RunSummary
from asyncrl.types import Report

TELL_S = 1.0  # in which other ranks fail too, if one has failed
PROBE_S = 5.0
_STATES = {  # by the letter in /proc/PID/stat
    "T": "was stopped by a signal",
    "t": "is held by a debugger",
    "D": "waits for a disk or a device",
    "R": "computes, and does not answer",
    "S": "waits for something: its log may say for what",
    "Z": "has ended",
    "X": "has ended",
}
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

    member, error = min(failed, key=order)
    if type(error) is Unavailable and member.pid:  # the driver's own, of an actor that is up, as far as it knows
        error = Unavailable(f"{error}: {held_up_by(member.node, member.pid)}")
    return member, error


def held_up_by(node: str, pid: int) -> str:
    """What holds up a process that is silent, as far as it can be told in PROBE_S: itself, its node, or the way there. One that
    was stopped is ended."""
    try:
        if node == ray.get_runtime_context().get_node_id():
            return end_if_stopped(pid)
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asking = ray.remote(num_cpus=0, max_retries=0)(end_if_stopped).options(scheduling_strategy=there)
        return str(ray.get(asking.remote(pid), timeout=PROBE_S))
    except GetTimeoutError:
        return f"its node did not say why within {PROBE_S:g} s: it is held up, or the network to it is"
    except RayError as error:
        return f"its node is not there any more ({type(error).__name__})"


def end_if_stopped(pid: int) -> str:
    """`process_state`, after which one that was stopped is killed: it can't hear that it should end, and Ray kills by a timer
    of the wall clock, which stands still for minutes once that was set an hour back and then two ahead."""
    state = process_state(pid)
    if state.endswith(_STATES["T"]):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return state


def process_state(pid: int) -> str:
    """What a process of this machine does, in words."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        letter = "X"
    return f"its node answers, and its process {_STATES.get(letter, _STATES['S'])}"


def refuse(member: Member, error: Exception) -> None:
    """Raises what no restart would mend."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, DiskFull):
        raise cause from error  # it says where, which is often not the member's own place
    if full_disk(cause) or isinstance(cause, OutOfDiskError):
        raise DiskFull(f"{member.name}: {cause}: make room, then go on with --resume") from error
    if isinstance(cause, NON_RETRYABLE):
        raise type(cause)(f"{member.name}: {cause}") from error


def heard(lead: Member, summary: RunSummary) -> dict[str, Report]:
    """The newest reports of the gang's members."""
    return {member.name: report for member in lead.gang if (report := summary.reports.get(member.name))}


def gang_standing(lead: Member, summary: RunSummary) -> str:
    """What the ranks of a gang, if it is one, were doing when they were last heard."""
    if len(lead.gang) == 1:
        return ""
    doing = ", ".join(f"{name} {report.doing or 'between two calls'}" for name, report in heard(lead, summary).items())
    return f"; all ranks start anew. After update {summary.committed} they were last heard at: {doing or 'nothing yet'}"


def dump(members: Sequence[Member]) -> dict[str, Any]:
    """The store's queues and every actor's stacks, of those that answer within some seconds."""
    store, *others = members
    asked = {"store": call_store(store.handle, "state")}
    asked |= {member.name: member.handle.stacks.remote() for member in others if member.phase != "ended"}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=10.0)
    found: dict[str, Any] = {}
    for name, ref in asked.items():
        try:
            found[name] = ray.get(ref, timeout=0)
        except RayError as error:
            found[name] = f"no answer: {error}"
    return found


def brief(error: Exception) -> str:
    """A died process in one line (Ray's text holds a page of guesses); anything else as it is, traceback and all."""
    if not isinstance(error, RayActorError) or error.actor_init_failed:
        return str(error)
    detail = re.search(r"(exit type: \w+|killed by|exit code|SIG[A-Z]+)[^.]*", str(error))
    return f"the process died ({detail.group(0) if detail else type(error).__name__})"
