"""Episodes in a whole run: the shipped recipe, in a shorter form."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoTokenizer

import asyncrl.replay
from asyncrl import RunResult, launch
from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.rundir import RunDir

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def pointers_run(local_ray, tmp_path_factory) -> RunResult:
    """20 of the 100 updates."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = ["total_steps=20", "evaluation.freq=20", "evaluation.limit=128"]
    recipe, deployment = load_specs(RECIPES / "pointers.py", None, overrides)
    return launch(resolve_paths(recipe, RunDir(runs / "pointers"), RECIPES), deployment, runs_dir=runs)


def test_the_policy_learns_to_ask(pointers_run, metrics_of) -> None:
    """What is to be said stands in the environment's answers alone: at first the policy gives up before it has it."""
    assert pointers_run.first_score <= 0.15
    assert pointers_run.last_score >= 0.8
    steps = metrics_of(pointers_run.run_dir, "step")
    sampled = [line["reward/mean"] for line in steps]
    assert fmean(sampled[:4]) <= 0.25
    assert fmean(sampled[-4:]) >= fmean(sampled[:4]) + 0.06  # greedy play is there long before
    assert max(line.get("gap/logprob_max_abs", 0.0) for line in steps) <= 1e-5  # over all turns
    assert (pointers_run.steps, pointers_run.samples, pointers_run.invalid, pointers_run.timeout) == (20, 20 * 256, 0, 0)


def test_rows_are_conversations_as_they_were_read_and_sampled(pointers_run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(pointers_run.run_dir) / "data/warm")
    columns = ["prompt_ids", "response_ids", "loss_mask", "turns", "segments", "episode", "reward", "trained_update"]
    rows = [row for row in asyncrl.replay.open(pointers_run.run_dir).rollouts(columns).to_pylist() if row["trained_update"]]
    assert len(rows) == 20 * 256
    whole = 0
    for row in rows:
        episode = json.loads(row["episode"])
        messages = json.loads(episode["messages"])
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        ids = row["prompt_ids"] + row["response_ids"]
        assert (row["segments"], len(row["turns"]), row["reward"]) == (None, len(said), episode["reward"])
        sampled = [token for token, mine in zip(row["response_ids"], row["loss_mask"], strict=True) if mine]
        assert tokenizer.decode(sampled, skip_special_tokens=True).split() == " ".join(said).split()
        ended = sampled.count(1) == len(said)  # every answer by itself
        if ended and all(said) and not {0, 2, 3, 4} & {*sampled}:  # no token in it that its text does not show
            rendered = tokenizer.apply_chat_template(messages, return_dict=False)
            assert rendered[: len(ids)] == ids
            whole += 1
    assert whole >= len(rows) // 2
