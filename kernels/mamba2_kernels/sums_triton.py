"""Sums over rows in a fixed order: how the gradients of shared weights come together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import LENGTHS, launch


@triton.jit(do_not_specialize=LENGTHS)
def sum_rows_kernel(parts, out, n_rows, width, BR: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BR, BC), tl.float32)
    for r0 in range(0, n_rows, BR):
        r = r0 + tl.arange(0, BR)
        p_parts = parts + r.to(tl.int64)[:, None] * width + c[None, :]
        total += tl.load(p_parts, mask=(r < n_rows)[:, None] & (c < width)[None, :], other=0.0)
    tl.store(out + c, tl.sum(total, 0), mask=c < width)


def sum_rows(parts: Tensor) -> Tensor:
    """Sum a dense float32 (rows, width) over its rows."""
    rows, width = parts.shape
    out = torch.empty(width, dtype=torch.float32, device=parts.device)
    columns = 64
    launch(
        sum_rows_kernel,
        (triton.cdiv(width, columns),),
        parts.device,
        parts,
        out,
        rows,
        width,
        BR=32,
        BC=columns,
        num_warps=4,
    )
    return out
