"""The gate: one at a time, outsiders before the next step. Admission: who joins the next step."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from asyncrl.generate.embedded.rows import Job
from asyncrl.generate.embedded.scheduling import GroupAlone, JoinAtOnce, StepGate
from asyncrl.types import GenerationRequest

WAIT_S = 10.0


def test_an_outsider_gets_in_between_two_steps_of_a_busy_loop() -> None:
    """The loop takes the gate again at once, for as long as the outsider has not been in: a plain lock could starve it."""
    gate, been_inside, stepping = StepGate(), threading.Event(), threading.Event()
    holders: list[str] = []
    alone = True

    def loop() -> None:
        nonlocal alone
        while not been_inside.is_set():
            with gate.step():
                holders.append("step")
                stepping.set()
                alone = alone and len(holders) == 1
                holders.pop()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    assert stepping.wait(WAIT_S)
    with gate.between_steps():
        holders.append("outsider")
        been_inside.set()
        alone = alone and len(holders) == 1
        holders.pop()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert alone


def test_a_holder_that_fails_lets_the_next_one_in() -> None:
    gate = StepGate()
    entered = []
    with pytest.raises(ValueError, match="step"), gate.step():
        raise ValueError("step")
    with gate.between_steps():
        entered.append("outsider")
    with gate.step():
        entered.append("step")
    assert entered == ["outsider", "step"]


# ------------------------------------------------------------------------------------------- admission

MakeRequest = Callable[..., GenerationRequest]


def queue_of(make_request: MakeRequest, *groups: int) -> deque[Job]:
    return deque(Job(make_request(str(i), group=group), Future()) for i, group in enumerate(groups))


def ids(jobs: list[Job]) -> list[str]:
    return [job.request.id for job in jobs]


def test_an_idle_engine_takes_what_fits_in_order(make_request: MakeRequest) -> None:
    queue = queue_of(make_request, 0, 0, 1)
    assert ids(JoinAtOnce(2).take(queue, count=0)) == ["0", "1"]
    assert len(queue) == 1


def test_joiners_wait_for_company_but_not_for_long(make_request: MakeRequest) -> None:
    """16 slots: company is 2. One free slot and two in the queue: wait, at most PATIENCE steps."""
    policy, queue = JoinAtOnce(16), queue_of(make_request, 0, 0)
    assert [policy.take(queue, count=15) for _ in range(JoinAtOnce.PATIENCE)] == [[]] * JoinAtOnce.PATIENCE
    assert ids(policy.take(queue, count=15)) == ["0"]
    assert ids(policy.take(queue, count=15)) == ["1"]  # alone in the queue: there is no company to wait for
    assert policy.take(queue, count=0) == []


def test_enough_free_slots_are_filled_at_once(make_request: MakeRequest) -> None:
    assert ids(JoinAtOnce(16).take(queue_of(make_request, 0, 0, 0), count=14)) == ["0", "1"]
    assert JoinAtOnce(16).take(queue_of(make_request, 0), count=16) == []


def test_a_group_alone_is_taken_whole_and_in_order_of_ids(make_request: MakeRequest) -> None:
    policy, queue = GroupAlone(4), queue_of(make_request, 1, 0, 1)
    queue.rotate(1)  # 2 (group 1), 0 (group 1), 1 (group 0)
    assert ids(policy.take(queue, count=0)) == ["0", "2"]
    assert policy.take(queue, count=2) == []
    assert ids(policy.take(queue, count=0)) == ["1"]
