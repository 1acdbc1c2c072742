"""What the driver makes of a run directory before any actor starts."""

import json
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from asyncrl.cluster.preparation import prepare_run
from asyncrl.config import AlgorithmSpec, Deployment, EvaluationSpec
from asyncrl.errors import ConfigError, DataError
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
        with pytest.raises(ConfigError, match=r"evaluation \(files, limit and n\)=(.|\n)*but it began with"):
            prepare_run(replace(recipe, evaluation=other), Deployment(), run, resuming=True)
    prepare_run(replace(recipe, evaluation=replace(held_out, freq=3)), Deployment(), run, resuming=True)
