"""Rows: spans, and moving into the holes that ended rows leave."""

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generate.embedded.rows import Job, Rows, spans_of
from asyncrl.types import GenerationRequest, Span, Version

V0, V1 = Version(0, 0), Version(0, 1)


def test_ended_rows_are_filled_from_the_back(make_request: Callable[..., GenerationRequest]) -> None:
    rows = Rows(slots=5, max_length=16, device=torch.device("cpu"))
    limits = {"a": 1, "b": 4, "c": 1, "d": 4, "e": 4}
    jobs = [
        Job(make_request(id, max_tokens=limit, temperature=i + 1.0), Future()) for i, (id, limit) in enumerate(limits.items())
    ]
    assert rows.add(jobs, V0) == [0, 1, 2, 3, 4]
    ended = rows.record(np.arange(10, 15), np.full(5, -1.0), None)
    assert [(done.job.request.id, done.generation.token_ids) for done in ended] == [("a", [10]), ("c", [12])]
    to, source = rows.drop()
    assert (to.tolist(), source.tolist()) == ([0, 2], [3, 4])
    assert [job.request.id for job in rows.jobs()] == ["d", "b", "e"]
    assert rows.last()[0].tolist() == [13, 11, 14]
    assert rows.sampling().temperature.tolist() == [4.0, 2.0, 5.0]
    rows.mark(V1)
    rows.record(np.arange(20, 23), np.full(3, -0.5), None)
    (aborted, *_) = rows.abort(lambda job: True)
    assert aborted.generation.token_ids == [13, 20]
    assert aborted.generation.logprobs == [-1.0, -0.5]
    assert aborted.generation.spans == (Span(V0, 1), Span(V1, 1))


def test_rows_thrown_away_give_their_jobs_back_in_the_order_in_which_they_joined(
    make_request: Callable[..., GenerationRequest],
) -> None:
    rows = Rows(slots=4, max_length=16, device=torch.device("cpu"))
    rows.add([Job(make_request(id, max_tokens=1 if id == "a" else 5), Future()) for id in "abc"], V0)
    rows.record(np.arange(3), np.full(3, -1.0), None)
    rows.drop()  # c now stands before b
    rows.add([Job(make_request("d", max_tokens=1), Future()), Job(make_request("e"), Future())], V0)
    rows.record(np.arange(4), np.full(4, -1.0), None)  # d has ended, as a dummy: it has its answer
    jobs, sampled = rows.clear()
    assert [job.request.id for job in jobs] == ["b", "c", "e"]
    assert (sampled, rows.count, rows.jobs()) == (2 + 2 + 1, 0, [])
    assert rows.add([jobs[0]], V1) == [0]
    assert rows.draw_keys()[1].tolist() == [0]  # its random numbers begin anew


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6), st.integers(0, 5))
def test_spans_cover_the_tokens_in_order(steps: list[tuple[int, int]], tail: int) -> None:
    """Swaps after any number of tokens, zero included: lengths add up, no span is empty."""
    starts, at, expected = [], 0, []
    for i, (_, tokens) in enumerate(steps):
        starts.append((Version(0, i), at))
        expected += [Version(0, i)] * tokens
        at += tokens
    starts.append((Version(0, 99), at))
    expected += [Version(0, 99)] * tail
    spans = spans_of(starts, at + tail)
    assert [span.version for span in spans for _ in range(span.length)] == expected
    assert all(span.length > 0 for span in spans)
