"""The engine against plain forwards: logprobs, versions, swaps, joining, leaving, repeating."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import groupby

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from asyncrl.errors import CheckpointError, Closed, ConfigError, Unavailable
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.models.loading import named_weights
from asyncrl.types import Generation, GenerationRequest, Span, Tokens, Version

MakeModel = Callable[..., PreTrainedModel]
MakeRequest = Callable[..., GenerationRequest]
V0, V1, V2 = Version(0, 0), Version(0, 1), Version(0, 2)
WAIT_S = 20.0
WINDOWED = [
    "mistral, all layers see 5 tokens",
    "gemma3, every other layer sees 5",
    "gemma2, eager, capped scores",
    "gpt_oss, eager, sinks",
    "llama4, every other layer sees its chunk of 5",
]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(model).items()}


@pytest.fixture
def make_engine(make_model: MakeModel) -> Iterator[Callable[..., TorchEngine]]:
    """make_engine(kind="qwen3", **settings): with weights V0, of make_model's seed 0."""
    engines: list[TorchEngine] = []

    def make(kind: str = "qwen3", slots: int = 4, max_length: int = 64, **settings: object) -> TorchEngine:
        model = make_model(kind)
        engine = TorchEngine(model, slots=slots, max_length=max_length, **settings)
        engine.update_weights(V0, weights(model))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def submit(engine: TorchEngine, request: GenerationRequest) -> "Future[Generation]":
    return engine.submit_group([request])[0]


def finish(engine: TorchEngine, *futures: "Future[Generation]") -> list[Generation]:
    while engine.step():
        pass
    return [future.result(0) for future in futures]


def recomputed(models: dict[Version, PreTrainedModel], request: GenerationRequest, answer: Generation) -> np.ndarray:
    """Full-softmax logprobs [T] of the response at the request's temperature, each by a plain forward of its tagged version."""
    ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
    versions = [span.version for span in answer.spans for _ in range(span.length)]
    assert len(versions) == len(answer.token_ids)
    first, out = len(request.prompt_ids) - 1, []
    with torch.no_grad():
        scores = {v: (m(input_ids=ids).logits[0] / request.sampling.temperature).log_softmax(-1) for v, m in models.items()}
    for i, (version, token) in enumerate(zip(versions, answer.token_ids, strict=True)):
        out.append(scores[version][first + i, token].item())
    return np.array(out)


def full_logprobs(answer: Generation) -> np.ndarray:
    return np.array(answer.logprobs) + (0.0 if answer.kept_logmass is None else np.array(answer.kept_logmass))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (1.0, 5), (0.9, 8)])
def test_logprobs_are_those_of_a_plain_forward(
    make_engine: Callable[..., TorchEngine],
    make_model: MakeModel,
    make_request: MakeRequest,
    kind: str,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    engine = make_engine(kind)
    requests = [
        make_request(
            str(i), prompt=range(1, 3 + i), seed=i, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=8 + i
        )
        for i in range(6)
    ]
    for request, answer in zip(requests, finish(engine, *engine.submit_group(requests)), strict=True):
        assert answer.spans == (Span(V0, request.sampling.max_tokens),)
        assert answer.finish_reason == "length"
        assert (answer.kept_logmass is None) == (top_p == 1.0 and top_k == 0)
        np.testing.assert_allclose(full_logprobs(answer), recomputed({V0: make_model(kind)}, request, answer), atol=1e-5)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8, "temperature": 0.7}])
def test_a_swap_in_flight_keeps_every_logprob_exact(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest, cut: dict[str, float]
) -> None:
    engine, models = make_engine(slots=3), {V0: make_model(), V1: make_model(seed=1), V2: make_model(seed=2)}
    requests = [make_request(str(i), prompt=range(1, 4 + i), seed=i, max_tokens=6 + 3 * i, **cut) for i in range(3)]
    futures = engine.submit_group(requests)
    for _ in range(4):
        engine.step()
    report = engine.update_weights(V1, weights(models[V1]))
    # Known to the cache: prompt (3, 4, 5) + 4 sampled − the last one, which is still to be fed.
    assert report.recomputed_tokens == (3 + 4 + 5) + 3 * 3
    assert report.version == engine.version == V1
    for _ in range(5):
        engine.step()
    engine.update_weights(V2, weights(models[V2]))
    answers = finish(engine, *futures)
    assert [answer.spans for answer in answers] == [
        (Span(V0, 4), Span(V1, 2)),
        (Span(V0, 4), Span(V1, 5)),
        (Span(V0, 4), Span(V1, 5), Span(V2, 3)),
    ]
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(full_logprobs(answer), recomputed(models, request, answer), atol=1e-5)


class Heard:
    """What an engine told of unfinished requests, by id; each time what follows."""

    def __init__(self) -> None:
        self.pieces: dict[str, list[Tokens]] = {}

    def __call__(self, request: GenerationRequest, start: int, tokens: Tokens) -> None:
        pieces = self.pieces.setdefault(request.id, [])
        assert start == sum(len(piece.token_ids) for piece in pieces) + len(request.begun.token_ids if request.begun else ())
        pieces.append(tokens)

    def of(self, id: str) -> Tokens:
        """All of it as one."""
        names, pieces = ("token_ids", "logprobs", "kept_logmass"), self.pieces[id]
        lists = {name: [x for piece in pieces for x in getattr(piece, name) or ()] for name in names}
        spans = [s for piece in pieces for s in piece.spans]
        return Tokens(**lists | {"kept_logmass": lists["kept_logmass"] or None}, spans=tuple(spans))


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8, "temperature": 0.7}])
def test_another_engine_goes_on_with_what_was_told(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest, cut: dict[str, float]
) -> None:
    """Two rows that share a prompt and one more; a swap before the engine is lost, and one after."""
    models = {V0: make_model(), V1: make_model(seed=1), V2: make_model(seed=2)}
    engine, heard = make_engine(slots=3, stream_interval=4), Heard()
    requests = [make_request(str(i), prompt=(1, 2, 3 + i // 2), seed=i, max_tokens=20 + i, **cut) for i in range(3)]
    engine.submit_group(requests, heard)
    for step in range(11):
        if step == 6:
            engine.update_weights(V1, weights(models[V1]))
        assert engine.step()
    assert [len(piece.token_ids) for piece in heard.pieces["0"]] == [4, 4]
    known = {request.id: heard.of(request.id) for request in requests}
    assert {tokens.spans for tokens in known.values()} == {(Span(V0, 4), Span(V0, 2), Span(V1, 2))}

    other, again = make_engine(slots=3, stream_interval=4), Heard()
    other.update_weights(V1, weights(models[V1]))
    begun = [replace(request, begun=known[request.id]) for request in requests[:2]]
    futures = [*other.submit_group(begun, again), *other.submit_group(requests[2:])]
    for _ in range(5):
        assert other.step()
    other.update_weights(V2, weights(models[V2]))
    answers = finish(other, *futures)
    for request, answer in zip(requests[:2], answers, strict=False):
        first = known[request.id]
        assert (answer.token_ids[:8], answer.logprobs[:8]) == (first.token_ids, first.logprobs)
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == request.sampling.max_tokens
        merged = [(version, sum(s.length for s in of_it)) for version, of_it in groupby(answer.spans, lambda s: s.version)]
        assert merged == [(V0, 6), (V1, 7), (V2, request.sampling.max_tokens - 13)]
        np.testing.assert_allclose(full_logprobs(answer), recomputed(models, request, answer), atol=1e-5)
        told = [token for piece in again.pieces[request.id] for token in piece.token_ids]
        assert told == answer.token_ids[8 : 8 + len(told)]
        assert len(told) >= request.sampling.max_tokens - 8 - 4


def test_under_the_same_weights_an_answer_goes_on_as_it_would_have(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    """As each token's random number depends on its seed and place alone; but for the rounding of what is computed again."""
    request, heard = make_request(max_tokens=30), Heard()
    (whole,) = _whole(make_engine(), request)
    engine = make_engine(stream_interval=7)
    engine.submit_group([request], heard)
    for _ in range(20):
        engine.step()
    (answer,) = _whole(make_engine(), replace(request, begun=heard.of("a")))
    assert answer.token_ids == whole.token_ids
    assert answer.logprobs[:14] == whole.logprobs[:14]
    np.testing.assert_allclose(answer.logprobs, whole.logprobs, atol=1e-5)


def _whole(engine: TorchEngine, request: GenerationRequest) -> list[Generation]:
    return finish(engine, submit(engine, request))


def test_nobody_is_told_of_short_answers_nor_any_more_of_one_that_began_anew(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine, heard = make_engine(update_mode="restart", stream_interval=5), Heard()
    futures = engine.submit_group([make_request("a", max_tokens=5), make_request("b", max_tokens=20)], heard)
    for _ in range(7):
        engine.step()
    engine.update_weights(V1, weights(engine._model))
    short, long = finish(engine, *futures)
    assert (short.finish_reason, long.spans) == ("length", (Span(V1, 20),))
    assert {id: [len(p.token_ids) for p in pieces] for id, pieces in heard.pieces.items()} == {"b": [5]}


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_see_what_they_see_in_a_plain_forward(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest, kind: str
) -> None:
    """Prompts and responses longer than the window of 5 tokens; rows join and leave; swaps compute their caches again."""
    engine = make_engine(kind, slots=3, max_length=96)
    models = {V0: make_model(kind), V1: make_model(kind, seed=1), V2: make_model(kind, seed=2)}
    requests = [make_request(str(i), prompt=range(1, 3 + 4 * i), seed=i, max_tokens=8 + 5 * (i % 3)) for i in range(5)]
    futures = engine.submit_group(requests)
    for version in (V1, V2):
        for _ in range(6):
            engine.step()
        assert engine.update_weights(version, weights(models[version])).recomputed_tokens > 0
    answers = finish(engine, *futures)
    assert {span.version for answer in answers for span in answer.spans} == models.keys()
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer.logprobs, recomputed(models, request, answer), atol=5e-6)
    # They would be others without the window.
    wide = {v: make_model(kind, seed=v.update, sliding_window=64, attention_chunk_size=64) for v in models}
    assert np.abs(answers[4].logprobs - recomputed(wide, requests[4], answers[4])).max() > 1e-2


@pytest.mark.parametrize("kind", ["qwen3", *WINDOWED])
def test_a_swap_computes_a_shared_prompt_once(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest, kind: str
) -> None:
    """Two groups and one request alone; a row of the first has left, another lies in a class of longer rows."""
    models = {V0: make_model(kind), V1: make_model(kind, seed=1)}
    engine = make_engine(kind, slots=8, max_length=96)
    prompts = [tuple(n % 24 for n in range(50)), (7, 3, 5), (2, 9)]
    requests = [
        make_request(f"{g}/{r}", prompt=prompts[g], group=g, seed=10 * g + r, max_tokens=30 if r else 16)
        for g, rollouts in enumerate((4, 3, 1))
        for r in range(rollouts)
    ]
    futures = engine.submit_group(requests)
    for _ in range(18):
        engine.step()
    assert [future.done() for future in futures] == [True, False, False, False, True, False, False, True]
    # The prompts but for their last token, then 18 tokens of each of five rows; not 3 × (49 + 18) + 2 × (2 + 18).
    assert engine.update_weights(V1, weights(models[V1])).recomputed_tokens == 49 + 2 + 5 * 18
    for request, answer in zip(requests, finish(engine, *futures), strict=True):
        np.testing.assert_allclose(answer.logprobs, recomputed(models, request, answer), atol=1e-5)


def test_deterministic_swaps_compute_every_row_whole(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    """As they always have: another split would round otherwise."""
    engine = make_engine(deterministic=True)
    engine.submit_group([make_request(str(i), seed=i) for i in range(4)])
    engine.step()
    assert engine.update_weights(V1, weights(make_model(seed=1))).recomputed_tokens == 4 * 3


def test_keep_kv_recomputes_nothing_and_is_outside_the_guarantee(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    engine, models = make_engine(update_mode="keep_kv"), {V0: make_model(), V1: make_model(seed=1)}
    request = make_request(max_tokens=10)
    future = submit(engine, request)
    for _ in range(5):
        engine.step()
    assert engine.update_weights(V1, weights(models[V1])).recomputed_tokens == 0
    (answer,) = finish(engine, future)
    assert answer.spans == (Span(V0, 5), Span(V1, 5))
    gap = np.abs(full_logprobs(answer) - recomputed(models, request, answer))
    assert gap[:5].max() < 1e-5
    assert gap[5:].max() > 1e-3


def resume_when_draining(engine: TorchEngine) -> None:
    deadline = time.monotonic() + WAIT_S
    while not engine._draining and time.monotonic() < deadline:
        time.sleep(0.001)
    engine.resume()


@pytest.mark.parametrize("threaded", [False, True])
def test_drain_swaps_when_the_running_rows_have_ended(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest, threaded: bool
) -> None:
    engine = make_engine(slots=2, update_mode="drain")
    futures = engine.submit_group([make_request(str(i), seed=i, max_tokens=20) for i in range(4)])
    engine.step()
    new = weights(make_model(seed=1))
    if threaded:  # no step is made before the update is asked for
        engine.pause()
        engine.start()
        threading.Thread(target=resume_when_draining, args=(engine,), daemon=True).start()
    report = engine.update_weights(V1, new)
    assert [future.result(WAIT_S).spans for future in futures[:2]] == [(Span(V0, 20),)] * 2
    assert report.recomputed_tokens == 0
    if not threaded:
        assert not any(future.done() for future in futures[2:])
        finish(engine)
    versions = [future.result(WAIT_S).spans for future in futures]
    assert versions == [(Span(V0, 20),)] * 2 + [(Span(V1, 20),)] * 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_restart_begins_unfinished_rollouts_anew_in_their_order(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest, deterministic: bool
) -> None:
    models = {V0: make_model(), V1: make_model(seed=1)}
    engine = make_engine(slots=3, update_mode="restart", deterministic=deterministic)
    # Slots for the first three: b, which ends, is replaced by d from the second group (or not yet, if deterministic).
    lengths = {"a": 12, "b": 3, "c": 14, "d": 12, "e": 12}
    requests = [
        make_request(id, prompt=range(1, 4 + i), seed=i, group=i // 3, max_tokens=n)
        for i, (id, n) in enumerate(lengths.items())
    ]
    futures = engine.submit_group(requests[:3]) + engine.submit_group(requests[3:])
    for _ in range(5):
        engine.step()
    report = engine.update_weights(V1, weights(models[V1]))
    # a and c had 5 tokens each; d joined after 3 steps.
    assert (report.discarded_tokens, report.recomputed_tokens) == (5 + 5 + (0 if deterministic else 2), 0)
    assert (engine.gauges()["active"], engine.gauges()["queued"]) == (0.0, 4.0)
    assert [job.request.id for job in engine._queue] == ["a", "c", "d", "e"]
    answers = finish(engine, *futures)
    assert [answer.spans for answer in answers] == [(Span(V0 if id == "b" else V1, n),) for id, n in lengths.items()]
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(full_logprobs(answer), recomputed(models, request, answer), atol=1e-5)


def test_restart_under_the_same_weights_gives_the_same_rollout(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    """Its random numbers are those of its seed, whatever was thrown away: no second draw for what takes long."""
    plain, engine = make_engine(), make_engine(update_mode="restart")
    expected = finish(plain, submit(plain, make_request()))[0].token_ids
    future = submit(engine, make_request())
    for version in (V1, V2):
        for _ in range(4):
            engine.step()
        engine.update_weights(version, weights(make_model()))
    assert finish(engine, future)[0].token_ids == expected


def test_restarts_of_a_running_engine_lose_nothing(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    versions = [Version(0, update) for update in range(1, 6)]
    engine = make_engine(slots=4, max_length=96, update_mode="restart")
    engine.start()
    futures = [submit(engine, make_request(str(i), seed=i, max_tokens=10 + 5 * (i % 4))) for i in range(16)]
    tensors = weights(make_model(seed=1))
    reports = [engine.update_weights(version, tensors) for version in versions]
    answers = [future.result(WAIT_S) for future in futures]
    assert [len(answer.token_ids) for answer in answers] == [10 + 5 * (i % 4) for i in range(16)]
    assert all(len(answer.spans) == 1 for answer in answers)
    assert all(report.recomputed_tokens == 0 for report in reports)


def test_requests_join_and_leave_at_any_step_and_give_what_they_give_alone(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    requests = [
        make_request(str(i), prompt=range(1, 2 + i % 5), seed=40 + i, max_tokens=3 + 5 * (i % 4), temperature=0.5 + i % 2)
        for i in range(10)
    ]
    alone = make_engine(slots=1)
    expected = [finish(alone, submit(alone, request))[0] for request in requests]
    engine, futures = make_engine(slots=3), []
    for i, request in enumerate(requests):
        futures.append(submit(engine, request))
        for _ in range(i % 3):
            engine.step()
    for ours, theirs in zip(finish(engine, *futures), expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    assert engine.gauges()["active"] == 0


def test_a_shared_prompt_is_computed_once_and_gives_the_same(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    requests = [make_request(str(i), prompt=(4, 5, 6, 7), seed=i) for i in range(4)]
    alone, together = make_engine(slots=1), make_engine(slots=4)
    prefills: list[int] = []
    together._model.register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(kwargs["input_ids"].numel()) if kwargs["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    shared = finish(together, *together.submit_group(requests))
    assert prefills == [3]
    assert [g.token_ids for g in shared] == [finish(alone, submit(alone, request))[0].token_ids for request in requests]
    assert len({tuple(g.token_ids) for g in shared}) > 1


def test_stop_tokens_end_a_rollout_and_are_part_of_it(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine = make_engine()
    (free,) = finish(engine, submit(engine, make_request(max_tokens=30)))
    stops = (free.token_ids[9], free.token_ids[6])
    end = next(i for i, token in enumerate(free.token_ids) if token in stops) + 1
    stopped, other = finish(
        engine, *engine.submit_group([make_request(max_tokens=30, stop_token_ids=stops), make_request("b")])
    )
    assert stopped.token_ids == free.token_ids[:end]
    assert stopped.finish_reason == "stop"
    assert stopped.spans == (Span(V0, end),)
    assert other.token_ids == free.token_ids[:12]  # its neighbour's stop tokens are not its own


def test_greedy_takes_the_likeliest_token(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    engine, model = make_engine(), make_model()
    request = make_request(temperature=0.0)
    (answer,) = finish(engine, submit(engine, request))
    assert answer.logprobs == [0.0] * 12
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*request.prompt_ids, *answer.token_ids]])).logits[0]
    assert logits[2:-1].argmax(-1).tolist() == answer.token_ids


def test_abort_ends_running_and_queued_requests_of_a_group_only(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine = make_engine(slots=2)
    running, other, queued = (
        submit(engine, make_request(id, group=group, max_tokens=20)) for id, group in (("a", 1), ("b", 2), ("c", 1))
    )
    for _ in range(3):
        engine.step()
    engine.abort(1)
    assert running.result(0).finish_reason == queued.result(0).finish_reason == "abort"
    assert len(running.result(0).token_ids) == len(running.result(0).logprobs) == 3
    assert running.result(0).spans == (Span(V0, 3),)
    assert queued.result(0).token_ids == []
    assert finish(engine, other)[0].finish_reason == "length"


def test_a_cancelled_request_gives_its_slot_back(make_engine: Callable[..., TorchEngine], make_request: MakeRequest) -> None:
    engine = make_engine(slots=1)
    running, queued, other = (submit(engine, make_request(id, max_tokens=20)) for id in "abc")
    engine.step()
    running.cancel()
    queued.cancel()
    engine.step()
    assert (engine.gauges()["active"], engine.gauges()["queued"]) == (1.0, 0.0)  # of `other`, which has the only slot
    assert finish(engine, other)[0].finish_reason == "length"


def test_a_drain_does_not_wait_for_a_cancelled_request(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine = make_engine(update_mode="drain")
    future = submit(engine, make_request(max_tokens=20))
    engine.step()
    drain = threading.Thread(target=engine._drain, daemon=True)
    engine._thread = drain  # as if the engine stepped by itself: then a drain waits
    drain.start()
    while not engine._draining:
        time.sleep(0)
    future.cancel()
    while engine.step():
        pass
    drain.join(WAIT_S)
    assert not drain.is_alive()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"max_tokens": 62}, "prompt of 3 tokens.*max_tokens=62 > engine.max_length=64"),
        ({"max_tokens": 0}, "max_tokens=0 < 1"),
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (3, 24)}, "ids 3 to 24 leave the model's vocabulary of 24"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest, bad: dict[str, object], words: str
) -> None:
    engine = make_engine()
    refused, fine = submit(engine, make_request(**bad)), submit(engine, make_request("b", max_tokens=61))
    with pytest.raises(ConfigError, match=words):
        refused.result(0)
    assert len(finish(engine, fine)[0].token_ids) == 61


def test_nothing_is_decoded_before_the_first_weights_or_while_paused(make_model: MakeModel, make_request: MakeRequest) -> None:
    engine = TorchEngine(make_model(), slots=2, max_length=32)
    future = submit(engine, make_request())
    assert engine.version is None
    assert not engine.step()
    engine.update_weights(V0, weights(make_model()))
    engine.pause()
    assert not engine.step()
    engine.resume()
    assert finish(engine, future)[0].spans == (Span(V0, 12),)


# --------------------------------------------------------------------------------------------- memory


def kv_bytes(engine: TorchEngine) -> int:
    layers = engine._batch._decoder.cache.used
    return sum(of.nbytes for layer in layers for of in (*layer.keys, *layer.values))


def test_requests_join_by_the_memory_that_they_may_need(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    """Room for 5 rows of up to 64 positions, or for 2 of those and 2 of 96; nobody overtakes the one whose turn it is."""
    row = make_engine()._batch._decoder.cache.bytes_for(np.array([64]))
    engine = make_engine(slots=8, max_length=96, kv_bytes=5 * row)
    long, short = {"max_tokens": 80}, {"max_tokens": 10}
    requests = [
        make_request(str(i), seed=i, **size)
        for i, size in enumerate((long, short, long, long, short, short, short, short, short))
    ]
    futures, active = engine.submit_group(requests), []
    while engine.step():
        active.append(engine.gauges()["active"])
        assert kv_bytes(engine) <= 5 * row
    assert (active[0], max(active)) == (3, 4)
    assert [len(future.result(0).token_ids) for future in futures] == [80, 10, 80, 80, 10, 10, 10, 10, 10]


def test_a_request_that_never_fits_is_refused_and_others_go_on(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    row = make_engine()._batch._decoder.cache.bytes_for(np.array([64]))
    engine = make_engine(max_length=96, kv_bytes=row)
    refused, fine = submit(engine, make_request(max_tokens=80)), submit(engine, make_request("b"))
    with pytest.raises(ConfigError, match=rf"request a: .*1 rollouts .*83 tokens, may take .* > engine.kv_bytes={row:,}"):
        refused.result(0)
    assert len(finish(engine, fine)[0].token_ids) == 12
    group = make_engine(max_length=96, kv_bytes=row, deterministic=True).submit_group([make_request(id) for id in "ab"])
    with pytest.raises(ConfigError, match="2 rollouts that run together"):
        group[0].result(0)


class Scarce:
    """A device that has too little memory for more than so many rows in a forward pass."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.failures = 0

    def __call__(self, module: PreTrainedModel, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[0] > self.rows:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_of_memory_begins_rows_anew_under_a_smaller_budget(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    requests = [make_request(str(i), prompt=(i + 1, 2), seed=i) for i in range(8)]
    plain = make_engine(slots=8)
    expected = [answer.token_ids for answer in finish(plain, *plain.submit_group(requests))]
    engine, device = make_engine(slots=8), Scarce(rows=3)
    engine._model.register_forward_pre_hook(device, with_kwargs=True)
    futures = engine.submit_group(requests[:2])
    for _ in range(4):
        engine.step()
    futures += engine.submit_group(requests[2:])
    assert [answer.token_ids for answer in finish(engine, *futures)] == expected
    assert device.failures == 2  # 8 rows, then less than three quarters of those, 5, then 3
    engine.health(0.0)


def test_a_swap_that_runs_out_of_memory_begins_rows_anew(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    engine, device = make_engine(), Scarce(rows=4)
    engine._model.register_forward_pre_hook(device, with_kwargs=True)
    futures = engine.submit_group([make_request(str(i), prompt=(i + 1, 2), seed=i) for i in range(4)])
    engine.step()
    device.rows = 3
    report = engine.update_weights(V1, weights(make_model(seed=1)))
    assert (report.recomputed_tokens, report.discarded_tokens) == (0, 4)
    assert [answer.spans for answer in finish(engine, *futures)] == [(Span(V1, 12),)] * 4


def test_a_request_that_memory_runs_out_for_alone_is_refused_and_the_engine_lives(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine, device = make_engine(), Scarce(rows=0)
    hook = engine._model.register_forward_pre_hook(device, with_kwargs=True)
    future = submit(engine, make_request(max_tokens=61))
    engine.start()
    with pytest.raises(ConfigError, match="never be started"):
        future.result(WAIT_S)
    hook.remove()
    engine.health(WAIT_S)


# --------------------------------------------------------------------------------------------- deterministic


@pytest.mark.parametrize("threaded", [False, True])
def test_deterministic_results_repeat_to_the_bit(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest, threaded: bool
) -> None:
    groups = [
        [
            # The last group is so long that the cache grows: before the others in one order, after them in the other.
            make_request(f"{g}/{r}", prompt=[5] * (2 + 20 * g), seed=10 * g + r, group=g, max_tokens=4 + 5 * ((g + r) % 3))
            for r in range(3)
        ]
        for g in range(4)
    ]
    first = make_engine(slots=8, max_length=96, deterministic=True)
    expected = {g.id: g for group in groups for g in finish(first, *first.submit_group(group))}
    again = make_engine(slots=8, max_length=96, deterministic=True)
    if threaded:
        again.start()
    futures = []
    for group in reversed(groups):
        futures += again.submit_group(group[::-1])
        again.step()
    if not threaded:
        finish(again)
    for future in futures:
        answer = future.result(WAIT_S)
        assert answer == expected[answer.id]  # to the bit: logprobs are compared as they are


def test_deterministic_rows_stay_until_their_group_has_ended(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine = make_engine(slots=4, deterministic=True)
    short, long = engine.submit_group([make_request("a", max_tokens=2), make_request("b", max_tokens=5)])
    other = submit(engine, make_request("c", group=1, max_tokens=1))
    assert (engine.gauges()["active"], engine.gauges()["queued"]) == (0.0, 3.0)
    counts = []
    while engine.step():
        counts.append(engine.gauges()["active"])
    assert counts == [2, 2, 2, 2, 0, 0]
    assert [len(f.result(0).token_ids) for f in (short, long, other)] == [2, 5, 1]


def test_a_deterministic_group_must_fit(make_engine: Callable[..., TorchEngine], make_request: MakeRequest) -> None:
    engine = make_engine(slots=2, deterministic=True)
    with pytest.raises(ConfigError, match=r"3 rollouts > engine.slots=2"):
        engine.submit_group([make_request(str(i)) for i in range(3)])[0].result(0)


# ---------------------------------------------------------------------------------------- threads and failure


def test_threaded_swaps_pauses_and_submits_lose_nothing(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    engine, models = make_engine(slots=4, max_length=96), {V0: make_model(), V1: make_model(seed=1), V2: make_model(seed=2)}
    engine.start()
    requests = [make_request(str(i), seed=i, max_tokens=30) for i in range(12)]
    futures = [submit(engine, request) for request in requests[:6]]
    engine.update_weights(V1, weights(models[V1]))
    futures += engine.submit_group(requests[6:])
    engine.pause()
    engine.health(0.0)
    engine.resume()
    engine.update_weights(V2, weights(models[V2]))
    for request, future in zip(requests, futures, strict=True):
        answer = future.result(WAIT_S)
        np.testing.assert_allclose(answer.logprobs, recomputed(models, request, answer), atol=1e-5)
    engine.health(WAIT_S)


def test_a_failing_step_fails_every_future_and_health(
    make_engine: Callable[..., TorchEngine], make_request: MakeRequest
) -> None:
    engine = make_engine(slots=1)
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights(engine._model).items()}
    futures = [submit(engine, make_request(str(i))) for i in range(3)]
    engine.update_weights(V1, broken)
    engine.start()
    for future in futures:
        with pytest.raises(Unavailable, match=r"NonFinite: logits of version 0.1 are not finite"):
            future.result(WAIT_S)
    with pytest.raises(Unavailable, match="NonFinite"):
        engine.health(WAIT_S)
    with pytest.raises(Unavailable):
        submit(engine, make_request()).result(0)


def test_weights_of_another_model_are_refused_and_end_the_engine(make_engine: Callable[..., TorchEngine]) -> None:
    engine = make_engine()
    with pytest.raises(CheckpointError):
        engine.update_weights(V1, {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(Unavailable, match="CheckpointError"):
        engine.health(0.0)


def test_health_names_a_stuck_engine(make_engine: Callable[..., TorchEngine], make_request: MakeRequest) -> None:
    engine = make_engine()
    engine.health(0.0)  # idle is healthy
    submit(engine, make_request())
    with pytest.raises(Unavailable, match=r"no step in 0.0 s with 0 rows running and 1 requests queued"):
        engine.health(0.0)


def test_close_ends_futures_and_threads(make_engine: Callable[..., TorchEngine], make_request: MakeRequest) -> None:
    engine = make_engine(slots=1, max_length=90)
    futures = [submit(engine, make_request(str(i), max_tokens=80)) for i in range(3)]
    engine.step()  # one is running, two are queued
    engine.pause()
    engine.start()
    engine.close(WAIT_S)
    assert "torch-engine" not in {thread.name for thread in threading.enumerate()}
    for future in futures:
        with pytest.raises(Closed):
            future.result(0)
    with pytest.raises(Closed):
        engine.update_weights(V1, {})


def test_every_step_and_swap_is_progress_long_before_a_request_ends(
    make_engine: Callable[..., TorchEngine], make_model: MakeModel, make_request: MakeRequest
) -> None:
    engine = make_engine()
    future = submit(engine, make_request(max_tokens=40))
    for _ in range(10):
        before = engine.progress()
        assert engine.step()
        assert engine.progress() > before
    before = engine.progress()
    engine.update_weights(V1, weights(make_model(seed=1)))
    assert engine.progress() > before
    assert not future.done()
