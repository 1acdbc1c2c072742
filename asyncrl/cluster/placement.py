"""Where actors go: one placement group per engine replica and one per learner gang; helpers reserve nothing."""

import itertools
from collections.abc import Sequence
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


def reserve(name: str, places: Sequence[PlaceSpec], timeout_s: float) -> Placement:
    """Reserves a placement group for an actor at each of the places, on few nodes; waits `timeout_s` for the cluster to have
    room.

    Raises PlacementError with the resources demanded against those available.
    """
    wanted = [demand(place) for place in places]
    bundles = [bundle for bundle in wanted if bundle]
    if not bundles:
        return Placement(({"num_cpus": 0},) * len(places))
    group = placement_group(bundles, strategy="PACK", name=name)
    room = _room(bundles)
    if room < len(bundles) or not group.wait(timeout_s):
        total, free = ray.cluster_resources(), ray.available_resources()
        remove_placement_group(group)
        each = f" by the largest of {len(bundles)} ranks" if len(bundles) > 1 else ""
        most = {kind: max(bundle.get(kind, 0.0) for bundle in bundles) for bundle in bundles for kind in bundle}
        rows = [
            f"  {kind:12} demanded {amount:g}{each}, available {free.get(kind, 0.0):g} of {total.get(kind, 0.0):g}"
            for kind, amount in most.items()
        ]
        whole = f"each rank needs one node that has all of it, and free nodes have room for {room}" if each else ""
        raise PlacementError(
            f"{name} fits nowhere in the cluster:\n"
            + "\n".join(rows)
            + f"\n{whole or 'one node must have all of it'}; lower its `place` in the deployment, or add such a node"
        )
    index = itertools.count()
    return Placement(tuple(_options(bundle, group, next(index)) if bundle else {"num_cpus": 0} for bundle in wanted), group)


def _room(bundles: Sequence[dict[str, float]]) -> int:
    """How many of them, first to last, the cluster's nodes could take if they were free."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    room = 0
    for bundle in bundles:
        for node in nodes:
            if all(node.get(kind, 0.0) + 1e-9 >= amount for kind, amount in bundle.items()):
                for kind, amount in bundle.items():
                    node[kind] -= amount
                room += 1
                break
    return room


def _options(bundle: dict[str, float], group: PlacementGroup, index: int) -> dict[str, Any]:
    resources = {kind: amount for kind, amount in bundle.items() if kind not in ("CPU", "GPU")}
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "resources": resources,
        "scheduling_strategy": strategy,
    }


def beside_driver() -> Placement:
    """The driver's own node, always: a restarted store must reach the disk that its log lies on."""
    node = ray.get_runtime_context().get_node_id()
    return Placement(({"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)},))
