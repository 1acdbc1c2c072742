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
    """A reserved place, to be handed to `actor.options(**placement.options)`. `release` gives it back."""

    options: dict[str, Any]
    group: PlacementGroup | None = None

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


def reserve(name: str, place: PlaceSpec, timeout_s: float) -> Placement:
    """Reserves a placement group for one actor; waits `timeout_s` for the cluster to have room.

    Raises PlacementError with the resources demanded against those available.
    """
    wanted = demand(place)
    if not wanted:
        return Placement({"num_cpus": 0})
    total = ray.cluster_resources()
    group = placement_group([wanted], strategy="STRICT_PACK", name=name)
    fits = all(total.get(resource, 0.0) >= amount for resource, amount in wanted.items())
    if not fits or not group.wait(timeout_s):
        available = ray.available_resources()
        remove_placement_group(group)
        rows = [
            f"  {resource:12} demanded {amount:g}, available {available.get(resource, 0.0):g} of {total.get(resource, 0.0):g}"
            for resource, amount in wanted.items()
        ]
        raise PlacementError(
            f"{name} fits nowhere in the cluster:\n"
            + "\n".join(rows)
            + "\none node must have all of it; lower its `place` in the deployment, or add such a node"
        )
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    options = {
        "num_cpus": wanted.pop("CPU", 0),
        "num_gpus": wanted.pop("GPU", 0),
        "resources": wanted,
        "scheduling_strategy": strategy,
    }
    return Placement(options, group)


def beside_driver() -> Placement:
    """The driver's own node, always: a restarted store must reach the disk that its log lies on."""
    node = ray.get_runtime_context().get_node_id()
    return Placement({"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)})
