"""Work that others hand to an event loop ends when it does, and with the reason why that ended."""

import asyncio
import threading

import pytest

from asyncrl.errors import Closed, Unavailable
from asyncrl.loops import LoopThread

DEADLINE_S = 10.0


async def nothing():
    pass


@pytest.fixture
def loop():
    loop = LoopThread("it")
    loop.start()
    yield loop
    loop.close(Closed("closed"), nothing, DEADLINE_S)


def test_what_is_asked_for_comes_back(loop):
    async def add(a, b):
        await asyncio.sleep(0)
        return a + b

    assert loop.ask(add(2, 3)).result(DEADLINE_S) == 5


def test_what_was_handed_in_before_the_start_runs_after_it():
    loop, ran = LoopThread("it"), threading.Event()
    assert loop.call(ran.set) is None
    assert not ran.is_set()
    loop.start()
    assert ran.wait(DEADLINE_S)
    loop.close(Closed("closed"), nothing, DEADLINE_S)


def test_a_question_before_the_start_is_refused():
    with pytest.raises(Closed, match="it was not started"):
        LoopThread("it").ask(nothing())


def test_what_a_spawned_task_raises_ends_the_loop_with_that_reason():
    reasons = []
    loop = LoopThread("it", reasons.append)
    loop.start()

    async def fails():
        raise ValueError("no")

    waiting = loop.ask(asyncio.sleep(3600))
    loop.call(lambda: loop.spawn(fails()))
    with pytest.raises(Unavailable, match="it failed: ValueError: no"):
        waiting.result(DEADLINE_S)
    with pytest.raises(Unavailable, match="ValueError: no"):
        loop.ask(nothing())
    loop.close(Closed("closed"), nothing, DEADLINE_S)
    assert isinstance(loop.call(print), Unavailable)  # the first reason stays
    assert [str(reason) for reason in reasons] == [str(reasons[0])] * 2


def test_close_cancels_what_was_spawned_then_runs_the_last_and_is_idempotent(loop):
    said = []

    async def stays():
        try:
            await asyncio.sleep(3600)
        finally:
            said.append("cancelled")

    async def last():
        said.append("last")

    task = loop.ask(_spawned(loop, stays())).result(DEADLINE_S)
    for _ in range(2):
        loop.close(Closed("closed"), last, DEADLINE_S)
    assert said == ["cancelled", "last"]
    assert task.cancelled()
    assert str(loop.call(print)) == "closed"


async def _spawned(loop, work):
    task = loop.spawn(work)
    await asyncio.sleep(0)  # its first step
    return task
