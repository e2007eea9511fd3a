"""One token at a time: the scan and the convolution of decoding, for inference only.

They compute what `ssd_scan` and `causal_conv1d` compute for a sequence of one token, and update the
state in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_kernels import reference
from mamba2_kernels.backend import resolve_backend, triton_path
from mamba2_kernels.checks import ArgumentCheck, check_activation, check_dt_limit, check_values
from mamba2_kernels.launch import no_mixer_kernel
from mamba2_kernels.precision import compute_dtype, widen

INFINITY = float("inf")


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    backend: str = "auto",
) -> Tensor:
    """Advance every head's state by one token and return y.

    Args:
        x: (batch, n_heads, headdim), any float dtype.
        dt: (batch, n_heads), any float dtype.
        A, D, dt_bias: (n_heads,).
        B, C: (batch, n_groups, d_state) in x's dtype.
        state: (batch, n_heads, headdim, d_state), updated in place; float32 keeps what a final
            state of `ssd_scan` holds, other dtypes round it at every token.
        dt_softplus, dt_limit, backend: as in `ssd_scan`.

    Returns:
        y (batch, n_heads, headdim) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or a backend that cannot
            run here.
    """
    op = "ssd_step"
    check = ArgumentCheck(op)
    check.tensor("x", x, "batch, n_heads, headdim", dense=True)
    check.tensor("dt", dt, "batch, n_heads")
    check.tensor("A", A, "n_heads")
    for name, tensor in (("B", B), ("C", C)):
        dimensions = "batch, n_groups, d_state"
        check.tensor(name, tensor, dimensions, dtypes=(x.dtype,), dtype_of="x", dense=True)
    check.tensor("state", state, "batch, n_heads, headdim, d_state", dense=True)
    check.tensor("D", D, "n_heads")
    check.tensor("dt_bias", dt_bias, "n_heads")
    check.divides("n_groups", "n_heads")
    check.no_gradient("state", state)
    dt_min, dt_max = check_dt_limit(op, dt_limit)
    check_values(op, A=A)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x))
    with torch.no_grad():
        if backend != "reference":
            return _ssd_step(
                x, dt, A, B, C, state, D, dt_bias, dt_softplus, dt_min, dt_max, backend
            )
        wide = widen(compute_dtype(x), x, dt, A, B, C, state, D, dt_bias)
        y, new_state = reference.ssd_step(
            *wide[:6],
            D=wide[6],
            dt_bias=wide[7],
            dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max),
        )
        state.copy_(new_state)
        return y.to(x.dtype)


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """Convolve one token with the inputs before it, which `state` holds, and return y.

    Args:
        x: (batch, channels), any float dtype.
        state: (batch, d_conv - 1, channels), the last inputs, oldest first; updated in place.
        weight: (channels, d_conv).
        bias: (channels,).
        activation: "silu" or None.
        backend: as in `causal_conv1d`.

    Returns:
        y (batch, channels) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, an unknown activation, or a
            backend that cannot run here.
    """
    op = "causal_conv1d_step"
    check = ArgumentCheck(op)
    check.tensor("x", x, "batch, channels", dense=True)
    check.tensor("weight", weight, "channels, d_conv")
    check.at_least_one("d_conv")
    check.sizes["d_conv - 1"] = (check.size("d_conv") - 1, "weight")
    check.tensor("state", state, "batch, d_conv - 1, channels", dense=True)
    check.tensor("bias", bias, "channels")
    check.no_gradient("state", state)
    check_activation(op, activation)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, d_conv=weight.shape[1]))
    with torch.no_grad():
        if backend != "reference":
            return _causal_conv1d_step(x, state, weight, bias, activation or "", backend)
        wide = widen(compute_dtype(x), x, state, weight, bias)
        y, new_state = reference.causal_conv1d_step(*wide, activation=activation)
        state.copy_(new_state)
        return y.to(x.dtype)


@torch.library.custom_op("mamba2_kernels::ssd_step", mutates_args=("state",))
def _ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> Tensor:
    if backend == "triton":
        return triton_path("ssd_step").ssd_step(
            x, dt, A, B, C, state, D, dt_bias, dt_softplus, dt_min, dt_max
        )
    dtype = compute_dtype(x)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(dt_min, dt_max)
    n_groups = B.shape[1]
    decay = torch.exp(dt * A.to(dtype))
    update = (dt[..., None] * x).unflatten(1, (n_groups, -1))
    # (b, g, r, p, n), the caller's own memory where it has the dtype of the computation
    wide_state = state.to(dtype).unflatten(1, (n_groups, -1))
    wide_state.mul_(decay.unflatten(1, (n_groups, -1))[..., None, None])
    wide_state.addcmul_(update[..., None], B.to(dtype)[:, :, None, None, :])
    # (b, g, r p, n) @ (b, g, n, 1) -> (b, g, r p, 1)
    y = (wide_state.flatten(2, 3) @ C.to(dtype)[..., None]).view(x.shape)
    if state.dtype != dtype:
        state.copy_(wide_state.flatten(1, 2))
    if D is not None:
        y.addcmul_(D.to(dtype)[:, None], x.to(dtype))
    return y.to(x.dtype)


@_ssd_step.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2_kernels::causal_conv1d_step", mutates_args=("state",))
def _causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    if backend == "triton":
        return triton_path("causal_conv1d_step").causal_conv1d_step(
            x, state, weight, bias, activation
        )
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)
    dtype = compute_dtype(x)
    y = (window.to(dtype) * weight.to(dtype).T).sum(dim=1)
    if bias is not None:
        y += bias.to(dtype)
    if activation == "silu":
        F.silu(y, inplace=True)
    state.copy_(window[:, 1:])
    return y.to(x.dtype)


@_causal_conv1d_step.register_fake
def _(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)
