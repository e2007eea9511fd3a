"""The causal convolution and its gradient in Triton: a program walks the tokens of a few channels.

The last three inputs of the document at hand stay in registers, so every input is read once and
nothing is summed across threads. At padding nothing moves on; at a new document they become zero;
before the first token they are the initial state (the `past`, positions -1 to -3).

The backward pass walks forwards as well. Token t's gradient g_t, before the activation, adds to

    dx_{t-k} += w_k g_t        dw_k += g_t x_{t-k}        k hops back in t's document, 0 to 3

so the dx of the last three tokens grow in registers too, and leave them when complete. Behind its
span a program goes on for three more tokens, whose g it needs but does not own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import LENGTHS, launch
from mamba2_kernels.sums_triton import sum_rows

NOWHERE: tl.constexpr = tl.constexpr(-(1 << 30))  # a position with no token: its input is zero
SEARCHED: tl.constexpr = tl.constexpr(256)  # positions looked at together for one with a token
CHANNELS = 256
SPAN = 64  # tokens that one program walks
SPAN_BACKWARD = 128  # longer, for each span leaves a sum of the weights' gradient
WARPS = 2


@triton.jit
def token_before(t, seq_idx, stride_t, PACKED: tl.constexpr):
    """The last position before t that is no padding, -1 for none; in the past, one further back."""
    found = t - 1
    if PACKED:
        found = tl.where(t > 0, -1, found)
        end = t
        while (found < 0) & (end > 0):
            s = end - 1 - tl.arange(0, SEARCHED)
            here = tl.load(seq_idx + s.to(tl.int64) * stride_t, mask=s >= 0, other=-1)
            found = tl.max(tl.where(here >= 0, s, -1), 0)
            end -= SEARCHED
    return found


@triton.jit
def token_after(t, seq_idx, stride_t, seq_len, PACKED: tl.constexpr):
    """The first position after t that is no padding, or at least seq_len for none."""
    found = t + 1
    if PACKED:
        found = tl.maximum(found, seq_len)
        begin = t + 1
        while (found >= seq_len) & (begin < seq_len):
            s = begin + tl.arange(0, SEARCHED)
            here = tl.load(seq_idx + s.to(tl.int64) * stride_t, mask=s < seq_len, other=-1)
            found = tl.min(tl.where(here >= 0, s, seq_len), 0)
            begin += SEARCHED
    return found


@triton.jit
def document_at(t, seq_idx, stride_t, seq_len, other, PACKED: tl.constexpr):
    """The document of position t, or `other` where there is no position t."""
    document = other
    if PACKED:
        m = (t >= 0) & (t < seq_len)
        document = tl.load(seq_idx + t.to(tl.int64) * stride_t, mask=m, other=other)
    return document


@triton.jit
def hop_back(t, document, seq_idx, stride_t, seq_len, PACKED: tl.constexpr):
    """The position before t in its document; the past lies before the first one of a row."""
    found = token_before(t, seq_idx, stride_t, PACKED)
    if PACKED:
        same = document_at(found, seq_idx, stride_t, seq_len, document, PACKED) == document
        found = tl.where(same, found, NOWHERE)
    return found


@triton.jit
def load_input(x, past, t, c, m_c, sx_t, sp_t, seq_len, W: tl.constexpr, HAS_PAST: tl.constexpr):
    """The inputs at one position, in float32; zeros where there are none."""
    inside = (t >= 0) & (t < seq_len)
    inputs = tl.load(x + t.to(tl.int64) * sx_t + c, mask=m_c & inside, other=0.0).to(tl.float32)
    if HAS_PAST:
        p_past = past + (t + W - 1).to(tl.int64) * sp_t + c
        m_past = m_c & (t < 0) & (t > -W)
        inputs += tl.load(p_past, mask=m_past, other=0.0).to(tl.float32)
    return inputs


@triton.jit
def load_tap(weight, k, c, m_c, sw_c, sw_k, W: tl.constexpr):
    """The weights of the inputs k hops back; zeros beyond the last tap."""
    p_weight = weight + c.to(tl.int64) * sw_c + (W - 1 - k) * sw_k
    return tl.load(p_weight, mask=m_c & (k < W), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def conv_kernel(
    x, weight, bias, seq_idx, past, y, tail,
    sx_b, sx_t, ss_b, ss_t, sp_b, sp_t, sw_c, sw_k, seq_len, channels,
    W: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, HAS_TAIL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y of SPAN tokens; with HAS_TAIL the last program along the tokens writes the final state."""
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = c < channels
    x += row * sx_b
    past += row * sp_b
    if PACKED:
        seq_idx += row * ss_b
    begin = tl.minimum(tl.program_id(0) * SPAN, seq_len)
    if HAS_TAIL and tl.program_id(0) == tl.num_programs(0) - 1:
        begin = seq_len
    t1 = token_before(begin, seq_idx, ss_t, PACKED)
    document = document_at(t1, seq_idx, ss_t, seq_len, -1, PACKED)
    t2 = hop_back(t1, document, seq_idx, ss_t, seq_len, PACKED)
    t3 = hop_back(t2, document, seq_idx, ss_t, seq_len, PACKED)
    x1 = load_input(x, past, t1, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
    x2 = load_input(x, past, t2, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
    x3 = load_input(x, past, t3, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
    if HAS_TAIL and begin == seq_len:
        p_tail = tail + row * (W - 1) * channels + c
        tl.store(p_tail + (W - 2) * channels, x1.to(tail.dtype.element_ty), mask=m_c)
        tl.store(p_tail + (W - 3) * channels, x2.to(tail.dtype.element_ty), mask=m_c & (W > 2))
        tl.store(p_tail + (W - 4) * channels, x3.to(tail.dtype.element_ty), mask=m_c & (W > 3))
    w0 = load_tap(weight, 0, c, m_c, sw_c, sw_k, W)
    w1 = load_tap(weight, 1, c, m_c, sw_c, sw_k, W)
    w2 = load_tap(weight, 2, c, m_c, sw_c, sw_k, W)
    w3 = load_tap(weight, 3, c, m_c, sw_c, sw_k, W)
    b_bias = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + c, mask=m_c, other=0.0).to(tl.float32)
    ahead = load_input(x, past, begin, c, m_c, sx_t, sp_t, seq_len, W, False)
    for i in range(tl.minimum(SPAN, seq_len - begin)):
        t = begin + i
        x0 = ahead
        # Read before it is needed: the loop's own work hides the way to memory.
        ahead = load_input(x, past, t + 1, c, m_c, sx_t, sp_t, seq_len, W, False)
        is_token = True
        if PACKED:
            here = document_at(t, seq_idx, ss_t, seq_len, -1, PACKED)
            is_token = here >= 0
            if is_token & (t1 >= 0) & (here != document):
                x1 = tl.zeros((BC,), tl.float32)
                x2 = tl.zeros((BC,), tl.float32)
                x3 = tl.zeros((BC,), tl.float32)
            t1 = tl.where(is_token, t, t1)
            document = tl.where(is_token, here, document)
        total = b_bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        if SILU:
            total = total / (1.0 + tl.exp(-total))
        if PACKED:
            total = tl.where(is_token, total, 0.0)
            x3 = tl.where(is_token, x2, x3)
            x2 = tl.where(is_token, x1, x2)
            x1 = tl.where(is_token, x0, x1)
        else:
            x3 = x2
            x2 = x1
            x1 = x0
        tl.store(y + (row * seq_len + t) * channels + c, total.to(y.dtype.element_ty), mask=m_c)


@triton.jit
def d_before_activation(dy, total, SILU: tl.constexpr):
    grad = dy
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-total))
        grad = dy * gate * (1.0 + total * (1.0 - gate))
    return grad


@triton.jit
def store_complete(dx, dpast, grad, t, begin, row, c, m_c, seq_len, channels, W: tl.constexpr):
    """The finished gradient of the input at t, if it belongs to the span that begins at `begin`:
    in a token's place, or before 0 in that of the past."""
    m = m_c & (t >= begin)
    p_dx = dx + (row * seq_len + t) * channels + c
    tl.store(p_dx, grad.to(dx.dtype.element_ty), mask=m & (t >= 0))
    p_dpast = dpast + (row * (W - 1) + t + W - 1) * channels + c
    tl.store(p_dpast, grad.to(dpast.dtype.element_ty), mask=m & (t < 0))


@triton.jit
def load_dtail(dtail, k, c, m_c, stride_t, W: tl.constexpr):
    """What the final state's gradient adds to the input k hops before the last one."""
    p_dtail = dtail + (W - 2 - k) * stride_t + c
    return tl.load(p_dtail, mask=m_c & (k < W - 1), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def conv_backward_kernel(
    dy, dtail, x, weight, bias, seq_idx, past, dx, dpast, dweight,
    sdy_b, sdy_t, sdt_b, sdt_t, sx_b, sx_t, ss_b, ss_t, sp_b, sp_t, sw_c, sw_k,
    seq_len, channels,
    W: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, HAS_DTAIL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dx of SPAN tokens and what they add to the gradients of the weights and the bias.

    With HAS_PAST the last program along the tokens owns the past instead of a span.
    """
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = c < channels
    x += row * sx_b
    dy += row * sdy_b
    past += row * sp_b
    if PACKED:
        seq_idx += row * ss_b
    if HAS_DTAIL:
        dtail += row * sdt_b
        last = token_before(seq_len, seq_idx, ss_t, PACKED)
    n_spans = tl.cdiv(seq_len, SPAN)
    is_past = tl.program_id(0) == n_spans
    begin = tl.where(is_past, 0, tl.program_id(0) * SPAN)
    end = tl.where(is_past, 0, tl.minimum(begin + SPAN, seq_len))
    t1 = token_before(begin, seq_idx, ss_t, PACKED)
    document = document_at(t1, seq_idx, ss_t, seq_len, -1, PACKED)
    t2 = hop_back(t1, document, seq_idx, ss_t, seq_len, PACKED)
    t3 = hop_back(t2, document, seq_idx, ss_t, seq_len, PACKED)
    x1 = load_input(x, past, t1, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
    x2 = load_input(x, past, t2, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
    x3 = load_input(x, past, t3, c, m_c, sx_t, sp_t, seq_len, W, HAS_PAST)
    begin = tl.where(is_past, 1 - W, begin)
    w0 = load_tap(weight, 0, c, m_c, sw_c, sw_k, W)
    w1 = load_tap(weight, 1, c, m_c, sw_c, sw_k, W)
    w2 = load_tap(weight, 2, c, m_c, sw_c, sw_k, W)
    w3 = load_tap(weight, 3, c, m_c, sw_c, sw_k, W)
    b_bias = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + c, mask=m_c, other=0.0).to(tl.float32)
    # dx of the three tokens before this one, and the sums for the taps and the bias.
    d1 = tl.zeros((BC,), tl.float32)
    d2 = tl.zeros((BC,), tl.float32)
    d3 = tl.zeros((BC,), tl.float32)
    dw0 = tl.zeros((BC,), tl.float32)
    dw1 = tl.zeros((BC,), tl.float32)
    dw2 = tl.zeros((BC,), tl.float32)
    dw3 = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    if HAS_DTAIL:
        if is_past & (last < 0):  # no token at all: the final state is the past
            d1 = load_dtail(dtail, 0, c, m_c, sdt_t, W)
            d2 = load_dtail(dtail, 1, c, m_c, sdt_t, W)
            d3 = load_dtail(dtail, 2, c, m_c, sdt_t, W)
    first = tl.where(is_past, 0, begin)
    x_ahead = load_input(x, past, first, c, m_c, sx_t, sp_t, seq_len, W, False)
    dy_ahead = load_input(dy, past, first, c, m_c, sdy_t, sp_t, seq_len, W, False)
    for i in range(end - first):
        t = first + i
        x0 = x_ahead
        b_dy = dy_ahead
        # Read before it is needed: the loop's own work hides the way to memory.
        x_ahead = load_input(x, past, t + 1, c, m_c, sx_t, sp_t, seq_len, W, False)
        dy_ahead = load_input(dy, past, t + 1, c, m_c, sdy_t, sp_t, seq_len, W, False)
        is_token = True
        if PACKED:
            here = document_at(t, seq_idx, ss_t, seq_len, -1, PACKED)
            is_token = here >= 0
            begins = is_token & (t1 >= 0) & (here != document)
            if begins:
                store_complete(dx, dpast, d1, t1, begin, row, c, m_c, seq_len, channels, W)
                store_complete(dx, dpast, d2, t2, begin, row, c, m_c, seq_len, channels, W)
                store_complete(dx, dpast, d3, t3, begin, row, c, m_c, seq_len, channels, W)
                x1 = tl.zeros((BC,), tl.float32)
                x2 = tl.zeros((BC,), tl.float32)
                x3 = tl.zeros((BC,), tl.float32)
            t1 = tl.where(begins, NOWHERE, t1)
            t2 = tl.where(begins, NOWHERE, t2)
            t3 = tl.where(begins, NOWHERE, t3)
            document = tl.where(is_token, here, document)
        if is_token:
            total = b_bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            grad = d_before_activation(b_dy, total, SILU)
            dw0 += grad * x0
            dw1 += grad * x1
            dw2 += grad * x2
            dw3 += grad * x3
            dbias += grad
            d0 = w0 * grad
            d1 += w1 * grad
            d2 += w2 * grad
            d3 += w3 * grad
            if HAS_DTAIL:
                if t == last:
                    d0 += load_dtail(dtail, 0, c, m_c, sdt_t, W)
                    d1 += load_dtail(dtail, 1, c, m_c, sdt_t, W)
                    d2 += load_dtail(dtail, 2, c, m_c, sdt_t, W)
            store_complete(dx, dpast, d3, t3, begin, row, c, m_c, seq_len, channels, W)
            x3 = x2
            x2 = x1
            x1 = x0
            d3 = d2
            d2 = d1
            d1 = d0
            t3 = t2
            t2 = t1
            t1 = t
        else:
            zero = tl.zeros((BC,), tl.float32)  # whatever stands at padding, NaN included
            store_complete(dx, dpast, zero, t, begin, row, c, m_c, seq_len, channels, W)
    # The readers behind the span; behind the document's end there are none.
    reader = tl.where(is_past, -1, end - 1)
    for _ in range(3):
        reader = token_after(reader, seq_idx, ss_t, seq_len, PACKED)
        reads = reader < seq_len
        if PACKED:
            here = document_at(reader, seq_idx, ss_t, seq_len, -1, PACKED)
            document = tl.where(t1 < 0, here, document)  # the first one continues the past
            reads = reads & (here == document)
        reader = tl.where(reads, reader, seq_len)
        x0 = load_input(x, past, reader, c, m_c, sx_t, sp_t, seq_len, W, False)
        b_dy = load_input(dy, past, reader, c, m_c, sdy_t, sp_t, seq_len, W, False)
        total = b_bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        grad = d_before_activation(b_dy, total, SILU)
        d1 += w1 * grad
        d2 += w2 * grad
        d3 += w3 * grad
        if HAS_DTAIL:
            if reader == last:
                d1 += load_dtail(dtail, 1, c, m_c, sdt_t, W)
                d2 += load_dtail(dtail, 2, c, m_c, sdt_t, W)
        store_complete(dx, dpast, d3, t3, begin, row, c, m_c, seq_len, channels, W)
        x3 = x2
        x2 = x1
        x1 = x0
        d3 = d2
        d2 = d1
        d1 = tl.zeros((BC,), tl.float32)
        t3 = t2
        t2 = t1
        t1 = tl.where(reads, reader, NOWHERE)
    if not is_past:
        # As the weights lie, the bias behind them.
        p_dw = dweight + (row * n_spans + tl.program_id(0)) * (W + 1) * channels + c
        tl.store(p_dw + W * channels, dbias, mask=m_c)
        tl.store(p_dw + (W - 1) * channels, dw0, mask=m_c)
        tl.store(p_dw + (W - 2) * channels, dw1, mask=m_c & (W > 1))
        tl.store(p_dw + (W - 3) * channels, dw2, mask=m_c & (W > 2))
        tl.store(p_dw + (W - 4) * channels, dw3, mask=m_c & (W > 3))


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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tail = x.new_empty((batch, d_conv - 1, channels) if return_final_state else (0,))
    has_tail = return_final_state and d_conv > 1
    launch(
        conv_kernel,
        (triton.cdiv(seq_len, SPAN) + has_tail, triton.cdiv(channels, CHANNELS), batch),
        x.device,
        x,
        weight,
        bias,
        seq_idx,
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
        SPAN=SPAN,
        BC=CHANNELS,
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        HAS_PAST=past is not None,
        HAS_TAIL=has_tail,
        PACKED=seq_idx is not None,
        num_warps=WARPS,
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
    n_spans = triton.cdiv(seq_len, SPAN_BACKWARD)
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
        SPAN=SPAN_BACKWARD,
        BC=CHANNELS,
        SILU=activation == "silu",
        HAS_BIAS=bias is not None,
        HAS_PAST=past is not None,
        HAS_DTAIL=dtail is not None,
        PACKED=seq_idx is not None,
        num_warps=WARPS,
    )
    sums = sum_rows(shares.flatten(1)).view(d_conv + 1, channels)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dweight.copy_(sums[:d_conv].T)
    dbias = x.new_empty(0) if bias is None else sums[d_conv].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dpast


def _dense(state: Tensor | None) -> Tensor | None:
    return state if state is None or state.stride(-1) == 1 else state.contiguous()
