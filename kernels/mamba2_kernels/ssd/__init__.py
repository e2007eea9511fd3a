"""The state-space dual (SSD) scan of Mamba2.

For every head, with dt_t the step size after bias, softplus and limits:

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T
    y_t     = state_t C_t + D x_t

Source: Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060).
"""

from typing import Any

import torch
from torch import Tensor

from mamba2_kernels import reference
from mamba2_kernels.backend import resolve_backend, triton_path
from mamba2_kernels.checks import ArgumentCheck, check_dt_limit, check_values
from mamba2_kernels.launch import no_scan_kernel
from mamba2_kernels.precision import compute_dtype, widen
from mamba2_kernels.ssd import torch_path

INFINITY = float("inf")


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk_size: int = 256,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:  # Tensor, or a pair of them: see Returns
    """Run the scan over whole sequences.

    Gradients reach x, dt, A, B, C, D, dt_bias and initial_state, through y and the final state, in
    each input's dtype. float16 and bfloat16 are computed in float32, float64 in float64. Strided
    views, such as those `split` makes, need no copy.

    Args:
        x: (batch, seq_len, n_heads, headdim), any float dtype.
        dt: (batch, seq_len, n_heads) step sizes, any float dtype.
        A: (n_heads,) negative.
        B, C: (batch, seq_len, n_groups, d_state) in x's dtype; consecutive heads share a group.
        D: (n_heads,) weight of x in y.
        dt_bias: (n_heads,) added to dt first.
        dt_softplus: apply softplus to dt next.
        dt_limit: (smallest, largest) step size; dt is clamped to it last. No gradient outside.
        chunk_size: a hint for the kernels. No result depends on it.
        seq_idx: (batch, seq_len) int32, the document of each token. The state is reset where it
            changes. -1 marks padding: y is 0 there, the state passes through, no gradient arises.
        initial_state: (batch, n_heads, headdim, d_state) state before the first token. A row's
            first document continues it.
        return_final_state: also return the state after the last token.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y (batch, seq_len, n_heads, headdim) in x's dtype or, with `return_final_state`, y and the
        final state (batch, n_heads, headdim, d_state) in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or a backend that cannot
            run here.
    """
    op = "ssd_scan"
    check = ArgumentCheck(op)
    check.tensor("x", x, "batch, seq_len, n_heads, headdim", dense=True)
    check.at_least_one("seq_len")
    check.tensor("dt", dt, "batch, seq_len, n_heads")
    check.tensor("A", A, "n_heads")
    for name, tensor in (("B", B), ("C", C)):
        dims = "batch, seq_len, n_groups, d_state"
        check.tensor(name, tensor, dims, dtypes=(x.dtype,), dtype_of="x", dense=True)
    check.tensor("D", D, "n_heads")
    check.tensor("dt_bias", dt_bias, "n_heads")
    check.tensor("seq_idx", seq_idx, "batch, seq_len", dtypes=(torch.int32,))
    check.tensor("initial_state", initial_state, "batch, n_heads, headdim, d_state")
    check.divides("n_groups", "n_heads")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}: it must be at least 1")
    dt_min, dt_max = check_dt_limit(op, dt_limit)
    check_values(op, A=A, seq_idx=seq_idx)
    backend = resolve_backend(op, backend, x.device, no_scan_kernel(x, B.shape[3]))
    if backend == "reference":
        wide_x, dt, A, B, C, D, dt_bias, initial_state = widen(
            compute_dtype(x), x, dt, A, B, C, D, dt_bias, initial_state
        )
        y, final_state = reference.ssd_scan(
            wide_x,
            dt,
            A,
            B,
            C,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max),
            seq_idx=seq_idx,
            initial_state=initial_state,
        )
        y = y.to(x.dtype)
    else:
        y, final_state = _ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            seq_idx,
            initial_state,
            dt_softplus,
            dt_min,
            dt_max,
            chunk_size,
            return_final_state,
            backend,
        )
    return (y, final_state) if return_final_state else y


@torch.library.custom_op("mamba2_kernels::ssd_scan", mutates_args=())
def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    path = triton_path("ssd_scan") if backend == "triton" else torch_path
    # autocast would narrow the products within, which are float32 on purpose
    with torch.autocast(x.device.type, enabled=False):
        return path.forward(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            seq_idx,
            initial_state,
            dt_softplus,
            dt_min,
            dt_max,
            chunk_size,
            return_final_state,
        )


@_ssd_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, _, n_heads, headdim = x.shape
    state_shape = (batch, n_heads, headdim, B.shape[3]) if return_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(state_shape, dtype=compute_dtype(x))


@torch.library.custom_op("mamba2_kernels::ssd_scan_backward", mutates_args=())
def _ssd_scan_backward(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = triton_path("ssd_scan") if backend == "triton" else torch_path
    # autocast would narrow the products within, which are float32 on purpose
    with torch.autocast(x.device.type, enabled=False):
        return path.backward(
            dy,
            d_final_state,
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            seq_idx,
            initial_state,
            dt_softplus,
            dt_min,
            dt_max,
            chunk_size,
        )


@_ssd_scan_backward.register_fake
def _(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.dt_options = inputs[9:12]
    ctx.chunk_size, ctx.has_final_state, ctx.backend = inputs[12:]


def _gradients(ctx: Any, dy: Tensor | None, d_final_state: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: under checkpointing each look recomputes them
    x, *_, D, dt_bias, _, initial_state = saved
    dx, ddt, dA, dB, dC, dD, ddt_bias, d_initial_state = _ssd_scan_backward(
        torch.zeros_like(x) if dy is None else dy,
        d_final_state if ctx.has_final_state else None,
        *saved,
        *ctx.dt_options,
        ctx.chunk_size,
        ctx.backend,
    )
    return (
        dx,
        ddt,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if dt_bias is None else ddt_bias,
        None,
        None if initial_state is None else d_initial_state,
        *(None,) * 6,
    )


_ssd_scan.register_autograd(_gradients, setup_context=_save_inputs)
