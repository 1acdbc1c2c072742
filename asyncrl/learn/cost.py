"""What an update takes of the devices: memory, and how much of their arithmetic is put to use."""

import re
import resource
from collections.abc import Sequence

import torch

from asyncrl.models.packed import Pack, PackedModel
from asyncrl.models.ranks import Ranks

_GIB = 2**30
# bfloat16, dense, in 1e12 floating-point operations per second, by words of a device's name, the longer first: makers' data
# sheets, which verl and prime-rl go by too.
_PEAKS = {
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250, "H100 NVL": 835, "H100 PCIe": 756, "H200 NVL": 835,
    "H100": 989, "H800": 989, "H200": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "A40": 149.7,
    "L20": 119.5, "L4": 121, "MI300X": 1307, "MI325X": 1307, "MI350X": 2300, "MI355X": 2500,
}  # fmt: skip


def peak_flops(name: str) -> float | None:
    """Operations per second that a device of this name can do at most; None: nobody has said."""
    return next((1e12 * peak for part, peak in _PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def cost_metrics(ranks: Ranks, device: torch.device, utilization: float) -> dict[str, float]:
    """The most that a rank has taken so far, in GiB: of its GPU, or resident of its host. All ranks must call it.

    utilization: of this rank's device; 0 where it is not known, or the rank has no part of the policy.
    """
    if device.type == "cuda":
        names = ["perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb"]
        taken = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    else:
        names, taken = ["perf/max_rss_gb"], [1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    *told, best = ranks.most([*(size / _GIB for size in taken), utilization])
    return dict(zip(names, told, strict=True)) | ({"perf/mfu/actor": best} if best else {})


def flops_utilization(policy: PackedModel, packs: Sequence[Pack], seconds: float, name: str = "") -> float:
    """Of what this rank's device can do in so many seconds, the share that training on its packs asks for; 0: not known.

    The arithmetic of the model alone counts, not what is computed twice to spare memory. name: of the device, if not its own.
    """
    device = policy.device
    peak = peak_flops(name or (torch.cuda.get_device_name(device) if device.type == "cuda" else ""))
    if peak is None:
        return 0.0
    sharing = policy.ranks.layout.tp * policy.ranks.layout.sp  # ranks that compute the same packs together
    return training_flops(policy, packs) / sharing / (seconds * peak)


def training_flops(policy: PackedModel, packs: Sequence[Pack]) -> float:
    """Operations of a forward and a backward pass: 2 for each weight and token, and as many for each gradient.

    Attention is causal: a token reads half of its sequence. Of experts count those that a token goes through. Weights that
    don't learn, beside adapters, need no gradient of their own.
    """
    model, config = policy.model, policy.model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    output = None if head is None else head.weight
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    inner = 0.0
    for name, weight in model.named_parameters():
        if weight is not embedding and weight is not output:
            inner += weight.numel() * (chosen / experts if ".experts." in name else 1.0)
    heads = getattr(config, "num_attention_heads", None) or 0  # some models have no attention
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    computed = sum(len(pack.input_ids_u) for pack in packs)
    scored = sum(len(pack.target_ids_t) for pack in packs)
    read = sum(count * length**2 / 2 for pack in packs for count, length in pack.runs)
    matrices = 2 * (inner * computed + (0 if output is None else output.numel()) * scored)
    passes = 3 if all(weight.requires_grad for weight in model.parameters()) else 2
    return passes * matrices + 3 * 4 * config.num_hidden_layers * width * read
