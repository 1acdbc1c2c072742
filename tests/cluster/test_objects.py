"""Models, tokenizers, data and rewards of a program as files of a run."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.cluster.objects import recipe_of
from asyncrl.config import LearnerSpec, ModelSpec, RewardTerm, SamplingSpec
from asyncrl.errors import ConfigError, DataError
from asyncrl.models.loading import load_model, named_weights
from asyncrl.models.tokenizing import load_tokenizer
from asyncrl.prompts.encoding import identity
from asyncrl.prompts.reading import check_columns, read_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "extra": i if i else None} for i in range(4)]


class Split:
    """What `datasets.Dataset` has of its own, as far as it is used."""

    num_rows = 4

    def with_format(self, kind: str) -> "Split":
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        return pa.Table.from_pylist(ROWS)[rows]


def trl(prompts, completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)


@pytest.fixture
def loaded(tiny_model: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)


def test_objects_come_back_from_their_files_and_are_kept_once(loaded, tmp_path):
    model, tokenizer = loaded
    first, again = (recipe_of(tmp_path, model, tokenizer, ROWS, trl, None, {"total_steps": 3}) for _ in range(2))
    assert first == again
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["model", "tokenizer", "train"]
    back = named_weights(load_model(first.model))
    assert all(torch.equal(tensor, back[name]) for name, tensor in named_weights(model).items())
    assert identity(load_tokenizer(first.model)) == identity(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    other = recipe_of(tmp_path, model, tokenizer, ROWS, trl, None, {"total_steps": 3})
    assert other.model.path != first.model.path
    assert torch.equal(load_model(first.model).model.norm.weight + 1, load_model(other.model).model.norm.weight)
    in_bfloat16 = recipe_of(tmp_path, model.bfloat16(), tokenizer, ROWS, trl, None, {"total_steps": 3})
    assert in_bfloat16.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    "dataset",
    [ROWS, pa.Table.from_pylist(ROWS), pd.DataFrame(ROWS, index=[3, 1, 0, 2]), Split()],
    ids=lambda x: type(x).__name__,
)
def test_every_kind_of_table_becomes_the_same_rows(dataset, tmp_path):
    recipe = recipe_of(tmp_path, "m", None, dataset, trl, dataset, {"total_steps": 1})
    rows = list(read_rows(recipe.data))
    assert [(row.prompt, row.columns["answer"], row.data_source) for row in rows] == [
        (r["prompt"], r["answer"], "train") for r in ROWS
    ]
    assert pq.read_table(recipe.data.files[0]).column_names == ["prompt", "answer", "extra"]
    assert Path(recipe.evaluation.files[0]).name == "eval.parquet"


def test_columns_of_later_rows_are_kept():
    from asyncrl.prompts.tables import _table

    assert _table([{"a": 1}, {"b": 2}]).to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_verls_convention_wants_its_ground_truth_to_be_named(tmp_path):
    unnamed = recipe_of(tmp_path, "m", None, ROWS, verl, None, {"total_steps": 1})
    with pytest.raises(DataError, match=r"no column 'reward_model' \(data\.answer_key.*columns found: answer, extra, prompt"):
        check_columns(unnamed.data.files, unnamed.data)
    named = recipe_of(tmp_path, "m", None, ROWS, verl, None, {"total_steps": 1, "data": {"answer_key": "answer", "epochs": 2}})
    assert [row.ground_truth for row in read_rows(named.data)] == ["1", "2", "3", "4"]
    assert named.data.epochs == 2


def test_settings_are_specs_or_mappings_and_paths_stay(tmp_path):
    settings = {"total_steps": 2, "name": "mine", "learner": LearnerSpec(lr=1e-3), "sampling": {"n": 4, "min_valid": 1}}
    rewards = [verl, RewardTerm(function=trl, weight=0.5)]
    recipe = recipe_of(tmp_path, ModelSpec(path="m", dtype="bfloat16"), Path("t"), "a.parquet", rewards, ["b.jsonl"], settings)
    assert recipe.model == ModelSpec(path="m", dtype="bfloat16", tokenizer="t")
    assert (recipe.data.files, recipe.evaluation.files) == (("a.parquet",), ("b.jsonl",))
    assert (recipe.sampling, recipe.learner.lr) == (SamplingSpec(n=4, min_valid=1), 1e-3)
    assert [(term.name, term.weight) for term in recipe.reward.terms()] == [("verl", 1.0), ("trl", 0.5)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 7}, r"the model \(a int\) is no model of transformers"),
        ({"tokenizer": 7}, "the tokenizer is a int"),
        ({"tokenizer": None}, "the tokenizer is a NoneType.*None only for a model that is named"),
        ({"dataset": {"train": ROWS}}, "the dataset is a dict; give a list of dicts"),
        ({"dataset": []}, "the dataset holds no rows"),
        ({"dataset": [{"prompt": "a"}, {"prompt": 1}]}, "values can't stand in one table"),
        ({"eval_dataset": 7}, "the eval_dataset is a int"),
        ({"reward": 7}, "the reward is a int"),
        ({"reward": "model"}, "the reward is a Qwen3ForCausalLM"),
        ({"settings": {"total_steps": 0}}, "total_steps=0 < 1"),
        ({"settings": {"total_steps": 1, "learner": {"warmup": 1}}}, r"no field 'warmup'; did you mean 'warmup_steps'"),
        ({"settings": {"total_steps": 1, "num_generations": 8}}, "TRL calls it that: here it is sampling.n"),
        ({"settings": {"total_steps": 1, "seed": object()}}, "which no field of a recipe can hold"),
    ],
)  # fmt: skip
def test_what_is_of_no_known_kind_is_refused(loaded, tmp_path, change, said):
    model, tokenizer = loaded
    given = {"model": model, "tokenizer": tokenizer, "dataset": ROWS, "reward": trl, "eval_dataset": None}
    given = given | {"settings": {"total_steps": 1}} | change
    given["reward"] = model if given["reward"] == "model" else given["reward"]
    with pytest.raises((ConfigError, DataError), match=said):
        recipe_of(tmp_path, **given)


def test_models_that_would_not_come_back_as_they_are_are_refused(loaded, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match=r"is in float16, in which nothing is trained"):
        recipe_of(tmp_path, model.half(), tokenizer, ROWS, trl, None, {"total_steps": 1})
    model.float()._hf_peft_config_loaded = True
    with pytest.raises(ConfigError, match="has adapters"):
        recipe_of(tmp_path, model, tokenizer, ROWS, trl, None, {"total_steps": 1})
