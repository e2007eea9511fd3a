"""RMSNorm and gated RMSNorm, and their gradients, in plain PyTorch.

The rounding order is that of transformers' Mamba2: statistics and normalised values in float32, the
latter rounded to x's dtype, then times the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_kernels.precision import compute_dtype


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y and x + residual, empty when there is no residual."""
    total = _total(x, residual)
    wide = total.to(compute_dtype(x))
    y = _weighted(wide * _inverse(_square_sum(wide), x.shape[-1], eps), weight, x.dtype)
    return y, x.new_empty(0) if residual is None else total


def rms_norm_backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dresidual, empty when there is no residual."""
    wide = _total(x, residual).to(compute_dtype(x))
    inverse = _inverse(_square_sum(wide), x.shape[-1], eps)
    normed = wide * inverse
    d_weight = _d_weight(dy, normed, weight)
    d_wide = _through_norm(dy.to(wide.dtype) * weight.to(wide.dtype), normed, inverse)
    if d_total is not None:
        d_wide += d_total
    if residual is None:
        return d_wide.to(x.dtype), d_weight, x.new_empty(0)
    return d_wide.to(x.dtype), d_weight, d_wide.to(residual.dtype, copy=True)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    gated = _gated(x, z).unflatten(-1, (-1, group_size))
    gated *= _inverse(_square_sum(gated), group_size, eps)
    return _weighted(gated.flatten(-2), weight, x.dtype)


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dz and dweight."""
    normed = _gated(x, z).unflatten(-1, (-1, group_size))
    inverse = _inverse(_square_sum(normed), group_size, eps)
    normed *= inverse
    d_weight = _d_weight(dy, normed.flatten(-2), weight)
    d_normed = dy.to(normed.dtype) * weight.to(normed.dtype)
    d_gated = _through_norm(d_normed.unflatten(-1, (-1, group_size)), normed, inverse)
    return *_through_gate(d_gated.flatten(-2), x, z), d_weight


def gated_square_sum(x: Tensor, z: Tensor, group_size: int) -> Tensor:
    return _square_sum(_gated(x, z).unflatten(-1, (-1, group_size))).squeeze(-1)


def gated_square_sum_backward(
    d_square_sum: Tensor, x: Tensor, z: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return dx and dz."""
    gated = _gated(x, z).unflatten(-1, (-1, group_size))
    gated *= 2 * d_square_sum[..., None]
    return _through_gate(gated.flatten(-2), x, z)


def gated_scale(
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
) -> Tensor:
    gated = _gated(x, z).unflatten(-1, (-1, group_size))
    gated *= _inverse(square_sum[..., None].to(gated.dtype), count, eps)
    return _weighted(gated.flatten(-2), weight, x.dtype)


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
    normed = _gated(x, z).unflatten(-1, (-1, group_size))
    inverse = _inverse(square_sum[..., None].to(normed.dtype), count, eps)
    normed *= inverse
    d_weight = _d_weight(dy, normed.flatten(-2), weight)
    d_gated = (dy.to(normed.dtype) * weight.to(normed.dtype)).unflatten(-1, (-1, group_size))
    # inverse = (square_sum / count + eps)^(-1/2)
    d_square_sum = (d_gated * normed).sum(dim=-1) * inverse[..., 0].square() / (-2 * count)
    dx, dz = _through_gate((d_gated * inverse).flatten(-2), x, z)
    return dx, dz, d_square_sum.to(square_sum.dtype), d_weight


def _total(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else (x + residual).to(residual.dtype)


def _gated(x: Tensor, z: Tensor) -> Tensor:
    return F.silu(z.to(compute_dtype(x))).mul_(x)


def _square_sum(wide: Tensor) -> Tensor:
    # One pass over the values and no temporary, unlike square().sum().
    return torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()


def _inverse(square_sum: Tensor, count: int, eps: float) -> Tensor:
    return torch.rsqrt(square_sum / count + eps)


def _weighted(normed: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (normed.to(dtype) * weight).to(dtype)


def _d_weight(dy: Tensor, normed: Tensor, weight: Tensor) -> Tensor:
    products = dy.to(normed.dtype) * normed
    return products.reshape(-1, len(weight)).sum(dim=0).to(weight.dtype)


def _through_norm(d_normed: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    along = (d_normed * normed).mean(dim=-1, keepdim=True)
    return torch.addcmul(d_normed, normed, along, value=-1).mul_(inverse)


def _through_gate(d_gated: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    wide_z = z.to(d_gated.dtype)
    dx = d_gated * F.silu(wide_z)
    dz = torch.ops.aten.silu_backward(d_gated * x, wide_z)
    return dx.to(x.dtype), dz.to(z.dtype)
