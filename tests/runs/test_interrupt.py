"""Ctrl-C, from Python: what was trained is saved, and the run goes on from exactly there."""

import signal
import threading
from collections.abc import Callable

import pytest

from asyncrl import Callbacks, Trainer
from asyncrl.config import CheckpointSpec, Deployment, LimitsSpec
from asyncrl.control import Stop, ask
from asyncrl.errors import ConfigError
from asyncrl.replay.log import events as ev
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir
from asyncrl.types import Record

pytestmark = pytest.mark.ray


class CtrlC:
    """Interrupts this process when so many updates are committed, and again in every later round up to `times`."""

    def __init__(self, after: int, times: int = 1) -> None:
        self.after, self.left = after, times

    def __call__(self, run: RunSummary) -> None:
        if self.left and run.committed >= self.after:
            self.left -= 1
            signal.raise_signal(signal.SIGINT)


class Stops:
    """Asks as `asyncrl stop` does, when two updates are committed, and once that is taken as `asyncrl stop --now` does."""

    wanted = ["the update under way is made and saved, then the run ends", "the run ends at once"]

    def __init__(self, run: RunDir) -> None:
        self.run, self.told = run, list[str]()
        self.thread: threading.Thread | None = None

    def __call__(self, run: RunSummary) -> None:
        if run.committed >= 2 and self.thread is None:
            self.thread = threading.Thread(target=self.ask)
            self.thread.start()

    def ask(self) -> None:
        for now in (False, True):
            self.told.append(ask(self.run, Stop(at_once=now), 60.0))

    def wait(self) -> list[str]:
        if self.thread is not None:
            self.thread.join(60)
        return self.told


class Picky:
    """A callback that fails once, at an update that it is told to; before, it asks for what can't be done while one trains."""

    at = -1
    trainer: Trainer

    def __call__(self, update: Record) -> None:
        if update.version.update == self.at:
            self.at = -1
            for ask in (self.trainer.save_checkpoint, lambda: self.trainer.load_checkpoint(0)):
                with pytest.raises(ConfigError, match="call it between two `fit`s, not in a callback"):
                    ask()
            raise ValueError("not this update")


def deployment(**limits: float) -> Deployment:
    return Deployment(limits=LimitsSpec(poll_s=0.5, stop_timeout_s=3.0, **limits))


def test_an_interrupted_fit_saves_goes_on_and_is_resumed_from_exactly_there(
    local_ray: None, tiny_recipe: Callable, events_of: Callable, metrics_of: Callable, tmp_path
) -> None:
    run = RunDir(tmp_path / "tiny")
    recipe = tiny_recipe(total_steps=100_000, checkpoint=CheckpointSpec(save_freq=1000, keep_last_n=9))
    picky = Picky()
    with Trainer(recipe, deployment(), runs_dir=tmp_path, observe=CtrlC(2), callbacks=Callbacks(on_update=picky)) as trainer:
        with pytest.raises(
            KeyboardInterrupt, match=r"update (\d+) is saved in .*step_0*\1\nto go on: Trainer\(…, resume_from=.*tiny"
        ):
            trainer.fit()
        saved = trainer.result().steps
        assert saved >= 2
        assert [folder.name for folder in run.steps()] == ["step_000000", f"step_{saved:06d}"]
        assert trainer.fit(2).steps == saved + 2, "the learner was left of no use"
        picky.at, picky.trainer = saved + 3, trainer
        with pytest.raises(ValueError, match="not this update") as caught:  # a callback's error ends it in the same order
            trainer.fit()
        saved = trainer.result().steps
        assert caught.value.__notes__[0].startswith(f"update {saved} is saved in {run.checkpoint(saved)}\nto go on: ")
        assert trainer.fit(2).steps == saved + 2
    assert [line["step"] for line in metrics_of(run.path, "step")] == list(range(1, saved + 3))

    with (
        pytest.raises(KeyboardInterrupt),
        Trainer(recipe, deployment(), runs_dir=tmp_path, resume_from=run.path, observe=CtrlC(saved + 4)) as trainer,
    ):
        trainer.fit()
    events = events_of(run.path)
    fences = [event for event in events if isinstance(event, ev.LearnerFenced)]
    assert [fence.committed for fence in fences] == [0, saved + 2]
    commits = [event.version.update for event in events if isinstance(event, ev.BatchCommitted)]
    assert commits == list(range(1, commits[-1] + 1)), "an update was made twice"
    assert run.steps()[-1].name == f"step_{commits[-1]:06d}"


@pytest.mark.parametrize("how", ["too late", "twice", "asked"])
def test_an_update_that_does_not_end_holds_up_the_end_for_a_while_only(
    local_ray: None, tiny_recipe: Callable, hold_after: Callable, tmp_path, how: str
) -> None:
    recipe = tiny_recipe(algorithm=hold_after(2).algorithm, checkpoint=CheckpointSpec(save_freq=1000))
    stops = Stops(RunDir(tmp_path / "tiny"))
    observe = stops if how == "asked" else CtrlC(2, times=2 if how == "twice" else 1)
    limits = {"save_timeout_s": 2.0 if how == "too late" else 600.0}
    with (
        Trainer(recipe, deployment(**limits), runs_dir=tmp_path, observe=observe) as trainer,
        pytest.raises(KeyboardInterrupt) as interrupt,
    ):
        trainer.fit()
    said = str(interrupt.value)
    if how != "too late":
        assert said == ""
        assert [words.rpartition("; ")[0] for words in stops.wait()] == stops.wanted * (how == "asked")
    else:
        assert "step_000000 is the newest checkpoint; the updates since, up to 2, will be made again from the log" in said
