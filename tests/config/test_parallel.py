"""Which layouts settings leave, in the order in which they are tried."""

import pytest

from asyncrl.config import Layout, ParallelSpec, RanksSpec, layouts
from asyncrl.errors import ConfigError


def said(spec: ParallelSpec, ranks: int, per_node: int | None = None) -> list[str]:
    """replicate × shard × sp × tp, c for checkpointed activations, o for offload."""
    flags = [(at, "c" * at.checkpoint_activations + "o" * at.offload) for at in layouts(spec, ranks, per_node)]
    return [f"{at.replicate}{at.shard}{at.sp}{at.tp}{flag}" for at, flag in flags]


def test_sharding_comes_first_then_checkpointing_tp_sp_and_offload() -> None:
    assert said(ParallelSpec(), 1) == ["1111", "1111c", "1111o", "1111co"]
    without = ["1211", "1211c", "1112", "1112c", "1121", "1121c"]
    assert said(ParallelSpec(), 2) == [*without, *(f"{layout}o" for layout in without)]


def test_nodes_hold_copies_before_weights_are_sharded_over_them_and_tp_stays_within_one() -> None:
    pinned = ParallelSpec(sp=1, offload=False, checkpoint_activations=False)
    assert said(pinned, 4, per_node=2) == ["2211", "1411", "2112", "1212"]


@pytest.mark.parametrize(
    ("fields", "ranks", "expected"),
    [
        ({"fsdp": 1}, 4, Layout(replicate=4)),
        ({"fsdp": 2}, 4, Layout(replicate=2, shard=2)),
        ({"tp": 2}, 4, Layout(shard=2, tp=2)),
        ({"sp": 2}, 4, Layout(shard=2, sp=2)),
        ({"sp": 2, "fsdp": 2}, 4, Layout(replicate=2, sp=2)),
        ({"offload": True, "reshard_after_forward": False}, 1, Layout(offload=True, reshard_after_forward=False)),
    ],
)
def test_what_is_pinned_stays(fields: dict, ranks: int, expected: Layout) -> None:
    found = layouts(ParallelSpec(**fields), ranks)
    assert found[0] == expected
    assert all(layout.ranks == ranks for layout in found)


@pytest.mark.parametrize("fields", [{"tp": 3}, {"sp": 4, "fsdp": 2}, {"fsdp": 3}, {"tp": 2, "sp": 4}])
def test_parts_that_do_not_make_up_the_ranks(fields: dict) -> None:
    with pytest.raises(ConfigError, match=r"do not make up ranks=4: some would be idle"):
        RanksSpec(ranks=4, parallel=ParallelSpec(**fields))
