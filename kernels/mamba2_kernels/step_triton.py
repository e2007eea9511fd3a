"""One token of the scan and of the convolution in Triton; the state changes in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import launch
from mamba2_kernels.ssd.triton_forward import softplus

CHANNELS = 128
STATE_BLOCK = 4096  # elements of the state that one program holds


@triton.jit
def ssd_step_kernel(
    x, dt, A, B, C, state, D, dt_bias, y,
    sx_b, sx_h, sdt_b, sdt_h, sb_b, sb_g, sc_b, sc_g, ss_b, ss_h, ss_p,
    n_heads, headdim, d_state, heads_per_group, dt_min, dt_max,
    BP: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    g = h // heads_per_group
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    m_p, m_n = p < headdim, n < d_state
    size = tl.load(dt + b * sdt_b + h * sdt_h).to(tl.float32)
    if HAS_BIAS:
        size += tl.load(dt_bias + h).to(tl.float32)
    if SOFTPLUS:
        size = softplus(size)
    size = tl.minimum(tl.maximum(size, dt_min), dt_max)
    decay = tl.exp(size * tl.load(A + h).to(tl.float32))
    b_x = tl.load(x + b * sx_b + h * sx_h + p, mask=m_p, other=0.0).to(tl.float32)
    b_b = tl.load(B + b * sb_b + g * sb_g + n, mask=m_n, other=0.0).to(tl.float32)
    b_c = tl.load(C + b * sc_b + g * sc_g + n, mask=m_n, other=0.0).to(tl.float32)
    p_state = state + b * ss_b + h.to(tl.int64) * ss_h + p[:, None] * ss_p + n[None, :]
    m = m_p[:, None] & m_n[None, :]
    b_state = tl.load(p_state, mask=m, other=0.0).to(tl.float32)
    b_state = b_state * decay + (size * b_x)[:, None] * b_b[None, :]
    tl.store(p_state, b_state.to(state.dtype.element_ty), mask=m)
    b_y = tl.sum(b_state * b_c[None, :], 1)
    if HAS_D:
        b_y += tl.load(D + h).to(tl.float32) * b_x
    tl.store(y + (b * n_heads + h) * headdim + p, b_y.to(y.dtype.element_ty), mask=m_p)


@triton.jit
def conv_step_kernel(
    x, state, weight, bias, y, sx_b, ss_b, ss_t, sw_c, sw_k, channels,
    W: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    m = c < channels
    newest = tl.load(x + b * sx_b + c, mask=m, other=0.0)
    p_weight = weight + c.to(tl.int64) * sw_c
    total = newest.to(tl.float32) * tl.load(p_weight + (W - 1) * sw_k, mask=m, other=0.0).to(
        tl.float32
    )
    if HAS_BIAS:
        total += tl.load(bias + c, mask=m, other=0.0).to(tl.float32)
    for k in tl.static_range(W - 1):
        p_state = state + b * ss_b + k * ss_t + c
        held = tl.load(p_state, mask=m, other=0.0).to(x.dtype.element_ty).to(tl.float32)
        total += held * tl.load(p_weight + k * sw_k, mask=m, other=0.0).to(tl.float32)
        if k < W - 2:
            moved = tl.load(p_state + ss_t, mask=m, other=0.0)
        else:
            moved = newest.to(state.dtype.element_ty)
        tl.store(p_state, moved, mask=m)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(y + b * channels + c, total.to(y.dtype.element_ty), mask=m)


def ssd_step(
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
) -> Tensor:
    """Return y (batch, n_heads, headdim) and advance `state` in place."""
    batch, n_heads, headdim = x.shape
    n_groups, d_state = B.shape[1:]
    n_block = max(16, triton.next_power_of_2(d_state))
    p_block = min(triton.next_power_of_2(headdim), max(1, STATE_BLOCK // n_block))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        ssd_step_kernel,
        (triton.cdiv(headdim, p_block), n_heads, batch),
        x.device,
        x,
        dt,
        A,
        B,
        C,
        state,
        D,
        dt_bias,
        y,
        *x.stride()[:2],
        *dt.stride(),
        *B.stride()[:2],
        *C.stride()[:2],
        *state.stride()[:3],
        n_heads,
        headdim,
        d_state,
        n_heads // n_groups,
        dt_min,
        dt_max,
        BP=p_block,
        BN=n_block,
        SOFTPLUS=dt_softplus,
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        num_warps=4,
    )
    return y


def causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Return y (batch, channels) and shift x into `state`."""
    batch, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        conv_step_kernel,
        (triton.cdiv(channels, CHANNELS), batch),
        x.device,
        x,
        state,
        weight,
        bias,
        y,
        x.stride(0),
        *state.stride()[:2],
        *weight.stride(),
        channels,
        W=weight.shape[1],
        BC=CHANNELS,
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
    return y
