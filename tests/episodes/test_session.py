"""What an episode's session records: every sampled token once, in the context in which it was sampled."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from asyncrl.episodes.session import Budget, Session
from asyncrl.learn.batch import make_batch
from asyncrl.staleness import Staleness
from asyncrl.types import Episode, Generation, Sampling, Span, TrainRollout, Trajectory, Version

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,))
WIDE = Budget(tokens=1 << 20, turn_tokens=8, context=1 << 20)


def make_session(budget: Budget = WIDE, sampling: Sampling = SAMPLING) -> Session:
    return Session("5/0/0", 5, sampling, 77, budget)


def answer(ids: Sequence[int], number: int = 0, reason: str = "stop", update: int = 0) -> Generation:
    """Log-probabilities tell which answer a token is of, and its place there."""
    return Generation(
        id="x",
        token_ids=list(ids),
        logprobs=[-float(100 * number + place) for place in range(1, len(ids) + 1)],
        kept_logmass=None,
        spans=(Span(Version(1, update), len(ids)),),
        finish_reason=reason,  # type: ignore[arg-type]
    )


def contexts(made: Trajectory) -> dict[float, tuple[int, ...]]:
    """By log-probability, the tokens before each sampled one, and itself."""
    found = {}
    ends = (*made.segments[1:], len(made.token_ids))
    for number, (start, end) in enumerate(zip(made.segments, ends, strict=True)):
        prompt = made.prompt_ids if number == 0 else ()
        for place in range(start, end):
            if made.loss_mask[place]:
                assert made.logprobs[place] not in found, "trained twice"
                found[made.logprobs[place]] = (*prompt, *made.token_ids[start : place + 1])
    return found


def learned(row: TrainRollout) -> dict[float, tuple[int, ...]]:
    """The same, of what the learner trains."""
    batch = make_batch([row], Staleness(max_lag=0, batch_groups=1), 0)
    found = [tuple(sequence.ids[: at + 1]) for sequence in batch.sequences for at in sequence.scored]
    assert len({*batch.behaviour_n.tolist()}) == len(found), "trained twice"
    return dict(zip(batch.behaviour_n.tolist(), found, strict=True))


def test_turns_that_follow_each_other_are_one_segment() -> None:
    session = make_session()
    first = session.request([2, 3])
    session.record(first, answer([7, 1], number=1))
    second = session.request([2, 3, 7, 1, 4, 5])
    session.record(second, answer([8, 9], number=2, reason="length", update=1))
    made = session.trajectory(Episode(reward=1.0))
    assert made.prompt_ids == (2, 3)
    assert made.token_ids == [7, 1, 4, 5, 8, 9]
    assert made.loss_mask == [1, 1, 0, 0, 1, 1]
    assert made.logprobs == [-101.0, -102.0, 0.0, 0.0, -201.0, -202.0]
    assert (made.turns, made.segments) == ((0, 4), (0,))
    assert [(span.version.update, span.length) for span in made.spans] == [(0, 2), (1, 2), (1, 2)]
    assert made.finish_reason == "length"
    assert made.kept_logmass is None
    assert (session.turns, session.sampled) == (2, 4)


def test_another_history_is_a_segment_of_its_own() -> None:
    session = make_session()
    session.record(session.request([2, 3]), answer([7, 1], number=1))
    session.record(session.request([2, 3, 7, 1, 4]), answer([8, 1], number=2))
    session.record(session.request([2, 3, 7, 1, 5]), answer([9, 1], number=3))  # a branch
    session.record(session.request([2, 6]), answer([10, 1], number=4))  # a shortened history
    made = session.trajectory(Episode())
    assert made.segments == (0, 5, 12)
    assert made.token_ids[5:12] == [2, 3, 7, 1, 5, 9, 1]
    assert made.loss_mask[5:] == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert made.turns == (0, 3, 10, 14)
    assert sum(span.length for span in made.spans) == len(made.token_ids)


def test_a_repeated_call_has_numbers_of_its_own_and_parallel_ones_any_order() -> None:
    one, other = make_session(), make_session()
    prompts = [[2, 3], [2, 4], [2, 3]]
    seeds = [one.request(prompt).seed for prompt in prompts]
    assert len({*seeds}) == 3
    assert [other.request(prompt).seed for prompt in (prompts[1], prompts[0], prompts[2])] == [seeds[1], seeds[0], seeds[2]]


def test_budgets() -> None:
    session = make_session(Budget(tokens=5, turn_tokens=4, context=10))
    assert session.room([2] * 3) == 4
    assert session.room([2] * 8) == 2
    assert session.room([2] * 12) == 0
    request = session.request([2, 3])
    assert request.sampling.max_tokens == 4
    session.record(request, answer([7, 8, 9, 1]))
    assert session.room([2, 3, 7, 8, 9, 1]) == 1


def test_an_episode_without_an_answer() -> None:
    session = make_session()
    session.record(session.request([2]), answer([]))
    made = session.trajectory(Episode(status="invalid", stop="error"))
    assert (made.token_ids, made.segments, made.turns, made.spans) == ([], (0,), (0,), ())


def test_where_sampling_was_cut_context_has_no_mass_cut() -> None:
    session = make_session(sampling=Sampling(temperature=1.0, top_p=0.9, top_k=0, max_tokens=4, stop_token_ids=(1,)))
    cut = Generation(
        id="x",
        token_ids=[7],
        logprobs=[-1.0],
        kept_logmass=[-0.1],
        spans=(Span(Version(1, 0), 1),),
        finish_reason="stop",
    )
    session.record(session.request([2]), cut)
    session.record(session.request([2, 7, 3]), cut)
    assert session.trajectory(Episode()).kept_logmass == [-0.1, 0.0, -0.1]


@given(st.data())
def test_every_sampled_token_is_trained_once_in_its_context(row_of, data: st.DataObject) -> None:
    """With branches, shortened histories and calls repeated; few different tokens, so that prefixes meet by chance."""
    session, wanted, histories = make_session(), {}, [[2]]
    token = st.integers(2, 4)
    for number in range(1, data.draw(st.integers(1, 8)) + 1):
        history = data.draw(st.sampled_from(histories))
        cut = data.draw(st.integers(1, len(history)))
        prompt = [*history[:cut], *data.draw(st.lists(token, max_size=3))]
        request = session.request(prompt)
        made = answer(data.draw(st.lists(token, min_size=1, max_size=3)), number=number)
        session.record(request, made)
        histories.append([*prompt, *made.token_ids])
        for place, logprob in enumerate(made.logprobs):
            wanted[logprob] = (*prompt, *made.token_ids[: place + 1])
    made = session.trajectory(Episode())
    assert contexts(made) == wanted
    assert learned(row_of(made)) == wanted
    assert len(made.loss_mask) == len(made.logprobs) == len(made.token_ids) == sum(span.length for span in made.spans)
    assert all(made.loss_mask[start] == 0 for start in made.segments[1:])
    assert [made.loss_mask[turn] for turn in made.turns] == [1] * len(made.turns)
