from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.errors import ConfigError
from asyncrl.replay.plan import Source, ticket_seed
from asyncrl.types import Prompt, Sampling


def source(size: int, **fields: Any) -> Source:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(0,))
    return Source(prompts=[Prompt(row=i, ids=(i,), data_source="") for i in range(size)], sampling=sampling, **fields)


def test_every_epoch_is_another_permutation_of_all_rows() -> None:
    order = source(50, seed=3, epochs=2)
    first, second = ([order.index(e * 50 + i) for i in range(50)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))
    assert order.total == 100


def test_the_order_depends_on_the_seed_alone() -> None:
    one, two, other = source(50, seed=3), source(50, seed=3), source(50, seed=4)
    late = [two.index(p) for p in (149, 3, 70)]  # asked in another order, across epochs
    assert [one.index(p) for p in (149, 3, 70)] == late
    assert [one.index(p) for p in range(50)] != [other.index(p) for p in range(50)]


def test_without_shuffling_it_is_the_order_of_the_file() -> None:
    order = source(3, seed=9, shuffle=False)
    assert [order.index(p) for p in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert order.total is None


def test_no_prompts_is_refused(fakes: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="0 prompts < batch_groups"):
        fakes.plan(size=0)


def test_seeds_differ_in_every_part() -> None:
    seeds = [
        ticket_seed(1, "train", 2, 0, 3),
        ticket_seed(2, "train", 2, 0, 3),
        ticket_seed(1, "eval", 2, 0, 3),
        ticket_seed(1, "train", 3, 0, 3),
        ticket_seed(1, "train", 2, 1, 3),
        ticket_seed(1, "train", 2, 0, 4),
    ]
    assert len(set(seeds)) == 6
    assert seeds[0] == ticket_seed(1, "train", 2, 0, 3)
