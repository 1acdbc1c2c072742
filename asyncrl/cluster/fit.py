"""How the learner's ranks divide its models: the cheapest layout that fits their memory, and what that takes. No torch.

A dry run asks with this machine's devices, the ranks with those that they have: the same function, so that what is told is
what is done. Where devices differ, the smallest counts.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from asyncrl.cluster.resources import gpu_bytes
from asyncrl.config import (
    CPU_PACK_TOKENS,
    Deployment,
    Group,
    Layout,
    ModelSpec,
    PlaceSpec,
    RanksSpec,
    Recipe,
    layouts,
    run_dtypes,
)
from asyncrl.disk import as_size
from asyncrl.errors import ConfigError
from asyncrl.models.architectures import read_config
from asyncrl.models.footprint import Footprint, Work, footprint
from asyncrl.models.room import available_bytes
from asyncrl.models.sizes import ModelSize, size_of

_COUNTED_ON = 0.9  # share of a memory: the rest is the driver's, the collectives' and fragmentation's
_NODE_RANKS = 8  # of a node that has not been asked yet
_BYTES = {"float32": 4, "bfloat16": 2}
_COLUMNS = ("weights", "optimizer", "gradients", "gathered", "activations", "logits")


class DeviceMemory(Struct, frozen=True, kw_only=True):
    """What a rank has, as it tells the others. memory_bytes: of its device; None where nobody knows."""

    node: str
    memory_bytes: int | None
    host_bytes: int


class Fit(NamedTuple):
    """A layout, why it was taken, and what it takes of a rank: lines of a table, and of its device (0: not known)."""

    layout: Layout
    reason: str
    table: tuple[str, ...] = ()
    device_bytes: int = 0


class _Model(NamedTuple):
    """A model of the learner's, and what is done with it."""

    name: str
    size: ModelSize
    work: Work


def device_memory(place: PlaceSpec) -> DeviceMemory:
    """Of the process that asks, or of one at this place on its machine. On CPUs, what all processes of the node have left."""
    host = available_bytes()
    gpu = gpu_bytes() if place.gpus else None
    return DeviceMemory(
        node=os.uname().nodename,
        memory_bytes=host if not place.gpus else None if gpu is None else int(gpu * min(1.0, place.gpus)),
        host_bytes=host,
    )


def agree(
    store: Any,
    rank: int,
    groups: Sequence[Group],
    own: DeviceMemory,
    fit: Callable[[Mapping[Group, Sequence[DeviceMemory]]], Mapping[Group, Layout]],
) -> tuple[int, dict[Group, Layout]]:
    """Tells all ranks, through the store of their rendezvous, the layouts that the first makes of their devices; each gets its
    number anew, by which those of a node are neighbours in their group. Waits for all others. Raises on the first what `fit`
    raises. groups: of each rank, one after the other."""
    store.set(f"device {rank}", msgspec.json.encode(own))
    if rank == 0:
        devices = [msgspec.json.decode(store.get(f"device {i}"), type=DeviceMemory) for i in range(len(groups))]
        nodes = [device.node for device in devices]
        order = sorted(range(len(groups)), key=lambda i: (groups.index(groups[i]), nodes.index(nodes[i]), i))
        by_group = {group: [devices[i] for i in order if groups[i] == group] for group in groups}
        store.set("layout", msgspec.json.encode((order, fit(by_group))))
    order, found = msgspec.json.decode(store.get("layout"), type=tuple[list[int], dict[Group, Layout]])
    return order.index(rank), found


def fit_layouts(
    recipe: Recipe, deployment: Deployment, devices: Mapping[Group, Sequence[DeviceMemory]] | None = None
) -> dict[Group, Fit]:
    """How each group of ranks divides its models. devices: of its ranks; None where they are not known yet.

    recipe: with paths resolved. Raises ConfigError, with figures, where nothing fits the memory that is known; and for a group
    that has no model.
    """
    nodes = Counter(device.node for of in (devices or {}).values() for device in of)
    share = max(nodes.values(), default=_NODE_RANKS)  # ranks of a node, whose host is all of theirs
    return {
        group: _fit(_models(recipe, deployment, group), group, deployment, devices[group] if devices else [], share)
        for group in deployment.groups
    }


def _fit(models: Sequence[_Model], group: Group, deployment: Deployment, devices: Sequence[DeviceMemory], share: int) -> Fit:
    """The first of `config.layouts` that fits. share: ranks that share a host."""
    of = deployment.groups[group]
    spec, ranks = of.parallel, of.ranks
    nodes = [device.node for device in devices]
    per_node = min(map(nodes.count, nodes)) if nodes else _NODE_RANKS
    found = layouts(spec, ranks, per_node)
    if not models:
        return Fit(found[0], f"{_said(found[0])}; how large the model is, is not known")
    room, host = _room(of, devices, share)
    found = [layout for layout in found if all(_divides(layout, model.size, spec.tp) for model in models)] or found
    if room is None:
        taken = _told(found[0], models)
        return Fit(found[0], f"{_said(found[0])}; how much memory its devices have, is not known yet", taken)
    needed = [_needed(layout, models, per_node, on_host=not of.place.gpus) for layout in found]
    for counted in (1.0, 1 / _COUNTED_ON):  # at last all there is: the estimate may be too high, too
        for number, (layout, (on_device, on_host)) in enumerate(zip(found, needed, strict=True)):
            if on_device <= counted * room and on_host <= counted * host:
                cheaper = min((size for size, _ in needed[:number]), default=0)
                why = f"; whatever is cheaper takes {as_size(cheaper)} or more" if cheaper > counted * room else ""
                tight = "" if counted == 1.0 else "; it may not fit"
                takes = f"a rank takes {as_size(on_device)} of the {as_size(room)} that count of its memory"
                return Fit(layout, f"{_said(layout)}: {takes}{why}{tight}", _told(layout, models), on_device)
    least = min(range(len(found)), key=lambda number: needed[number])
    on_device, on_host = needed[least]
    table = "\n".join(f"  {line}" for line in _told(found[least], models))
    raise ConfigError(
        f"{group}.ranks={ranks}: what they hold does not fit. {_said(found[least])} would take {as_size(on_device)} of a "
        f"device, of which {as_size(room)} count, and {as_size(on_host)} of its host's {as_size(host)}:\n{table}\n"
        "  use more ranks, larger devices or hosts, a smaller learner.max_tokens_per_pack, or learner.lora; leave settings of "
        f"{group}.parallel to auto; or state {group}.parallel.memory_bytes if you know better"
    )


def _room(of: RanksSpec, devices: Sequence[DeviceMemory], share: int) -> tuple[int | None, int]:
    """What each rank may take of its device (None: not known), and of its host, which so many share."""
    stated = of.parallel.memory_bytes
    known = [device.memory_bytes for device in devices]
    host = min((int(_COUNTED_ON * device.host_bytes) // share for device in devices), default=2**62)
    if stated is not None:
        return stated, host
    if None in known or not known:
        return None, host
    smallest = int(_COUNTED_ON * min(memory for memory in known if memory is not None))
    return smallest // (1 if of.place.gpus else share), host


def _models(recipe: Recipe, deployment: Deployment, group: Group) -> list[_Model]:
    """What these ranks hold; nothing where the size of one of them is not known. Raises ConfigError if that is no model."""
    learner, critic, wide = recipe.learner, recipe.critic, _BYTES[run_dtypes(recipe, deployment).compute]
    groups, n = learner.mini_batch_groups or learner.batch_groups, recipe.sampling.n
    longest = recipe.data.max_prompt_length + recipe.sampling.max_response_length
    pack = learner.max_tokens_per_pack if deployment.learner.place.gpus else min(learner.max_tokens_per_pack, CPU_PACK_TOKENS)
    tokens = min(max(pack, longest), groups * (recipe.data.max_prompt_length + n * recipe.sampling.max_response_length))

    def work(model: ModelSpec, **how: bool | int | None) -> Work:
        return Work(tokens=tokens, master_bytes=_BYTES[model.dtype], compute_bytes=wide, **how)  # type: ignore[arg-type]

    wanted = {"learner": ("policy", recipe.model, work(recipe.model, adapters=learner.lora.rank if learner.lora else None))}
    if recipe.algorithm.needs_critic and critic.backbone == "own":
        start = critic.model or recipe.model
        wanted["critic"] = "critic", start, work(start, values=True)
    if recipe.algorithm.needs_reference and learner.lora is None:  # else it is the policy without its adapters
        wanted["reference"] = "reference", recipe.model, work(recipe.model, trains=False)
    if group not in wanted:
        raise ConfigError(
            f"deploy.{group} is set, but the recipe has no {group} model of its own: its ranks would be idle; set "
            f"deploy.{group}=null"
        )
    own = [of for holder, of in wanted.items() if group == (holder if holder in deployment.groups else "learner")]
    sized = [
        (name, None if model.builder else size_of(read_config(model.path, model.revision) | model.override_config), doing)
        for name, model, doing in own
    ]
    return [_Model(name, size, doing) for name, size, doing in sized if size] if all(size for _, size, _ in sized) else []


def _divides(layout: Layout, size: ModelSize, tp: int | str) -> bool:
    """Whether the model can be divided so. What is pinned is left to the learner, which asks the model itself."""
    heads = size.heads % layout.tp == size.key_heads % layout.tp == size.heads // layout.tp % layout.sp == 0
    by_tp = layout.tp == 1 or tp != "auto" or (heads and size.splits)
    return by_tp and (layout.sp == 1 or (heads and size.packed))


def _needed(layout: Layout, models: Sequence[_Model], per_node: int, *, on_host: bool) -> tuple[int, int]:
    """Bytes of the device and of its host that a rank takes: all that rests, and the most that any of the models moves.

    What the first rank of the group loads counts for all of its node alike, whose memory is divided so.
    """
    feet = [footprint(model.size, model.work, layout) for model in models]
    resting, moving = sum(foot.resting for foot in feet), max(foot.moving for foot in feet)
    loading = max(foot.loading for foot in feet) // per_node
    dealt = loading + sum(foot.weights for foot in feet) if layout.ranks > 1 else loading  # where parts rest on the host
    if on_host:
        return max(resting + moving, dealt), 0
    if not layout.offload:
        return resting + moving, loading
    gradients = max(foot.gradients for foot in feet)
    return moving - gradients, max(resting + gradients, dealt)


def _said(layout: Layout) -> str:
    """The layout in words."""
    copies = f" × {layout.replicate} copies" if layout.replicate > 1 else ""
    parts = [f"{layout.ranks} ranks" if layout.ranks > 1 else "1 rank"]
    if layout.ranks > 1:
        parts.append(f"fsdp={layout.shard * layout.sp}{copies} tp={layout.tp} sp={layout.sp}")
    parts += ["activations checkpointed"] * layout.checkpoint_activations + ["weights and optimizer offloaded"] * layout.offload
    return ", ".join(parts)


def _told(layout: Layout, models: Sequence[_Model]) -> tuple[str, ...]:
    """What each model takes of a rank, in GiB."""
    rows = [f"{'GiB per rank':<24}" + "".join(f"{name:>13}" for name in _COLUMNS)]
    for model in models:
        foot: Footprint = footprint(model.size, model.work, layout)
        label = f"{model.name}, {model.size.parameters / 1e9:.2f}B"
        rows.append(f"{label:<24}" + "".join(f"{getattr(foot, name) / 2**30:>13.2f}" for name in _COLUMNS))
    if len(models) > 1:
        rows.append("(models compute one after another: of what is right of the optimizer only the largest sum counts)")
    return tuple(rows)
