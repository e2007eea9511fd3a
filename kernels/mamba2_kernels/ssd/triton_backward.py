"""The scan's backward pass in Triton: every gradient, no atomics, states recomputed.

    prepare   tokens x heads            as in the forward pass
    states    twice                     S entering each chunk; dS, its gradient, leaving each chunk
    dx        chunks x heads            the forward pass mirrored in time: dx from dy and dS
    inside    tiles x splits of heads   what the tokens of one tile say about each other: d(C B^T)
                                        summed over heads, their share of ddt and the decay, dD
    across    the same x blocks of n    what the states say: dB, dC, the rest of ddt and the decay
    finish    three small kernels       sums in a fixed order, softplus and limits

With M_ij = <dy_i, x_j> (C_i . B_j) exp2(a_i - a_j) dt_j, the gradient of token t's log decay is the
sum of all M_ij with j < t <= i. Inside a tile that is column sums minus row sums of M, up to t, in
float32; what passes over the whole tile is <dS, S>, taken anew for every tile: an exact anchor.
(The textbook identity <y, dy> - <x, dx> is a small difference of large numbers, useless in bf16.)

Splits of the heads follow the shapes alone, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import LENGTHS, launch
from mamba2_kernels.ssd.triton_common import (
    add_dot,
    carry_state,
    dot,
    load_state,
    load_tile,
    pair_decay,
    running_decay,
    store_tile,
    total_of,
    weight_in,
    weight_out,
    weight_through,
)
from mamba2_kernels.ssd.triton_forward import (
    Scan,
    chunk_states,
    dense,
    prepare,
    readable,
    softplus,
    state_blocks,
    step_size,
    tiles,
)

# Heads that one program of `inside` and `across` works through: more spare memory traffic, fewer
# fill the GPU.
MOST_HEADS_PER_PROGRAM = 20
STRONG_DECAY: tl.constexpr = tl.constexpr(22.0)  # exp(-22) = 2^-32


@triton.jit(do_not_specialize=LENGTHS)
def dx_kernel(
    dy, B, C, D, log_decay, log_dt, start, dstates, dx,
    sdy_b, sdy_t, sdy_h, sb_b, sb_t, sb_h, sc_b, sc_t, sc_h, sdx_b, sdx_t, sdx_h,
    seq_len, padded_len, n_heads, heads_per_group, n_chunks,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    N: tl.constexpr, HAS_D: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    STATE_PN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dx of SPAN tokens, one head and PB of its channels; the state's gradient in registers."""
    c = tl.program_id(0)
    h = tl.program_id(1) // (P // PB)
    p = (tl.program_id(1) % (P // PB)) * PB
    b = tl.program_id(2)
    g = h // heads_per_group
    q = tl.arange(0, Q)
    head = b.to(tl.int64) * n_heads + h
    log_decay += head * padded_len
    log_dt += head * padded_len
    start += b.to(tl.int64) * padded_len
    if HAS_D:
        d = tl.load(D + h).to(tl.float32)
    last = tl.minimum((c + 1) * (SPAN // CHUNK), n_chunks) - 1
    row = ((b * n_chunks + last) * n_heads + h) * P + p
    state = load_state(dstates, row, 0, N, PB, N, TMA)
    if not STATE_PN:
        state = tl.trans(state)
    n_tiles = tl.minimum(SPAN // Q, tl.cdiv(seq_len, Q) - c * (SPAN // Q))
    for k in range(n_tiles):
        t = (c * (SPAN // Q) + n_tiles - 1 - k) * Q
        whole, rest, all_whole, all_rest = running_decay(log_decay, t, Q, EXACT)
        b_dy = load_tile(dy, b, t, h, p, sdy_b, sdy_t, sdy_h, seq_len, Q, PB, TMA)
        b_b = load_tile(B, b, t, g, 0, sb_b, sb_t, sb_h, seq_len, Q, N, TMA)
        b_c = load_tile(C, b, t, g, 0, sc_b, sc_t, sc_h, seq_len, Q, N, TMA)
        b_ldt = tl.load(log_dt + t + q)
        w_in = weight_in(whole, rest, start, t, Q, PACKED, EXACT)
        w_out = weight_out(whole, rest, all_whole, all_rest, b_ldt, start, t, Q, PACKED, EXACT)
        w_through = weight_through(all_whole, all_rest, start, t, Q, PACKED, EXACT)
        seen = q[:, None] <= q[None, :]  # rows: tokens read; columns: the outputs that read them
        if PACKED:
            seen = seen & (q[:, None] >= (tl.load(start + t + q) - t)[None, :])
        b_dyw = (b_dy * w_in[:, None]).to(b_dy.dtype)
        if STATE_PN:
            # [q, n] @ [n, p] -> [q, p], then [p, q] @ [q, n] -> [p, n]
            b_dx = dot(b_b, tl.trans(state.to(b_b.dtype)), EXACT) * w_out[:, None]
            state = add_dot(tl.trans(b_dyw), b_c, state * w_through, EXACT)
        else:
            b_dx = dot(b_b, state.to(b_b.dtype), EXACT) * w_out[:, None]
            state = add_dot(tl.trans(b_c), b_dyw, state * w_through, EXACT)
        # [q, n] @ [n, q] -> [q, q]
        bc = dot(b_b, tl.trans(b_c), EXACT) * pair_decay(-whole, b_ldt - rest, -whole, -rest, EXACT)
        bc = tl.where(seen, bc, 0.0)
        if HAS_D:
            bc = tl.where(seen & (q[:, None] == q[None, :]), bc + d, bc)
        # [q, q] @ [q, p] -> [q, p]
        b_dx = add_dot(bc.to(b_dy.dtype), b_dy, b_dx, EXACT)
        store_tile(dx, b_dx, b, t, h, p, sdx_b, sdx_t, sdx_h, seq_len, Q, PB, TMA)


@triton.jit(do_not_specialize=LENGTHS)
def inside_kernel(
    x, dy, B, C, log_decay, log_dt, start, dcb, du, da, dD,
    sx_b, sx_t, sx_h, sdy_b, sdy_t, sdy_h, sb_b, sb_t, sb_h, sc_b, sc_t, sc_h,
    seq_len, padded_len, n_heads, heads_per_group, n_splits, heads_per_split,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LOOP_STAGES: tl.constexpr,
    HAS_D: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Everything between tokens of one tile: d(C B^T) summed over the heads of one split; for each
    head the column sums du = <x, d(dt x)>, its share da of the decay's gradient, and dD."""
    i = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    g = split // n_splits
    q = tl.arange(0, Q)
    t = i * Q
    row = b.to(tl.int64)
    seen = q[:, None] >= q[None, :]
    if PACKED:
        seen = seen & (q[None, :] >= (tl.load(start + row * padded_len + t + q) - t)[:, None])
    b_b = load_tile(B, b, t, g, 0, sb_b, sb_t, sb_h, seq_len, Q, N, TMA)
    b_c = load_tile(C, b, t, g, 0, sc_b, sc_t, sc_h, seq_len, Q, N, TMA)
    # [q, n] @ [n, q] -> [q, q]
    cb = dot(b_c, tl.trans(b_b), EXACT)
    # The diagonal takes its own way: in sums that must cancel it would only leave its rounding.
    same = q[:, None] == q[None, :]
    cb_same = tl.sum(tl.where(same, cb, 0.0), 0)
    cb = tl.where(seen & (q[:, None] > q[None, :]), cb, 0.0)
    total = tl.zeros((Q, Q), tl.float32)
    for k in tl.range(0, heads_per_split, num_stages=LOOP_STAGES):
        h = g * heads_per_group + (split % n_splits) * heads_per_split + k
        vector = (row * n_heads + h) * padded_len + t + q
        whole, rest, _, _ = running_decay(log_decay + (row * n_heads + h) * padded_len, t, Q, EXACT)
        b_ldt = tl.load(log_dt + vector)
        b_x = load_tile(x, b, t, h, 0, sx_b, sx_t, sx_h, seq_len, Q, P, TMA)
        b_dy = load_tile(dy, b, t, h, 0, sdy_b, sdy_t, sdy_h, seq_len, Q, P, TMA)
        # [q, p] @ [p, q] -> [q, q]
        m = dot(b_dy, tl.trans(b_x), EXACT)
        xdy = tl.sum(tl.where(seen & same, m, 0.0), 0)
        if HAS_D:
            o_d = (row * tl.num_programs(0) + i) * n_heads + h
            tl.store(dD + o_d + tl.arange(0, 1), total_of(xdy))
        m *= tl.where(seen, pair_decay(whole, rest, whole, rest - b_ldt, EXACT), 0.0)
        total += m
        m *= cb
        columns = tl.sum(m, 0)
        v = columns - tl.sum(m, 1)
        tl.store(du + vector, columns + xdy * cb_same * tl.exp2(b_ldt))
        tl.store(da + vector, tl.cumsum(v, 0) - v)
    width = tl.num_programs(1) * Q
    p_dcb = dcb + (row * tl.num_programs(0) * Q + t + q)[:, None] * width + split * Q + q[None, :]
    tl.store(p_dcb, total.to(dcb.dtype.element_ty))


@triton.jit(do_not_specialize=LENGTHS)
def across_kernel(
    x, dy, B, C, log_decay, log_dt, start, initial_states, dstates, dcb, du, da, dB, dC,
    sx_b, sx_t, sx_h, sdy_b, sdy_t, sdy_h, sb_b, sb_t, sb_h, sc_b, sc_t, sc_h,
    so_b, so_t, so_h,
    seq_len, padded_len, n_heads, heads_per_group, n_splits, heads_per_split, n_chunks,
    CHUNK: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    LOOP_STAGES: tl.constexpr, RELOAD: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """What the states say about one tile, NB of the d_state columns, the heads of one split.

    dB and dC gather over the heads, starting from what `inside` left in d(C B^T); du and da come
    for each head. The states at the tile follow from those at its chunk's ends. RELOAD reads B and
    C again for every head, which needs fewer registers; otherwise a second product does.
    """
    i = tl.program_id(0)
    split = tl.program_id(1) // (N // NB)
    n_block = tl.program_id(1) % (N // NB)
    n = n_block * NB
    b = tl.program_id(2)
    g = split // n_splits
    q = tl.arange(0, Q)
    t = i * Q
    row = b.to(tl.int64)
    c = i // (CHUNK // Q)
    last = tl.minimum((c + 1) * (CHUNK // Q), tl.cdiv(seq_len, Q)) - 1
    part = (n_block.to(tl.int64) * tl.num_programs(2) + row) * n_heads
    start += row * padded_len
    b_b = load_tile(B, b, t, g, n, sb_b, sb_t, sb_h, seq_len, Q, NB, TMA)
    b_c = load_tile(C, b, t, g, n, sc_b, sc_t, sc_h, seq_len, Q, NB, TMA)
    width = (tl.num_programs(1) // (N // NB)) * Q
    p_dcb = dcb + (row * tl.num_programs(0) * Q + t + q)[:, None] * width + split * Q + q[None, :]
    b_dcb = tl.load(p_dcb)
    # [q, q] @ [q, n] -> [q, n]
    b_db = dot(tl.trans(b_dcb), b_c, EXACT)
    b_dc = dot(b_dcb, b_b, EXACT)
    for k in tl.range(0, heads_per_split, num_stages=LOOP_STAGES):
        h = g * heads_per_group + (split % n_splits) * heads_per_split + k
        p_decay = log_decay + (row * n_heads + h) * padded_len
        p_log_dt = log_dt + (row * n_heads + h) * padded_len
        state_row = ((b * n_chunks + c) * n_heads + h) * P
        state = load_state(initial_states, state_row, n, N, P, NB, TMA)
        if CHUNK > Q:  # a loop that never runs would still keep the heads' loop from prefetching
            for j in range(c * (CHUNK // Q), i):
                state = carry_state(
                    state, x, B, p_decay, p_log_dt, start, j * Q, b, h, 0, g, n,
                    sx_b, sx_t, sx_h, sb_b, sb_t, sb_h, seq_len,
                    Q, P, NB, 0, PACKED, TMA, EXACT,
                )  # fmt: skip
        s_in = state.to(b_b.dtype)
        whole, rest, all_whole, all_rest = running_decay(p_decay, t, Q, EXACT)
        b_dy = load_tile(dy, b, t, h, 0, sdy_b, sdy_t, sdy_h, seq_len, Q, P, TMA)
        w_in = weight_in(whole, rest, start, t, Q, PACKED, EXACT)
        if RELOAD:
            b_c = load_tile(C, b, t, g, n, sc_b, sc_t, sc_h, seq_len, Q, NB, TMA)
            # [q, p] @ [p, n] -> [q, n]
            z = dot(b_dy, s_in, EXACT)
            b_dc += z * w_in[:, None]
            reads = w_in * tl.sum(z * b_c.to(tl.float32), 1)
        else:
            # [q, n] @ [n, p] -> [q, p], then [q, p] @ [p, n] -> [q, n]
            b_dyw = b_dy * w_in[:, None]
            reads = tl.sum(b_dyw * dot(b_c, tl.trans(s_in), EXACT), 1)
            b_dc = add_dot(b_dyw.to(b_dy.dtype), s_in, b_dc, EXACT)
        state = load_state(dstates, state_row, n, N, P, NB, TMA)
        if CHUNK > Q:
            for j in range(0, last - i):
                state = carry_state(
                    state, dy, C, p_decay, p_log_dt, start, (last - j) * Q, b, h, 0, g, n,
                    sdy_b, sdy_t, sdy_h, sc_b, sc_t, sc_h, seq_len,
                    Q, P, NB, 1, PACKED, TMA, EXACT,
                )  # fmt: skip
        ds_out = state.to(b_b.dtype)
        through = weight_through(all_whole, all_rest, start, t, Q, PACKED, EXACT)
        anchor = through * total_of(tl.sum(s_in.to(tl.float32) * state, 1))
        b_x = load_tile(x, b, t, h, 0, sx_b, sx_t, sx_h, seq_len, Q, P, TMA)
        b_ldt = tl.load(p_log_dt + t + q)
        w_out = weight_out(whole, rest, all_whole, all_rest, b_ldt, start, t, Q, PACKED, EXACT)
        if RELOAD:
            b_b = load_tile(B, b, t, g, n, sb_b, sb_t, sb_h, seq_len, Q, NB, TMA)
            z = dot(b_x, ds_out, EXACT)
            b_db += z * w_out[:, None]
            writes = w_out * tl.sum(z * b_b.to(tl.float32), 1)
        else:
            b_xw = b_x * w_out[:, None]
            writes = tl.sum(b_xw * dot(b_b, tl.trans(ds_out), EXACT), 1)
            b_db = add_dot(b_xw.to(b_x.dtype), ds_out, b_db, EXACT)
        vector = (part + h) * padded_len + t + q
        tl.store(du + vector, writes)
        # Token t's decay lies between what is read at t or later and what was written before it.
        reads = tl.cumsum(reads, 0, reverse=True)
        tl.store(da + vector, anchor + reads + (tl.cumsum(writes, 0) - writes))
    store_tile(dB, b_db, b, t, split, n, so_b, so_t, so_h, seq_len, Q, NB, TMA)
    store_tile(dC, b_dc, b, t, split, n, so_b, so_t, so_h, seq_len, Q, NB, TMA)


@triton.jit(do_not_specialize=LENGTHS)
def finish_bc_kernel(
    dB_parts, dC_parts, dB, dC, seq_len, n_groups, n_splits, so_b, so_t,
    BT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sum the splits of dB and dC, first to last."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    g = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    m = (t < seq_len)[:, None]
    b_db = tl.zeros((BT, N), tl.float32)
    b_dc = tl.zeros((BT, N), tl.float32)
    token = (row * seq_len + t)[:, None] * n_groups + g
    for k in range(n_splits):
        o = (token * n_splits + k) * N + n[None, :]
        b_db += tl.load(dB_parts + o, mask=m, other=0.0)
        b_dc += tl.load(dC_parts + o, mask=m, other=0.0)
    o = row * so_b + t.to(tl.int64)[:, None] * so_t + g * N + n[None, :]
    tl.store(dB + o, b_db.to(dB.dtype.element_ty), mask=m)
    tl.store(dC + o, b_dc.to(dC.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=LENGTHS)
def finish_dt_kernel(
    dt, dt_bias, A, log_dt, du, da, ddt, dA, ddt_bias,
    sdt_b, sdt_t, sdt_h, seq_len, padded_len, n_heads, dt_min, dt_max,
    N_PARTS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """ddt from the parts of du and da, through limits and softplus; dA, ddt_bias per BT tokens."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    b = tl.program_id(2)
    m_h = h < n_heads
    m = m_h[None, :] & (t < seq_len)[:, None]
    o = (b.to(tl.int64) * n_heads + h)[None, :] * padded_len + t[:, None]
    b_du = tl.zeros((BT, BH), tl.float32)
    b_da = tl.zeros((BT, BH), tl.float32)
    for k in range(N_PARTS):
        part = k * (tl.num_programs(2).to(tl.int64) * n_heads * padded_len)
        b_du += tl.load(du + part + o, mask=m, other=0.0)
        b_da += tl.load(da + part + o, mask=m, other=0.0)
    size = tl.exp2(tl.load(log_dt + o, mask=m, other=float("-inf")))
    m = m & (size > 0.0)  # padding has none
    b_a = tl.load(A + h, mask=m_h, other=0.0).to(tl.float32)
    # Behind a decay this strong nothing is left: what b_da holds is rounding, and dt is large.
    b_da = tl.where(size * b_a[None, :] > -STRONG_DECAY, b_da, 0.0)
    grad = tl.where(m, b_du / size + b_a[None, :] * b_da, 0.0)
    row = b.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dA + row * n_heads + h, tl.sum(tl.where(m, b_da * size, 0.0), 0), mask=m_h)
    m_dt = m_h[None, :] & (t < seq_len)[:, None]
    raw = step_size(dt, dt_bias, b, t, h, sdt_b, sdt_t, sdt_h, m_dt, m_h, HAS_BIAS)
    limited = softplus(raw) if SOFTPLUS else raw
    grad = tl.where((limited >= dt_min) & (limited <= dt_max), grad, 0.0)
    if SOFTPLUS:
        grad = grad / (1.0 + tl.exp(-raw))
    if HAS_BIAS:
        tl.store(ddt_bias + row * n_heads + h, tl.sum(grad, 0), mask=m_h)
    o_dt = (b.to(tl.int64) * seq_len + t)[:, None] * n_heads + h[None, :]
    tl.store(ddt + o_dt, grad.to(ddt.dtype.element_ty), mask=m_dt)


@triton.jit(do_not_specialize=LENGTHS)
def finish_heads_kernel(
    dA_parts, dD_parts, dbias_parts, dA, dD, dbias, n_rows, n_tile_rows, n_heads,
    BR: tl.constexpr, BH: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Sum dA, dD and ddt_bias over tokens."""
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    m_h = h < n_heads
    b_da = tl.zeros((BR, BH), tl.float32)
    b_dd = tl.zeros((BR, BH), tl.float32)
    b_db = tl.zeros((BR, BH), tl.float32)
    for r0 in range(0, tl.maximum(n_rows, n_tile_rows), BR):
        r = r0 + tl.arange(0, BR)
        o = r.to(tl.int64)[:, None] * n_heads + h[None, :]
        m = (r < n_rows)[:, None] & m_h[None, :]
        b_da += tl.load(dA_parts + o, mask=m, other=0.0)
        if HAS_BIAS:
            b_db += tl.load(dbias_parts + o, mask=m, other=0.0)
        if HAS_D:
            m_tiles = (r < n_tile_rows)[:, None] & m_h[None, :]
            b_dd += tl.load(dD_parts + o, mask=m_tiles, other=0.0)
    tl.store(dA + h, tl.sum(b_da, 0).to(dA.dtype.element_ty), mask=m_h)
    if HAS_D:
        tl.store(dD + h, tl.sum(b_dd, 0).to(dD.dtype.element_ty), mask=m_h)
    if HAS_BIAS:
        tl.store(dbias + h, tl.sum(b_db, 0).to(dbias.dtype.element_ty), mask=m_h)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, ddt, dA, dB, dC, dD, ddt_bias and d_initial_state; empty for inputs left out."""
    A, D, dt_bias, start, end = dense(A, D, dt_bias, initial_state, dfinal_state)
    s = prepare(x, dt, A, B, dt_bias, seq_idx, dt_softplus, dt_min, dt_max)
    x, B, C, dy = (readable(t, s.tma) for t in (x, B, C, dy))
    chunk = s.config["across"]["CHUNK"]
    states, _ = chunk_states(s, x, B, chunk, start, reverse=False)
    dstates, dinitial_state = chunk_states(
        s, dy, C, chunk, end, reverse=True, to_far_edge=initial_state is not None
    )
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    _dx(s, dy, B, C, D, dstates, dx, chunk)
    n_splits = head_splits(s.heads_per_group)
    dcb, du, da, dD_parts = _inside(s, x, dy, B, C, D, n_splits)
    _across(s, x, dy, B, C, states, dstates, dcb, du, da, dB, dC, chunk, n_splits)
    ddt, dA, dD, ddt_bias = _finish(
        s, dt, A, D, dt_bias, du, da, dD_parts, dt_softplus, dt_min, dt_max
    )
    if initial_state is not None:
        dinitial_state = dinitial_state.to(initial_state.dtype)
    return dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state


def head_splits(heads_per_group: int) -> int:
    """In how many programs to work through the heads of a group: from shapes alone."""
    return next(
        n
        for n in range(1, heads_per_group + 1)
        if heads_per_group % n == 0 and heads_per_group // n <= MOST_HEADS_PER_PROGRAM
    )


def _dx(
    s: Scan, dy: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dstates: Tensor, dx: Tensor,
    chunk: int,
) -> None:  # fmt: skip
    settings = s.config["dx"]
    tile, block = settings["Q"], settings["PB"]
    launch(
        dx_kernel,
        (
            triton.cdiv(s.seq_len, settings["SPAN"]),
            s.n_heads * (s.headdim // block),
            s.batch,
        ),
        dy.device,
        tiles(dy, tile, block, s.tma),
        tiles(B, tile, s.d_state, s.tma),
        tiles(C, tile, s.d_state, s.tma),
        D,
        s.log_decay,
        s.log_dt,
        s.start,
        state_blocks(dstates, block, s.d_state, s.tma),
        tiles(dx, tile, block, s.tma),
        *dy.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *dx.stride()[:3],
        s.seq_len,
        s.padded_len,
        s.n_heads,
        s.heads_per_group,
        triton.cdiv(s.seq_len, chunk),
        CHUNK=chunk,
        P=s.headdim,
        N=s.d_state,
        HAS_D=D is not None,
        PACKED=s.packed,
        EXACT=s.exact,
        **settings,
    )


def _inside(
    s: Scan, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, D: Tensor | None, n_splits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = s.config["inside"]
    tile = settings["Q"]
    n_tiles = triton.cdiv(s.seq_len, tile)
    n_parts = 1 + s.d_state // s.config["across"]["NB"]
    dcb = torch.empty(
        s.batch, n_tiles * tile, s.n_groups * n_splits * tile, dtype=x.dtype, device=x.device
    )
    du, da = torch.empty(
        2, n_parts, s.batch, s.n_heads, s.padded_len, dtype=torch.float32, device=x.device
    )
    dD_parts = torch.empty(s.batch * n_tiles, s.n_heads, dtype=torch.float32, device=x.device)
    launch(
        inside_kernel,
        (n_tiles, s.n_groups * n_splits, s.batch),
        x.device,
        tiles(x, tile, s.headdim, s.tma),
        tiles(dy, tile, s.headdim, s.tma),
        tiles(B, tile, s.d_state, s.tma),
        tiles(C, tile, s.d_state, s.tma),
        s.log_decay,
        s.log_dt,
        s.start,
        dcb,
        du[0],
        da[0],
        dD_parts,
        *x.stride()[:3],
        *dy.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        s.seq_len,
        s.padded_len,
        s.n_heads,
        s.heads_per_group,
        n_splits,
        s.heads_per_group // n_splits,
        P=s.headdim,
        N=s.d_state,
        HAS_D=D is not None,
        PACKED=s.packed,
        EXACT=s.exact,
        **settings,
    )
    return dcb, du, da, dD_parts


def _across(
    s: Scan, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, states: Tensor, dstates: Tensor,
    dcb: Tensor, du: Tensor, da: Tensor, dB: Tensor, dC: Tensor, chunk: int, n_splits: int,
) -> None:  # fmt: skip
    settings = s.config["across"]
    tile, block = settings["Q"], settings["NB"]
    out_B, out_C = dB, dC
    if n_splits > 1:
        shape = (2, s.batch, s.seq_len, s.n_groups * n_splits, s.d_state)
        out_B, out_C = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        across_kernel,
        (
            triton.cdiv(s.seq_len, tile),
            s.n_groups * n_splits * (s.d_state // block),
            s.batch,
        ),
        x.device,
        tiles(x, tile, s.headdim, s.tma),
        tiles(dy, tile, s.headdim, s.tma),
        tiles(B, tile, block, s.tma),
        tiles(C, tile, block, s.tma),
        s.log_decay,
        s.log_dt,
        s.start,
        state_blocks(states, s.headdim, block, s.tma),
        state_blocks(dstates, s.headdim, block, s.tma),
        dcb,
        du[1:],
        da[1:],
        tiles(out_B, tile, block, s.tma),
        tiles(out_C, tile, block, s.tma),
        *x.stride()[:3],
        *dy.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *out_B.stride()[:3],
        s.seq_len,
        s.padded_len,
        s.n_heads,
        s.heads_per_group,
        n_splits,
        s.heads_per_group // n_splits,
        triton.cdiv(s.seq_len, chunk),
        P=s.headdim,
        N=s.d_state,
        PACKED=s.packed,
        EXACT=s.exact,
        **settings,
    )
    if n_splits > 1:
        rows = min(32, 4096 // s.d_state)  # two float32 tiles in registers
        launch(
            finish_bc_kernel,
            (triton.cdiv(s.seq_len, rows), s.n_groups, s.batch),
            x.device,
            out_B,
            out_C,
            dB,
            dC,
            s.seq_len,
            s.n_groups,
            n_splits,
            *dB.stride()[:2],
            BT=rows,
            N=s.d_state,
            num_warps=4,
        )


def _finish(
    s: Scan, dt: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None, du: Tensor,
    da: Tensor, dD_parts: Tensor, dt_softplus: bool, dt_min: float, dt_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    device = dt.device
    rows, columns = 64, 16
    n_blocks = triton.cdiv(s.seq_len, rows)
    parts = torch.empty(2, s.batch * n_blocks, s.n_heads, dtype=torch.float32, device=device)
    dA_parts, dbias_parts = parts
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=device)
    launch(
        finish_dt_kernel,
        (n_blocks, triton.cdiv(s.n_heads, columns), s.batch),
        device,
        dt,
        dt_bias,
        A,
        s.log_dt,
        du,
        da,
        ddt,
        dA_parts,
        dbias_parts,
        *dt.stride(),
        s.seq_len,
        s.padded_len,
        s.n_heads,
        dt_min,
        dt_max,
        N_PARTS=du.shape[0],
        BT=rows,
        BH=columns,
        SOFTPLUS=dt_softplus,
        HAS_BIAS=dt_bias is not None,
        num_warps=4,
    )
    # Each gradient a tensor of its own: outputs of an op must not share memory.
    dA, dD, ddt_bias = (
        dt.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)
        for t in (A, D, dt_bias)
    )
    launch(
        finish_heads_kernel,
        (triton.cdiv(s.n_heads, columns),),
        device,
        dA_parts,
        dD_parts,
        dbias_parts,
        dA,
        dD,
        ddt_bias,
        dA_parts.shape[0],
        dD_parts.shape[0],
        s.n_heads,
        BR=64,
        BH=columns,
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        num_warps=4,
    )
    return ddt, dA, dD, ddt_bias
