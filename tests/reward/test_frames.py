from hypothesis import given
from hypothesis import strategies as st

from asyncrl.reward.frames import Broken, FrameReader, Ready, Sample, Verdict, frame, reply, samples

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"))
verdicts = st.builds(
    Verdict, st.sampled_from(["ok", "invalid", "timeout"]), st.none() | finite, st.dictionaries(text, finite), text
)
replies = verdicts | st.just(Ready()) | st.builds(Broken, text)


@given(st.lists(replies, max_size=8), st.data())
def test_replies_survive_any_split_of_the_stream(messages, data):
    stream = b"".join(map(frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader, received = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += [reply(body) for body in reader.feed(stream[start:end])]
    assert received == messages


@given(st.lists(st.builds(Sample, text, text, text, text), max_size=5))
def test_samples_round_trip(batch):
    [body] = FrameReader().feed(frame(batch))
    assert samples(body) == batch


def test_an_incomplete_frame_waits():
    whole = frame(Verdict("ok", 1.0))
    reader = FrameReader()
    assert reader.feed(whole[:-1]) == []
    assert reader.feed(whole[-1:] + whole[:2]) == [whole[4:]]
