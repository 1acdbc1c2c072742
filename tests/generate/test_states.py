"""The generator's states: every state × event, against the four facts that a state stands for."""

import itertools
from typing import NamedTuple

import pytest

from asyncrl.generate.states import TRANSITIONS, GeneratorEvent, GeneratorState, accepts, state_after

S, E = GeneratorState, GeneratorEvent
PAIRS = list(itertools.product(S, E))


class Facts(NamedTuple):
    """What is true in a state. waiting: new weights are here that the engine does not take yet."""

    reserving: bool = False
    pinned: bool = False
    waiting: bool = False
    swapping: bool = False


FACTS = {
    S.READY: Facts(),
    S.RESERVING: Facts(reserving=True),
    S.RESERVING_BEFORE_SWAP: Facts(reserving=True, waiting=True),
    S.PINNED: Facts(pinned=True),
    S.PINNED_BEFORE_SWAP: Facts(pinned=True, waiting=True),
    S.PINNED_RESERVING: Facts(reserving=True, pinned=True),
    S.PINNED_RESERVING_BEFORE_SWAP: Facts(reserving=True, pinned=True, waiting=True),
    S.SWAPPING: Facts(swapping=True),
}


def expected(state: GeneratorState, event: GeneratorEvent) -> GeneratorState | None:
    """The rules in words; None: the event can't happen."""
    if event is E.STOP or state is S.STOPPED:
        return S.STOPPED
    if state is S.NO_WEIGHTS:
        return S.SWAPPING if event is E.WEIGHTS else None
    facts = FACTS[state]
    held_up = facts.waiting and not facts.pinned
    possible = {
        # One reserve at a time; none in a swap; none before one that waits, unless an evaluation must be completed first.
        E.RESERVE: not facts.reserving and not facts.swapping and not held_up,
        E.RESERVED: facts.reserving,
        E.PIN: facts.reserving and not facts.pinned,  # requests of an evaluation come from a reserve
        E.UNPIN: facts.pinned,
        E.WEIGHTS: not facts.waiting and not facts.swapping,  # one at a time: the bus is asked again after the swap
        E.SWAPPED: facts.swapping,
    }
    if not possible[event]:
        return None
    changes = {
        E.RESERVE: {"reserving": True},
        E.RESERVED: {"reserving": False},
        E.PIN: {"pinned": True},
        E.UNPIN: {"pinned": False},
        E.WEIGHTS: {"waiting": True},
        E.SWAPPED: {"swapping": False},
    }
    after = facts._replace(**changes[event])
    if after.waiting and not after.reserving and not after.pinned:  # nothing holds the swap up any more: it begins at once
        after = after._replace(waiting=False, swapping=True)
    return next(state for state, facts in FACTS.items() if facts == after)


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=[f"{state.name}-{event.name}" for state, event in PAIRS])
def test_every_event_in_every_state_is_a_transition_or_refused(state: GeneratorState, event: GeneratorEvent) -> None:
    after = expected(state, event)
    assert event is E.STOP or accepts(state, event) == (after is not None)
    if after is None:
        with pytest.raises(ValueError, match=f"{state.name} can't {event.name}"):
            state_after(state, event)
    else:
        assert state_after(state, event) is after


def test_every_state_is_reached_and_none_of_them_swaps_while_it_reserves_or_evaluates() -> None:
    reached, frontier = set(), {S.NO_WEIGHTS}
    while frontier:
        state = frontier.pop()
        reached.add(state)
        frontier |= {state_after(state, event) for event in E if event in TRANSITIONS[state] or event is E.STOP} - reached
    assert reached == set(S) == FACTS.keys() | {S.NO_WEIGHTS, S.STOPPED}
    assert not any(facts.swapping and (facts.reserving or facts.pinned or facts.waiting) for facts in FACTS.values())
    swaps = {state for state in S if accepts(state, E.SWAPPED)} - {S.STOPPED}
    assert swaps == {S.SWAPPING}
    assert not accepts(S.SWAPPING, E.RESERVE)


def test_whatever_happens_new_weights_get_in_once_the_store_has_answered_and_the_evaluation_has_ended() -> None:
    for state in FACTS:
        if accepts(state, E.WEIGHTS):
            state = state_after(state, E.WEIGHTS)
        for event in (E.RESERVED, E.UNPIN):
            if accepts(state, event):
                state = state_after(state, event)
        assert state is S.SWAPPING
        assert state_after(state, E.SWAPPED) is S.READY


def test_an_evaluation_larger_than_the_engine_is_completed_before_the_swap() -> None:
    state = S.NO_WEIGHTS
    events = [E.WEIGHTS, E.SWAPPED, E.RESERVE, E.PIN, E.RESERVED, E.WEIGHTS, E.RESERVE, E.RESERVED, E.RESERVE, E.RESERVED]
    for event in events:
        state = state_after(state, event)
    assert state is S.PINNED_BEFORE_SWAP
    assert state_after(state, E.UNPIN) is S.SWAPPING
