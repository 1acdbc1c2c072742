"""Functions as tools: calls of one turn side by side, and what the policy reads of those that went wrong."""

import asyncio
import threading

from asyncrl.episodes.chat import UNREADABLE, call_of
from asyncrl.episodes.environments import Step
from asyncrl.episodes.tools import Tools

both_here = threading.Barrier(2, timeout=20)


def left(at: int) -> int:
    """Meets right.

    Args:
        at: Where.
    """
    both_here.wait()
    return at


def right(at: int) -> int:
    """Meets left.

    Args:
        at: Where.
    """
    both_here.wait()
    return -at


async def first(at: int) -> int:
    """Waits for second.

    Args:
        at: Where.
    """
    await asyncio.wait_for(told.wait(), 20)
    return at


async def second(at: int) -> int:
    """Lets first go on.

    Args:
        at: Where.
    """
    told.set()
    return -at


told = asyncio.Event()


def play(*calls: tuple[str, object]) -> Step:
    made = [call_of(f"call_{i}", name, arguments) for i, (name, arguments) in enumerate(calls)]
    return asyncio.run(Tools([left, right, first, second]).step({"role": "assistant", "content": "", "tool_calls": made}))


def test_calls_of_a_turn_run_side_by_side() -> None:
    """Each of a pair waits for the other, in threads or in the loop; one after the other would not end."""
    step = play(("left", {"at": 1}), ("right", {"at": 2}), ("first", {"at": 3}), ("second", {"at": 4}))
    assert [message["content"] for message in step.messages] == ["1", "-2", "3", "-4"]  # as they were asked for
    assert step.parts == {"tool_calls": 4.0, "tool_failures": 0.0}


def test_the_policy_reads_what_it_called_wrongly() -> None:
    step = play((UNREADABLE, "look(1)"), ("second", '{"at": '), ("second", {"up": 1}), ("third", {}), ("second", {"at": 1}))
    unreadable, cut, wrong, unknown, right_ = (message["content"] for message in step.messages)
    assert "can't be read" in unreadable
    assert "look(1)" in unreadable
    assert "can't be read" in cut
    assert "unexpected keyword argument 'up'" in wrong
    assert "there is no tool 'third'; there are left, right, first, second" in unknown
    assert right_ == "-1"
    assert step.parts == {"tool_calls": 5.0, "tool_failures": 4.0}
    assert not step.done
