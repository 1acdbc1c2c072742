"""What is kept from turn to turn: found by its tokens, in so many bytes, the latest first; and exact in the engine."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.generate.embedded.prefixes import LEAST, Prefixes
from asyncrl.models.loading import named_weights
from asyncrl.types import Generation, GenerationRequest, Sampling, Version

V0, V1 = Version(0, 0), Version(0, 1)
BYTES = 10  # of a position
Turn = tuple[GenerationRequest, Generation]


def ids_of(*parts: Sequence[int]) -> np.ndarray:
    """LEAST tokens, and the parts."""
    return np.array([*range(LEAST), *itertools.chain(*parts)])


def copy_of(ids: np.ndarray) -> Callable[[], list]:
    """A layer whose keys and values tell where they come from."""
    tensor = torch.from_numpy(ids)[None, :, None]
    return lambda: [(tensor, -tensor)]


def test_the_longest_common_beginning_is_found_in_the_group_alone() -> None:
    prefixes = Prefixes(BYTES)
    for ids in (ids_of([1, 2]), ids_of([1, 3, 3])):
        prefixes.keep(7, ids, copy_of(ids), room=10_000)
    size, layers = prefixes.find(7, ids_of([1, 3, 4, 4]))
    assert size == LEAST + 2
    assert layers[0][0][0, :, 0].tolist() == ids_of([1, 3, 3]).tolist()
    assert prefixes.find(8, ids_of([1, 3])) == (0, ())
    assert prefixes.find(7, np.array([5, 6])) == (0, ())  # not worth it
    assert prefixes.bytes == BYTES * (2 * LEAST + 5)


def test_what_goes_on_takes_the_place_of_what_it_begins_with() -> None:
    prefixes = Prefixes(BYTES)
    for ids in (ids_of([1]), ids_of([2]), ids_of([1, 5])):
        prefixes.keep(7, ids, copy_of(ids), room=10_000)
    assert prefixes.bytes == BYTES * (2 * LEAST + 3)
    assert prefixes.find(7, ids_of([2, 4]))[0] == LEAST + 1


def test_what_was_not_asked_for_longest_goes_first() -> None:
    prefixes, room = Prefixes(BYTES), BYTES * 2 * LEAST
    for group in (1, 2):
        prefixes.keep(group, ids_of(), copy_of(ids_of()), room)
    assert prefixes.find(1, ids_of())[0] == LEAST
    prefixes.keep(3, ids_of(), copy_of(ids_of()), room)
    assert [prefixes.find(group, ids_of())[0] for group in (1, 2, 3)] == [LEAST, 0, LEAST]
    prefixes.shrink(BYTES * LEAST)
    assert [prefixes.find(group, ids_of())[0] for group in (1, 3)] == [0, LEAST]
    prefixes.clear()
    assert (prefixes.bytes, prefixes.find(3, ids_of())) == (0, (0, ()))


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=4), st.integers(0, 3)), max_size=20))
def test_bytes_stay_within_the_room(asked: list[tuple[int, list[int], int]]) -> None:
    prefixes = Prefixes(BYTES)
    for group, tail, room in asked:
        ids, room = ids_of(tail), BYTES * (LEAST + 2) * room
        prefixes.shrink(room)  # as the engine does before anything joins
        prefixes.keep(group, ids, copy_of(ids), room)
        assert prefixes.bytes <= room
        size, layers = prefixes.find(group, ids)
        if size:
            assert layers[0][0][0, :size, 0].tolist() == ids[:size].tolist()


# ------------------------------------------------------------------------------------------------ engine


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(model).items()}


@pytest.fixture
def make_engine(make_model) -> Callable[..., TorchEngine]:
    def make(kind: str = "qwen3", **settings: object) -> TorchEngine:
        model = make_model(kind, max_position_embeddings=512)
        engine = TorchEngine(model, **{"slots": 4, "max_length": 256, **settings})
        engine.update_weights(V0, weights(model))
        return engine

    return make


def play(
    engine: TorchEngine, turns: int, *, goes_on: bool = True, between: Callable[[int], None] = lambda turn: None
) -> list[Turn]:
    """An episode that begins with 70 tokens, answers in 5, and reads 3."""
    prompt, made = [i % 22 + 1 for i in range(70)], []
    for turn in range(turns):
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=5, stop_token_ids=())
        request = GenerationRequest(
            id=str(turn), group=3, prompt_ids=tuple(prompt), sampling=sampling, seed=turn, goes_on=goes_on
        )
        future = engine.submit_group([request])[0]
        while engine.step():
            pass
        made.append((request, future.result(0)))
        prompt += [*future.result(0).token_ids, 4, 5, turn + 6]
        between(turn)
    return made


def gap(turns: list[Turn], model: PreTrainedModel) -> float:
    """Max |a plain forward − the engine|."""
    found = 0.0
    for request, answer in turns:
        ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logp.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        found = max(found, (own - torch.tensor(answer.logprobs)).abs().max().item())
    return found


@pytest.mark.parametrize(
    "kind", ["qwen3", "llama", "mistral, all layers see 5 tokens", "gemma3, every other layer sees 5", "gpt_oss, eager, sinks"]
)
def test_a_turn_computes_what_is_new_and_nothing_else_changes(make_engine, make_model, kind: str) -> None:
    engine = make_engine(kind)
    turns = play(engine, 4)
    # At first the prompt but for its last token; then that of the answer, which nothing was predicted from, and two of three.
    assert engine.gauges()["prefilled_tokens"] == 69 + 3 * 3
    assert engine.gauges()["reused_tokens"] == (70 + 4) + (78 + 4) + (86 + 4)
    assert gap(turns, make_model(kind, max_position_embeddings=512)) <= 1e-5
    whole = play(make_engine(kind), 4, goes_on=False)
    assert [answer.token_ids for _, answer in turns] == [answer.token_ids for _, answer in whole]


def test_after_a_swap_nothing_of_the_old_weights_is_used(make_engine, make_model) -> None:
    engine, other = make_engine(), make_model(seed=1, max_position_embeddings=512)
    turns = play(engine, 3, between=lambda turn: engine.update_weights(V1, weights(other)) if turn == 0 else None)
    assert engine.gauges()["reused_tokens"] == 78 + 4  # of the third turn
    assert [answer.spans[0].version for _, answer in turns] == [V0, V1, V1]
    assert gap(turns[1:], other) <= 1e-5


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"update_mode": "keep_kv"}])
def test_where_it_would_not_be_exact_nothing_is_kept(make_engine, settings: dict) -> None:
    engine = make_engine(**settings)
    play(engine, 3)
    assert engine.gauges()["reused_tokens"] == 0


def test_what_is_kept_gives_way_to_rows(make_engine) -> None:
    """Room for 440 positions: for a slot of 128 and the 74 that it left, not for one of 256 beside them."""
    position = make_engine()._batch._decoder.cache._position_bytes
    engine = make_engine(kv_bytes=440 * position)
    cache = engine._batch._decoder.cache

    def ask(tokens: int) -> Generation:
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=tokens, stop_token_ids=())
        request = GenerationRequest(id="a", group=9, prompt_ids=tuple(range(1, 21)) * 5, sampling=sampling, seed=0)
        future = engine.submit_group([request])[0]
        while engine.step():
            held = sum(of.nbytes for layer in cache.used for of in (*layer.keys, *layer.values))
            assert held + cache.prefixes.bytes <= cache.budget
        return future.result(0)

    play(engine, 1)
    assert cache.prefixes.bytes == 74 * position
    assert len(ask(20).token_ids) == 20
    assert cache.prefixes.bytes == 74 * position
    assert len(ask(100).token_ids) == 100
    assert cache.prefixes.bytes == 0


def test_what_there_is_no_room_for_is_not_kept(make_engine) -> None:
    cache = make_engine()._batch._decoder.cache
    engine = make_engine(kv_bytes=cache.bytes_for(np.array([128])))
    play(engine, 3)
    assert engine.gauges()["reused_tokens"] == engine._batch._decoder.cache.prefixes.bytes == 0


def test_no_memory_to_keep_a_turn_costs_nothing_but_the_turn(make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def keep(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._batch._cache, "keep", keep)
    turns = play(engine, 2)
    assert [len(answer.token_ids) for _, answer in turns] == [5, 5]
    assert gap(turns, engine._model) < 1e-5
    assert engine.gauges()["reused_tokens"] == 0


def test_what_is_kept_counts_when_memory_runs_out(make_engine) -> None:
    """So a row that fitted beside kept turns may fit without them."""
    engine = make_engine()
    play(engine, 2)
    cache = engine._batch._cache
    held = cache.prefixes.bytes
    assert held > 0
    engine._batch.cut_budget()
    assert (cache.budget, cache.prefixes.bytes) == (held * 3 // 4, 0)
