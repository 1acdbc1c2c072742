"""A model divided among ranks, in place: tensor parallel, activations made again, FSDP2, in this order.

    shard(model, ranks, precision)    one rank that computes in the weights' dtype and offloads nothing: plain torch
      1. tensor parallel              the model's own plan, by torch's styles: weights become DTensors over tp
      2. activation checkpointing     per decoder layer
      3. FSDP2                        per decoder layer and root, over the other ranks: weights rest in their own dtype (the
                                      master weights; gradients and optimizer, too), and are gathered in that of the compute

Afterwards the optimizer may be built, and PackedModel. All ranks must call it. The weights are those of the first rank: the
others may have the model on the meta device (`load_model` makes it so), and get their own parts alone (models/spreading.py).
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from asyncrl.config import PrecisionSpec
from asyncrl.errors import ConfigError
from asyncrl.models.layout import DTYPES
from asyncrl.models.packed import packable
from asyncrl.models.ranks import Ranks
from asyncrl.models.spreading import Whole


def compute_dtype(precision: PrecisionSpec, master: torch.dtype, device: str) -> torch.dtype:
    """In which dtype a model computes whose weights are `master` (model.dtype)."""
    return DTYPES[precision.compute_of(str(master).removeprefix("torch."), gpu=device == "cuda")]


def shard(model: PreTrainedModel, ranks: Ranks, precision: PrecisionSpec, device: str = "cpu") -> None:
    """Divides a causal LM on the CPU among the ranks, and brings it to their devices. Every rank waits for all others.

    Raises ConfigError, before anything is changed, for a model that the ranks can't divide so, or that is not the same on all.
    """
    layout = ranks.layout
    _refuse(model, ranks)
    styles = _styles(model, layout.tp) if layout.tp > 1 else []
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32  # of the process; an own critic's and a reference's are the same
    layers = _layers(model)
    whole = Whole(model, ranks) if ranks.grouped else None
    compute = compute_dtype(precision, model.dtype, device)
    if ranks.tp_mesh is not None:
        _divide(model, styles, ranks.tp_mesh)
    if layout.checkpoint_activations:
        for layer in layers:
            checkpoint(layer)
    if layout.ranks == 1 and compute == model.dtype and not layout.offload:
        model.to(device)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == model.dtype else compute, reduce_dtype=getattr(torch, precision.reduce)
    )
    fully = partial(
        fully_shard,
        mesh=ranks.fsdp_mesh or _alone(device),
        reshard_after_forward=layout.reshard_after_forward,
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy(pin_memory=device == "cuda") if layout.offload else OffloadPolicy(),
    )
    if packable(model):  # else a pass calls every layer as often as a rank's pack has lengths, and gathers once for all
        for layer in layers:
            fully(layer)
        for layer, following in itertools.pairwise(layers):
            cast(FSDPModule, layer).set_modules_to_forward_prefetch([cast(FSDPModule, following)])
    fully(model)
    _sum_gradients(model)
    if whole is not None:
        whole.deal(model, device, "cpu" if layout.offload else device)


def shard_head(head: nn.Module, ranks: Ranks) -> None:
    """The same for a small module that reads what a sharded model made: it computes in its own dtype."""
    if ranks.tp_mesh is not None:
        parallelize_module(head, ranks.tp_mesh, _Whole())
    if ranks.layout.ranks > 1:
        fully_shard(head, mesh=ranks.fsdp_mesh)
        _sum_gradients(head)


def _sum_gradients(model: nn.Module) -> None:
    """Losses carry coefficients of the whole batch: gradients are summed over ranks, where FSDP's default is the mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # NCCL's premultiplied sum, the other way, is wrong in bfloat16


def _alone(device: str) -> DeviceMesh:
    """A mesh of this process alone, with a group if it has none: FSDP also casts and offloads for one rank."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: what transformers, too, keeps whole when it divides a model. (It also names parts of them.)"""
    kinds = set(model._no_split_modules or ())
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not any(name.startswith(f"{other}.") for other in layers):
            layers[name] = module
    return list(layers.values())


class _Whole(ParallelStyle):
    """Every rank of tp holds the whole module. placement: of what it reads and makes; every rank has that, or has a part."""

    def __init__(self, placement: Placement | None = None) -> None:
        self._placement = placement or Replicate()

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute_module(module, mesh)
        module.register_forward_pre_hook(
            lambda _, inputs: (DTensor.from_local(inputs[0], mesh, [self._placement], run_check=False), *inputs[1:])
        )
        module.register_forward_hook(lambda _, inputs, output: output.to_local())
        return module


_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda: _Whole(Shard(2)),  # a norm of each head, of which a rank has some
}
_DIVIDED = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}  # dimension of the weight


def _divide(model: PreTrainedModel, styles: Sequence[tuple[nn.Module, ParallelStyle]], mesh: DeviceMesh) -> None:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    for module, style in styles:
        learns = [parameter.requires_grad for parameter in module.parameters()]
        parallelize_module(module, mesh, style)
        for parameter, does in zip(module.parameters(), learns, strict=True):
            parameter.requires_grad_(does)  # torch makes parameters anew, which would all learn
    if tied:
        output.weight = embedding.weight


def _styles(model: PreTrainedModel, tp: int) -> list[tuple[nn.Module, ParallelStyle]]:
    """How the model's own plan, and ours for both of its ends, divides each module that has parameters of its own.

    Raises ConfigError where it has no plan, or one that can't be followed.
    """
    if not getattr(model.config.get_text_config(decoder=True), "base_model_tp_plan", None):
        raise _undivided(model, tp, "it has no plan for tensor parallelism (base_model_tp_plan)")
    plan: dict[str, str] = model.tp_plan
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    beside = {pattern.rpartition(".")[0] for pattern, style in plan.items() if style == "colwise"}
    styles: list[tuple[nn.Module, ParallelStyle]] = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            continue  # what is inside is divided
        pattern, own = re.sub(r"\d+", "*", name), dict(module.named_parameters(recurse=False))
        planned = _planned(plan, pattern)
        if module in ends:
            divides = module.weight.shape[0] % tp == 0  # a value head has one output
            end = _STYLES["rowwise_split_input" if module is ends[0] else "colwise_gather_output"]
            styles.append((module, end() if divides else _Whole()))
        elif planned is None and own:
            if pattern.rpartition(".")[0] in beside:
                raise _undivided(model, tp, f"its plan says nothing of {name}, beside layers of which a rank has a part")
            styles.append((module, _Whole()))
        elif planned is not None:
            if planned not in _STYLES or "weight" not in own:
                raise _undivided(model, tp, f"{name} ({type(module).__name__}) can't be divided as its plan says, {planned}")
            if planned in _DIVIDED and module.weight.shape[_DIVIDED[planned]] % tp:
                raise _undivided(model, tp, f"{name} has a weight of {tuple(module.weight.shape)}, which tp does not divide")
            styles.append((module, _STYLES[planned]()))
    return styles


_ADAPTED = re.compile(r"(.*)\.(base_layer|lora_A\.default|lora_B\.default)")  # as models.lora has made a layer


def _planned(plan: Mapping[str, str], pattern: str) -> str | None:
    """What the plan says of a module. Of an adapter, A reads what its layer reads, and B makes what that makes."""
    if (found := _ADAPTED.fullmatch(pattern)) is None:
        return plan.get(pattern)
    style, whole = plan.get(found[1]), {"colwise": "lora_A.default", "rowwise": "lora_B.default"}
    return None if style is None or whole.get(style) == found[2] else style


def _undivided(model: PreTrainedModel, tp: int, why: str) -> ConfigError:
    return ConfigError(f"parallel.tp={tp} with {type(model).__name__}: {why}; use tp=1, and more ranks for fsdp")


def _refuse(model: PreTrainedModel, ranks: Ranks) -> None:
    """Raises ConfigError for attention heads that tp or sp does not divide, and for a model that sp can't."""
    config, tp, sp = model.config.get_text_config(decoder=True), ranks.layout.tp, ranks.layout.sp
    heads = getattr(config, "num_attention_heads", 0)
    keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % tp or keys % tp:
        raise _undivided(model, tp, f"tp does not divide its {heads} attention heads, or its {keys} of keys and values")
    if sp > 1 and not packable(model):
        raise ConfigError(
            f"parallel.sp={sp} with {type(model).__name__}: it is trained by rows (docs/architectures.md), which ranks "
            "can't share; use sp=1, and more ranks for fsdp"
        )
    if heads // tp % sp:
        raise ConfigError(
            f"parallel.sp={sp} with {type(model).__name__}: it does not divide the {heads // tp} attention heads that "
            f"a rank has with tp={tp}; use a divisor of them, and more ranks for fsdp"
        )
