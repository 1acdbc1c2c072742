import pytest

from asyncrl.config import LearnerSpec
from asyncrl.learn.schedule import learning_rate


def test_warmup_then_constant() -> None:
    spec = LearnerSpec(lr=1.0, warmup_steps=4)
    assert [learning_rate(spec, c, 100) for c in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_cosine_falls_to_its_floor_and_stays() -> None:
    spec = LearnerSpec(lr=2.0, warmup_steps=2, lr_schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(spec, c, 12) for c in (2, 7, 12, 30)]
    assert rates == pytest.approx([2.0, 1.1, 0.2, 0.2])  # half way: the mean of 2 and 0.2
