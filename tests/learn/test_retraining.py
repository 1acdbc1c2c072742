"""A training made again from its checkpoints and batches: equal to the bit, or told where not."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncrl.errors import CheckpointError, ConfigError, DataError
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.past import choose_updates, own_checkpoints
from asyncrl.learn.retraining import PastRun, UnlikeMetric
from asyncrl.rundir import RunDir
from asyncrl.types import Version

UPDATES, SAVED = 5, (0, 2, 5)


@dataclass
class Batch:
    groups: tuple[int, ...]
    version: Version
    metrics: dict[str, float]


@dataclass
class Log:
    """What replay.log.history.RunHistory tells, from memory. gone: groups whose rows were deleted."""

    make_rollouts: object
    commits: dict[int, Batch] = field(default_factory=dict)
    gone: frozenset[int] = frozenset()

    def rollouts(self, groups):
        return self.make_rollouts(seed=groups[0])

    def holds(self, groups):
        return not self.gone.intersection(groups)


KINDS = {
    "plain": {},
    "adaptive, running": {
        "algorithm": {"kl_coef": 0.1, "kl_control": "adaptive", "reward_normalization": "running", "adv_estimator": "rloo"},
        "reference": 3,
        "learner": {"mini_batch_groups": 2, "ppo_epochs": 2},
    },
    "critic": {"algorithm": {"adv_estimator": "gae"}, "critic": {"backbone": "own"}},
    "shared critic": {"algorithm": {"adv_estimator": "gae"}, "critic": {"backbone": "shared"}},
}


@pytest.fixture
def made(make_trainer, make_model, make_rollouts, tmp_path):
    """made(kind): a run's directory and log, and a function that makes its trainer anew."""

    def run(kind: str = "plain"):
        def trainer():
            options = dict(KINDS[kind])
            if "reference" in options:
                options["reference"] = make_model(seed=options["reference"])
            return make_trainer(**options)

        run_dir, log, learning = RunDir(tmp_path / "run").create(), Log(make_rollouts), trainer()
        checkpoints = Checkpoints(run_dir, keep_last_n=9)
        for update in range(UPDATES + 1):
            if update:
                metrics = learning.update(log.rollouts((update,)), update - 1)
                metrics["timing_s/step"] = math.nan
                log.commits[update] = Batch((update,), Version(1, update), metrics)
            if update in SAVED:
                checkpoints.save(learning, Version(1, update))
        checkpoints.wait()
        return run_dir, log, trainer

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [0, 2])
def test_what_is_trained_again_is_equal_to_the_bit(kind: str, begin: int, made) -> None:
    run, log, trainer = made(kind)
    past = PastRun(run, log, trainer())
    past.load(begin)
    compared = 0
    while past.committed < UPDATES:
        unlike, count = past.unlike_metrics(past.step(past.batch()))
        assert unlike == []
        compared += count
        if past.committed in SAVED:
            assert past.unlike_weights() == []
    assert compared > 15 * (UPDATES - begin)


def test_what_differs_is_told_where_it_begins(made) -> None:
    run, log, trainer = made("adaptive, running")
    log.commits[3].metrics["actor/pg_loss"] += 1e-12
    log.commits[3].metrics["timing_s/update"] = -1.0  # of the clock: never compared
    past = PastRun(run, log, trainer())
    past.load(2)
    metrics = past.step(past.batch())
    assert past.unlike_metrics(metrics)[0] == [
        UnlikeMetric(3, "actor/pg_loss", log.commits[3].metrics["actor/pg_loss"], metrics["actor/pg_loss"])
    ]
    past.load(5)
    path = run.checkpoint(5) / "optimizer" / "policy" / "adamw.safetensors"
    moments = load_file(path)
    name = next(name for name in moments if name.endswith("exp_avg"))
    moments[name].view(-1)[3] += 0.25
    save_file(moments, path, {"format": "pt"})
    state = json.loads((run.checkpoint(5) / "training_state.json").read_text())
    state["figures"]["kl_coef"] += 1.0
    (run.checkpoint(5) / "training_state.json").write_text(json.dumps(state))
    (moment, coefficient) = past.unlike_weights()
    assert moment.name == f"optimizer/policy/{name}"
    assert moment.largest == pytest.approx(0.25)
    assert coefficient == ("figures/kl_coef", 1.0)
    with torch.no_grad():
        weight = next(past.trainer.model.parameters())
        weight.view(-1)[0].neg_()
    assert [of.name.split("/")[0] for of in past.unlike_weights()] == ["policy", "optimizer", "figures"]
    with pytest.raises(CheckpointError, match="adamw"):
        past.load(5)  # whose sums don't match any more


def test_other_threads_than_the_run_had_are_told(made, caplog) -> None:
    run, log, trainer = made()
    PastRun(run, log, trainer()).load(2)
    assert "was made with" not in caplog.text
    torch.set_num_threads(2)
    PastRun(run, log, trainer()).load(2)
    assert "step_000002 was made with threads 1 (here 2)" in caplog.text


# -------------------------------------------------------------------------------------------- which updates


def test_the_oldest_checkpoint_whose_rows_are_there_is_gone_on_from(made) -> None:
    run, log, _ = made()
    assert choose_updates(run, log, None, None) == (0, 5)
    assert choose_updates(run, log, None, 4) == (0, 4)
    log.gone = frozenset({2})
    assert choose_updates(run, log, None, None) == (2, 5)
    assert choose_updates(run, log, 0, 1) == (0, 1)
    with pytest.raises(DataError, match="updates 2 to 2 are deleted"):
        choose_updates(run, log, 0, None)
    log.gone = frozenset({5})
    with pytest.raises(DataError, match=r"updates 5 to 5 are deleted.*from 2; .*there are 0, 2, 5"):
        choose_updates(run, log, None, None)


@pytest.mark.parametrize(
    ("begin", "end", "told"),
    [
        (None, 6, "--to 6: the log of .* holds updates 1 to 5"),
        (None, 0, "--to 0"),
        (3, None, "--from 3: .* has no checkpoint of it; it has 0, 2, 5"),
        (5, None, "--from 5 --to 5: there is no update between"),
    ],
)
def test_updates_that_are_not_there_are_named(begin, end, told, made) -> None:
    run, log, _ = made()
    with pytest.raises(ConfigError, match=told):
        choose_updates(run, log, begin, end)


def test_a_checkpoint_of_a_lineage_that_was_given_up_is_none_of_the_runs(made) -> None:
    run, log, _ = made()
    log.commits[2].version = Version(2, 2)  # it was made again, by another learner
    assert own_checkpoints(run, log) == [0, 5]


def test_without_its_checkpoint_update_0_is_the_model_as_it_was_built(made, tmp_path: Path) -> None:
    run, log, trainer = made()
    run.checkpoint(0).rename(tmp_path / "away")
    assert choose_updates(run, log, None, None) == (2, 5), "what the run wrote goes before what is made anew"
    past = PastRun(run, log, trainer())
    past.load(0)
    assert past.unlike_metrics(past.step(past.batch()))[0] == []
