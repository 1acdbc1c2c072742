from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from msgspec.structs import replace

from asyncrl.errors import DataError
from asyncrl.replay.log import rows as schema
from asyncrl.replay.log.rows import TrainScore
from asyncrl.types import Episode, Prompt, Rollout, Span, Version


@pytest.fixture
def rollouts(fakes: SimpleNamespace) -> list[Rollout]:
    """Two turns with a tool's answer between them, across a swap; and one with top-p."""
    bench = fakes.Bench(fakes.plan())
    (ticket,) = bench.reserve(1, 0).tickets
    spans = (Span(Version(2, 7), 2), Span(Version(2, 8), 1), Span(Version(2, 9), 2))
    tool = fakes.rollout(
        ticket,
        0,
        Version(2, 7),
        response_ids=[11, 12, 13, 14, 0],
        logprobs=[-0.1, -0.2, 0.0, -0.3, -0.4],
        loss_mask=[1, 1, 0, 1, 1],
        turns=(0, 3),
        spans=spans,
        tokens=5,
        text="ask, and say 42",
        prompt_text="how much?",
        prompt=replace(ticket.prompt, ground_truth='"42"'),
    )
    other = replace(ticket.prompt, ground_truth="42")
    return [tool, fakes.rollout(ticket, 1, Version(2, 9), kept_logmass=[-0.25, 0.0], tokens=2, prompt=other)]


def test_train_rollouts_come_back_as_they_went(rollouts: list[Rollout]) -> None:
    batch = schema.from_ipc(schema.encode_rollouts(rollouts, "run"))
    a, b = schema.decode_train(
        batch.select(schema.TRAIN_COLUMNS), [TrainScore(1.0, {"format": 0.5}, 0.25), TrainScore(0.0, {})]
    )
    assert a.response_ids.tolist() == [11, 12, 13, 14, 0]
    assert a.prompt_ids.tolist() == [1, 2, 0]
    assert a.loss_mask.tolist() == [True, True, False, True, True]
    assert a.updates.tolist() == [7, 7, 8, 9, 9]
    assert a.logprobs == pytest.approx([-0.1, -0.2, 0.0, -0.3, -0.4])
    assert (a.kept_logmass, a.reward, a.parts) == (None, 1.0, {"format": 0.5})
    assert (a.token_rewards, a.baseline, b.baseline) == (None, 0.25, None)
    dtypes = [x.dtype for x in (a.prompt_ids, a.response_ids, a.loss_mask, a.logprobs, a.updates)]
    assert dtypes == [np.int64, np.int64, np.bool_, np.float32, np.int64]
    assert b.kept_logmass is not None
    assert b.kept_logmass.tolist() == [-0.25, 0.0]


def test_unscored_keeps_the_prompt_but_its_ids_and_the_stop_token(rollouts: list[Rollout]) -> None:
    batch = schema.from_ipc(schema.encode_rollouts(rollouts, "run")).select(schema.UNSCORED_COLUMNS)
    a, b = schema.decode_unscored(batch)
    assert a.prompt == Prompt(row=100, ids=(), data_source="even", ground_truth='"42"')  # rewards need no prompt tokens
    assert b.prompt.ground_truth == "42"  # the number
    assert (a.response_ids, a.text) == ([11, 12, 13, 14, 0], "ask, and say 42")
    assert (a.purpose, a.finish_reason, a.turns) == ("train", "stop", (0, 3))


def test_rows_can_be_read_by_people(rollouts: list[Rollout]) -> None:
    texts = ["prompt", "response", "ground_truth", "ground_truth_is_json"]
    rows = schema.from_ipc(schema.encode_rollouts(rollouts, "run")).select(texts).to_pylist()
    assert [tuple(row.values()) for row in rows] == [("how much?", "ask, and say 42", "42", False), ("", "", "42", True)]


def test_rows_get_their_token_rewards_later(rollouts: list[Rollout]) -> None:
    rows = schema.from_ipc(schema.encode_rollouts(rollouts, "run"))
    earned = [[0.0, 0.1, 0.0, 0.0, -1e-17], [1 / 3, 0.0]]
    again = schema.with_token_rewards(rows, earned)
    assert schema.read_submitted(schema.to_ipc(again)).equals(again)
    assert again.drop_columns("token_rewards").equals(rows.drop_columns("token_rewards"))
    trained = schema.decode_train(again.select(schema.TRAIN_COLUMNS), [TrainScore(0.0, {})] * 2)
    assert [r.token_rewards.tolist() for r in trained if r.token_rewards is not None] == earned  # float64, to the bit


def test_a_slice_decodes_like_the_whole(rollouts: list[Rollout]) -> None:
    batch = schema.from_ipc(schema.encode_rollouts(rollouts, "run")).slice(1, 1).select(schema.TRAIN_COLUMNS)
    (b,) = schema.decode_train(batch, [TrainScore(0.0, {})])
    assert b.updates.tolist() == [9, 9]
    assert b.response_ids.tolist() == rollouts[1].response_ids


def test_summaries_count_only_tokens_the_policy_chose(rollouts: list[Rollout]) -> None:
    tool_first = replace(rollouts[0], loss_mask=[0, 0, 1, 1, 1])
    none = replace(rollouts[0], loss_mask=[0] * 5)
    aborted = replace(rollouts[1], finish_reason="abort")
    a, b, c, d = schema.summaries(schema.from_ipc(schema.encode_rollouts([tool_first, none, aborted, rollouts[1]], "run")))
    assert (a.oldest, a.newest, a.length, a.version, a.problem) == (8, 9, 5, None, "")
    assert b.problem == "no token chosen by the policy"
    assert c.problem == "finish_reason=abort"
    assert (d.oldest, d.newest, d.length, d.version, d.problem) == (9, 9, 2, Version(2, 9), "")


def test_lists_that_are_not_parallel_are_refused(rollouts: list[Rollout]) -> None:
    with pytest.raises(DataError, match=r"5 response tokens, but \{'logprobs': 1\}"):
        schema.encode_rollouts([replace(rollouts[0], logprobs=[0.0])], "run")


EPISODE = Episode(reward=0.5, parts={"calls": 2.0}, stop="max_turns", messages='[{"role": "user", "content": "x"}]')


def test_an_episodes_segments_prompt_and_outcome_come_back(rollouts: list[Rollout]) -> None:
    cut = replace(rollouts[0], segments=(0, 2), prompt_ids=(8, 9), episode=EPISODE)
    batch = schema.from_ipc(schema.encode_rollouts([cut, rollouts[1]], "run"))
    a, b = schema.decode_train(batch.select(schema.TRAIN_COLUMNS), [TrainScore(1.0, {})] * 2)
    assert (a.segments, a.prompt_ids.tolist(), b.segments, b.prompt_ids.tolist()) == ((0, 2), [8, 9], (0,), [1, 2, 0])
    c, d = schema.decode_unscored(batch.select(schema.UNSCORED_COLUMNS))
    assert (c.episode, d.episode) == (EPISODE, None)


@pytest.mark.parametrize("segments", [(), (1, 3), (0, 3, 2), (0, 2, 5), (0, 1)])
def test_segments_that_are_none_are_refused(rollouts: list[Rollout], segments: tuple[int, ...]) -> None:
    """They rise from 0, end within the response, and begin with a prompt of their own."""
    with pytest.raises(DataError, match="must rise from 0, and each but the first begin with a token that the policy did not"):
        schema.encode_rollouts([replace(rollouts[0], segments=segments)], "run")


def test_rows_of_another_schema_are_refused() -> None:
    with pytest.raises(DataError, match="schema version"):
        schema.read_submitted(schema.to_ipc(pa.record_batch({"group": [1]})))


def test_what_is_no_arrow_stream_is_refused() -> None:
    with pytest.raises(DataError, match="not a readable Arrow stream"):
        schema.read_submitted(b"garbage")


def test_summaries_tell_how_episodes_went_and_why_one_sampled_nothing(rollouts: list[Rollout]) -> None:
    went = Episode(stop="max_turns", turn_rewards=(0.0, 0.5), figures={"turns": 2.0}, messages='[{"role": "user"}]')
    late = Episode(status="timeout", stop="deadline", error="no answer in time", figures={"turns": 0.0})
    nothing = {"response_ids": [], "logprobs": [], "loss_mask": [], "spans": ()}
    ended = [replace(rollouts[0], episode=late, **nothing), replace(rollouts[0], episode=Episode(), **nothing)]
    episodes = [replace(rollouts[0], episode=went), *ended, rollouts[0]]
    a, b, silent, c = schema.summaries(schema.from_ipc(schema.encode_rollouts(episodes, "run")))
    assert a.figures == {"turns": 2.0, "stop/max_turns": 1.0, "turn_reward/1": 0.0, "turn_reward/2": 0.5}
    assert (b.status, b.problem, b.figures) == ("timeout", "no answer in time", {"turns": 0.0, "stop/deadline": 1.0})
    assert (silent.status, silent.problem) == ("invalid", "the episode ended before the policy had answered anything")
    assert (c.problem, c.figures) == ("", None)
