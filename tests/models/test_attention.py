"""One call of the flash kernel asks for what the loop over lengths computes."""

import pytest
import torch
from torch.nn.attention import varlen

from asyncrl.models.attention import PackedLayout, _by_runs, _flash, _takes_flash

RUNS = ((2, 3), (1, 7))


def dense(query, key, value, starts, _, longest, __, causal, scale, window, *unused):
    """What torch documents of the kernel, by masks over all tokens: window counts keys to the left and right of a query."""
    assert longest == 7
    total, (left, right) = len(query), window
    own = torch.bucketize(torch.arange(total), starts, right=True)
    apart = torch.arange(total)[None] - torch.arange(total)[:, None]
    seen = (own[None] == own[:, None]) & (apart <= right) & ((apart >= -left) | (left < 0))
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(0, 1).contiguous(), query.new_zeros(query.shape[1], total), torch.zeros(2, dtype=torch.uint64)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@torch.no_grad()
def test_the_kernel_is_asked_for_the_same(window: int | None) -> None:
    varlen._varlen_attn.register_kernel("cpu")(dense)  # which has none for CPUs
    torch.manual_seed(0)
    query, (key, value) = torch.randn(13, 4, 8), torch.randn(2, 13, 2, 8)
    rows = torch.arange(13)
    layout = PackedLayout.of(rows, rows, RUNS, None)
    assert layout.starts.tolist() == [0, 3, 6, 13]
    expected = _by_runs(query, key, value, layout, window, 0.3)
    torch.testing.assert_close(_flash(query, key, value, layout, window, 0.3), expected, atol=1e-6, rtol=0)


def test_the_kernel_is_for_gpus_in_half_precision() -> None:
    class OnGPU(torch.Tensor):
        is_cuda = True

    def taken(dtype: torch.dtype, size: int, of_values: int) -> bool:
        tensors = (torch.empty(1, 1, width, dtype=dtype).as_subclass(OnGPU) for width in (size, of_values))
        return _takes_flash(*tensors)

    assert taken(torch.bfloat16, 128, 128)
    assert not taken(torch.float32, 128, 128)
    assert not taken(torch.bfloat16, 192, 128)  # DeepSeek's
    assert not taken(torch.bfloat16, 512, 512)
    assert not _takes_flash(*torch.empty(2, 1, 1, 128, dtype=torch.bfloat16))
