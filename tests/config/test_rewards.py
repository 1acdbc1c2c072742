"""What a reward term may say, and what is refused when it is made."""

import subprocess
import sys

import msgspec
import pytest

from asyncrl.config import JudgeSpec, ModelSpec, Recipe, RewardSpec, RewardTerm
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir

MODEL = ModelSpec(path="org/Reward-0.6B")
URL = "http://judge/v1"


def judge(**fields):
    return JudgeSpec(prompt="prompts/helpful.txt", **fields)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: RewardTerm(), "nothing in one term: it is not clear what scores"),
        (lambda: RewardTerm(function="m:f", model=MODEL), "function and model in one term"),
        (lambda: RewardTerm(model=MODEL, arguments={"a": 1}), "arguments={'a': 1} with a model: only functions have it"),
        (lambda: RewardTerm(model=ModelSpec(path="m", builder="m:f")), "builder='m:f' with a reward's model"),
        (lambda: judge(), "url='' and model=None: it is not clear who judges"),
        (lambda: judge(url=URL, model=MODEL), "it is not clear who judges"),
        (lambda: judge(url="judge/v1"), "url='judge/v1' is no address; write http"),
        (lambda: judge(model=MODEL, key_env="KEY"), "key_env='KEY' with a model of the run's own"),
        (lambda: judge(url=URL, n=3), "n=3 with temperature=0 and pairwise=False: greedy texts would be equal"),
        (lambda: judge(url=URL, n=3, temperature=1.0, pairwise=True), "pairs are asked about in both orders"),
        (lambda: judge(url=URL, pattern="score: [0-9]+"), "has no group: put the score into parentheses"),
        (lambda: judge(url=URL, pattern="("), "is no regular expression: missing"),
        (
            lambda: RewardSpec(functions=(RewardTerm(model=MODEL), RewardTerm(model=MODEL))),
            "the name 'rm/Reward-0.6B' is taken",
        ),
    ],
)
def test_what_could_not_score_is_refused(make, problem):
    with pytest.raises(ConfigError) as refused:
        make()
    assert problem in str(refused.value)


def test_terms_are_called_after_what_scores():
    terms = RewardSpec(
        functions=(RewardTerm(model=MODEL), RewardTerm(judge=judge(url=URL)), RewardTerm(function="a.b:c"))
    ).terms()
    assert [term.name for term in terms] == ["rm/Reward-0.6B", "judge/helpful", "c"]
    assert [term.served for term in terms] == [MODEL, None, None]


def test_files_of_models_and_judges_are_found_beside_the_recipe(tiny_recipe, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "own").mkdir()
    own = judge(model=ModelSpec(path="own"), parse="parse.py:read")
    made = tiny_recipe(reward=RewardSpec(functions=(RewardTerm(model=ModelSpec(path="{run}/rm")), RewardTerm(judge=own))))
    recipe = resolve_paths(made, RunDir(tmp_path / "run"), tmp_path)
    classifier, judged = recipe.reward.functions
    assert classifier.model.path == str(tmp_path / "run" / "rm")
    assert judged.judge.prompt == str(tmp_path / "prompts" / "helpful.txt")
    assert judged.judge.model.path == str(tmp_path / "own")
    assert judged.judge.parse == f"{tmp_path}/parse.py:read"
    assert msgspec.convert(msgspec.to_builtins(recipe), Recipe) == recipe


def test_a_run_without_models_imports_nothing_of_them():
    """What a reward worker, and the driver, import for functions alone."""
    code = (
        "import sys, asyncrl.cluster.wiring, asyncrl.cluster.supervisor, asyncrl.reward.worker, asyncrl.reward.process;"
        "print(sorted({'aiohttp', 'torch', 'asyncrl.reward.asking', 'asyncrl.reward.served'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
