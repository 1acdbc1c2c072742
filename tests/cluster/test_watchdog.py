"""What the supervisor concludes from clocks, with clocks that the tests set."""

import pytest

from asyncrl.cluster.watchdog import Clock, RestartBudget, StallWatch
from asyncrl.report.timing import AwakeClock
from asyncrl.types import GroupCounts, Report, StoreReport

LIMIT_S, STEP_S = 300.0, 2.0


class SetClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


# ------------------------------------------------------------------------------------------------ a run that is stuck


class Run:
    """A store and two actors under the watch, which looks at them after every second."""

    def __init__(self, clock: SetClock, watched_on: Clock) -> None:
        self.clock, self.watch = clock, StallWatch(LIMIT_S, watched_on)
        self.activity = 7
        self.progress = {"learner": 0, "generator-0": 0}
        self.seconds = {"learner": {"busy": 900.0, "wait:store": 1.0}, "generator-0": {"busy": 1.0, "sync": 0.5}}
        self.looks = 0

    def after(self, seconds: int, *, excused: bool = False, **spent_in: str) -> str:
        """What the watch says at the end of so many seconds, each spent in these states."""
        said = ""
        for _ in range(seconds):
            self.clock.now += 1.0
            for name, state in spent_in.items():
                own = self.seconds[name.replace("_", "-")]
                own[state] = own.get(state, 0.0) + 1.0
            reports = {
                name: Report(name=name, role=name, seconds=dict(seconds), gauges={}, progress=self.progress[name])
                for name, seconds in self.seconds.items()
            }
            store = StoreReport(
                records=(), committed=3, counts=GroupCounts(), evals_pending=0, activity=self.activity, gauges={}
            )
            said = self.watch.stalled(store, reports, excused=excused)
        return said


@pytest.fixture
def run(clock: SetClock) -> Run:
    return Run(clock, clock)


def test_a_run_in_which_nothing_moves_is_found_in_time_and_everybody_is_named_with_what_he_did(run: Run) -> None:
    assert run.after(301, learner="wait:store", generator_0="busy") == ""  # of which the first look sees all as new
    assert run.after(1, learner="wait:store", generator_0="busy") == "generator-0 busy, learner wait:store"


@pytest.mark.parametrize("actor", ["learner", "generator-0"])
def test_an_actor_that_gets_anything_done_keeps_the_run_alive(run: Run, actor: str) -> None:
    for _ in range(20):  # an update, or a response, of 100 minutes
        assert run.after(300) == ""
        run.progress[actor] += 1
    assert run.after(302) != "", "the last of it was long ago"


def test_so_does_data_that_moves_through_the_store(run: Run) -> None:
    for _ in range(3):
        assert run.after(300) == ""
        run.activity += 1


def test_progress_that_begins_again_with_a_restarted_actor_counts_too(run: Run) -> None:
    run.progress["learner"] = 40
    assert run.after(300) == ""
    run.progress["learner"] = 0
    assert run.after(300) == ""


def test_what_starts_has_a_limit_of_its_own_however_long(run: Run) -> None:
    assert run.after(5000, excused=True) == ""
    assert run.after(300) == ""
    assert run.after(1) != ""


# ---------------------------------------------------------------------------------------------- a clock that jumps


def test_seconds_in_which_the_caller_was_awake_pass_as_they_are(clock: SetClock) -> None:
    awake = AwakeClock(clock, STEP_S)
    start = awake()
    for _ in range(200):
        clock.now += 0.5
        awake()
    assert awake() - start == pytest.approx(100.0)


def test_a_caller_that_was_stopped_for_an_hour_has_missed_some_seconds(clock: SetClock) -> None:
    awake = AwakeClock(clock, STEP_S)
    start = awake()
    clock.now += 3600.0
    assert awake() - start == STEP_S
    assert awake() - start == STEP_S


def test_a_run_is_not_stuck_because_its_supervisor_was_stopped(clock: SetClock) -> None:
    run = Run(clock, AwakeClock(clock, STEP_S))
    assert run.after(200) == ""
    clock.now += 3600.0
    assert run.after(90) == ""
    assert run.after(20) != "", "the time before and after it counts"


# ------------------------------------------------------------------------------------------ failures that count

HOUR_S = 3600.0


class Slot:
    """An actor that starts and fails as the test says."""

    def __init__(self, clock: SetClock) -> None:
        self.clock, self.budget = clock, RestartBudget(HOUR_S, clock)

    def fail(self, name: str, *, up_s: float = 0.0, down_s: float = 0.0) -> list[str]:
        """Starts for `down_s`, is up for `up_s` (0: never), and fails."""
        self.clock.now += down_s
        if up_s:
            self.budget.up()
            self.clock.now += up_s
        return self.budget.failed(name)


@pytest.fixture
def slot(clock: SetClock) -> Slot:
    return Slot(clock)


def test_an_actor_that_dies_once_a_day_goes_on_for_ever(slot: Slot) -> None:
    for day in range(30):
        assert slot.fail(f"day {day}", up_s=24 * HOUR_S, down_s=60.0) == [f"day {day}"]


def test_failures_within_the_window_count_and_the_first_of_them_is_the_first(slot: Slot) -> None:
    slot.fail("long ago", up_s=10.0)
    assert slot.fail("a", up_s=2 * HOUR_S) == ["a"]
    assert slot.fail("b", up_s=1200.0) == ["a", "b"]
    assert slot.fail("c", up_s=1200.0) == ["a", "b", "c"]
    assert slot.fail("d", up_s=1200.0) == ["a", "b", "c", "d"]
    assert slot.fail("e", up_s=1200.0) == ["b", "c", "d", "e"]


def test_time_in_which_it_was_down_lets_no_failure_be_forgotten(slot: Slot) -> None:
    slot.fail("a", down_s=2 * HOUR_S)  # it never came up
    slot.fail("b", down_s=2 * HOUR_S)
    assert slot.fail("c", down_s=2 * HOUR_S, up_s=1.0) == ["a", "b", "c"]
    assert slot.fail("d", down_s=2 * HOUR_S, up_s=1.0) == ["a", "b", "c", "d"]


def test_failures_that_are_explained_count_no_longer(slot: Slot) -> None:
    slot.fail("a", up_s=1.0)
    slot.budget.forgive()
    assert slot.fail("b", up_s=1.0) == ["b"]


def test_time_in_which_it_was_given_up_lets_no_failure_be_forgotten(slot: Slot) -> None:
    slot.fail("a", up_s=1.0)
    slot.budget.up()
    slot.budget.down()  # fewer were wanted
    assert slot.fail("b", down_s=2 * HOUR_S) == ["a", "b"]
