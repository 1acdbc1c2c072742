"""The messages between a pool and its scoring processes; what such a process does is in test_pool.py."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.forks import Broken, Died, Loaded
from asyncrl.reward.process import HEADER, take_replies, to_frame
from asyncrl.reward.results import Sample, Verdict

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"))
verdicts = st.builds(
    Verdict,
    st.sampled_from(["ok", "invalid", "timeout"]),
    st.none() | finite,
    st.dictionaries(text, finite),
    text,
    st.none() | text,
    st.none() | st.lists(finite),
)
replies = verdicts | st.just(Loaded()) | st.builds(Broken, text) | st.builds(Died, st.integers(-64, 255))


@given(st.lists(replies, max_size=8), st.data())
def test_replies_survive_any_split_of_the_stream(messages, data):
    stream = b"".join(map(to_frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    buffer, received = bytearray(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        buffer += stream[start:end]
        received += take_replies(buffer)
    assert received == messages


@given(st.lists(st.builds(Sample, text, text, text, text, text, st.lists(st.integers(0, 2**32))), max_size=5))
def test_samples_round_trip(batch):
    frame = to_frame(batch)
    assert int.from_bytes(frame[:HEADER]) == len(frame) - HEADER
    assert msgspec.msgpack.decode(frame[HEADER:], type=list[Sample]) == batch


def test_an_incomplete_frame_waits():
    whole = to_frame(Verdict("ok", 1.0))
    buffer = bytearray(whole[:-1])
    assert take_replies(buffer) == []
    buffer += whole[-1:] + whole[:2]
    assert take_replies(buffer) == [Verdict("ok", 1.0)]
    assert buffer == whole[:2]
