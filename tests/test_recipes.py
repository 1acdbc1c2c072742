"""The recipes of public data sets, on local files of the same shape."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from asyncrl.cluster.preflight import check_run
from asyncrl.cluster.preparation import prepare_run
from asyncrl.config import Deployment, Recipe
from asyncrl.config.callables import load_callable
from asyncrl.config.load import load_recipe, override
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import DataError
from asyncrl.prompts.dataset import PromptFile
from asyncrl.prompts.reading import read_rows
from asyncrl.rundir import RunDir

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GSM8K = [{"question": f"What is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"} for i in range(998, 1066)]
MATH = [
    {
        "problem": f"Compute ${i}/2$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
    }
    for i in range(1, 69)
]


def prepared(name: str, source: Path, tiny_model: Path, run: RunDir, *overrides: str) -> Recipe:
    """The recipe as `asyncrl run` has it, checked and prepared."""
    words = (f"arguments={{source: {source}}}", f"model.path={tiny_model}", "data.max_prompt_length=256", *overrides)
    recipe = resolve_paths(override(load_recipe(RECIPES / name), words), run, RECIPES)
    deployment = override(Deployment(), ["generators.engine.max_length=4096"])
    plan = check_run(recipe, deployment, run)
    assert any(line.endswith("train.parquet (made by prepare)") for line in plan)
    prepare_run(recipe, deployment, run, resuming=False)
    return recipe


def score(recipe: Recipe, response: str, truth: str) -> float:
    return load_callable(recipe.reward.function)("s", response, truth)["score"]


def test_gsm8k_from_its_parquet_files_and_not_twice(tiny_model, tmp_path):
    for config in ("main", "socratic"):
        (tmp_path / "gsm8k" / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = GSM8K if split == "train" else GSM8K[:3]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "gsm8k" / config / f"{split}-00000-of-00001.parquet")
    run = RunDir(tmp_path / "run")
    recipe = prepared("gsm8k.py", tmp_path / "gsm8k", tiny_model, run)
    assert (len(PromptFile(run.data / "train.arrow")), len(PromptFile(run.data / "eval.arrow"))) == (68, 3)
    row = next(read_rows(recipe.data))
    assert row.prompt == [
        {"role": "user", "content": 'What is 998+1? Let\'s think step by step and output the final answer after "####".'}
    ]
    assert (row.data_source, row.ground_truth) == ("gsm8k", "999")
    assert [score(recipe, said, "1,000") for said in ("It is #### 1000", "It is #### 1001")] == [1.0, 0.0]

    made = (run.data / "train.parquet").stat().st_mtime_ns
    for file in (tmp_path / "gsm8k").rglob("*.parquet"):
        file.unlink()
    prepare_run(recipe, Deployment(), run, resuming=True)  # needs its source no more
    assert (run.data / "train.parquet").stat().st_mtime_ns == made
    other = replace(recipe, arguments={"source": str(tmp_path / "gsm8k")}, name="other")
    with pytest.raises(DataError, match=r"gsm8k holds neither train\*\.parquet nor train\*\.jsonl"):
        prepare_run(other, Deployment(), RunDir(tmp_path / "other"), resuming=False)


def test_gsm8k_with_programs(tiny_model, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    recipe = prepared("gsm8k_tools.py", tmp_path, tiny_model, RunDir(tmp_path / "run"))
    row = next(read_rows(recipe.data))
    assert row.prompt[0]["content"].endswith('the final answer after "####". Compute with the python tool where that helps.')
    reward = load_callable(recipe.reward.function)

    def scored(stop: str, *messages: dict[str, str]) -> dict[str, object]:
        return reward("s", "", row.ground_truth, episode={"messages": messages, "stop": stop})

    right, printed = {"role": "assistant", "content": "So #### 999"}, {"role": "tool", "content": "999"}
    assert scored("done", printed, right) == {"score": 1.0, "pred": "999"}
    assert scored("done", printed, {"role": "assistant", "content": "#### 998"})["score"] == 0.0
    assert scored("max_turns", right, printed)["score"] == 0.0  # nobody said it


@pytest.fixture
def python():
    """The tool of recipes/gsm8k_tools.py."""
    return load_callable(f"{RECIPES / 'gsm8k_tools.py'}:python")


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(998 + 1)", "999"),
        ("import math, sys\nprint(math.factorial(20))\nsys.exit()", "2432902008176640000"),
        ("x = 1", "(the program printed nothing)"),
        ("print('a' * 5000)", "a" * 1000),
    ],
)
def test_what_a_program_printed_is_told(python, code, printed):
    assert python(code) == printed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(1\n", r"SyntaxError: '\(' was never closed"),
        ("[0] * 10**10", "MemoryError"),
        ("while True: print('x' * 9999)", r"OSError: \[Errno 27\] File too large"),
        ("import os; os._exit(3)", "the program ended with exit code 3"),
        ("while True: pass", r"the program did not end within 0\.5 seconds"),
    ],
)
def test_a_program_costs_its_call_at_most(python, monkeypatch, code, error):
    monkeypatch.setitem(python.__globals__, "LONGEST_S", 0.5 if "pass" in code else 30.0)
    with pytest.raises((RuntimeError, TimeoutError), match=f"^{error}$"):
        python(code)


def test_math_from_json_lines_and_answers_that_stand_apart(tiny_model, tmp_path):
    pytest.importorskip("math_verify")
    (tmp_path / "math").mkdir()
    with_answers = [{**row, "answer": f"\\frac{{{i}}}{{2}}"} for i, row in enumerate(MATH[:2], start=1)]
    for split, rows in (("train", MATH), ("test", with_answers)):
        (tmp_path / "math" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDir(tmp_path / "run")
    recipe = prepared("competition_math.py", tmp_path / "math", tiny_model, run)
    first, held_out = next(read_rows(recipe.data)), next(read_rows(replace(recipe.data, files=recipe.evaluation.files)))
    assert first.prompt[0]["content"].endswith("output the final answer within \\boxed{}.")
    assert (first.ground_truth, held_out.ground_truth) == ("It is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}")
    for truth in (first.ground_truth, held_out.ground_truth):
        assert [score(recipe, f"So \\boxed{{{said}}}", truth) for said in ("0.5", "2")] == [1.0, 0.0]


def test_what_is_neither_a_folder_nor_fetched_and_other_columns_are_told(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"arguments\.source='.*nowhere' is no folder here, and can't be fetched"):
        prepared("gsm8k.py", tmp_path / "nowhere", tiny_model, RunDir(tmp_path / "run"))
    (tmp_path / "train.jsonl").write_text('{"prompt": "1"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: no column 'question'; columns found: prompt"):
        prepared("gsm8k.py", tmp_path, tiny_model, RunDir(tmp_path / "run"))
    assert not (tmp_path / "run" / "data" / "train.parquet").exists()
