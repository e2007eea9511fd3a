"""The causal convolution and its gradient in Triton.

Positions of a row run over its past, -(d_conv - 1) to -1 for the initial state, and its tokens from
0 on. Padding is stepped over: the inputs of a token are reached by hops to the `previous` token of
its document, its readers by hops to the `next` one. Without `seq_idx` a hop is just one position;
with it, one small kernel finds all hops first. A document that does not go on leads to NOWHERE.

The backward pass computes the activation's input anew, from the 2 d_conv - 1 inputs that lie around
each token, which costs no memory traffic. The weights' gradient is summed per block of tokens, then
over the blocks in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import launch
from mamba2_kernels.sums_triton import sum_rows

NOWHERE: tl.constexpr = tl.constexpr(-(1 << 30))
TOKENS = 32  # of one tile
CHANNELS = 64
TOKENS_BACKWARD = 16  # holds 2 d_conv - 1 tiles at once
TOKENS_PER_PROGRAM = 256  # of the backward pass, which sums the weights' gradient over them
LONGEST_SCAN = 1024


@triton.jit
def later(a, b):
    return tl.maximum(a, b)


@triton.jit
def earlier(a, b):
    return tl.minimum(a, b)


@triton.jit
def hops_kernel(
    seq_idx, previous, following, ends, stride_b, stride_t, seq_len, BLOCK: tl.constexpr
):
    """For each token its neighbours in its document; `ends` (b, 2): first and last token of all.

    The token before the first one is the newest of the past, -1.
    """
    row = tl.program_id(0).to(tl.int64)
    seq_idx += row * stride_b
    previous += row * seq_len
    following += row * seq_len
    if tl.program_id(1) == 0:
        last = -1
        for t0 in range(0, seq_len, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            here = tl.load(seq_idx + t.to(tl.int64) * stride_t, mask=t < seq_len, other=-1)
            m_left = (t >= 1) & (t <= seq_len)
            left = tl.load(seq_idx + (t - 1).to(tl.int64) * stride_t, mask=m_left, other=-1)
            token = tl.associative_scan(tl.where(left >= 0, t - 1, -1), 0, later)
            token = tl.maximum(token, last)
            document = tl.load(seq_idx + token.to(tl.int64) * stride_t, mask=token >= 0, other=-1)
            goes_on = (token < 0) | (document == here)
            tl.store(previous + t, tl.where(goes_on, token, NOWHERE), mask=t < seq_len)
            last = tl.maximum(tl.max(tl.where(here >= 0, t, -1), 0), last)
        tl.store(ends + row * 2 + 1, last)
    else:
        first = seq_len
        n_blocks = tl.cdiv(seq_len, BLOCK)
        for k in range(0, n_blocks):
            t = (n_blocks - 1 - k) * BLOCK + tl.arange(0, BLOCK)
            here = tl.load(seq_idx + t.to(tl.int64) * stride_t, mask=t < seq_len, other=-1)
            m_right = t + 1 < seq_len
            right = tl.load(seq_idx + (t + 1).to(tl.int64) * stride_t, mask=m_right, other=-1)
            token = tl.where(right >= 0, t + 1, seq_len)
            token = tl.minimum(tl.associative_scan(token, 0, earlier, reverse=True), first)
            m_token = token < seq_len
            document = tl.load(seq_idx + token.to(tl.int64) * stride_t, mask=m_token, other=-1)
            goes_on = m_token & (document == here)
            tl.store(following + t, tl.where(goes_on, token, NOWHERE), mask=t < seq_len)
            first = tl.minimum(tl.min(tl.where(here >= 0, t, seq_len), 0), first)
        tl.store(ends + row * 2, tl.where(first < seq_len, first, NOWHERE))


@triton.jit
def hop_back(t, previous, seq_len, PACKED: tl.constexpr):
    """The position before t in its document; the past lies before every first document."""
    if PACKED:
        m = (t >= 0) & (t < seq_len)
        before = tl.load(previous + t, mask=m, other=NOWHERE)
        before = tl.where((t < 0) & (t > NOWHERE), t - 1, before)
    else:
        before = t - 1
    return before


@triton.jit
def hop_on(t, following, first, seq_len, PACKED: tl.constexpr):
    """The position after t in its document; past the end of the row it may be anything."""
    if PACKED:
        after = tl.load(following + t, mask=(t >= 0) & (t < seq_len), other=NOWHERE)
        after = tl.where(t == -1, first, after)
        after = tl.where((t < -1) & (t > NOWHERE), t + 1, after)
    else:
        after = t + 1
    return after


@triton.jit
def load_inputs(
    x, past, t, c, m_c, stride_t, past_t, seq_len, W: tl.constexpr, HAS_PAST: tl.constexpr
):
    """The inputs at positions t, zeros where there are none."""
    p_x = x + t.to(tl.int64)[:, None] * stride_t + c[None, :]
    m_x = ((t >= 0) & (t < seq_len))[:, None] & m_c[None, :]
    inputs = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    if HAS_PAST:
        p_past = past + (t + W - 1).to(tl.int64)[:, None] * past_t + c[None, :]
        m_past = ((t < 0) & (t > -W))[:, None] & m_c[None, :]
        inputs += tl.load(p_past, mask=m_past, other=0.0).to(tl.float32)
    return inputs


@triton.jit
def store_tail(
    x, previous, ends, past, tail, row, c, m_c, sx_t, sp_t, seq_len, channels,
    W: tl.constexpr, HAS_PAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of the last document, from the newest to the oldest."""
    last = seq_len - 1
    if PACKED:
        last = tl.load(ends + row * 2 + 1)
    t = last + tl.zeros((1,), tl.int32)
    for k in tl.static_range(W - 1):
        inputs = load_inputs(x, past, t, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
        p_tail = tail + (row * (W - 1) + (W - 2 - k)) * channels + c[None, :]
        tl.store(p_tail, inputs.to(tail.dtype.element_ty), mask=m_c[None, :])
        t = hop_back(t, previous, seq_len, PACKED)


@triton.jit
def conv_kernel(
    x, weight, bias, seq_idx, previous, ends, past, y, tail,
    sx_b, sx_t, ss_b, ss_t, sp_b, sp_t, sw_c, sw_k, seq_len, channels,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, HAS_TAIL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y of one tile; with HAS_TAIL the last program along the tokens writes the final state."""
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = c < channels
    x += row * sx_b
    past += row * sp_b
    if PACKED:
        previous += row * seq_len
    if HAS_TAIL and tl.program_id(0) == tl.num_programs(0) - 1:
        store_tail(
            x, previous, ends, past, tail, row, c, m_c, sx_t, sp_t, seq_len, channels,
            W, HAS_PAST, PACKED,
        )  # fmt: skip
    else:
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        m_t = t < seq_len
        total = tl.zeros((BT, BC), tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        source = t
        for k in tl.static_range(W):
            inputs = load_inputs(x, past, source, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
            p_weight = weight + c.to(tl.int64) * sw_c + (W - 1 - k) * sw_k
            total += inputs * tl.load(p_weight, mask=m_c, other=0.0).to(tl.float32)[None, :]
            source = hop_back(source, previous, seq_len, PACKED)
        if SILU:
            total = total / (1.0 + tl.exp(-total))
        if PACKED:
            here = tl.load(seq_idx + row * ss_b + t.to(tl.int64) * ss_t, mask=m_t, other=-1)
            total = tl.where((here >= 0)[:, None], total, 0.0)
        p_y = y + (row * seq_len + t)[:, None] * channels + c[None, :]
        tl.store(p_y, total.to(y.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


@triton.jit
def d_before_activation(
    dy, x, past, weight, bias, previous, t, c, m_c, sdy_t, sx_t, sp_t, sw_c, sw_k, seq_len,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of the activation's input at positions t, zeros where there is no token."""
    p_dy = dy + t.to(tl.int64)[:, None] * sdy_t + c[None, :]
    m_dy = ((t >= 0) & (t < seq_len))[:, None] & m_c[None, :]
    grad = tl.load(p_dy, mask=m_dy, other=0.0).to(tl.float32)
    if SILU:
        total = tl.zeros((BT, BC), tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        source = t
        for k in tl.static_range(W):
            inputs = load_inputs(x, past, source, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
            p_weight = weight + c.to(tl.int64) * sw_c + (W - 1 - k) * sw_k
            total += inputs * tl.load(p_weight, mask=m_c, other=0.0).to(tl.float32)[None, :]
            source = hop_back(source, previous, seq_len, PACKED)
        gate = 1.0 / (1.0 + tl.exp(-total))
        grad = grad * gate * (1.0 + total * (1.0 - gate))
    return grad


@triton.jit
def conv_backward_kernel(
    dy, dtail, x, weight, bias, seq_idx, previous, following, ends, past, dx, dpast, dweight,
    sdy_b, sdy_t, sdt_b, sdt_t, sx_b, sx_t, ss_b, ss_t, sp_b, sp_t, sw_c, sw_k,
    seq_len, channels,
    W: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, HAS_DTAIL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dx of SPAN tokens and what they add to the gradients of the weights and the bias.

    With HAS_PAST the last program along the tokens computes the past's gradient: it is the same
    sum over readers, at positions before 0.
    """
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = c < channels
    x += row * sx_b
    dy += row * sdy_b
    past += row * sp_b
    first = 0
    last = seq_len - 1
    if PACKED:
        previous += row * seq_len
        following += row * seq_len
        first = tl.load(ends + row * 2)
        last = tl.load(ends + row * 2 + 1)
    n_spans = tl.cdiv(seq_len, SPAN)
    is_past = tl.program_id(0) == n_spans
    n_tiles = tl.cdiv(seq_len - tl.program_id(0) * SPAN, BT)
    n_tiles = tl.where(is_past, 1, tl.minimum(n_tiles, SPAN // BT))
    taps = tl.arange(0, 16)
    dw = tl.zeros((16, BC), tl.float32)  # row k: the tap k tokens back; row W: the bias
    for i in range(n_tiles):
        t = tl.program_id(0) * SPAN + i * BT + tl.arange(0, BT)
        t = tl.where(is_past, tl.arange(0, BT) - (W - 1), t)
        m_here = tl.where(is_past, t < 0, t < seq_len)
        m_t = m_here
        if PACKED:
            p_here = seq_idx + row * ss_b + t.to(tl.int64) * ss_t
            m_t = m_t & (tl.load(p_here, mask=m_t & (t >= 0), other=0) >= 0)
        reader = tl.where(m_t, t, NOWHERE)
        total = tl.zeros((BT, BC), tl.float32)
        for k in tl.static_range(W):
            grad = d_before_activation(
                dy, x, past, weight, bias, previous, reader, c, m_c, sdy_t, sx_t, sp_t,
                sw_c, sw_k, seq_len, W, SILU, HAS_BIAS, HAS_PAST, PACKED, BT, BC,
            )  # fmt: skip
            p_weight = weight + c.to(tl.int64) * sw_c + (W - 1 - k) * sw_k
            total += grad * tl.load(p_weight, mask=m_c, other=0.0).to(tl.float32)[None, :]
            if k == 0:
                # Each token's own gradient, against its inputs: the weights' share.
                source = reader
                for j in tl.static_range(W):
                    inputs = load_inputs(x, past, source, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
                    share = tl.sum(grad * inputs, 0)
                    dw += tl.where((taps == j)[:, None], share[None, :], 0.0)
                    source = hop_back(source, previous, seq_len, PACKED)
                share = tl.sum(grad, 0)
                dw += tl.where((taps == W)[:, None], share[None, :], 0.0)
            if HAS_DTAIL and k < W - 1:
                p_tail = dtail + row * sdt_b + (W - 2 - k) * sdt_t + c[None, :]
                m_tail = (reader == last)[:, None] & m_c[None, :]
                m_tail = m_tail & m_t[:, None]
                p_tail = p_tail + tl.zeros((BT, 1), tl.int32)
                total += tl.load(p_tail, mask=m_tail, other=0.0).to(tl.float32)
            reader = hop_on(reader, following, first, seq_len, PACKED)
            if not PACKED:
                reader = tl.where(m_t, reader, NOWHERE)
        m_out = m_t[:, None] & m_c[None, :]
        if HAS_PAST:
            p_dpast = dpast + (row * (W - 1) + t + W - 1)[:, None] * channels + c[None, :]
            tl.store(p_dpast, total.to(dpast.dtype.element_ty), mask=m_out & (t < 0)[:, None])
        p_dx = dx + (row * seq_len + t)[:, None] * channels + c[None, :]
        m_dx = (m_here & (t >= 0))[:, None] & m_c[None, :]  # zeros at padding, too
        tl.store(p_dx, total.to(dx.dtype.element_ty), mask=m_dx)
    if not is_past:
        p_dw = dweight + ((row * n_spans + tl.program_id(0)) * (W + 1) + taps)[:, None] * channels
        tl.store(p_dw + c[None, :], dw, mask=(taps <= W)[:, None] & m_c[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, empty when it is not asked for."""
    batch, seq_len, channels = x.shape
    d_conv = weight.shape[1]
    past = _dense(initial_state)
    previous, _, ends = _hops(seq_idx)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tail = x.new_empty((batch, d_conv - 1, channels) if return_final_state else (0,))
    has_tail = return_final_state and d_conv > 1
    launch(
        conv_kernel,
        (triton.cdiv(seq_len, TOKENS) + has_tail, triton.cdiv(channels, CHANNELS), batch),
        x.device,
        x,
        weight,
        bias,
        seq_idx,
        previous,
        ends,
        x if past is None else past,
        y,
        tail,
        *x.stride()[:2],
        *((0, 0) if seq_idx is None else seq_idx.stride()),
        *((0, 0) if past is None else past.stride()[:2]),
        *weight.stride(),
        seq_len,
        channels,
        W=d_conv,
        BT=TOKENS,
        BC=CHANNELS,
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        HAS_PAST=past is not None,
        HAS_TAIL=has_tail,
        PACKED=seq_idx is not None,
        num_warps=4,
    )
    return y, tail


def backward(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and d_initial_state; empty for inputs left out."""
    batch, seq_len, channels = x.shape
    d_conv = weight.shape[1]
    past, dtail = _dense(initial_state), _dense(d_final_state)
    if d_conv == 1:
        past = dtail = None
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    previous, following, ends = _hops(seq_idx)
    n_spans = triton.cdiv(seq_len, TOKENS_PER_PROGRAM)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dpast = x.new_empty(0)
    if initial_state is not None:
        dpast = torch.empty(
            initial_state.shape, dtype=initial_state.dtype, device=initial_state.device
        )
    shares = torch.empty(
        batch * n_spans, d_conv + 1, channels, dtype=torch.float32, device=x.device
    )
    launch(
        conv_backward_kernel,
        (n_spans + (past is not None), triton.cdiv(channels, CHANNELS), batch),
        x.device,
        dy,
        dtail,
        x,
        weight,
        bias,
        seq_idx,
        previous,
        following,
        ends,
        x if past is None else past,
        dx,
        dpast,
        shares,
        *dy.stride()[:2],
        *((0, 0) if dtail is None else dtail.stride()[:2]),
        *x.stride()[:2],
        *((0, 0) if seq_idx is None else seq_idx.stride()),
        *((0, 0) if past is None else past.stride()[:2]),
        *weight.stride(),
        seq_len,
        channels,
        W=d_conv,
        SPAN=TOKENS_PER_PROGRAM,
        BT=TOKENS_BACKWARD,
        BC=CHANNELS,
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        HAS_PAST=past is not None,
        HAS_DTAIL=dtail is not None,
        PACKED=seq_idx is not None,
        num_warps=4,
    )
    sums = sum_rows(shares.flatten(1)).view(d_conv + 1, channels)
    dweight = sums[:d_conv].flip(0).T.to(weight.dtype).contiguous()
    dbias = x.new_empty(0) if bias is None else sums[d_conv].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dpast


def _hops(seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if seq_idx is None:
        return None, None, None
    batch, seq_len = seq_idx.shape
    previous, following = torch.empty(2, batch, seq_len, dtype=torch.int32, device=seq_idx.device)
    ends = torch.empty(batch, 2, dtype=torch.int32, device=seq_idx.device)
    block = min(LONGEST_SCAN, max(16, triton.next_power_of_2(seq_len)))
    launch(
        hops_kernel,
        (batch, 2),
        seq_idx.device,
        seq_idx,
        previous,
        following,
        ends,
        *seq_idx.stride(),
        seq_len,
        BLOCK=block,
        num_warps=4,
    )
    return previous, following, ends


def _dense(state: Tensor | None) -> Tensor | None:
    return state if state is None or state.stride(-1) == 1 else state.contiguous()
