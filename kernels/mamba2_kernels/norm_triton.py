"""RMSNorm, plain and gated, and their gradients in Triton: one program per row and group.

All ops are one equation, v = x, x + residual or x silu(z), and y = v / rms(v) * weight, so they are
one forward and one backward kernel. `SUM` says where the sum of squares is: "own" for the program's
own, "given" by the caller, "only" when it is itself the result.

The rounding order is that of transformers' Mamba2: statistics and normalised values in float32, the
latter rounded to x's dtype, then times the weight. A group is held whole, so its width has a limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import LENGTHS, launch
from mamba2_kernels.sums_triton import sum_rows

ROWS_PER_PROGRAM = (16, 64)  # of the backward pass, which sums the weight's gradient over them
MOST_PROGRAMS = 512


@triton.jit
def normalised(
    x, z, residual, square_sum, row, c, sx, sz, sr, o_sum, m, count, eps,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """v, the sum of its squares, and 1 / rms."""
    v = tl.load(x + row * sx + c, mask=m, other=0.0).to(tl.float32)
    if RESIDUAL:
        v += tl.load(residual + row * sr + c, mask=m, other=0.0).to(tl.float32)
        v = v.to(residual.dtype.element_ty).to(tl.float32)
    if GATED:
        b_z = tl.load(z + row * sz + c, mask=m, other=0.0).to(tl.float32)
        v = v * (b_z / (1.0 + tl.exp(-b_z)))
    if SUM == "given":
        total = tl.load(square_sum + o_sum).to(tl.float32)
    else:
        total = tl.sum(v * v, 0)
    return v, total, tl.rsqrt(total / count + eps)


@triton.jit
def norm_kernel(
    x, z, residual, weight, square_sum, y, out_sum,
    sx, sz, sr, n_groups, group_size, count, eps,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    m = i < group_size
    c = g * group_size + i
    v, total, inverse = normalised(
        x, z, residual, square_sum, row, c, sx, sz, sr,
        row * n_groups + g, m, count, eps, GATED, RESIDUAL, SUM,
    )  # fmt: skip
    if SUM == "only":
        tl.store(out_sum + row * n_groups + g, total)
    else:
        normed = (v * inverse).to(x.dtype.element_ty).to(tl.float32)
        b_y = normed * tl.load(weight + c, mask=m, other=0.0).to(tl.float32)
        tl.store(y + row * n_groups * group_size + c, b_y.to(y.dtype.element_ty), mask=m)
        if RESIDUAL:
            p_sum = out_sum + row * n_groups * group_size + c
            tl.store(p_sum, v.to(out_sum.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=LENGTHS)
def norm_backward_kernel(
    dy, dtotal, x, z, residual, weight, square_sum, dx, dz, dresidual, dweight, dsum,
    sdy, sdt, sx, sz, sr, n_rows, rows_per_program, n_groups, group_size, count, eps,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, HAS_DTOTAL: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a run of rows, one group; `dweight` gets one row per program.

    With v = x, x + residual or x silu(z) and n = v / rms(v), dn = dy weight:
        own sum     dv = (dn - n mean(dn n)) / rms
        given sum   dv = dn / rms, and dsum = -sum(dn n) / (2 count rms^2)
        only sum    dv = 2 v dsum
    """
    g = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    m = i < group_size
    c = g * group_size + i
    first = tl.program_id(0) * rows_per_program
    dw = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, tl.minimum(rows_per_program, n_rows - first)):
        row = first.to(tl.int64) + k
        o_sum = row * n_groups + g
        v, _, inverse = normalised(
            x, z, residual, square_sum, row, c, sx, sz, sr,
            o_sum, m, count, eps, GATED, RESIDUAL, SUM,
        )  # fmt: skip
        if SUM == "only":
            dv = 2.0 * v * tl.load(dsum + o_sum).to(tl.float32)
        else:
            b_dy = tl.load(dy + row * sdy + c, mask=m, other=0.0).to(tl.float32)
            normed = v * inverse
            dw += b_dy * normed.to(x.dtype.element_ty).to(tl.float32)
            # Read again for each row: held for all of them it spills.
            dn = b_dy * tl.load(weight + c, mask=m, other=0.0).to(tl.float32)
            along = tl.sum(dn * normed, 0)
            if SUM == "given":
                dv = dn * inverse
                tl.store(dsum + o_sum, -0.5 * along * inverse * inverse / count)
            else:
                dv = (dn - normed * (along / count)) * inverse
        if HAS_DTOTAL:
            dv += tl.load(dtotal + row * sdt + c, mask=m, other=0.0).to(tl.float32)
        o = row * n_groups * group_size
        if GATED:
            tl.debug_barrier()  # what is read from here on is not held before: it would spill
            b_z = tl.load(z + row * sz + c, mask=m, other=0.0).to(tl.float32)
            gate = 1.0 / (1.0 + tl.exp(-b_z))
            b_dz = dv * gate * (1.0 + b_z * (1.0 - gate))
            dv = dv * b_z * gate
            tl.store(dx + o + c, dv.to(dx.dtype.element_ty), mask=m)
            b_dz *= tl.load(x + row * sx + c, mask=m, other=0.0).to(tl.float32)
            tl.store(dz + o + c, b_dz.to(dz.dtype.element_ty), mask=m)
        else:
            tl.store(dx + o + c, dv.to(dx.dtype.element_ty), mask=m)
        if RESIDUAL:
            tl.store(dresidual + o + c, dv.to(dresidual.dtype.element_ty), mask=m)
    if SUM != "only":
        p_dw = dweight + tl.program_id(0).to(tl.int64) * n_groups * group_size + c
        tl.store(p_dw, dw, mask=m)


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y and x + residual, empty when there is no residual."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if residual is None:
        total = x.new_empty(0)
    else:
        total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    _forward(x, None, residual, weight, None, y, total, eps, x.shape[-1], x.shape[-1], "own")
    return y, total


def rms_norm_backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dresidual, empty when there is no residual."""
    size = x.shape[-1]
    dx, _, dresidual, dweight = _backward(
        dy, d_total, x, None, residual, weight, None, None, eps, size, size, "own"
    )
    return dx, dweight, dresidual


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward(x, z, None, weight, None, y, None, eps, group_size, group_size, "own")
    return y


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dz and dweight."""
    dx, dz, _, dweight = _backward(
        dy, None, x, z, None, weight, None, None, eps, group_size, group_size, "own"
    )
    return dx, dz, dweight


def gated_square_sum(x: Tensor, z: Tensor, group_size: int) -> Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // group_size)
    square_sum = torch.empty(shape, dtype=torch.float32, device=x.device)
    _forward(x, z, None, None, None, None, square_sum, 1.0, group_size, group_size, "only")
    return square_sum


def gated_square_sum_backward(
    d_square_sum: Tensor, x: Tensor, z: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return dx and dz."""
    dsum = d_square_sum.contiguous()
    dx, dz, _, _ = _backward(
        None, None, x, z, None, None, None, dsum, 1.0, group_size, group_size, "only"
    )
    return dx, dz


def gated_scale(
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    given = square_sum.contiguous()
    _forward(x, z, None, weight, given, y, None, eps, group_size, count, "given")
    return y


def gated_scale_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dz, dsquare_sum and dweight."""
    dsum = torch.empty(square_sum.shape, dtype=square_sum.dtype, device=x.device)
    dx, dz, _, dweight = _backward(
        dy, None, x, z, None, weight, square_sum.contiguous(), dsum, eps, group_size, count, "given"
    )
    return dx, dz, dsum, dweight


def _forward(
    x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor | None,
    square_sum: Tensor | None, y: Tensor | None, out_sum: Tensor | None, eps: float,
    group_size: int, count: int, where: str,
) -> None:  # fmt: skip
    rows, n_rows, n_groups = _rows(x), x.numel() // x.shape[-1], x.shape[-1] // group_size
    z, residual = _rows(z), _rows(residual)
    launch(
        norm_kernel,
        (n_rows, n_groups),
        x.device,
        rows,
        z,
        residual,
        None if weight is None else weight.contiguous(),
        square_sum,
        y,
        out_sum,
        _stride(rows),
        _stride(z),
        _stride(residual),
        n_groups,
        group_size,
        float(count),
        eps,
        GATED=z is not None,
        RESIDUAL=residual is not None,
        SUM=where,
        **_block(group_size),
    )


def _backward(
    dy: Tensor | None, d_total: Tensor | None, x: Tensor, z: Tensor | None,
    residual: Tensor | None, weight: Tensor | None, square_sum: Tensor | None,
    dsum: Tensor | None, eps: float, group_size: int, count: int, where: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dz, dresidual and dweight, empty for inputs left out."""
    channels = x.shape[-1]
    rows, n_rows, n_groups = _rows(x), x.numel() // channels, channels // group_size
    dx, dz, dresidual = (
        torch.empty(() if t is None else t.shape, dtype=x.dtype if t is None else t.dtype,
                    device=x.device)
        for t in (x, z, residual)
    )  # fmt: skip
    least, most = ROWS_PER_PROGRAM
    per_program = min(most, max(least, triton.cdiv(n_rows * n_groups, MOST_PROGRAMS)))
    n_programs = triton.cdiv(n_rows, per_program)
    shares = torch.empty(n_programs, channels, dtype=torch.float32, device=x.device)
    z, residual, dy, d_total = _rows(z), _rows(residual), _rows(dy), _rows(d_total)
    launch(
        norm_backward_kernel,
        (n_programs, n_groups),
        x.device,
        dy,
        d_total,
        rows,
        z,
        residual,
        None if weight is None else weight.contiguous(),
        square_sum,
        dx,
        dz,
        dresidual,
        shares,
        dsum,
        _stride(dy),
        _stride(d_total),
        _stride(rows),
        _stride(z),
        _stride(residual),
        n_rows,
        per_program,
        n_groups,
        group_size,
        float(count),
        eps,
        GATED=z is not None,
        RESIDUAL=residual is not None,
        HAS_DTOTAL=d_total is not None,
        SUM=where,
        **_block(group_size),
    )
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = sum_rows(shares).to(weight.dtype)
    return dx, dz, dresidual if residual is not None else x.new_empty(0), dweight


def _rows(t: Tensor | None) -> Tensor | None:
    """(..., channels) as (rows, channels): a view wherever the rows lie evenly."""
    if t is None:
        return None
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _block(group_size: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(group_size))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), "num_stages": 1}
