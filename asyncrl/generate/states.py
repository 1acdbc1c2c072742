"""What a generator is doing, as one state: whether it reserves, whether an evaluation pins its weights, whether it swaps.

    READY ──RESERVE──► RESERVING ──RESERVED──► READY        a reserve is told the version, so a swap waits for its end
      └────WEIGHTS───► SWAPPING  ──SWAPPED───► READY        nothing is reserved meanwhile

A reserve may bring requests of an evaluation (PIN): all of them must come from the present weights. Reserving goes on, for
the evaluation may be larger than the engine, and new weights wait until its last request has ended (UNPIN).

Pure. A state says which events may happen in it; any other event is an error of this program.
"""

from enum import Enum, auto


class GeneratorState(Enum):
    NO_WEIGHTS = auto()  # nothing can be generated or reserved yet
    READY = auto()  # requests may be running; tickets may be asked for, weights swapped
    RESERVING = auto()  # a `reserve` of tickets waits for the store
    RESERVING_BEFORE_SWAP = auto()  # the same, and new weights wait for its end
    PINNED = auto()  # an evaluation of the present weights runs
    PINNED_BEFORE_SWAP = auto()  # the same, and new weights wait for its end
    PINNED_RESERVING = auto()  # an evaluation runs, and a `reserve` waits for the store
    PINNED_RESERVING_BEFORE_SWAP = auto()  # the same, and new weights wait for both
    SWAPPING = auto()  # the engine takes new weights, or is about to
    STOPPED = auto()  # the run is over; whatever still happens changes nothing


class GeneratorEvent(Enum):
    RESERVE = auto()  # tickets are asked for
    RESERVED = auto()  # the store has replied, and work on its tickets has begun
    PIN = auto()  # the reply holds tickets of an evaluation of the present weights
    UNPIN = auto()  # the last request of an evaluation has ended, and the last reserve brought no more
    WEIGHTS = auto()  # newer weights are here
    SWAPPED = auto()  # the engine has them
    STOP = auto()  # `stop`, or the first error


_S, _E = GeneratorState, GeneratorEvent

TRANSITIONS: dict[GeneratorState, dict[GeneratorEvent, GeneratorState]] = {
    _S.NO_WEIGHTS: {_E.WEIGHTS: _S.SWAPPING},
    _S.READY: {_E.RESERVE: _S.RESERVING, _E.WEIGHTS: _S.SWAPPING},
    _S.RESERVING: {_E.RESERVED: _S.READY, _E.PIN: _S.PINNED_RESERVING, _E.WEIGHTS: _S.RESERVING_BEFORE_SWAP},
    _S.RESERVING_BEFORE_SWAP: {_E.RESERVED: _S.SWAPPING, _E.PIN: _S.PINNED_RESERVING_BEFORE_SWAP},
    _S.PINNED: {_E.RESERVE: _S.PINNED_RESERVING, _E.UNPIN: _S.READY, _E.WEIGHTS: _S.PINNED_BEFORE_SWAP},
    _S.PINNED_BEFORE_SWAP: {_E.RESERVE: _S.PINNED_RESERVING_BEFORE_SWAP, _E.UNPIN: _S.SWAPPING},
    _S.PINNED_RESERVING: {_E.RESERVED: _S.PINNED, _E.UNPIN: _S.RESERVING, _E.WEIGHTS: _S.PINNED_RESERVING_BEFORE_SWAP},
    _S.PINNED_RESERVING_BEFORE_SWAP: {_E.RESERVED: _S.PINNED_BEFORE_SWAP, _E.UNPIN: _S.RESERVING_BEFORE_SWAP},
    _S.SWAPPING: {_E.SWAPPED: _S.READY},
    _S.STOPPED: dict.fromkeys(_E, _S.STOPPED),
}


def state_after(state: GeneratorState, event: GeneratorEvent) -> GeneratorState:
    """Raises ValueError for an event that can't happen in `state`."""
    if event is GeneratorEvent.STOP:
        return GeneratorState.STOPPED
    if event not in TRANSITIONS[state]:
        raise ValueError(f"a generator that is {state.name} can't {event.name}: its threads disagree about what it does")
    return TRANSITIONS[state][event]


def accepts(state: GeneratorState, event: GeneratorEvent) -> bool:
    return event in TRANSITIONS[state]
