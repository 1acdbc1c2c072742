"""Pieces of unfinished rollouts: what counts of them, who goes on from where, and what becomes of them in the log."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log import events as ev
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.pieces import encode_pieces, joined, piece_heads, read_rollout_pieces
from asyncrl.replay.store import LocalTransport, ReplayStore
from asyncrl.types import RolloutPiece, Span, Ticket, Tokens, Version


def begun(ticket: Ticket) -> dict[int, list[int]]:
    """The updates of the tokens that there are, by rollout."""
    return {r: [s.version.update for s in t.spans for _ in range(s.length)] for r, t in ticket.begun.items()}


def dies(bench: Any, worker: str = "gen", incarnation: int = 1) -> None:
    bench.call("forget", worker, incarnation, worker="supervisor")


def test_another_generator_goes_on_and_so_does_the_one_after_it(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=3))
    bench.fence(0)
    (ticket,) = bench.reserve(1, 0).tickets
    assert bench.stream(fakes.piece(ticket, 1, 0, 0, 0)) == 1
    assert bench.stream(fakes.piece(ticket, 1, 2, 0)) == 1
    dies(bench)
    (again,) = bench.reserve(1, 0, worker="b").tickets
    assert (again.attempt, again.rollouts, begun(again)) == (1, (0, 1), {1: [0, 0, 0]})
    assert bench.stream(fakes.piece(again, 0, 0, 0), fakes.piece(again, 1, 3, 0, 0)) == 2
    assert bench.submit(again, 0, rollouts=[0]) == 1
    dies(bench, "b")
    (last,) = bench.reserve(1, 0, worker="c").tickets
    assert (last.rollouts, begun(last)) == ((1,), {1: [0] * 5})
    ledger = bench.core.ledger
    # Of each try at most what is left of 8 tokens: 8 + 5, then 3. Rollout 0 was submitted, and is lost to nobody.
    assert (ledger.resumed_tokens, ledger.lost_tokens) == (3 + 5, 8 + 5 + 3)
    assert bench.submit(last, 0) == 1
    assert ledger.groups[0].rollouts[1].pieces == []
    assert ledger.groups[0].unsubmitted == 0


def test_the_tokens_that_may_be_lost_are_those_of_an_interval(fakes: SimpleNamespace) -> None:
    from msgspec.structs import replace

    bench = fakes.Bench(replace(fakes.plan(max_lag=3), stream_interval=2))
    bench.fence(0)
    (ticket,) = bench.reserve(1, 0).tickets
    bench.stream(fakes.piece(ticket, 0, 0, *[0] * 7))
    dies(bench)
    assert bench.reserve(1, 0, worker="b").tickets
    assert bench.core.ledger.lost_tokens == 1 + 2  # of 8 tokens 7 are known of the one


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, 1),
        ({"start": 1}, 0),  # known already
        ({"start": 3}, 0),  # not what follows
        ({"attempt": 0}, 0),  # a zombie's
        ({"attempt": 2}, 0),
        ({"group": 9}, 0),
        ({"rollout": 0}, 0),  # submitted
        ({"rollout": 2}, 0),
        ({"rollout": -1}, 0),
        ({"spans": (Span(Version(1, 0), 1),)}, 1),
    ],
)
def test_only_what_follows_counts(fakes: SimpleNamespace, changes: dict[str, Any], taken: int) -> None:
    from msgspec.structs import replace

    bench = fakes.Bench(fakes.plan(max_lag=3))
    bench.fence(0)
    (first,) = bench.reserve(1, 0).tickets
    bench.stream(fakes.piece(first, 1, 0, 0))
    bench.sleep(40)  # the holder is silent
    (ticket,) = bench.reserve(1, 0, worker="b").tickets
    bench.stream(fakes.piece(ticket, 1, 1, 0))
    bench.submit(ticket, 0, rollouts=[0])
    piece = replace(fakes.piece(ticket, 1, 2, 0), **changes)
    assert bench.stream(piece) == taken
    assert bench.stream(piece) == 0  # once more
    assert bench.core.ledger.groups[0].rollouts[1].length == 2 + taken


def test_tokens_that_would_pass_the_bound_are_dropped_and_younger_ones_kept(fakes: SimpleNamespace) -> None:
    """η = 2, B = 1: with a token of update 0 the group has to be in the third batch at the latest."""
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=1, size=20))
    bench.fence(0)
    (ticket,) = bench.reserve(1, 0).tickets
    bench.stream(fakes.piece(ticket, 0, 0, 0, 1), fakes.piece(ticket, 1, 0, 2, 2))
    assert bench.core.holders.deadline(bench.core.ledger.groups[0]) == 2
    dies(bench)
    for update in range(3):
        (other,) = bench.reserve(1, update, worker="b", held=[0]).tickets
        bench.submit(other, update)
        bench.score(other, 1.0, 1.0)
        bench.train(update)
    assert bench.core.ledger.committed == 3
    (again,) = bench.reserve(1, 3, worker="c").tickets
    assert (again.group, begun(again)) == (0, {1: [2, 2]})
    group = bench.core.ledger.groups[0]
    assert bench.core.holders.deadline(group) == 2 + 2  # of its oldest token, though its holder's weights are newer
    (event,) = [e for e in bench.log if isinstance(e, ev.GroupReissued)]
    assert (event.dropped, event.lost) == ((0,), 6 + 2 + 6)
    assert (bench.core.ledger.resumed_tokens, group.rollouts[0].length) == (2, 0)
    assert bench.stream(fakes.piece(again, 0, 0, 3)) == 1  # from the beginning


def test_tokens_older_than_the_group_was_known_to_be_are_not_kept(fakes: SimpleNamespace) -> None:
    """As after a restore, when the weights in use fall back."""
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=1, size=20))
    bench.fence(0)
    bench.ready(1, 0)
    bench.train(0)
    (ticket,) = bench.reserve(1, 1).tickets
    assert bench.stream(fakes.piece(ticket, 0, 0, 0)) == 0
    assert bench.stream(fakes.piece(ticket, 0, 0, 1)) == 1


def test_a_piece_that_cannot_be_read_costs_its_rollout_alone(fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=3))
    bench.fence(0)
    (ticket,) = bench.reserve(1, 0).tickets
    bench.stream(fakes.piece(ticket, 0, 0, 0), fakes.piece(ticket, 1, 0, 0))
    take = bench.core.context.log.take_pieces

    def damaged(pieces: Sequence[int]) -> Tokens:
        if 0 in pieces:
            raise DataError("the file is damaged")
        return take(pieces)

    bench.core.context.log.take_pieces = damaged
    dies(bench)
    (again,) = bench.reserve(1, 0, worker="b").tickets
    assert (again.rollouts, begun(again)) == ((0, 1), {1: [0]})
    assert "rollout 0 of group 0 begins anew: the file is damaged" in caplog.text


def test_pieces_travel_and_join(fakes: SimpleNamespace) -> None:
    blank = {"group": 3, "rollout": 1, "attempt": 2}
    whole = Tokens(
        token_ids=[5, 6, 7, 8],
        logprobs=[-0.5, -1.0, -1.5, -0.25],
        kept_logmass=[0.0, -0.125, 0.0, -2.0],
        spans=(Span(Version(1, 4), 3), Span(Version(2, 3), 1)),
    )
    rest = whole.after(2)
    assert whole.after(0) == whole
    lists = {name: getattr(whole, name)[:2] for name in ("token_ids", "logprobs", "kept_logmass")}
    head = Tokens(**lists, spans=(Span(Version(1, 4), 2),))
    pieces = [
        RolloutPiece(**blank, start=start, **{n: getattr(t, n) for n in Tokens.__struct_fields__})
        for start, t in ((0, head), (2, rest))
    ]
    batch = read_rollout_pieces(encode_pieces(pieces))
    assert joined(batch) == whole
    told = [(h.group, h.rollout, h.attempt, h.start, h.length, h.oldest, h.newest) for h in piece_heads(batch)]
    assert told == [(3, 1, 2, 0, 2, 4, 4), (3, 1, 2, 2, 2, 3, 4)]
    lame = RolloutPiece(**blank, start=0, token_ids=[1], logprobs=[], kept_logmass=None, spans=rest.spans)
    with pytest.raises(DataError, match="parallel"):
        read_rollout_pieces(encode_pieces([lame]))


def test_a_store_that_restarts_has_the_pieces_and_a_checkpoint_lets_go_of_those_of_no_use(
    fakes: SimpleNamespace, tmp_path: Path
) -> None:
    plan = fakes.plan(max_lag=3, batch=1)
    spec = StoreSpec(segment_bytes=1)  # each call closes its segments

    def opened() -> tuple[LocalTransport, Any]:
        transport = LocalTransport(ReplayStore(plan, tmp_path, spec))
        return transport, lru_cache(lambda worker: ReplayClient(transport, worker, 1))

    def files() -> int:
        return len(list((tmp_path / "pieces").glob("*.parquet")))

    transport, client = opened()
    learner = client("learner")
    learner.fence(0)
    one, other = client("a").reserve(2, Version(1, 0), [], 0.0).tickets
    client("a").stream([fakes.piece(one, 0, 0, 0, 0), fakes.piece(other, 1, 0, 0)])
    client("a").stream([fakes.piece(one, 0, 2, 0)])
    client("a").submit([fakes.rollout(one, i, Version(1, 0)) for i in (0, 1)])
    transport.close()

    transport, client = opened()
    (again,) = client("b").reserve(1, Version(1, 0), [], 0.0).tickets  # nobody is known to be dead yet: a new group
    assert (again.group, files()) == (2, 2)
    client("supervisor").forget("a", 1)
    (again,) = client("b").reserve(1, Version(1, 0), [again.group], 0.0).tickets
    assert (again.group, begun(again)) == (1, {1: [0]})
    assert client("supervisor").report(0).gauges["handover/resumed_tokens"] == 1
    learner = client("learner")
    learner._learner = learner.fence(0).incarnation
    learner.checkpointed(0)
    assert files() == 1  # of the first call, which the other group needs
    client("b").submit([fakes.rollout(again, i, Version(1, 0)) for i in (0, 1)])
    learner.checkpointed(0)
    assert files() == 0
    transport.close()
    log = ReplayLog(tmp_path, spec)
    assert log.append_pieces(read_rollout_pieces(encode_pieces([fakes.piece(one, 0, 0, 0)]))) == 3  # no number comes twice
    log.close()


def test_a_piece_that_no_event_names_is_cut(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path)
    (ticket,) = [Ticket(group=0, attempt=0, prompt=fakes.prompts(1)[0], rollouts=(0,), seeds=(1,), sampling=fakes.SAMPLING)]
    first = log.append_pieces(read_rollout_pieces(encode_pieces([fakes.piece(ticket, 0, 0, 0, 0)])))
    log.append_events([ev.RolloutStreamed(0, 0, 0, first, 0, 0, 2)])
    log.append_pieces(read_rollout_pieces(encode_pieces([fakes.piece(ticket, 0, 2, 0)])))
    log.close()
    log = ReplayLog(tmp_path)
    assert log.append_pieces(read_rollout_pieces(encode_pieces([fakes.piece(ticket, 0, 2, 1)]))) == 1
    assert [s.version.update for s in log.take_pieces([0, 1]).spans] == [0, 1]
    log.close()
    for path in (tmp_path / "pieces").iterdir():
        path.unlink()
    log = ReplayLog(tmp_path)
    with pytest.raises(DataError, match="row 0 of pieces"):
        log.take_pieces([0])
    log.close()
