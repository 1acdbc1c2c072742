"""The window: what each kind of observation does to it, and what becomes of a server that it drives."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.generate.sglang.window import QUEUED, SETTLE, Load, Window


def load(in_flight: int = 64, *, waiting: int = 0, kv_usage: float = 0.5, retracted: int = 0) -> Load:
    return Load(running=in_flight - waiting, waiting=waiting, kv_usage=kv_usage, retracted=retracted, in_flight=in_flight)


CALM = load(0)


def shown(window: Window, *loads: Load) -> int:
    for one in loads:
        window.observe(one)
    return window.slots


def shrunk(slots: int = 48) -> Window:
    """A window of 64 slots that has come down to 48, and settled."""
    window = Window(64)
    assert shown(window, load(retracted=1), *[CALM] * SETTLE) == slots
    return window


def test_it_begins_with_all_slots() -> None:
    assert Window(64).slots == 64


# One observation of a window of 48 (of 64), which moves in steps of 4.
@pytest.mark.parametrize(
    ("seen", "slots"),
    [
        (load(48, retracted=1), 36),  # × 3/4
        (load(48, waiting=1, kv_usage=0.95), 36),
        (load(48, waiting=1, kv_usage=0.85), 48),  # waits for its prefill
        (load(48, kv_usage=0.95), 48),  # full, and nobody waits: just right
        (load(24, retracted=1), 18),  # 24 were too many already
        (load(60, retracted=1), 48),  # those beyond the window must end first
        (load(48), 52),  # full, and well
        (load(43), 52),  # nearly full: less than an eighth is free
        (load(42), 48),  # not full: more slots would stay empty
        (load(48, kv_usage=0.80), 52),  # 52 would use 0.87 of the cache
        (load(48, kv_usage=0.84), 48),  # 52 would use 0.91
    ],
)
def test_what_one_observation_does(seen: Load, slots: int) -> None:
    assert shown(shrunk(), seen) == slots


def test_one_congestion_is_answered_once() -> None:
    window, bad = Window(64), load(64, retracted=3)
    assert shown(window, bad) == 48
    assert shown(window, *[bad] * (SETTLE + 5)) == 48  # 64 are still in flight: nothing new
    assert shown(window, load(48, retracted=1)) == 36  # they are gone, and it is still too much
    assert shown(window, *[load(36, retracted=1)] * SETTLE) == 36
    assert shown(window, load(36, retracted=1)) == 27


def test_nothing_grows_while_it_settles() -> None:
    window = Window(64)
    assert shown(window, load(64, retracted=1), *[load(48)] * SETTLE) == 48
    assert shown(window, *[load(64)] * 10) == 64  # 52, 56, 60, 64 and no further


def test_requests_that_ended_since_the_retraction_count() -> None:
    """At the report only 8 are left in flight; but it was 64 that were too many."""
    assert shown(Window(64), load(64), load(8, retracted=2)) == 48


def test_a_queue_without_want_of_cache_leads_down_to_what_the_server_runs() -> None:
    window, queue = Window(64), load(64, waiting=44, kv_usage=0.2)  # it runs 20 at most
    assert shown(window, *[queue] * (QUEUED - 1)) == 64
    assert shown(window, queue) == 48
    for _ in range(100):  # as many as the window lets in; 20 run
        window.observe(load(window.slots, waiting=window.slots - 20, kv_usage=0.2))
    assert window.slots == 24  # 20, and 4 to refill freed places at once


def test_a_queue_that_comes_and_goes_or_is_short_or_paused_is_none() -> None:
    batch = load(64, waiting=40, kv_usage=0.2)
    assert shown(Window(64), *[*[batch] * (QUEUED - 1), load(64)] * 5) == 64
    assert shown(Window(64), *[load(64, waiting=4, kv_usage=0.2)] * 20) == 64
    assert shown(Window(64), *[load(64, waiting=64, kv_usage=0.0)] * 20) == 64  # none runs: weights are swapped


def test_less_than_a_group_free_is_full() -> None:
    """Groups of 16 in a window of 24: 16 in flight are all that fit, and the window must still grow."""
    window = Window(64, least=16)
    shown(window, load(32, retracted=1), *[CALM] * SETTLE)
    assert window.slots == 24
    assert shown(window, *[load(16)] * 2) == 32


def test_it_never_gets_stuck_below_what_is_always_in_flight() -> None:
    """A group of 8 is let in even by a window of 1, so more than the window is in flight at every observation."""
    window = Window(16)
    for _ in range(60):
        window.observe(load(min(8, window.slots), retracted=1))
    assert window.slots == 1
    assert shown(window, *[load(8)] * 60) == 9  # no larger while a place in it is free
    assert shown(window, *[load(16)] * 60) == 16


@pytest.mark.parametrize(("most", "least"), [(0, 1), (8, 0), (8, 9)])
def test_a_window_that_takes_nothing_is_refused(most: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"window of {least} to {most} slots"):
        Window(most, least)


LOADS = st.builds(
    Load,
    running=st.integers(0, 300),
    waiting=st.integers(0, 300),
    kv_usage=st.floats(0, 1),
    retracted=st.integers(0, 5),
    in_flight=st.integers(0, 300),
)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 256), st.integers(1, 256), st.lists(LOADS, max_size=60))
def test_bounds_steps_and_pauses_hold_for_any_server(most: int, least: int, loads: Sequence[Load]) -> None:
    least = min(least, most)
    window, since = Window(most, least), SETTLE
    for one in loads:
        before = window.slots
        window.observe(one)
        assert least <= window.slots <= most
        assert window.slots <= before + max(1, most // 16)
        if window.slots < before:
            assert since >= SETTLE
            assert one.retracted or one.waiting  # never without a reason
            assert one.in_flight <= before
        since = 0 if window.slots < before else since + 1


# ------------------------------------------------------------------------------------------------- simulation


class Server:
    """Decodes a token per tick for each running request; throws the youngest out when the cache of `capacity` tokens is full,
    and takes waiting ones in while a twentieth of it is free."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.running: list[list[int]] = []  # [tokens, tokens at its end]
        self.waiting: list[list[int]] = []
        self.retracted = 0

    @property
    def in_flight(self) -> int:
        return len(self.running) + len(self.waiting)

    def used(self) -> int:
        return sum(tokens for tokens, _ in self.running)

    def tick(self) -> int:
        """Returns the tokens made."""
        while self.waiting and self.used() + self.waiting[0][0] <= 0.95 * self.capacity:
            self.running.append(self.waiting.pop(0))
        while self.used() + len(self.running) > self.capacity:
            self.waiting.insert(0, self.running.pop())
            self.retracted += 1
        for request in self.running:
            request[0] += 1
        made = len(self.running)
        self.running = [request for request in self.running if request[0] < request[1]]
        return made

    def report(self) -> Load:
        retracted, self.retracted = self.retracted, 0
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage=self.used() / self.capacity,
            retracted=retracted,
            in_flight=self.in_flight,
        )


def drive(server: Server, window: Window, draw: random.Random, *, mean: int, ticks: int) -> dict[str, float]:
    """Keeps the window full with requests of log-normal length; observes every 20 ticks. Figures of the second half."""
    slots: list[int] = []
    made = retracted = waiting = 0
    for tick in range(ticks):
        while server.in_flight < window.slots:
            server.waiting.append([50, 50 + max(1, int(draw.lognormvariate(0, 0.5) * mean / 1.13))])
        made_now = server.tick()
        if tick % 20 == 19:
            seen = server.report()
            window.observe(seen)
            if tick > ticks / 2:
                slots.append(window.slots)
                retracted, waiting = retracted + seen.retracted, waiting + seen.waiting
        made += made_now if tick > ticks / 2 else 0
    return {
        "least": min(slots),
        "mean": sum(slots) / len(slots),
        "rate": made / (ticks / 2),
        "retracted": retracted,
        "waiting": waiting / len(slots),
    }


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_capacity_and_gives_it_back(seed: int) -> None:
    """Answers of 400 tokens on prompts of 50: at a random moment a request holds about 50 + 400·(1 + σ²)/2 = 300 tokens, so a
    cache of 9,600 has room for about 32 of 128."""
    server, window, draw = Server(9600), Window(128), random.Random(seed)
    long = drive(server, window, draw, mean=400, ticks=6000)
    assert 0.7 * 32 <= long["mean"] <= 1.2 * 32
    assert long["least"] >= 0.4 * 32  # no collapse
    flooded = drive(Server(9600), Window(128, least=128), random.Random(seed), mean=400, ticks=6000)
    assert long["retracted"] <= 0.5 * flooded["retracted"]
    assert long["waiting"] <= 8 < 80 <= flooded["waiting"]
    assert long["rate"] >= 0.8 * flooded["rate"]  # whose recomputations cost nothing here
    short = drive(server, window, draw, mean=20, ticks=4000)  # about 62 tokens each: 128 fit
    assert short["least"] == short["mean"] == 128
