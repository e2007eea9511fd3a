"""RMSNorm, plain and gated.

    rms_norm:        y = x / sqrt(mean(x^2) + eps) * weight
    gated_rms_norm:  the same of x silu(z), for each group of channels

The gate comes before the norm (`norm_before_gate=False` elsewhere). `gated_scale` after
`gated_square_sum` is `gated_rms_norm`: where tensor parallel splits a group's channels over ranks,
they add up their sums between the two.

Sources: Zhang and Sennrich (arXiv:1910.07467); Dao and Gu (arXiv:2405.21060), section 7.2.
"""

from typing import Any

import torch
from torch import Tensor

from mamba2_kernels import norm_torch, reference
from mamba2_kernels.backend import resolve_backend, triton_path
from mamba2_kernels.checks import ArgumentCheck, check_eps
from mamba2_kernels.launch import no_mixer_kernel
from mamba2_kernels.precision import compute_dtype, widen


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Any:  # Tensor, or a pair of them: see Returns
    """Normalise over the last dimension, after adding a residual if there is one.

    Statistics in float32 (float64 for float64). Gradients reach x, weight and residual.

    Args:
        x: (..., channels), any float dtype.
        weight: (channels,).
        residual: (..., channels) added to x first; often float32 beside a bfloat16 x.

    Returns:
        y (..., channels) in x's dtype or, with a residual, y and x + residual in the residual's
        dtype. The sum is rounded to that dtype before it is normalised.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    op = "rms_norm"
    check = ArgumentCheck(op)
    check.tensor("x", x, "..., channels", dense=True)
    check.tensor("weight", weight, "channels")
    check.tensor("residual", residual, "..., channels", dense=True)
    check.same_shape("residual", residual, "x", x)
    check_eps(op, eps)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, group_size=x.shape[-1]))
    if backend == "reference":
        total = x if residual is None else (x + residual).to(residual.dtype)
        wide_total, wide_weight = widen(compute_dtype(x), total, weight)
        y = reference.rms_norm(wide_total, wide_weight, eps=eps).to(x.dtype)
    elif backend == "torch" and not torch.is_grad_enabled():
        # a step of decoding has many: the dispatcher takes three times as long as the norm
        y, total = norm_torch.rms_norm(x, weight, residual, eps)
    else:
        y, total = _rms_norm(x, weight, residual, eps, backend)
    return y if residual is None else (y, total)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise x silu(z), each group of channels on its own.

    Statistics in float32 (float64 for float64). Gradients reach x, z and weight.

    Args:
        x, z: (..., channels), any float dtype.
        weight: (channels,).
        group_size: channels per group, all of them when left out.

    Returns:
        (..., channels) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or a group size that do not fit, or a backend that
            cannot run here.
    """
    op = "gated_rms_norm"
    group_size = _check_gated(op, x, z, weight, group_size)
    check_eps(op, eps)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, group_size=group_size))
    if backend == "reference":
        wide = widen(compute_dtype(x), x, z, weight)
        return reference.gated_rms_norm(*wide, eps=eps, group_size=group_size).to(x.dtype)
    return _gated_rms_norm(x, z, weight, eps, group_size, backend)


def gated_square_sum(
    x: Tensor, z: Tensor, *, group_size: int | None = None, backend: str = "auto"
) -> Tensor:
    """Sum (x silu(z))^2 over each group of channels.

    Gradients reach x and z.

    Args:
        x, z: (..., channels), any float dtype.
        group_size: channels per group, all of them when left out.

    Returns:
        (..., n_groups) in float32 (float64 for float64).

    Raises:
        ValueError: as `gated_rms_norm`.
    """
    op = "gated_square_sum"
    group_size = _check_gated(op, x, z, None, group_size)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, group_size=group_size))
    if backend == "reference":
        return reference.gated_square_sum(*widen(compute_dtype(x), x, z), group_size=group_size)
    return _gated_square_sum(x, z, group_size, backend)


def gated_scale(
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    count: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return x silu(z) / sqrt(square_sum / count + eps) * weight, group by group.

    Gradients reach x, z, square_sum and weight.

    Args:
        x, z: (..., channels), any float dtype.
        square_sum: (..., n_groups) float32, the sums over whole groups.
        weight: (channels,).
        group_size: channels per group that are here, all of them when left out.
        count: channels that each sum was taken over, on all ranks together; `group_size` when left
            out.

    Returns:
        (..., channels) in x's dtype.

    Raises:
        ValueError: as `gated_rms_norm`, and when `count` is less than `group_size`.
    """
    op = "gated_scale"
    group_size = _check_gated(op, x, z, weight, group_size, square_sum)
    check_eps(op, eps)
    count = group_size if count is None else count
    if count < group_size:
        raise ValueError(
            f"{op}: count is {count}, less than group_size = {group_size}: give the number of "
            "channels that each sum was taken over, on all ranks together"
        )
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, group_size=group_size))
    if backend == "reference":
        wide = widen(compute_dtype(x), x, z, square_sum, weight)
        y = reference.gated_scale(*wide, eps=eps, group_size=group_size, count=count)
        return y.to(x.dtype)
    return _gated_scale(x, z, square_sum, weight, eps, group_size, count, backend)


def _check_gated(
    op: str,
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    group_size: int | None,
    square_sum: Tensor | None = None,
) -> int:
    """Check what the gated ops share and return the group size."""
    check = ArgumentCheck(op)
    check.tensor("x", x, "..., channels", dense=True)
    check.tensor("z", z, "..., channels", dense=True)
    check.same_shape("z", z, "x", x)
    check.tensor("weight", weight, "channels")
    check.at_least_one("channels")
    channels = check.size("channels")
    if group_size is None:
        group_size = channels
    if group_size < 1 or channels % group_size != 0:
        raise ValueError(
            f"{op}: group_size = {group_size} does not divide channels = {channels}: "
            "it is the number of channels per group, d_inner // n_groups"
        )
    check.tensor("square_sum", square_sum, "..., n_groups")
    if square_sum is not None:
        expected = (*x.shape[:-1], channels // group_size)
        if square_sum.shape != expected:
            check.fail("square_sum", f"has shape {tuple(square_sum.shape)}", f"expected {expected}")
    return group_size


@torch.library.custom_op("mamba2_kernels::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    path = triton_path("rms_norm") if backend == "triton" else norm_torch
    return path.rms_norm(x, weight, residual, eps)


@_rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _new_like(residual, x)


@torch.library.custom_op("mamba2_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    path = triton_path("rms_norm") if backend == "triton" else norm_torch
    return path.rms_norm_backward(dy, d_total, x, weight, residual, eps)


@_rms_norm_backward.register_fake
def _(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_like(x, x), _new_like(weight, x), _new_like(residual, x)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _rms_norm_gradients(ctx: Any, dy: Tensor | None, d_total: Tensor | None) -> tuple[Any, ...]:
    x, weight, residual = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    d_total = None if residual is None else d_total
    gradients = _rms_norm_backward(dy, d_total, x, weight, residual, *ctx.options)
    dx, d_weight, d_residual = gradients
    return dx, d_weight, None if residual is None else d_residual, None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_save_rms_norm)


@torch.library.custom_op("mamba2_kernels::gated_rms_norm", mutates_args=())
def _gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, backend: str
) -> Tensor:
    path = triton_path("gated_rms_norm") if backend == "triton" else norm_torch
    return path.gated_rms_norm(x, z, weight, eps, group_size)


@_gated_rms_norm.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, backend: str) -> Tensor:
    return _new_like(x, x)


@torch.library.custom_op("mamba2_kernels::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    path = triton_path("gated_rms_norm") if backend == "triton" else norm_torch
    return path.gated_rms_norm_backward(dy, x, z, weight, eps, group_size)


@_gated_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_like(x, x), _new_like(z, x), _new_like(weight, x)


def _save_gated_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gated_rms_norm_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gradients = _gated_rms_norm_backward(dy, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None


_gated_rms_norm.register_autograd(_gated_rms_norm_gradients, setup_context=_save_gated_rms_norm)


@torch.library.custom_op("mamba2_kernels::gated_square_sum", mutates_args=())
def _gated_square_sum(x: Tensor, z: Tensor, group_size: int, backend: str) -> Tensor:
    path = triton_path("gated_square_sum") if backend == "triton" else norm_torch
    return path.gated_square_sum(x, z, group_size)


@_gated_square_sum.register_fake
def _(x: Tensor, z: Tensor, group_size: int, backend: str) -> Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // group_size)
    return x.new_empty(shape, dtype=compute_dtype(x))


@torch.library.custom_op("mamba2_kernels::gated_square_sum_backward", mutates_args=())
def _gated_square_sum_backward(
    d_square_sum: Tensor, x: Tensor, z: Tensor, group_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    path = triton_path("gated_square_sum") if backend == "triton" else norm_torch
    return path.gated_square_sum_backward(d_square_sum, x, z, group_size)


@_gated_square_sum_backward.register_fake
def _(
    d_square_sum: Tensor, x: Tensor, z: Tensor, group_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _new_like(x, x), _new_like(z, x)


def _save_gated_square_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _gated_square_sum_gradients(ctx: Any, d_square_sum: Tensor) -> tuple[Any, ...]:
    gradients = _gated_square_sum_backward(d_square_sum, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None


_gated_square_sum.register_autograd(
    _gated_square_sum_gradients, setup_context=_save_gated_square_sum
)


@torch.library.custom_op("mamba2_kernels::gated_scale", mutates_args=())
def _gated_scale(
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
    backend: str,
) -> Tensor:
    path = triton_path("gated_scale") if backend == "triton" else norm_torch
    return path.gated_scale(x, z, square_sum, weight, eps, group_size, count)


@_gated_scale.register_fake
def _(
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
    backend: str,
) -> Tensor:
    return _new_like(x, x)


@torch.library.custom_op("mamba2_kernels::gated_scale_backward", mutates_args=())
def _gated_scale_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path = triton_path("gated_scale") if backend == "triton" else norm_torch
    return path.gated_scale_backward(dy, x, z, square_sum, weight, eps, group_size, count)


@_gated_scale_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_like(x, x), _new_like(z, x), _new_like(square_sum, x), _new_like(weight, x)


def _save_gated_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gated_scale_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gradients = _gated_scale_backward(dy, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None


_gated_scale.register_autograd(_gated_scale_gradients, setup_context=_save_gated_scale)


def _new_like(tensor: Tensor | None, x: Tensor) -> Tensor:
    """An empty tensor, dense, in the shape of another; without elements for None."""
    return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
