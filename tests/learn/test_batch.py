import numpy as np
import pytest

from asyncrl.learn.batch import make_batch, minibatches
from asyncrl.learn.estimators import ESTIMATORS
from asyncrl.staleness import Staleness

BOUND = Staleness(max_lag=2, batch_groups=2)
grpo_no_std = ESTIMATORS["grpo_no_std"]


def test_columns_by_hand(make_rollout) -> None:
    first = make_rollout(5, 0, updates=(7, 8, 10), reward=3.0, prompt_ids=np.array([4, 9]), response_ids=np.array([1, 2, 3]))
    other = make_rollout(5, 1, updates=(9, 9), reward=1.0, loss_mask=np.array([True, False]))
    batch = make_batch([first, other], BOUND, 10, grpo_no_std)
    assert batch.lag_n.tolist() == [2, 0, 1]  # update 7 would lag by 3, past the bound of 2; the tool token is not trained
    assert batch.advantages_n.tolist() == [1.0, 1.0, -1.0]
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
    batch = make_batch([make_rollout(0, 0, updates=(4, 6))], BOUND, 5, grpo_no_std)
    assert batch.lag_n.tolist() == [1]


def test_behaviour_is_the_full_softmax_where_sampling_cut(make_rollout) -> None:
    cut = make_rollout(0, 0, updates=(0, 0), logprobs=np.float32([-0.5, -1.0]), kept_logmass=np.float32([-0.1, 0.0]))
    assert make_batch([cut], BOUND, 0, grpo_no_std).behaviour_n.tolist() == pytest.approx([-0.6, -1.0])


def test_a_rollout_too_old_to_train_still_counts_in_its_groups_mean(make_rollout) -> None:
    fresh, old = make_rollout(0, 0, updates=(9,), reward=1.0), make_rollout(0, 1, updates=(0,), reward=5.0)
    batch = make_batch([fresh, old], BOUND, 9, grpo_no_std)
    assert len(batch.sequences) == 1
    assert batch.advantages_n.tolist() == [-2.0]
    assert batch.outcomes.rewards_s.tolist() == [1.0, 5.0]
    assert batch.sequence_n.tolist() == batch.outcomes.sequence_n.tolist() == [0]


def test_an_empty_row_before_others_shifts_nobody(make_rollout) -> None:
    empty = make_rollout(0, 0, updates=(9, 9), reward=4.0, loss_mask=np.array([False, False]))
    inner = make_rollout(0, 1, updates=(9, 9, 9), reward=1.0, loss_mask=np.array([True, False, True]))
    batch = make_batch([empty, inner], BOUND, 9, grpo_no_std)
    assert batch.outcomes.sequence_n.tolist() == [1, 1]  # among all rollouts
    assert batch.sequence_n.tolist() == [0, 0]  # among those that are trained
    assert batch.advantages_n.tolist() == [-1.5, -1.5]
    assert batch.behaviour_n.tolist() == [inner.logprobs[0], inner.logprobs[2]]


def test_minibatches_keep_groups_whole_and_in_order() -> None:
    groups = np.array([8, 8, 2, 5, 5, 2, 9])
    assert minibatches(groups, 2) == [[0, 1, 2, 5], [3, 4, 6]]
    assert minibatches(groups, None) == [[0, 1, 2, 3, 4, 5, 6]]
    assert minibatches(np.array([], dtype=np.int64), None) == minibatches(np.array([], dtype=np.int64), 2) == []
