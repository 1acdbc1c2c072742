"""Which of several ranks' errors is told as the cause; and whether who is silent is slow, stopped or dead."""

import os
import signal
import subprocess
import sys

import pytest
import ray
from ray.exceptions import RayError

from asyncrl.cluster.causes import first_failure, held_up_by, process_state
from asyncrl.cluster.members import Member
from asyncrl.config import LimitsSpec, PlaceSpec
from asyncrl.errors import NonFinite, Unavailable

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0, max_retries=0)
def fail(error):
    raise error


@ray.remote(num_cpus=0)
class Rank:
    def run(self):
        ray.actor.exit_actor()  # as if killed


def error_of(ref):
    try:
        ray.get(ref)
    except RayError as error:
        return error


def test_the_first_failure_of_a_group_is_told(local_ray):
    """A peer that is lost shows as an error of whoever waits for it in a collective, often before its death does."""
    rank = Member("rank", "learner-1", PlaceSpec(), LimitsSpec(), lambda: 0.0)
    lead = Member("learner", "learner", PlaceSpec(), LimitsSpec(), lambda: 0.0, [rank])
    assert (rank.lead, lead.lead, lead.gang, rank.gang) == (lead, lead, (lead, rank), (rank,))
    lost = fail.remote(RuntimeError("Connection closed by peer"))
    actor = Rank.remote()
    died, diverged, own = actor.run.remote(), fail.remote(NonFinite("nan")), fail.remote(OSError("its own"))
    tasks = [lost, died, diverged, own]
    assert ray.wait(tasks, num_returns=4, timeout=60)[1] == []  # a worker's start may take longer than TELL_S
    for of_lead, of_rank, seen, cause in (
        (lost, died, lead, rank),  # the process that died, whoever is seen first
        (lost, diverged, lead, rank),  # what no restart mends
        (lost, own, rank, rank),  # else whoever is seen first
        (own, lost, lead, lead),
        (lost, None, lead, lead),  # the other one has not failed
    ):
        lead.task, rank.task = of_lead, of_rank
        member, error = first_failure(seen, error_of(seen.task))
        assert (member, str(error)) == (cause, str(error_of(cause.task)))
    silent = Unavailable("learner-1 has not answered for 60 s")
    rank.task = diverged
    assert first_failure(lead, silent) == (lead, silent)  # which nobody else can have caused


def test_a_silent_process_is_told_from_a_stopped_one_which_is_ended_and_a_dead_one(
    local_ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    spinning = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    waiting = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    here = ray.get_runtime_context().get_node_id()
    with spinning, waiting:
        assert spinning.stdout is not None
        spinning.stdout.readline()
        assert held_up_by(here, spinning.pid) == "its node answers, and its process computes, and does not answer"
        for process in (spinning, waiting):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        lead = Member("learner", "learner", PlaceSpec(), LimitsSpec(), lambda: 0.0)
        lead.pid, lead.node = spinning.pid, here
        member, error = first_failure(lead, Unavailable("learner has not answered for 60 s"))
        stopped = "its node answers, and its process was stopped by a signal"
        assert (member, str(error)) == (lead, f"learner has not answered for 60 s: {stopped}")
        monkeypatch.setattr("ray.runtime_context.RuntimeContext.get_node_id", lambda self: "another")  # so a task asks there
        assert held_up_by(here, waiting.pid) == stopped
        for process in (spinning, waiting):
            killed = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert killed is not None
            assert killed.si_status == signal.SIGKILL
        assert process_state(spinning.pid) == process_state(1 << 30) == "its node answers, and its process has ended"
        assert held_up_by("0" * 56, 1) == "its node is not there any more (TaskUnschedulableError)"
