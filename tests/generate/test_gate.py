"""The gate: one at a time, outsiders before the next step."""

import threading

import pytest

from asyncrl.generate.gate import StepGate

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
