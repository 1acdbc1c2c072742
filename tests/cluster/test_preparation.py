"""What the driver makes of a run directory before any actor starts."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from asyncrl.cluster.preparation import prepare_run, save_functions
from asyncrl.config import AlgorithmSpec, Deployment, EvaluationSpec, RewardSpec, SamplingSpec
from asyncrl.config.callables import PYTHON, SavedFunction, load_callable
from asyncrl.config.load import load_recipe
from asyncrl.errors import ConfigError, DataError
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample
from asyncrl.rundir import RunDir


def test_a_run_resumes_with_its_data_in_another_folder_but_not_with_other_data(tiny_recipe, tmp_path):
    recipe, run = tiny_recipe(), RunDir(tmp_path / "run")
    prepare_run(recipe, Deployment(), run, resuming=False)
    here = Path(recipe.data.files[0])
    (tmp_path / "copy").mkdir()
    there = here.rename(tmp_path / "copy" / here.name)
    moved = replace(recipe, data=replace(recipe.data, files=(str(there),)))
    prepare_run(moved, Deployment(), run, resuming=True)

    with pytest.raises(ConfigError, match=r"data=(.|\n)*max_prompt_length=7(.|\n)*but it began with"):
        prepare_run(replace(moved, data=replace(moved.data, max_prompt_length=7)), Deployment(), run, resuming=True)
    renamed = there.rename(there.with_name("other.jsonl"))
    with pytest.raises(ConfigError, match=r"'other\.jsonl'"):
        prepare_run(replace(moved, data=replace(moved.data, files=(str(renamed),))), Deployment(), run, resuming=True)
    there.write_text(renamed.read_text().replace("00+00=", "01+01="))
    with pytest.raises(DataError, match="changed since"):
        prepare_run(moved, Deployment(), run, resuming=True)


def test_the_recipe_of_a_run_has_written_out_what_was_left_to_the_loss(tiny_recipe, tmp_path):
    run, named = RunDir(tmp_path / "run"), replace(tiny_recipe(), algorithm=AlgorithmSpec(policy_loss="gspo"))
    prepare_run(named, Deployment(), run, resuming=False)
    written = json.loads(run.recipe.read_text())["algorithm"]
    assert (written["clip_ratio"], written["clip_ratio_high"]) == (3e-4, 4e-4)
    assert (written["loss_agg"], written["kl_estimator"]) == ("seq-mean-token-mean", "k3")
    assert msgspec.convert(written, AlgorithmSpec) == named.algorithm.resolved


def test_an_evaluation_that_is_under_way_keeps_its_prompts(tiny_recipe, tmp_path):
    recipe, run = tiny_recipe(), RunDir(tmp_path / "run")
    held_out = EvaluationSpec(files=recipe.data.files, limit=8)
    prepare_run(recipe, Deployment(), run, resuming=False)
    prepare_run(replace(recipe, evaluation=held_out), Deployment(), run, resuming=True)  # there was none
    for other in (EvaluationSpec(), replace(held_out, limit=4), replace(held_out, n=2)):
        with pytest.raises(ConfigError, match=r"evaluation \(files, limit, n and also\)=(.|\n)*but it began with"):
            prepare_run(replace(recipe, evaluation=other), Deployment(), run, resuming=True)
    prepare_run(replace(recipe, evaluation=replace(held_out, freq=3)), Deployment(), run, resuming=True)


# A program of a user's, of which only the main module knows the function.
PROGRAM = """
import helpers

BONUS = 0.25

def score(data_source, solution_str, ground_truth, extra_info=None):
    return helpers.right(solution_str, ground_truth) + BONUS

if __name__ == "__main__":
    import sys
    from asyncrl.cluster.preparation import save_functions
    from asyncrl.config import *
    from asyncrl.rundir import RunDir
    reward = RewardSpec(function=score)
    recipe = Recipe(name="r", model=ModelSpec(path="m"), data=DataSpec(files=("f",)), reward=reward, total_steps=1)
    print(save_functions(recipe, RunDir(sys.argv[1])).reward.function)
"""


def test_a_function_of_a_main_program_scores_in_other_processes_and_after_its_end(tmp_path):
    program, run = tmp_path / "program" / "train.py", tmp_path / "run"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    (program.parent / "helpers.py").write_text("def right(said, truth):\n    return float(said == truth)\n")
    command = [sys.executable, str(program), str(run)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    path, _, name = made.rpartition(":")
    assert (Path(path).parent, name) == (run / "functions", "score")
    assert Path(path).stat().st_mode & 0o777 == 0o600
    sample = Sample("s", "7", '"7"', "null", "{}", [])
    with RewardPool[int](made) as pool:
        assert [verdict.reward for verdict in pool.map([sample])] == [1.25]


RECIPE = """
import functools
from asyncrl import Recipe
from asyncrl.config import DataSpec, ModelSpec, RewardSpec
from beside import HALF

def half(said):
    return HALF * float(said == "7")

def score(data_source, solution_str, ground_truth, extra_info=None, *, times):
    return times * half(solution_str)

recipe = Recipe(
    name="r",
    model=ModelSpec(path="m"),
    data=DataSpec(files=("f",)),
    reward=RewardSpec(function=functools.partial(score, times=5.0)),
    total_steps=1,
)
"""


def test_what_a_recipe_makes_of_its_functions_takes_them_along(tmp_path, monkeypatch):
    """No other process has the recipe's file as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "recipes" / "recipe.py"
    file.parent.mkdir()
    file.write_text(RECIPE)
    (file.parent / "beside.py").write_text("HALF = 0.5")
    try:
        recipe = save_functions(load_recipe(file), RunDir(tmp_path / "run"))
    finally:
        sys.modules.pop("asyncrl_recipe", None)
        sys.modules.pop("beside", None)
    with RewardPool[int](recipe.reward.function) as pool:
        assert [verdict.reward for verdict in pool.map([Sample("s", "7", '"7"', "null", "{}", [])])] == [2.5]


def test_functions_are_saved_once_and_stay_what_was_given(tiny_recipe, tmp_path):
    seen, run = [], RunDir(tmp_path / "run")

    def prepare(recipe, run_dir):
        seen.append(recipe.sampling.keep)

    keep = SamplingSpec(n=4, max_response_length=6, keep=lambda rewards: sum(rewards) > 1)
    given = tiny_recipe(prepare=prepare, sampling=keep)
    recipe = save_functions(given, run)
    assert save_functions(given, run) == recipe
    assert {path.name.partition("-")[0] for path in run.functions.iterdir()} == {"prepare", "lambda"}
    prepare_run(recipe, Deployment(), run, resuming=False)
    assert seen == [recipe.sampling.keep], "it ran in the driver, and not as a copy"
    assert msgspec.json.decode(run.recipe.read_bytes(), type=type(recipe)).sampling == recipe.sampling
    assert load_callable(recipe.sampling.keep)([0.5, 0.6])
    assert save_functions(recipe, run) == recipe, "a resumed run has names already"


def test_what_cannot_be_sent_is_refused_before_anything_starts(tiny_recipe, tmp_path):
    lock = threading.Lock()
    recipe = tiny_recipe(reward=RewardSpec(function=lambda **sample: float(lock.locked())))
    with pytest.raises(ConfigError, match=r"the function 'lambda' can't be sent to other processes: TypeError: cannot pickle"):
        save_functions(recipe, RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("python", "words"),
    [("2.7", f"saved by Python 2.7, whose bytecode Python {PYTHON} "), (PYTHON, "could not be imported")],
)
def test_a_saved_function_that_cannot_be_loaded_says_why(tmp_path, python, words):
    path = tmp_path / "f.pkl"
    path.write_bytes(msgspec.msgpack.encode(SavedFunction(python, str(tmp_path), b"no pickle")))
    with pytest.raises(ConfigError, match=words):
        load_callable(f"{path}:f", "reward.function")
