import decimal
import math

import numpy as np
import pytest

from asyncrl.reward.results import Sample, Verdict, read_result

SAMPLE = Sample("gsm8k", "it is #### 72", '"72"', "null", response_ids=[4, 5, 6, 7], turns=(0, 3))


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (0.5, Verdict("ok", 0.5)),
        (0, Verdict("ok", 0.0)),
        (True, Verdict("ok", 1.0)),
        (np.float32(0.25), Verdict("ok", 0.25)),
        (np.array(0.25), Verdict("ok", 0.25)),
        ({"score": 1, "acc": True, "pred": "72", "len": 3}, Verdict("ok", 1.0, {"acc": 1.0, "len": 3.0}, answer="72")),
        ({"score": 1, "gap": math.nan}, Verdict("ok", 1.0, {})),
    ],
)
def test_results_that_are_rewards(result, verdict):
    assert read_result(result, SAMPLE) == verdict


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "returned NoneType None"),
        ("1.0", "returned str '1.0'"),
        (math.nan, "returned float nan"),
        (-math.inf, "returned float -inf"),
        ([1.0], "returned list [1.0]"),
        (np.array([1.0]), "returned ndarray"),
        (decimal.Decimal(1), "returned Decimal"),
        ({}, "without 'score'"),
        ({"reward": 1.0}, "keys are ['reward']"),
        ({"score": None}, "score=None"),
        ({"score": math.nan, "acc": 1.0}, "returned score=nan"),
    ],
)
def test_results_that_are_none(result, words):
    verdict = read_result(result, SAMPLE)
    assert verdict.status == "invalid"
    assert verdict.reward is None
    assert words in verdict.error


@pytest.mark.parametrize(
    ("earned", "token_rewards"),
    [
        ({"turn_rewards": [1, np.float32(0.5)]}, [0, 0, 1, 0.5]),  # at the last token of each turn: 2 and 3
        ({"turn_rewards": np.array([1.0, -1.0])}, [0, 0, 1, -1]),
        ({"token_rewards": (0.1, 0.2, True, 0)}, [0.1, 0.2, 1, 0]),
        ({"turn_rewards": [1, 2], "token_rewards": [0.5, 0, 0.5, 0]}, [0.5, 0, 1.5, 2]),
        ({"turn_rewards": None}, None),
    ],
)
def test_turn_rewards_are_assigned_to_the_last_token_and_add_to_token_rewards(earned, token_rewards):
    assert read_result({"score": 1.0, **earned}, SAMPLE) == Verdict("ok", 1.0, token_rewards=token_rewards)


@pytest.mark.parametrize(
    ("earned", "words"),
    [
        ({"turn_rewards": [1.0]}, "returned 1 turn_rewards; expected 2, one per turn"),
        ({"token_rewards": [0.0] * 3}, "returned 3 token_rewards; expected 4, one per response token"),
        ({"token_rewards": 0.5}, "returned token_rewards=0.5; expected a list of 4, one per response token"),
        ({"turn_rewards": [0.0, math.nan]}, "returned turn_rewards[1]=nan; expected a finite number"),
        ({"turn_rewards": [None, 1.0]}, "returned turn_rewards[0]=None; expected a finite number"),
        ({"turn_rewards": "ab"}, "returned turn_rewards[0]='a'; expected a finite number"),
    ],
)
def test_wrong_turn_and_token_rewards_cost_their_sample(earned, words):
    assert read_result({"score": 1.0, **earned}, SAMPLE) == Verdict("invalid", error=words)
