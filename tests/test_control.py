"""Requests to who leads a run: done once, in order, by the leader that they were made to, or not at all."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncrl.control as control
from asyncrl.control import Answered, Requests, Scale, Stop, Stopping, ask, leader
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(control, "_LOOK_S", 0.005)
    return RunDir(tmp_path / "run")


@pytest.fixture
def led(run: RunDir) -> Iterator[RunDir]:
    with run.lock():
        yield run


def scaling(done: list[Any]) -> Callable[[Scale], str]:
    def scale(request: Scale) -> str:
        done.append((request.generators, request.rewards))
        if request.generators == 0:
            raise ConfigError("generators=0 < 1")
        if request.generators == 13:
            raise ZeroDivisionError("a defect")
        return f"{request.generators} generators"

    return scale


class Looking:
    """A leader that looks again and again, in a thread."""

    def __init__(self, requests: Requests) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(requests,))

    def _look(self, requests: Requests) -> None:
        while not self._over.wait(0.005):
            requests.look()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def put(run: RunDir, name: str, content: bytes) -> None:
    run.create(run.requests)
    (run.requests / f"{name}.json").write_bytes(content)


def answer_to(run: RunDir, name: str) -> Answered:
    return msgspec.json.decode((run.requests / f"{name}.answer").read_bytes(), type=Answered)


def test_many_askers_get_their_own_answers_and_each_request_is_done_once(led: RunDir) -> None:
    done: list[Any] = []
    got: dict[int, str] = {}
    with Looking(Requests(led, {Scale: scaling(done), Stop: lambda _: "ending"})):
        askers = [
            threading.Thread(target=lambda n=n: got.update({n: ask(led, Scale(generators=n), 30.0)})) for n in range(1, 9)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert ask(led, Stop(), 30.0) == "ending"
    assert got == {n: f"{n} generators" for n in range(1, 9)}
    assert sorted(done) == [(n, None) for n in range(1, 9)]
    assert os.listdir(led.requests) == []


def test_they_are_done_in_the_order_in_which_they_were_asked(led: RunDir) -> None:
    done: list[Any] = []
    requests = Requests(led, {Scale: scaling(done)})
    for number in (2, 1, 3):
        put(led, f"{number:03d}", msgspec.json.encode(Scale(generators=number)))
    requests.look()
    requests.look()
    assert done == [(1, None), (2, None), (3, None)]
    assert sorted(os.listdir(led.requests)) == ["001.answer", "002.answer", "003.answer"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no request that this run knows (Input data was truncated); it knows scale"),
        (b"[]", "no request that this run knows (Expected `object`, got `array`)"),
        (b'{"type": "explode"}', "Invalid value 'explode'"),
        (b'{"type": "stop"}', "Invalid value 'stop'"),
        (b'{"type": "scale", "generators": "four"}', "Expected `int | null`, got `str` - at `$.generators`"),
        (b'{"type": "scale", "learners": 2}', "Object contains unknown field `learners`"),
        (b'{"type": "scale", "generators": 0}', "generators=0 < 1"),
        (b'{"type": "scale", "generators": 13}', "a defect"),
    ],
)
def test_what_cant_be_done_is_answered_and_ends_nothing(led: RunDir, content: bytes, said: str) -> None:
    requests = Requests(led, {Scale: scaling([])})
    put(led, "1", content)
    put(led, "2", b'{"type": "scale", "generators": 3}')
    requests.look()
    assert not answer_to(led, "1").done
    assert said in answer_to(led, "1").text
    assert answer_to(led, "2") == Answered(True, "3 generators")


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60))
def test_no_content_of_a_request_raises(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = RunDir(tmp_path_factory.mktemp("any"))
    requests = Requests(run, {Stop: lambda _: "ending"})
    put(run, "1", content)
    requests.look()
    assert not answer_to(run, "1").done


def test_a_refusal_is_raised_where_it_was_asked(led: RunDir) -> None:
    with Looking(Requests(led, {Scale: scaling([])})), pytest.raises(ConfigError, match="generators=0 < 1"):
        ask(led, Scale(generators=0), 30.0)
    assert os.listdir(led.requests) == []


def test_nobody_is_waited_for_where_nobody_leads(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="nobody leads the run"):
        ask(run, Stop(), 30.0)
    with run.lock():
        pass
    with pytest.raises(ConfigError, match="nobody leads the run"):
        ask(run, Stop(), 30.0)
    (run.path / ".lock").write_text("pid 0 on elsewhere\n")  # whether it lives can't be seen from here
    assert str(leader(run)) == "pid 0 on elsewhere"


def test_a_leader_that_does_not_answer_has_done_nothing(led: RunDir) -> None:
    with pytest.raises(Unavailable, match="nothing was done: pid "):
        ask(led, Stop(), 0.05)
    assert os.listdir(led.requests) == []


def test_what_was_asked_of_a_leader_that_died_is_not_done_by_the_next(run: RunDir) -> None:
    put(run, "1", b'{"type": "scale", "generators": 3}')
    put(run, "2", b'{"type": "scale", "generators": 4}')
    (run.requests / "2.json").rename(run.requests / "2.taken")  # it died while it did this
    done: list[Any] = []
    with run.lock():
        requests = Requests(run, {Scale: scaling(done)})
        requests.look()
        assert done == []
        assert os.listdir(run.requests) == []
        put(run, "3", b'{"type": "scale", "generators": 5}')
        requests.look()
    assert done == [(5, None)]


def test_an_asker_whose_leader_ends_is_told_at_once(run: RunDir) -> None:
    said: list[str] = []

    def asking() -> None:
        try:
            ask(run, Scale(generators=2), 60.0)
        except Unavailable as error:
            said.append(str(error))

    with run.lock():
        asker = threading.Thread(target=asking)
        asker.start()
        while not (run.requests.exists() and any(name.endswith(".json") for name in os.listdir(run.requests))):
            pass
    asker.join(10)
    assert len(said) == 1
    assert "nothing was done: pid" in said[0]
    assert said[0].endswith("which led it, has ended")


def test_what_is_to_end_at_once_is_not_to_end_in_order_any_more() -> None:
    stopping = Stopping()
    assert (stopping.asked, stopping.at_once) == (False, False)
    assert "is made and saved" in stopping.take(Stop())
    assert (stopping.asked, stopping.at_once) == (True, False)
    for at_once in (True, False):
        assert "ends at once" in stopping.take(Stop(at_once))
        assert (stopping.asked, stopping.at_once) == (True, True)


def test_a_request_that_was_begun_may_be_done_and_this_is_said(led: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object) -> None:
        for path in led.requests.glob("*.json"):
            path.rename(path.with_suffix(".taken"))

    monkeypatch.setattr(control.time, "sleep", taken)
    with pytest.raises(Unavailable, match="it had begun with what was asked"):
        ask(led, Stop(), 0.02)
