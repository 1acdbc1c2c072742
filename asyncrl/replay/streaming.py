"""Pieces of unfinished rollouts come in, so that another generator can go on with those whose holder is lost."""

from collections.abc import Sequence

import asyncrl.replay.log.events as ev
from asyncrl.replay.admission import Holders
from asyncrl.replay.context import StoreContext
from asyncrl.replay.log.pieces import PieceHead, piece_heads, read_rollout_pieces
from asyncrl.types import Key


class Streaming:
    """What counts of a rollout is one chain of pieces, each of which begins where the last one ends, whoever sampled them."""

    def __init__(self, context: StoreContext, holders: Holders) -> None:
        self._context = context
        self._ledger = context.ledger
        self._holders = holders

    def stream(self, caller: Key, rows: bytes) -> None:
        """Returns when the operating system has them; pieces that don't count are ignored."""
        batch = read_rollout_pieces(rows)
        heads = piece_heads(batch)
        self._holders.renew(caller.worker)
        if following := self.following(heads):
            whole = len(following) == batch.num_rows
            first = self._context.log.append_pieces(batch if whole else batch.take(following))
            self.streamed([heads[i] for i in following], first)

    def following(self, heads: Sequence[PieceHead]) -> list[int]:
        """Indices of the pieces that count: of an unfinished rollout in its present attempt, for training, from where the last
        piece ends. A repeated one does not, nor one that is older than the group was known to be, as after a restore."""
        ends: dict[tuple[int, int], int] = {}
        found = []
        for i, head in enumerate(heads):
            group = self._ledger.find(head.group)
            if group is None or group.purpose == "eval" or head.attempt != group.attempt or head.rollout not in group.missing():
                continue
            which = head.group, head.rollout
            old = head.rollout < group.n and head.oldest < group.oldest()
            if head.start == ends.get(which, group.rollouts[head.rollout].length) and not old and self._holders.regain(group):
                ends[which] = head.start + head.length
                found.append(i)
        return found

    def streamed(self, heads: Sequence[PieceHead], first: int) -> None:
        """Counts pieces that follow, which the log holds from number `first` on."""
        for piece, h in enumerate(heads, first):
            self._context.record(ev.RolloutStreamed(h.group, h.rollout, h.attempt, piece, h.oldest, h.newest, h.length))
