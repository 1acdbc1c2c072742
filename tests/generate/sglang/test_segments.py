"""From a server's chunks to an answer: whatever way the tokens come in, each is there once, with the version that made it."""

from collections.abc import Sequence
from types import EllipsisType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import Unavailable
from asyncrl.generate.sglang.segments import RequestRow, parse_label
from asyncrl.generate.sglang.wire import Chunk, Finish, Labelled, Meta
from asyncrl.types import GenerationRequest, Sampling, Span, Version

ONE, TWO, THREE = Version(1, 1), Version(1, 2), Version(1, 3)
LENGTH, STOP, ABORT = Finish("length"), Finish("stop"), Finish("abort", "asked for")
VOCABULARY = 50
IDS = [10 + token for token in range(40)]
FULL = [-token / 8 for token in range(40)]  # after temperature; exact in binary
SAMPLED = [-token / 16 for token in range(40)]  # after top-p as well


def make_row(max_tokens: int = 4, temperature: float = 1.0, top_p: float = 1.0, stop: tuple[int, ...] = ()) -> RequestRow:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=0, max_tokens=max_tokens, stop_token_ids=stop)
    return RequestRow(GenerationRequest(id="7/3", group=7, prompt_ids=(1, 2, 3), sampling=sampling, seed=0), VOCABULARY)


def chunk(
    start: int,
    end: int,
    *,
    base: int = 0,
    finish: Finish | None = None,
    labels: Sequence[tuple[str, int, int]] | EllipsisType = ...,
    cut: bool = False,
) -> Chunk:
    """News of tokens `start` to `end` of the whole answer; the segment began at `base`. Cumulative if start == base.

    labels: offsets in the segment; none reported without.
    """
    return Chunk(
        output_ids=IDS[start:end],
        meta_info=Meta(
            completion_tokens=end - base,
            finish_reason=finish,
            output_token_logprobs=[(FULL[i], IDS[i], None) for i in range(start, end)],
            output_token_sampling_logprobs=SAMPLED[start:end] if cut else [],
            weight_versions=None if labels is ... else [Labelled(*label) for label in labels],
        ),
    )


# ------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 2, 3)], ids=["cumulative", "incremental"])
def test_an_answer_in_three_chunks(starts: tuple[int, int, int]) -> None:
    row = make_row()
    row.begin(ONE)
    assert row.extend(chunk(starts[0], 2)) is None
    assert row.extend(chunk(starts[1], 3)) is None
    assert row.extend(chunk(starts[2], 4, finish=LENGTH, labels=[("1.1", 0, 4)])) == "length"
    answer = row.generation("length")
    assert (answer.id, answer.token_ids, answer.logprobs) == ("7/3", [10, 11, 12, 13], [0.0, -0.125, -0.25, -0.375])
    assert (answer.spans, answer.kept_logmass, answer.finish_reason) == ((Span(ONE, 4),), None, "length")
    assert row.length == 7


def test_a_last_chunk_without_news_ends_the_answer() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 2))
    assert row.extend(chunk(1, 2, finish=STOP, labels=[("1.1", 0, 2)])) == "stop"
    assert row.generation("stop").token_ids == [10, 11]


def test_an_update_while_it_runs_is_labelled_by_the_server() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 1))
    row.swapping(TWO)
    row.swapping(THREE)
    row.extend(chunk(0, 4, finish=LENGTH, labels=[("1.1", 0, 2), ("1.3", 2, 4)]))
    assert row.generation("length").spans == (Span(ONE, 2), Span(THREE, 2))


def test_a_row_begun_before_a_swap_may_be_wholly_of_the_new_weights() -> None:
    row = make_row()
    row.begin(ONE)
    row.swapping(TWO)
    row.extend(chunk(0, 4, finish=LENGTH, labels=[("1.2", 0, 4)]))
    assert row.generation("length").spans == (Span(TWO, 4),)


def test_an_interrupted_row_goes_on_with_other_weights() -> None:
    row = make_row()
    row.begin(ONE)
    assert row.extend(chunk(0, 3, finish=ABORT, labels=[("1.1", 0, 3)])) == "abort"
    row.begin(TWO)
    assert row.extend(chunk(3, 4, base=3, finish=LENGTH, labels=[("1.2", 0, 1)])) == "length"
    answer = row.generation("length")
    assert (answer.token_ids, answer.spans) == ([10, 11, 12, 13], (Span(ONE, 3), Span(TWO, 1)))


def test_two_segments_of_the_same_weights_are_one_span() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 3, finish=ABORT, labels=[("1.1", 0, 3)]))
    row.begin(ONE)
    row.extend(chunk(3, 4, base=3, finish=LENGTH))
    assert row.generation("length").spans == (Span(ONE, 4),)


@pytest.mark.parametrize(
    ("finish", "stop", "reason"),
    [
        (LENGTH, (), "length"),
        (ABORT, (), "length"),  # the abort came with the last token
        (ABORT, (13,), "stop"),  # or with the stop token
        (STOP, (13,), "stop"),
        (STOP, (), "stop"),
    ],
)
def test_why_it_ended_is_what_the_tokens_say(finish: Finish, stop: tuple[int, ...], reason: str) -> None:
    row = make_row(stop=stop)
    row.begin(ONE)
    row.extend(chunk(0, 2))
    assert row.extend(chunk(0, 4, finish=finish, labels=[("1.1", 0, 4)])) == reason


def test_an_abort_before_the_first_token() -> None:
    row = make_row()
    row.begin(ONE)
    assert row.extend(chunk(0, 0, finish=ABORT, labels=[("1.1", 0, 0)])) == "abort"
    answer = row.generation("abort")
    assert (answer.token_ids, answer.logprobs, answer.spans) == ([], [], ())


def test_greedy_samples_from_a_point_mass() -> None:
    row = make_row(temperature=0.0, top_p=0.5)
    row.begin(ONE)
    row.extend(chunk(0, 4, finish=LENGTH))
    answer = row.generation("length")
    assert (answer.logprobs, answer.kept_logmass) == ([0.0] * 4, None)


def test_top_p_gives_the_distribution_sampled_from_and_the_mass_it_kept() -> None:
    row = make_row(top_p=0.9)
    row.begin(ONE)
    row.extend(chunk(0, 2, cut=True))
    row.extend(chunk(2, 4, finish=LENGTH, cut=True))
    answer = row.generation("length")
    assert answer.logprobs == [0.0, -1 / 16, -2 / 16, -3 / 16]
    assert answer.kept_logmass == [0.0, -1 / 16, -2 / 16, -3 / 16]  # full − sampled: −2/16 − (−1/16), …


# ---------------------------------------------------------------------------------- what can't be right


@pytest.mark.parametrize(
    ("labels", "swapped"),
    [
        ([("1.2", 0, 4)], ()),  # never given to it
        ([("0.9", 0, 4)], (TWO,)),  # older than it began
        ([("1.3", 0, 4)], (TWO,)),  # newer than what it was given
        ([("default", 0, 4)], (TWO,)),  # restarted by somebody else
        ([("1.1", 0, 2), ("1.2", 3, 4)], (TWO,)),  # a gap
        ([("1.1", 0, 2), ("1.2", 2, 3)], (TWO,)),  # too few
        ([("1.1", 0, 5)], ()),  # too many
        ([("1.1", 0, 2), ("1.3", 2, 3), ("1.2", 3, 4)], (TWO, THREE)),  # back to older weights
        ([("1.1", 0, 5), ("1.2", 5, 4)], (TWO,)),  # backwards
        ([], ()),
        (..., (TWO,)),  # it does not say
    ],
)
def test_a_label_that_cannot_be_is_no_answer(labels: list[tuple[str, int, int]], swapped: tuple[Version, ...]) -> None:
    row = make_row()
    row.begin(ONE)
    for version in swapped:
        row.swapping(version)
    with pytest.raises(Unavailable, match="7/3"):
        row.extend(chunk(0, 4, finish=LENGTH, labels=labels))
    row.distrust()  # as its replica does, with all rows of that server
    assert row.lost() == 4
    assert (row.token_ids, row.generation("abort").spans) == ([], ())


@pytest.mark.parametrize(
    "wrong",
    [
        Chunk(output_ids=[10, 99], meta_info=chunk(0, 2).meta_info),  # ids and logprobs of different tokens
        Chunk(output_ids=[10], meta_info=chunk(0, 2).meta_info),  # an id short
        Chunk(output_ids=[10, 11], meta_info=Meta(completion_tokens=2, output_token_logprobs=[(0.0, 10, None)])),
        Chunk(output_ids=[10, 11], meta_info=Meta(completion_tokens=2)),  # no logprobs
    ],
)
def test_ids_and_logprobs_must_agree(wrong: Chunk) -> None:
    row = make_row()
    row.begin(ONE)
    with pytest.raises(Unavailable, match="don't agree"):
        row.extend(wrong)
    assert row.token_ids == []


@pytest.mark.parametrize("wrong", ["a token that the model does not know", "more tokens than were asked for"])
def test_an_answer_of_another_model_or_length_is_none(wrong: str) -> None:
    row = make_row(max_tokens=2 if "more" in wrong else 4)
    row.begin(ONE)
    news = chunk(0, 3)
    if "more" not in wrong:
        logprobs = [(0.0, VOCABULARY, None)] * 3
        news = Chunk(output_ids=[VOCABULARY] * 3, meta_info=Meta(completion_tokens=3, output_token_logprobs=logprobs))
    with pytest.raises(Unavailable, match="serves another model, or its answer was damaged"):
        row.extend(news)
    assert (row.token_ids, row.generation("abort").logprobs) == ([], [])


def test_fewer_tokens_than_were_reported_cannot_be() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 3))
    with pytest.raises(Unavailable, match="don't agree"):
        row.extend(chunk(0, 2))


def test_top_p_without_the_logprobs_of_what_was_sampled_is_no_answer() -> None:
    row = make_row(top_p=0.9)
    row.begin(ONE)
    with pytest.raises(Unavailable, match="don't agree"):
        row.extend(chunk(0, 2))


# --------------------------------------------------------------------------------------------- losses


def test_a_lost_server_costs_nothing_that_was_reported_of_one_version() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 3))
    assert row.lost() == 0
    assert (row.token_ids, row.generation("abort").spans) == ([10, 11, 12], (Span(ONE, 3),))
    assert row.lost() == 0  # once only


def test_a_lost_server_costs_what_was_reported_after_a_swap() -> None:
    row = make_row(top_p=0.9)
    row.begin(ONE)
    row.extend(chunk(0, 1, cut=True))
    row.swapping(TWO)
    row.extend(chunk(1, 3, cut=True))
    row.swapping(THREE)
    assert row.lost() == 2
    answer = row.generation("abort")
    assert (answer.token_ids, answer.logprobs, answer.kept_logmass, answer.spans) == ([10], [0.0], [0.0], (Span(ONE, 1),))


def test_distrust_leaves_earlier_segments() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 1, finish=ABORT, labels=[("1.1", 0, 1)]))
    row.begin(ONE)
    row.extend(chunk(1, 3, base=1))
    row.distrust()
    assert row.lost() == 2
    assert row.generation("abort").spans == (Span(ONE, 1),)


def test_a_row_that_begins_anew_is_of_one_version() -> None:
    row = make_row()
    row.begin(ONE)
    row.extend(chunk(0, 3, finish=ABORT, labels=[("1.1", 0, 3)]))
    assert row.restart() == 3
    row.begin(TWO)
    row.extend(chunk(0, 4, finish=LENGTH, labels=[("1.2", 0, 4)]))
    answer = row.generation("length")
    assert (answer.token_ids, answer.spans) == ([10, 11, 12, 13], (Span(TWO, 4),))


# ----------------------------------------------------------------------------------------- any history


class Source:
    """A server as the row sees it: it decodes the answer, and knows which weights made which token."""

    def __init__(self, total: int, cut: bool) -> None:
        self.total, self.cut = total, cut
        self.row = make_row(max_tokens=total, top_p=0.9 if cut else 1.0)
        self.weights = ONE
        self.made: list[Version] = []
        self.base = self.reported = 0

    def begin(self) -> None:
        self.base = self.reported = len(self.row.token_ids)
        del self.made[self.base :]
        self.row.begin(self.weights)

    def decode(self, count: int) -> None:
        self.made += [self.weights] * min(count, self.total - len(self.made))

    def swap(self) -> None:
        self.weights = Version(1, self.weights.update + 1)
        self.row.swapping(self.weights)

    def report(self, cumulative: bool, finish: Finish | None = None) -> str | None:
        start, self.reported = self.base if cumulative else self.reported, len(self.made)
        labels: list[tuple[str, int, int]] = []
        for offset, version in enumerate(self.made[self.base :] if finish else []):
            if labels and labels[-1][0] == str(version):
                labels[-1] = (str(version), labels[-1][1], offset + 1)
            else:
                labels.append((str(version), offset, offset + 1))
        return self.row.extend(
            chunk(start, self.reported, base=self.base, finish=finish, labels=labels if finish else ..., cut=self.cut)
        )

    def check(self) -> None:
        """All that the row claims between two segments is true."""
        claimed = [span.version for span in self.row.generation("abort").spans for _ in range(span.length)]
        assert claimed == self.made[: len(self.row.token_ids)]
        assert len(claimed) == len(self.row.token_ids)
        assert self.row.token_ids == IDS[: len(claimed)]


EVENTS = st.one_of(
    st.tuples(st.just("decode"), st.integers(1, 6)),
    st.tuples(st.just("report"), st.booleans()),
    st.tuples(st.sampled_from(["swap", "interrupt", "drop", "lose"]), st.booleans()),
)


@settings(max_examples=400, deadline=None)
@given(total=st.integers(1, 40), cut=st.booleans(), history=st.lists(EVENTS, max_size=40), cumulative=st.booleans())
def test_whatever_happens_the_answer_is_the_same(
    total: int, cut: bool, history: list[tuple[str, int]], cumulative: bool
) -> None:
    source = Source(total, cut)
    source.begin()
    for what, how in history:
        if what == "decode":
            source.decode(how)
        elif what == "report" and len(source.made) < total:
            source.report(bool(how))
        elif what == "swap":
            source.swap()
        elif what == "lose":  # with all that it made and did not report
            before = len(source.row.token_ids)
            assert source.row.lost() == before - len(source.row.token_ids)
            source.check()
            source.begin()
        elif what in ("interrupt", "drop"):
            if what == "drop":  # aborted in the server's queue: what was not reported is never heard of
                del source.made[source.reported :]
            if source.report(bool(how), ABORT) == "length":
                break
            source.check()
            source.begin()
    else:
        source.decode(total)
        assert source.report(cumulative, LENGTH) == "length"
    source.check()
    answer = source.row.generation("length")
    assert answer.token_ids == IDS[:total]
    assert answer.logprobs == (SAMPLED if cut else FULL)[:total]
    assert sum(span.length for span in answer.spans) == total
    assert answer.kept_logmass == ([full - one for full, one in zip(FULL, SAMPLED, strict=True)][:total] if cut else None)


@pytest.mark.parametrize(
    ("label", "version"),
    [
        ("1.2", Version(1, 2)),
        ("0.0", Version(0, 0)),
        ("12", None),
        ("1.", None),
        (".1", None),
        ("-1.2", None),
        ("default", None),
        ("\u0661.\u0662", None),  # digits, but none of ours
        ("1." + "9" * 5000, None),  # more than Python turns into an int
    ],
)
def test_a_label_names_a_version_or_none(label: str, version: Version | None) -> None:
    assert parse_label(label) == version


def test_a_cumulative_chunk_that_runs_ahead_of_its_count_is_cut_to_it() -> None:
    """Without incremental streaming, SGLang appends to the lists of a chunk until it is sent."""
    asked = GenerationRequest(
        id="0/0",
        group=0,
        prompt_ids=(5,),
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=()),
        seed=0,
    )
    row = RequestRow(asked, VOCABULARY)
    row.begin(Version(1, 1))
    everything = [(-0.1 * token, token, None) for token in (11, 12, 13, 14)]
    for count, seen in ((1, 2), (2, 4), (4, 4)):
        finish = Finish(type="length") if count == 4 else None
        meta = Meta(completion_tokens=count, finish_reason=finish, output_token_logprobs=everything[:seen])
        row.extend(Chunk(meta_info=meta, output_ids=[11, 12, 13, 14][:seen]))
        assert row.token_ids == [11, 12, 13, 14][:count]
    answer = row.generation("length")
    assert (answer.token_ids, answer.logprobs) == ([11, 12, 13, 14], [value[0] for value in everything])
