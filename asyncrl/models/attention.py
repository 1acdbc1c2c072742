"""Attention within each of the sequences of a pack, which are laid out in full, shared prompts for each that has them.

On CPUs, and in float32, it runs once per *run*, the neighbours of equal length, as a [count, heads, length, dim] batch with
the plain causal kernel. That is exact, linear in the number of sequences, and as fast for ten thousand responses of ten
tokens as for ten of ten thousand. In half precision on GPUs all lengths are one call of torch's own flash kernel.
(Hugging Face's own detection of packs by restarting position ids builds a dense mask with SDPA: quadratic.)
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asyncrl.errors import ConfigError
from asyncrl.models.ulysses import to_heads, to_tokens

ATTENTION = "asyncrl_packed"
FLASH_HEADS = range(8, 257, 8)  # sizes of a head that the kernel takes
Runs = tuple[tuple[int, int], ...]


class PackedLayout(NamedTuple):
    """How computed tokens U become the S of all sequences end to end, and S become U; see models.packed.Pack.

    starts: where each sequence begins among S, and S [count + 1] int32. group: of the ranks that have a slice of U each.
    """

    expand_s: torch.Tensor
    collect_u: torch.Tensor
    runs: Runs
    starts: torch.Tensor
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, expand_s: torch.Tensor, collect_u: torch.Tensor, runs: Runs, group: ProcessGroup | None) -> "PackedLayout":
        """Made once for all layers."""
        lengths = [0] + [length for count, length in runs for _ in range(count)]
        starts = torch.tensor(lengths).cumsum(0, dtype=torch.int32).to(expand_s.device, non_blocking=True)
        return cls(expand_s, collect_u, runs, starts, group)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a pack: query [1, H, U, D] to [1, U, H, D]. Without `packed_layout`, plain SDPA."""
    if packed_layout is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise ConfigError(f"{type(module).__name__} does not hand `packed_layout` to its attention: it can't train packed")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if packed_layout.group is not None:
        query, key, value = to_heads(query, key, value, packed_layout.group)
    shares = len(packed_layout.expand_s) > query.shape[2]
    q, k, v = (_expand(tensor[0].transpose(0, 1), packed_layout.expand_s if shares else None) for tensor in (query, key, value))
    attend = _flash if _takes_flash(q, v) else _by_runs
    output = attend(q, k, v, packed_layout, kwargs.get("sliding_window"), kwargs.get("scaling"))
    output = _expand(output, packed_layout.collect_u if shares else None)
    return (output if packed_layout.group is None else to_tokens(output, packed_layout.group))[None], None


def _by_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, window: int | None, scale: float | None
) -> torch.Tensor:
    """[S, H, D] of all three to [S, H, D]."""
    sizes = [count * length for count, length in layout.runs]
    # split, not slices: its backward is one concatenation instead of a full-size zero tensor per run
    split = [tensor.split(sizes) for tensor in (query, key, value)]
    outputs = []
    for (count, length), *parts in zip(layout.runs, *split, strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        band = None
        if window is not None and length > window:
            band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _takes_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return half and query.shape[-1] == value.shape[-1] and query.shape[-1] in FLASH_HEADS


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, window: int | None, scale: float | None
) -> torch.Tensor:
    """The same, by one kernel for all lengths. A window counts the token itself, the kernel's only those before it."""
    longest = max(length for _, length in layout.runs)
    before = -1 if window is None else window - 1
    gqa = query.shape[1] != key.shape[1]
    starts = layout.starts
    made = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scale, window_size=(before, 0), enable_gqa=gqa
    )
    assert isinstance(made, torch.Tensor)
    return made


def _expand(rows: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """rows[index] of [rows, H, D], with the backward pass of an embedding: fast, and in a fixed order where rows repeat."""
    return rows if index is None else F.embedding(index, rows.flatten(1)).unflatten(1, rows.shape[1:])


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
