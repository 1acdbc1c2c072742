"""The lookout without a run: it is handed records, and says what fired, once."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncrl.cluster import lookout
from asyncrl.config import SentinelSpec
from asyncrl.errors import SentinelFired
from asyncrl.rundir import RunDir
from asyncrl.types import Record, Version

pytest.importorskip("duckdb")
LOW = '"actor/entropy" < 0.5'


def step(update: int, entropy: float, kind: Any = "step", **metrics: float) -> Record:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    named |= {"actor/entropy": entropy} if kind == "step" else {}
    return Record(sequence=update, time=1.0, kind=kind, version=Version(1, update), metrics=named)


class Watch:
    """A lookout over a folder, which is handed records one after the other."""

    def __init__(self, folder: Path, **sentinels: SentinelSpec) -> None:
        self.saved = 0
        self.fired: dict[str, int] = {}
        self.path = RunDir(folder).sentinels
        self.lookout = lookout.Lookout(sentinels, RunDir(folder))

    def see(self, *records: Record) -> None:
        self.lookout.note(records)
        self.lookout.drain()
        self.lookout.settle(self.save, self.fired)

    def save(self) -> None:
        self.saved += 1

    def lines(self) -> list[tuple[int, str, str]]:
        told = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [(one["step"], one["sentinel"], one["event"]) for one in told]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watch]]:
    made: list[Watch] = []

    def make(**sentinels: SentinelSpec) -> Watch:
        made.append(Watch(tmp_path, **sentinels))
        return made[-1]

    yield make
    for one in made:
        one.lookout.close()


def test_it_fires_when_it_begins_to_hold_and_again_when_it_was_over(watch: Any, caplog: pytest.LogCaptureFixture) -> None:
    watched = watch(low=SentinelSpec(when=LOW, patience=2))
    with caplog.at_level(logging.INFO, "asyncrl"):
        watched.see(*(step(i + 1, entropy) for i, entropy in enumerate([0.4, 0.9, 0.4, 0.3, 0.2, 0.9, 0.1, 0.9, 0.4, 0.4])))
    assert watched.lines() == [(4, "low", "fired"), (6, "low", "over"), (10, "low", "fired")]
    assert watched.fired == {"low": 10}
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned[0] == f"sentinel low fired at update 4: {LOW}\n  step=4, actor/entropy=0.3"
    assert "sentinel low is over at update 6" in caplog.text
    assert json.loads(watched.path.read_text().splitlines()[0])["rows"] == [{"step": 4, "actor/entropy": 0.3}]


def test_every_says_at_which_updates_it_is_looked_at_and_the_end_is_always_one(watch: Any) -> None:
    watched = watch(often=SentinelSpec(when=LOW), seldom=SentinelSpec(when=LOW, every=3))
    watched.lookout.note([step(1, 0.4), step(2, 0.4)])
    watched.see(step(3, 0.9), step(4, 0.4))
    assert [line for line in watched.lines() if line[1] == "seldom"] == [(4, "seldom", "fired")]
    assert watched.lines()[:2] == [(1, "often", "fired"), (3, "often", "over")]


def test_held_out_scores_stand_beside_the_metrics_of_their_update(watch: Any) -> None:
    rows = 'select step, "eval/score" as score from updates where "eval/score" < 0.3 and "actor/entropy" > 0.5'
    watched = watch(eval=SentinelSpec(when=rows))
    watched.see(step(1, 0.9), step(2, 0.4), step(1, 0.0, "eval", eval__score=0.2))
    assert watched.lines() == [(2, "eval", "fired")]  # by the last look: no step came after the evaluation
    assert json.loads(watched.path.read_text())["rows"] == [{"step": 1, "score": 0.2}]


def test_the_window_bounds_what_a_query_sees(watch: Any) -> None:
    counts = "select count(*) as n from updates having n = {}"
    watched = watch(
        three=SentinelSpec(when=counts.format(3), window=3),
        four=SentinelSpec(when=counts.format(4), window=3),
        all=SentinelSpec(when=counts.format(6), window=None),
    )
    watched.see(*(step(update, 1.0) for update in range(1, 7)))
    assert watched.lines() == [(3, "three", "fired"), (6, "all", "fired")]


def test_what_fires_saves_or_stops_as_it_says(watch: Any) -> None:
    watched = watch(
        save=SentinelSpec(when=LOW, then="checkpoint"), stop=SentinelSpec(when='"actor/entropy" < 0.2', then="stop")
    )
    watched.see(step(1, 0.4))
    assert (watched.saved, watched.fired) == (1, {"save": 1})
    with pytest.raises(SentinelFired, match=r"sentinel stop fired at update 2: .*\n  step=2, actor/entropy=0\.1\n  its rows"):
        watched.see(step(2, 0.1))
    watched.see(step(3, 0.1))  # whoever goes on, goes on
    assert watched.fired == {"save": 1, "stop": 2}


def test_what_has_fired_does_not_fire_twice_in_a_run_that_is_resumed(watch: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = watch(low=SentinelSpec(when=LOW, then="checkpoint"), other=SentinelSpec(when=LOW))
    first.see(step(1, 0.9), step(2, 0.9), step(3, 0.4))
    first.lookout.close()
    with first.path.open("ab") as file:
        file.write(b'{"time": 1.0, "st')  # a kill cut it short
    resumed = watch(low=SentinelSpec(when=LOW, then="checkpoint"), other=SentinelSpec(when='"actor/entropy" < 0.45'))
    assert "sentinel low has fired at update 3" in caplog.text
    resumed.see(step(2, 0.4), step(3, 0.4), step(4, 0.4))  # 2 and 3 are trained again
    assert (resumed.saved, resumed.fired) == (0, {"other": 2})  # whose condition is another one
    resumed.see(step(5, 0.9), step(6, 0.4))
    assert (resumed.saved, resumed.fired["low"]) == (1, 6)
    steps = [line[0] for line in resumed.lines() if line[1] == "low"]
    assert steps == [3, 5, 6]


def test_updates_of_earlier_starts_are_in_the_tables(watch: Any, tmp_path: Path) -> None:
    line = {"sequence": 1, "time": 1.0, "kind": "step", "step": 1, "incarnation": 1, "actor/entropy": 2.0, "reward/mean": None}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps(line | {"kind": "actors"}) + "\n" + '{"kind": "st'
    )
    half = 'select step from updates where age = 0 and "actor/entropy" * 2 < (select max("actor/entropy") from updates)'
    watched = watch(half=SentinelSpec(when=half))
    watched.see(step(2, 0.9))
    assert watched.lines() == [(2, "half", "fired")]


def test_a_restore_begins_to_count_anew(watch: Any) -> None:
    watched = watch(low=SentinelSpec(when=LOW, patience=3))
    watched.see(step(1, 0.4), step(2, 0.4), step(1, 0.4), step(2, 0.4), step(3, 0.9))
    assert watched.lines() == []
    watched.see(step(4, 0.4), step(5, 0.4), step(6, 0.4))
    assert watched.lines() == [(6, "low", "fired")]


def test_a_query_that_fails_is_told_once_and_the_others_go_on(watch: Any, caplog: pytest.LogCaptureFixture) -> None:
    watched = watch(bad=SentinelSpec(when="select error('no') from updates"), low=SentinelSpec(when=LOW))
    watched.see(step(1, 0.9), step(2, 0.4))
    assert watched.lines() == [(2, "low", "fired")]
    told = [record.getMessage() for record in caplog.records if "could not be looked at" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("sentinel bad could not be looked at: ")


def test_what_breaks_the_thread_is_told_and_holds_up_nobody(
    watch: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(lookout.Database, "holds", broken)
    watched = watch(low=SentinelSpec(when=LOW))
    watched.see(step(1, 0.4))
    watched.see(step(2, 0.4))
    assert "sentinels: no longer looked at" in caplog.text
