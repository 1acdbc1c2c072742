"""The flash kernel that torch brings computes what the loop over lengths does, but for bfloat16's rounding."""

import pytest
import torch

from asyncrl.models.attention import PackedLayout, packed_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 1, 40])
def test_values_and_gradients_of_packed_attention(window: int | None) -> None:
    torch.manual_seed(0)
    total = 3 * 20 + 2 * 100 + 700
    tensors = [torch.randn(1, heads, total, 64, device="cuda") for heads in (8, 2, 2)]
    rows = torch.arange(total, device="cuda")
    layout = PackedLayout.of(rows, rows, ((3, 20), (2, 100), (1, 700)), None)
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in tensors)
        output, _ = packed_attention(
            torch.nn.Identity(), query, key, value, None, packed_layout=layout, sliding_window=window, scaling=0.125
        )
        output.square().sum().backward()
        made[dtype] = [output.detach(), query.grad, key.grad, value.grad]
    for exact, rounded in zip(*made.values(), strict=True):
        assert (rounded - exact).norm() <= 0.02 * exact.norm()
