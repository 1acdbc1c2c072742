import json

import pyarrow.parquet as pq
import pytest

from asyncrl.jobs.samples import Answer, summary, write_samples
from asyncrl.reward.frames import Verdict
from asyncrl.types import Generation, Prompt


def answer(row, source, status, reward, length=1, response="", read=None):
    generation = Generation(id="", token_ids=[0] * length, logprobs=[], kept_logmass=None, spans=(), finish_reason="stop")
    prompt = Prompt(row=row, ids=(1,), data_source=source)
    verdict = Verdict(status, reward, answer=read)
    return Answer(prompt=prompt, rollout=0, seed=0, generation=generation, response=response, verdict=verdict)


def test_failures_count_as_zero_in_the_mean():
    found = summary(
        [
            answer(0, "a", "ok", 1.0, 1),
            answer(0, "a", "invalid", None, 2),
            answer(1, "b", "timeout", None, 3),
            answer(1, "b", "ok", 0.5, 6),
        ]
    )
    del found["estimates"]
    assert found == {
        "prompts": 2,
        "samples": 4,
        "score": 0.375,
        "by_source": {"a": 0.5, "b": 0.25},
        "invalid": 1,
        "timeout": 1,
        "mean_length": 3.0,
    }


def test_votes_are_the_answers_read_or_else_the_text():
    samples = [
        answer(0, "a", "ok", 1.0, response="it is 1/2", read="1/2"),
        answer(0, "a", "ok", 1.0, response="0.5!", read="1/2"),
        answer(0, "a", "ok", 0.0, response="2"),
        answer(1, "a", "ok", 0.0, response=" 7\n"),
        answer(1, "a", "ok", 0.0, response="7"),
        answer(1, "a", "invalid", None, response="8"),
    ]
    assert [sample.vote for sample in samples] == ["1/2", "1/2", "2", "7", "7", "8"]
    figures = summary(samples, ks=(1, 3))["estimates"]["overall"]
    assert figures["maj@3"]["mean"] == 0.5  # prompt 0 by two votes of three, prompt 1 never
    assert figures["maj@1"]["mean"] == pytest.approx(1 / 3)
    assert figures["pass@3"]["mean"] == 0.5


def test_figures_by_source_are_those_of_its_prompts_alone():
    samples = [answer(0, "b", "ok", 1.0), answer(1, "a", "ok", 0.0), answer(2, "b", "ok", 0.0)]
    estimates = summary(samples)["estimates"]
    assert list(estimates["by_source"]) == ["a", "b"]
    assert estimates["by_source"]["a"]["pass@1"] == {"mean": 0.0, "low": None, "high": None}
    assert estimates["by_source"]["b"]["score"]["mean"] == 0.5
    assert estimates["overall"]["score"]["mean"] == pytest.approx(1 / 3)


def test_one_row_per_response(tmp_path):
    write_samples(tmp_path / "s.parquet", [answer(3, "a", "ok", 1.0, 4, "so 12", "12")])
    [row] = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert (row["row"], row["response"], row["answer"], row["score"], row["response_length"]) == (3, "so 12", "12", 1.0, 4)
    assert json.loads(row["parts"]) == {}
