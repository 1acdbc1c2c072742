"""The figures and lines that a run begins with, by hand."""

import math

import pytest

from asyncrl.report.facts import ActorFacts, Agreement, OpeningFacts, agreement, disagreement, held
from asyncrl.types import Prompt, Rollout, Score, Span, Version

PROMPT = Prompt(row=0, ids=(1, 2), data_source="sums", ground_truth='"46"')


def answer(logprobs: list[float], kept: list[float] | None = None) -> Rollout:
    return Rollout(
        group=-1,
        rollout=0,
        attempt=0,
        prompt=PROMPT,
        response_ids=[7] * len(logprobs),
        logprobs=logprobs,
        kept_logmass=kept,
        loss_mask=[1] * len(logprobs),
        turns=(0,),
        spans=(Span(Version(1, 0), len(logprobs)),),
        finish_reason="stop",
        worker="generator-0",
        times={},
    )


def test_the_gap_is_the_mean_distance_and_the_worst_token_is_named() -> None:
    found = agreement(answer([-1.0, -2.0, -0.5]), [-1.25, -2.0, -1.0], 0.3)
    assert (found.tokens, found.mean, found.worst, found.worst_at) == (3, 0.25, 0.5, 2)
    assert (found.engine, found.learner) == (-0.5, -1.0)
    assert found.holds
    assert not agreement(answer([-1.0, -2.0, -0.5]), [-1.25, -2.0, -1.0], 0.2).holds
    assert agreement(answer([-1.0]), [-9.0], None).holds, "null: any gap is allowed"


def test_what_top_p_cut_off_is_no_gap() -> None:
    assert agreement(answer([-0.5, -0.25], [-0.5, -0.25]), [-1.0, -0.5], 1e-9).mean == 0.0


def test_a_gap_that_is_no_number_ends_a_run() -> None:
    found = agreement(answer([-1.0, -1.0]), [-9.0, math.nan], 100.0)
    assert (found.worst_at, found.holds) == (1, False)


@pytest.fixture
def facts() -> OpeningFacts:
    return OpeningFacts(
        time=0.0,
        version=Version(1, 0),
        parameters=1_234_567,
        trained_parameters=1_234_567,
        dtypes={"compute": "float32", "engine": "float32"},
        actors=(
            ActorFacts(name="generator-0", place="a, 2 CPU threads", holds={"weights_bytes": 2048, "kv_bytes": 3 << 20}),
            ActorFacts(name="reward-0", place="a, 1 CPU threads"),
        ),
        generator="generator-0",
        prompt="12+34=",
        response="46",
        finish_reason="stop",
        answer_s=0.25,
        agreement=Agreement(tokens=3, mean=2e-7, worst=5e-7, worst_at=1, engine=-1.0, learner=-1.0, bound=1e-4),
        verdict=Score(group=-1, rollout=0, attempt=0, status="ok", reward=1.0, parts={"length": 0.25}),
        truth="46",
        verdict_s=0.125,
    )


def test_lines_for_people(facts: OpeningFacts) -> None:
    assert list(facts.lines()) == [
        "policy: 1,234,567 parameters, all trained; compute float32, engine float32",
        "generator-0 on a, 2 CPU threads: weights 2.0 KiB, KV cache up to 3.0 MiB",
        "reward-0 on a, 1 CPU threads",
        "first answer (generator-0, 3 tokens in 0.25 s): '12+34=' → '46'",
        "engine and learner: learner and engine are 2e-07 nats apart on average, of 0.0001 allowed, 5e-07 at worst",
        "reward: 1 (length 0.25) in 0.12 s, expected '46'",
    ]


def test_what_ends_a_run_says_the_figure_and_where_to_look(facts: OpeningFacts) -> None:
    said = disagreement(facts)
    for part in ("2e-07", "generators.max_gap=null", "token 1: engine -1, learner -1", "generators.engine.dtype"):
        assert part in said


def test_only_memory_is_held() -> None:
    gauges = {"engine/weights_bytes": 8.0, "engine/active": 3.0, "bus/received_bytes": 9.0, "policy_bytes": 4.0}
    assert held(gauges) == {"weights_bytes": 8.0, "policy_bytes": 4.0}
