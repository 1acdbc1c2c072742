"""A run is forked, and one whose reward was wrong repaired: to the bit as far as determinism reaches."""

import json
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace
from safetensors.torch import load_file

from asyncrl import Recipe, RunResult, launch
from asyncrl.cli import main
from asyncrl.config import (
    CheckpointSpec,
    DataSpec,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    RewardSpec,
    StalenessSpec,
)
from asyncrl.processes import ENDING
from asyncrl.replay import open as open_replay
from asyncrl.replay.log import events as ev

pytestmark = pytest.mark.ray
UPDATES, GROUPS, WRONG = 6, 4, 4  # the fourth update is the first with wrong rewards
REWARD = """
def right(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.count(ground_truth) / 6

def wrong(data_source, solution_str, ground_truth, extra_info=None):
    late = extra_info["place"] >= {first}
    return float("7" in solution_str) if late else solution_str.count(ground_truth) / 6
"""


class Made(NamedTuple):
    """Two runs at max_lag = 0, in deterministic mode: one with the right reward, one whose reward is wrong from update 4 on."""

    runs: Path
    reward: Path
    clean: RunResult
    buggy: RunResult


@pytest.fixture(scope="module")
def made(local_ray: None, tiny_recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("forks")
    reward, data = folder / "rewards.py", folder / "places.jsonl"
    reward.write_text(REWARD.format(first=(WRONG - 1) * GROUPS))
    rows = [{"prompt": f"{i:02d}+{7 * i % 100:02d}=", "answer": "7", "extra_info": {"place": i}} for i in range(64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe_in(
        folder,
        data=DataSpec(files=(str(data),), answer_key="answer", source_key="", max_prompt_length=8, shuffle=False),
        staleness=StalenessSpec(max_lag=0),
        learner=LearnerSpec(batch_groups=GROUPS, lr=1e-2),
        checkpoint=CheckpointSpec(save_freq=1, keep_last_n=10),
        total_steps=UPDATES,
    )
    deployment = Deployment(generators=GeneratorsSpec(engine=EngineSpec(slots=8, max_length=32, deterministic=True)))
    results = [
        launch(replace(recipe, reward=RewardSpec(function=f"{reward}:{which}")), deployment, name=which, runs_dir=folder)
        for which in ("right", "wrong")
    ]
    return Made(folder, reward, *results)


@pytest.fixture
def asyncrl(made: Made, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, list[Any], str]]]:
    """Status, the lines of JSON on standard output, and what standard error was told. A command leaves the signals that end it
    as they are for a process that has nothing more to do."""
    ended_by = {number: signal.getsignal(number) for number in ENDING}
    root, handlers, level = logging.getLogger(), list(logging.getLogger().handlers), logging.getLogger("asyncrl").level

    def call(*words: object) -> tuple[int, list[Any], str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        lines = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
        return status, lines, said.out + said.err

    yield call
    for number, handler in ended_by.items():
        signal.signal(number, handler)
    root.handlers[:] = handlers
    logging.getLogger("asyncrl").setLevel(level)


def weights(run: Path, update: int) -> dict[str, list[float]]:
    stored = load_file(run / "checkpoints" / f"step_{update:06d}" / "policy" / "model.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in stored.items()}


def scored(run: Path) -> list[dict[str, Any]]:
    rows = open_replay(run).rollouts(["response", "reward", "trained_update"]).to_pylist()
    return [row for row in rows if row["reward"] is not None]


def own_fence(events: list[Any]) -> ev.LearnerFenced:
    """The start of the fork's own learner."""
    return [e for e in events if isinstance(e, ev.LearnerFenced)][-1]


def equal_from(one: Path, other: Path, updates: Sequence[int]) -> list[bool]:
    return [weights(one, update) == weights(other, update) for update in updates]


def test_a_fork_with_nothing_changed_equals_the_run_to_the_bit(made: Made, asyncrl: Any, events_of: Any) -> None:
    """Trained again from the log, and, as max_lag = 0 and the engine is deterministic, also where it is generated anew."""
    before = {path: path.stat().st_mtime_ns for path in (made.runs / "right").rglob("*") if path.is_file()}
    for name, words in (("logged", ()), ("anew", ("--live",))):
        status, (result,), said = asyncrl("fork", made.runs / "right", name, "--at", 2, *words)
        assert status == 0, said
        assert result["steps"] == UPDATES
        assert equal_from(made.runs / name, made.runs / "right", range(2, UPDATES + 1)) == [True] * 5
        events = events_of(made.runs / name)
        replayed = [e.metrics["training/replayed"] for e in events if isinstance(e, ev.BatchCommitted) and e.version.update > 2]
        assert replayed == [0.0 if words else 1.0] * 4
        given_up = [len(e.groups) for e in events if isinstance(e, ev.GroupsUnused)]
        assert given_up == [made.clean.unused + (16 if words else 0)], "what the run had left over; live, its batches too"
        assert (result["trained"], result["pending"]) == (UPDATES * GROUPS, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the run that is forked is only read"
    facts = json.loads((made.runs / "logged" / "forked.json").read_text())
    assert facts == {"source": str(made.runs / "right"), "update": 2, "changed": [], "min_ess": 0.0, "batches": 4}
    assert weights(made.runs / "right", 6) != weights(made.runs / "right", 2)


def test_other_settings_train_on_the_log_until_the_behaviour_has_drifted(made: Made, asyncrl: Any, events_of: Any) -> None:
    """The first batch is of the fork's own policy; after one large step the next is not, and a third is leased ahead."""
    status, (result,), said = asyncrl("fork", made.runs / "right", "hot", "--at", 1, "learner.lr=0.05", "--min-ess", 0.9)
    assert status == 0, said
    events = events_of(result["run_dir"])
    own = [e.metrics for e in events if isinstance(e, ev.BatchCommitted) and e.version.update > 1]
    assert [m["training/replayed"] for m in own] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert own[0]["gap/ess"] > 0.999 > 0.9 > own[1]["gap/ess"]
    assert (result["steps"], result["trained"], result["pending"]) == (UPDATES, UPDATES * GROUPS, 0)
    given_up = [e.groups for e in events if isinstance(e, ev.GroupsUnused)][-1]
    assert len(given_up) == 2 * GROUPS
    after = [e for e in events if isinstance(e, ev.GroupReserved) and events.index(e) > events.index(own_fence(events))]
    assert [e.position for e in after][: 2 * GROUPS] == list(range(4 * GROUPS, 6 * GROUPS)), "their prompts come first"


def test_flips_are_counted_exactly_and_the_repaired_run_equals_a_clean_one(made: Made, asyncrl: Any) -> None:
    status, (report, result), said = asyncrl(
        "rescore", made.runs / "wrong", "--reward", f"{made.reward}:right", "--continue", "repaired", "--processes", 1
    )
    assert status == 0, said
    rows = scored(made.runs / "wrong")
    flips = [row for row in rows if abs(row["response"].count("7") / 6 - row["reward"]) > 1e-9]
    assert min(row["trained_update"] for row in flips if row["trained_update"]) == report["first_update"] == WRONG
    assert (report["rollouts"], report["rewards"], report["statuses"]) == (len(rows), len(flips), 0)
    assert report["advantages"] > 0
    assert report["by_source"]["places"]["rewards"] == len(flips)

    # Update 4 had the right rollouts, as update 3 was right; later ones come from a policy that the wrong rewards had made.
    repaired, clean, buggy = (made.runs / name for name in ("repaired", "right", "wrong"))
    assert json.loads((repaired / "forked.json").read_text())["update"] == WRONG - 1
    assert equal_from(repaired, clean, [3, 4, 5]) == [True, True, False]
    assert equal_from(buggy, clean, [3, 4]) == [True, False]
    assert result["steps"] == UPDATES
    assert all(row["reward"] == row["response"].count("7") / 6 for row in scored(repaired))
    assert json.loads((repaired / "recipe.json").read_text())["reward"]["function"] == f"{made.reward}:right"


def test_what_can_not_work_is_said_before_anything_is_made(made: Made, asyncrl: Any) -> None:
    run, before = made.runs / "wrong", sorted(made.runs.iterdir())
    for words, told in (
        (("fork", run, "x", "--at", 9), "no checkpoint of that update to fork from; it has 0, 1"),
        (("fork", run, "right", "--at", 2), "right is there already"),
        (("fork", made.runs, "x", "--at", 2), "no run directory: it has no recipe.json"),
        (("fork", run, "x", "--at", 6), "total_steps=6 <= --at 6"),
        (("fork", run, "x", "--at", 2, "seed=1"), "seed=1, but it began with 0"),
        (("fork", run, "x", "--at", 2, "learner.lrr=1"), "did you mean 'lr'"),
        (("rescore", run, "--reward", f"{made.reward}:rigth"), "did you mean 'right'"),
        (("rescore", run, "--reward", "nowhere.py"), "no file"),
        (("rescore", made.runs / "right", "--continue", "x"), "nothing to repair"),
        (("rescore", run, "--continue", "right"), "right is there already"),
    ):
        status, _, said = asyncrl(*words)
        assert (status, told in said) == (2, True), (words, said)
    for words in (
        ("fork", run, "x", "--at", 2, "learner.lr=0.1"),
        ("rescore", run, "--reward", f"{made.reward}:right"),
        ("rescore", run, "--reward", f"{made.reward}:right", "--continue", "x"),
    ):
        status, _, said = asyncrl(*words, "--dry-run")
        assert status == 0, said
    assert "fork        " + f"{run} at update 3" in said
    assert "log         3 batches of 12 groups, until gap/ess < 0.5; then live" in said
    assert sorted(made.runs.iterdir()) == before
