"""Where actors go: one placement group per engine replica and one per learner gang; helpers reserve nothing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from asyncrl.config import PlaceSpec
from asyncrl.errors import PlacementError


def demand(place: PlaceSpec) -> dict[str, float]:
    """What one actor asks of Ray; nothing at all for a helper."""
    wanted = {"CPU": place.cpus, "GPU": place.gpus, **place.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


@dataclass(frozen=True)
class Placement:
    """Places that are reserved, or will be, each to be handed to `actor.options(**options)`. `release` gives them back."""

    options: tuple[dict[str, Any], ...]  # of each actor
    group: PlacementGroup | None = None

    @property
    def ready(self) -> bool:
        """Whether they are reserved. Asks the cluster."""
        return self.group is None or placement_group_table(self.group)["state"] == "CREATED"

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


def request(name: str, places: Sequence[PlaceSpec], choice: int = 0) -> Placement:
    """Asks for a placement group for an actor at each of the places, on few nodes; waits for nothing. choice: which of each
    place's `choices` of labels is meant."""
    wanted = [demand(place) for place in places]
    labels = [place.choices[min(choice, len(place.choices) - 1)] for place in places]
    bundles = [bundle for bundle in wanted if bundle]
    if not bundles:
        return Placement(tuple(_anywhere(place) for place in places))
    selectors = [label for bundle, label in zip(wanted, labels, strict=True) if bundle]
    selected = {"bundle_label_selector": selectors} if any(selectors) else {}
    group = placement_group(bundles, strategy="PACK", name=name, **selected)
    index = itertools.count()
    options = (
        _options(bundle, group, next(index)) if bundle else _anywhere(place)
        for bundle, place in zip(wanted, places, strict=True)
    )
    return Placement(tuple(options), group)


def reserve(name: str, places: Sequence[PlaceSpec], timeout_s: float, *, patient: bool = False) -> Placement:
    """The same, and waits `timeout_s` for the cluster to have room; with the labels that come first for most of it, if there
    are others. patient: also where no node has room, for nodes may join.

    Raises PlacementError with the resources demanded against those available.
    """
    choices = max(len(place.choices) for place in places)
    for choice in range(choices):
        placement = request(name, places, choice)
        if placement.group is None:
            return placement
        bundles = [bundle for place in places if (bundle := demand(place))]
        if (patient or _room(bundles) == len(bundles)) and placement.group.wait(timeout_s / choices):
            return placement
        placement.release()
    raise fits_nowhere(name, places)


def fits_nowhere(name: str, places: Sequence[PlaceSpec]) -> PlacementError:
    """What is said of actors for which the cluster has no room."""
    bundles = [bundle for place in places if (bundle := demand(place))]
    total, free = ray.cluster_resources(), ray.available_resources()
    each = f" by the largest of {len(bundles)} ranks" if len(bundles) > 1 else ""
    most = {kind: max(bundle.get(kind, 0.0) for bundle in bundles) for bundle in bundles for kind in bundle}
    rows = [
        f"  {kind:12} demanded {amount:g}{each}, available {free.get(kind, 0.0):g} of {total.get(kind, 0.0):g}"
        for kind, amount in most.items()
    ]
    rows += [f"  on nodes labelled {' or '.join(map(str, place.choices))}" for place in places[:1] if place.labels]
    whole = f"each rank needs one node that has all of it, and free nodes have room for {_room(bundles)}" if each else ""
    return PlacementError(
        f"{name} fits nowhere in the cluster:\n"
        + "\n".join(rows)
        + f"\n{whole or 'one node must have all of it'}; lower its `place` in the deployment, or add such a node"
    )


def _anywhere(place: PlaceSpec) -> dict[str, Any]:
    """Of a helper, which reserves nothing."""
    fallback = [{"label_selector": labels} for labels in place.fallback if labels]
    labels = {"label_selector": place.labels, "fallback_strategy": fallback or None} if place.labels else {}
    return {"num_cpus": 0, **labels}


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
