import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import advantages
from asyncrl.config import AlgorithmSpec
from asyncrl.learn.batch import (
    ATTENDED,
    TrainBatch,
    deal,
    dummy_pack,
    make_batch,
    make_packs,
    minibatches,
    pack_cost,
    split_into_packs,
)
from asyncrl.learn.metrics import rollout_metrics
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.models.ranks import Ranks
from asyncrl.staleness import Staleness

BOUND = Staleness(max_lag=2, batch_groups=2)


def advantages_of(batch: TrainBatch, estimator: str = "grpo_no_std") -> list[float]:
    return advantages(AlgorithmSpec(adv_estimator=estimator), batch.outcomes)[0].tolist()


def test_columns_by_hand(make_rollout) -> None:
    first = make_rollout(5, 0, updates=(7, 8, 10), reward=3.0, prompt_ids=np.array([4, 9]), response_ids=np.array([1, 2, 3]))
    other = make_rollout(5, 1, updates=(9, 9), reward=1.0, loss_mask=np.array([True, False]))
    batch = make_batch([first, other], BOUND, 10)
    assert batch.lag_n.tolist() == [2, 0, 1]  # update 7 would lag by 3, past the bound of 2; the tool token is not trained
    assert advantages_of(batch) == [1.0, 1.0, -1.0]
    assert batch.sequence_n.tolist() == [0, 0, 1]
    assert batch.counts_s.tolist() == [2.0, 1.0]
    assert batch.behaviour_n.tolist() == [*first.logprobs[1:].tolist(), other.logprobs[0]]
    assert batch.sequences[0].ids.tolist() == [4, 9, 1, 2, 3]
    assert batch.sequences[0].scored.tolist() == [3, 4]
    assert batch.outcomes.sequence_n.tolist() == [0, 0, 1]
    assert batch.outcomes.lengths_s.tolist() == [3, 1]  # tokens that the policy chose, of any age
    assert batch.sequences[0].shared == 1  # the last prompt token predicts, so it is each rollout's own


def test_future_tokens_are_not_trained(make_rollout) -> None:
    """After a restore, tokens of a lost lineage can carry updates that this learner has yet to make."""
    batch = make_batch([make_rollout(0, 0, updates=(4, 6))], BOUND, 5)
    assert batch.lag_n.tolist() == [1]


def test_behaviour_is_the_full_softmax_where_sampling_cut(make_rollout) -> None:
    cut = make_rollout(0, 0, updates=(0, 0), logprobs=np.float32([-0.5, -1.0]), kept_logmass=np.float32([-0.1, 0.0]))
    assert make_batch([cut], BOUND, 0).behaviour_n.tolist() == pytest.approx([-0.6, -1.0])


def test_a_rollout_too_old_to_train_still_counts_in_its_groups_mean(make_rollout) -> None:
    fresh, old = make_rollout(0, 0, updates=(9,), reward=1.0), make_rollout(0, 1, updates=(0,), reward=5.0)
    batch = make_batch([fresh, old], BOUND, 9)
    assert len(batch.sequences) == 1
    assert advantages_of(batch) == [-2.0]
    assert batch.outcomes.rewards_s.tolist() == [1.0, 5.0]
    assert batch.sequence_n.tolist() == batch.outcomes.sequence_n.tolist() == [0]


def test_an_empty_row_before_others_shifts_nobody(make_rollout) -> None:
    empty = make_rollout(0, 0, updates=(9, 9), reward=4.0, loss_mask=np.array([False, False]))
    inner = make_rollout(0, 1, updates=(9, 9, 9), reward=1.0, loss_mask=np.array([True, False, True]))
    batch = make_batch([empty, inner], BOUND, 9)
    assert batch.outcomes.sequence_n.tolist() == [1, 1]  # among all rollouts
    assert batch.sequence_n.tolist() == [0, 0]  # among those that are trained
    assert advantages_of(batch) == [-1.5, -1.5]
    assert batch.behaviour_n.tolist() == [inner.logprobs[0], inner.logprobs[2]]


def test_outcomes_by_hand(make_rollout) -> None:
    """Update 7 is past the bound: what its token earned, 1, counts for the rollout and for no token."""
    first = make_rollout(5, 0, updates=(7, 8, 10), reward=3.0, token_rewards=np.array([1.0, 2.0, 4.0]))
    tool = make_rollout(
        5, 1, updates=(9, 9), reward=1.0, loss_mask=np.array([True, False]), token_rewards=np.array([0.5, 0.25])
    )
    old = make_rollout(6, 0, updates=(0, 0), reward=0.0, token_rewards=np.array([1.0, 1.0]))
    plain = make_rollout(6, 1, updates=(10,), reward=6.0)
    batch = make_batch([first, tool, old, plain], BOUND, 10)
    assert batch.outcomes.rewards_s.tolist() == [3.0, 1.0, 0.0, 6.0]
    assert batch.outcomes.token_rewards_n.tolist() == [2.0, 4.0, 0.75, 0.0]
    assert batch.outcomes.before_s.tolist() == [1.0, 0.0, 2.0, 0.0]
    # In all 10 and 1.75, mean 5.875; 2 and 6, mean 4.
    assert advantages_of(batch) == [4.125, 4.125, -4.125, 2.0]
    assert batch.outcomes.baselines_s is None


def test_remax_by_hand(make_rollout) -> None:
    """Returns 3 + 2 + 4, 3 + 4 against a baseline of 5; 1 against the same; 6 against 8."""
    rollouts = [
        make_rollout(5, 0, updates=(7, 8, 10), reward=3.0, token_rewards=np.array([1.0, 2.0, 4.0]), baseline=5.0),
        make_rollout(5, 1, updates=(9,), reward=1.0, baseline=5.0),
        make_rollout(6, 0, updates=(10,), reward=6.0, baseline=8.0),
    ]
    assert advantages_of(make_batch(rollouts, BOUND, 10), "remax") == [4.0, 2.0, -4.0, -2.0]
    figures = rollout_metrics(rollouts)
    assert (figures["reward/mean"], figures["reward/token_sum"]) == pytest.approx((10 / 3, 7 / 3))
    assert figures["reward/baseline"] == 6.5  # of the two prompts
    assert figures["samples"] == 3.0


def test_without_token_rewards_nothing_is_said_of_them(make_rollouts) -> None:
    batch = make_batch(make_rollouts(), BOUND, 0)
    assert not batch.outcomes.token_rewards_n.any()
    assert not batch.outcomes.before_s.any()
    assert not {"reward/token_sum", "reward/baseline"} & rollout_metrics(make_rollouts()).keys()


def test_minibatches_keep_groups_whole_and_in_order() -> None:
    groups = np.array([8, 8, 2, 5, 5, 2, 9])
    assert minibatches(groups, 2) == [[0, 1, 2, 5], [3, 4, 6]]
    assert minibatches(groups, None) == [[0, 1, 2, 3, 4, 5, 6]]
    assert minibatches(np.array([], dtype=np.int64), None) == minibatches(np.array([], dtype=np.int64), 2) == []


# --------------------------------------------------------------------------------------------- packing


def plain(length: int) -> TokenSequence:
    """A sequence that needs `length` input tokens."""
    return TokenSequence(np.arange(length + 1), np.array([length]))


def test_by_hand_few_and_even() -> None:
    sequences = [plain(n) for n in (4, 1, 3, 2, 2)]  # 12 tokens, at most 7 a pack: two packs
    assert split_into_packs(sequences, range(5), 7) == [[1, 3, 4], [2, 0]]  # 1 + 2 + 2 and 3 + 4


def test_a_sequence_longer_than_the_bound_is_alone() -> None:
    assert split_into_packs([plain(3), plain(50), plain(3)], range(3), 8) == [[0, 2], [1]]


def test_nothing_to_pack() -> None:
    assert split_into_packs([], [], 8) == []


def test_rollouts_of_one_prompt_stay_together_and_its_prompt_counts_once() -> None:
    prompts = [np.full(9, 1), np.full(9, 2)]
    sequences = [TokenSequence(np.append(prompts[i % 2], [5, i]), np.array([9, 10]), 8) for i in range(6)]
    packs = split_into_packs(sequences, range(6), 14)  # a prompt's 8 shared tokens + 3 rollouts of 2 own tokens
    assert packs == [[0, 2, 4], [1, 3, 5]]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(5, 60))
def test_every_sequence_once_and_within_the_bound(lengths: list[int], bound: int) -> None:
    sequences = [plain(n) for n in lengths]
    packs = split_into_packs(sequences, range(len(lengths)), bound)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        tokens = len(make_pack(sequences, pack).input_ids_u)
        assert tokens <= max(bound, max(lengths[i] for i in pack) if len(pack) == 1 else 0)


# --------------------------------------------------------------------------------------------- dealing


def in_groups(groups: list[tuple[int, list[int]]]) -> list[TokenSequence]:
    """For each group of (shared tokens of its prompt, own tokens of each rollout), its sequences."""
    return [
        TokenSequence(np.concatenate((np.full(shared, number), np.arange(own + 1))), np.array([shared + own]), shared)
        for number, (shared, owns) in enumerate(groups)
        for own in owns
    ]


def cost_of(share: list[list[int]], sequences: list[TokenSequence]) -> float:
    return sum(pack_cost(sequences, pack) for pack in share)


def test_the_cost_of_a_pack_by_hand() -> None:
    """A prompt of 8 counts once for two rollouts of 2 and 3 tokens, which attend over 10 and 11."""
    sequences = in_groups([(8, [2, 3]), (0, [5])])
    assert pack_cost(sequences, [0, 1, 2]) == 8 + 2 + 3 + 5 + (100 + 121 + 25) / ATTENDED
    assert pack_cost(sequences, []) == 0.0


def test_a_group_is_divided_only_where_the_dearest_share_gets_cheaper() -> None:
    sequences = in_groups([(4, [3, 3])] * 3)  # 10 tokens each; together 30, and 4 more where one is cut in two
    assert [sorted(map(sorted, share)) for share in deal(sequences, range(4), 99, 2)] == [[[0, 1]], [[2, 3]]]
    shares = deal(sequences, range(6), 99, 2)
    assert [len(make_pack(sequences, share[0]).input_ids_u) for share in shares] == [17, 17]  # not 20 and 10
    assert deal(in_groups([(9, [1])]), range(1), 99, 3) == [[[0]], [[]], [[]]]


def test_packs_that_are_computed_together_cost_about_as_much() -> None:
    """Four sequences of 600 cost less than one of 2,400 in attention; each share gets a long one, then short ones."""
    sequences = [plain(n) for n in (600, 2400, 600, 600, 600, 2400, 600, 600, 600, 600)]
    assert deal(sequences, range(10), 2400, 2) == [[[1], [0, 2, 3, 4]], [[5], [6, 7, 8, 9]]]


GROUPS = st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(1, 40), min_size=1, max_size=5)), max_size=12)


@given(GROUPS, st.integers(5, 80), st.integers(1, 5))
def test_a_deal_is_whole_even_and_balanced(groups: list[tuple[int, list[int]]], bound: int, shares: int) -> None:
    sequences = in_groups(groups)
    dealt = deal(sequences, range(len(sequences)), bound, shares)
    assert len(dealt) == shares
    assert len({len(share) for share in dealt}) == 1  # as many packs for every share
    assert sorted(i for share in dealt for pack in share for i in pack) == list(range(len(sequences)))
    assert dealt[0] if sequences else not any(dealt)
    for share in dealt:
        for pack in filter(None, share):
            assert len(pack) == 1 or len(make_pack(sequences, pack).input_ids_u) <= bound
    if shares > 1:
        rounds = [[pack_cost(sequences, pack) for pack in at_once] for at_once in zip(*dealt, strict=True)]
        assert all(min(first) >= max(second) for first, second in itertools.pairwise(rounds))
        dearest = max((cost for costs in rounds for cost in costs), default=0.0)
        totals = [cost_of(share, sequences) for share in dealt]
        assert max(totals) - min(totals) <= dearest + 1e-9


def test_a_dummy_pack_scores_nothing_and_gives_no_gradient(make_model) -> None:
    model = PackedModel(make_model())
    made = model.forward(dummy_pack(torch.device("cpu")))
    assert made.logp_t.shape == (0,)
    made.logp_t.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.model.parameters())


def test_one_share_has_all_packs_as_they_were_split() -> None:
    sequences = [plain(n) for n in (4, 1, 3, 2, 2)]
    packs = make_packs(sequences, range(5), 7, torch.device("cpu"), Ranks())
    assert [pack.flat_t.tolist() for pack in packs] == [[1, 3, 4], [2, 0]]
