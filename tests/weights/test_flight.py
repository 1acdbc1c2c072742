"""Bytes in flight: bounded for each receiver and in all, and nobody is left with nothing."""

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weights.flight import STALLED_S, Flight


def send(flight: Flight, peer: bytes, nbytes: int, now: float = 0.0) -> int:
    assert flight.allows(peer, nbytes)
    number = flight.next_number(peer)
    flight.send(peer, nbytes, now)
    return number


def test_a_receiver_gets_no_more_than_its_share_until_it_confirms() -> None:
    flight = Flight(each_bytes=100, total_bytes=1000)
    numbers = [send(flight, b"a", 40), send(flight, b"a", 60)]
    assert numbers == [1, 2]
    assert not flight.allows(b"a", 1)
    flight.confirm(b"a", 1, 0.0)
    assert flight.nbytes == 60
    assert flight.allows(b"a", 40)
    assert not flight.allows(b"a", 41)


def test_a_frame_that_was_never_sent_is_not_confirmed() -> None:
    flight = Flight(each_bytes=100, total_bytes=1000)
    send(flight, b"back on a new connection", 100)
    flight.confirm(b"back on a new connection", 40, 0.0)  # of the former one
    assert flight.nbytes == 100


def test_half_of_the_total_is_for_those_with_nothing_on_the_way() -> None:
    flight = Flight(each_bytes=100, total_bytes=200)
    send(flight, b"greedy", 50)
    send(flight, b"greedy", 50)
    send(flight, b"b", 50)
    assert not flight.allows(b"b", 1)
    assert flight.allows(b"c", 50)
    assert not flight.allows(b"c", 51)


def test_who_stalls_no_longer_counts_and_gets_nothing_until_it_confirms() -> None:
    flight = Flight(each_bytes=100, total_bytes=100)
    number = send(flight, b"stalled", 100)
    flight.look(STALLED_S - 1)
    assert not flight.allows(b"other", 50)
    flight.look(STALLED_S)
    assert flight.nbytes == 0
    assert flight.allows(b"other", 50)
    assert not flight.allows(b"stalled", 1)
    flight.confirm(b"stalled", number, STALLED_S)
    assert flight.nbytes == 0
    assert flight.allows(b"stalled", 50)


def test_what_is_forgotten_or_confirmed_twice_counts_once() -> None:
    flight = Flight(each_bytes=100, total_bytes=100)
    number = send(flight, b"a", 100)
    flight.confirm(b"a", number + 7, 0.0)  # a number of an older connection
    flight.confirm(b"a", number, 0.0)
    flight.confirm(b"unknown", 1, 0.0)
    assert flight.nbytes == 0
    send(flight, b"a", 100)
    flight.look(STALLED_S)
    flight.forget(b"a")
    flight.forget(b"a")
    assert flight.nbytes == 0


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 12))
def test_the_total_holds_and_is_given_back_whatever_receivers_do(seed: int, count: int) -> None:
    rng = random.Random(seed)
    flight = Flight(each_bytes=40, total_bytes=100)
    on_the_way: dict[bytes, deque[tuple[int, int]]] = {b"%d" % index: deque() for index in range(count)}
    for _ in range(200):
        peer = rng.choice(list(on_the_way))
        nbytes = rng.randint(1, 40)
        sent = on_the_way[peer]
        if rng.random() < 0.6 and flight.allows(peer, nbytes):
            sent.append((flight.next_number(peer), nbytes))
            flight.send(peer, nbytes, 0.0)
        elif sent and rng.random() < 0.9:
            flight.confirm(peer, sent.popleft()[0], 0.0)
        else:
            flight.forget(peer)
            sent.clear()
        assert flight.nbytes == sum(size for frames in on_the_way.values() for _, size in frames) <= 100
        assert all(sum(size for _, size in frames) <= 40 for frames in on_the_way.values())
