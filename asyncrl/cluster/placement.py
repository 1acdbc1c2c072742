"""Where actors go: one placement group per engine replica and one per learner gang; helpers reserve nothing."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from asyncrl.config import PlaceSpec
from asyncrl.errors import PlacementError


def demand(place: PlaceSpec) -> dict[str, float]:
    """What one actor asks of Ray; nothing at all for a helper."""
    wanted = {"CPU": place.cpus, "GPU": place.gpus, **place.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


@dataclass(frozen=True)
class Placement:
    """Reserved places, each to be handed to `actor.options(**options)`. `release` gives them back."""

    options: tuple[dict[str, Any], ...]  # of each actor
    group: PlacementGroup | None = None

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


def reserve(name: str, place: PlaceSpec, timeout_s: float, count: int = 1) -> Placement:
    """Reserves a placement group for `count` actors, on few nodes; waits `timeout_s` for the cluster to have room.

    Raises PlacementError with the resources demanded against those available.
    """
    wanted = demand(place)
    if not wanted:
        return Placement(({"num_cpus": 0},) * count)
    group = placement_group([wanted] * count, strategy="PACK", name=name)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in wanted.items()) for node in nodes)
    if room < count or not group.wait(timeout_s):
        total, free = ray.cluster_resources(), ray.available_resources()
        remove_placement_group(group)
        each = f" by each of {count} ranks" if count > 1 else ""
        rows = [
            f"  {kind:12} demanded {amount:g}{each}, available {free.get(kind, 0.0):g} of {total.get(kind, 0.0):g}"
            for kind, amount in wanted.items()
        ]
        whole = f"each rank needs one node that has all of it, and free nodes have room for {room}" if each else ""
        raise PlacementError(
            f"{name} fits nowhere in the cluster:\n"
            + "\n".join(rows)
            + f"\n{whole or 'one node must have all of it'}; lower its `place` in the deployment, or add such a node"
        )
    options = {"num_cpus": wanted.pop("CPU", 0), "num_gpus": wanted.pop("GPU", 0), "resources": wanted}
    at = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(count)]
    return Placement(tuple({**options, "scheduling_strategy": strategy} for strategy in at), group)


def beside_driver() -> Placement:
    """The driver's own node, always: a restarted store must reach the disk that its log lies on."""
    node = ray.get_runtime_context().get_node_id()
    return Placement(({"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)},))
