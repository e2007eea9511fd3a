"""The scan's forward pass in Triton: three launches, and never anything quadratic in HBM.

    prepare   tokens x heads       dt, log decay and document starts, once for all kernels
    states    blocks of (p, n)     the state that enters each chunk, token after token
    scan      chunks x heads       y: the state in registers, the tile's own part by C B^T

Inside a tile, with a_i the running sum of log2 decays,

    y_i = exp2(a_i) C_i S + sum_{j <= i} (C_i . B_j) exp2(a_i - a_j + log2 dt_j) x_j + D x_i

which is the chunked form of Dao and Gu (arXiv:2405.21060), section 6. The head dimension of x and
the state dimension are cut into blocks; see `triton_common` for the letters.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_kernels.launch import LENGTHS, descriptor, fits_descriptor, launch, scan_config
from mamba2_kernels.ssd.triton_common import (
    PADDING,
    add_dot,
    carry_state,
    dot,
    load_state,
    load_tile,
    pair_decay,
    running_decay,
    store_state,
    store_tile,
    weight_in,
    weight_out,
    weight_through,
)

# Vectors of one head are padded to a multiple of this, so that no tile ends past them.
LONGEST_TILE = 64
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Below this a decay is 0 to any float32, and running sums of it would lose the rest.
LEAST_LOG_DECAY: tl.constexpr = tl.constexpr(-126.0)
# Keeps log2 dt finite at dt = 0, whose gradient is then exact: dt cancels.
LEAST_DT: tl.constexpr = tl.constexpr(2.0**-100)


@triton.jit
def softplus(v):
    """log(1 + exp(v)) = max(v, 0) + 2 atanh(e / (2 + e)), e = exp(-|v|): exact for small dt too."""
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)  # at most 1/3
    s2 = s * s
    series = 1.0 / 15.0 + s2 * (1.0 / 17.0)
    series = 1.0 / 13.0 + s2 * series
    series = 1.0 / 11.0 + s2 * series
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    return tl.maximum(v, 0.0) + 2.0 * (s + s * s2 * series)


@triton.jit
def later(a, b):
    return tl.maximum(a, b)


@triton.jit
def step_size(dt, dt_bias, b, t, h, sdt_b, sdt_t, sdt_h, mask, mask_h, HAS_BIAS: tl.constexpr):
    """dt + dt_bias before softplus and limits, (t, h) in float32."""
    p_dt = dt + b.to(tl.int64) * sdt_b + t.to(tl.int64)[:, None] * sdt_t + h[None, :] * sdt_h
    raw = tl.load(p_dt, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit
def find_starts(seq_idx, start, seq_len, padded_len, ss_t, BLOCK: tl.constexpr):
    """Write the first token of each token's document, one row of the batch."""
    latest = -1  # the last token so far that is not padding
    first = -1  # the first token of its document; -1 continues the initial state
    for t0 in range(0, padded_len, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        here = tl.load(seq_idx + t.to(tl.int64) * ss_t, mask=t < seq_len, other=-1)
        before = t - 1
        m_before = (before >= 0) & (before < seq_len)
        left = tl.load(seq_idx + before.to(tl.int64) * ss_t, mask=m_before, other=-1)
        token = tl.associative_scan(tl.where(left >= 0, before, -1), 0, later)
        token = tl.maximum(token, latest)
        document = tl.load(seq_idx + token.to(tl.int64) * ss_t, mask=token >= 0, other=-1)
        starts = (here >= 0) & (token >= 0) & (here != document)
        begin = tl.maximum(tl.associative_scan(tl.where(starts, t, -1), 0, later), first)
        tl.store(start + t, tl.where(here >= 0, begin, begin + PADDING), mask=t < padded_len)
        latest = tl.max(token, 0)
        first = tl.max(begin, 0)


@triton.jit(do_not_specialize=LENGTHS)
def prepare_kernel(
    dt, dt_bias, A, seq_idx, log_decay, log_dt, start,
    sdt_b, sdt_t, sdt_h, ss_b, ss_t, seq_len, padded_len, n_heads, dt_min, dt_max,
    BT: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    if PACKED and tl.program_id(1) == tl.num_programs(1) - 1:
        # One program per row looks for documents beside those that work on dt.
        if tl.program_id(0) == 0:
            row = b.to(tl.int64)
            find_starts(
                seq_idx + row * ss_b, start + row * padded_len, seq_len, padded_len, ss_t, BLOCK
            )
    else:
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        h = tl.program_id(1) * BH + tl.arange(0, BH)
        m_h = h < n_heads
        m = (t < seq_len)[:, None] & m_h[None, :]
        v = step_size(dt, dt_bias, b, t, h, sdt_b, sdt_t, sdt_h, m, m_h, HAS_BIAS)
        if SOFTPLUS:
            v = softplus(v)
        v = tl.minimum(tl.maximum(v, dt_min), dt_max)
        if PACKED:
            p_s = seq_idx + b.to(tl.int64) * ss_b + t.to(tl.int64) * ss_t
            m = m & (tl.load(p_s, mask=t < seq_len, other=-1) >= 0)[:, None]
        a = v * (tl.load(A + h, mask=m_h, other=0.0).to(tl.float32) * LOG2E)[None, :]
        o = (b.to(tl.int64) * n_heads + h)[None, :] * padded_len + t[:, None]
        m_out = m_h[None, :] & (t < padded_len)[:, None]
        tl.store(log_decay + o, tl.where(m, tl.maximum(a, LEAST_LOG_DECAY), 0.0), mask=m_out)
        log_v = tl.log2(tl.maximum(v, LEAST_DT))
        tl.store(log_dt + o, tl.where(m, log_v, float("-inf")), mask=m_out)


@triton.jit(do_not_specialize=LENGTHS)
def states_kernel(
    x, keys, log_decay, log_dt, start, edge, states, far_edge,
    sx_b, sx_t, sx_h, sk_b, sk_t, sk_h,
    seq_len, padded_len, n_heads, heads_per_group, n_chunks,
    CHUNK: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    N: tl.constexpr, NB: tl.constexpr, REVERSE: tl.constexpr, HAS_EDGE: tl.constexpr,
    TO_FAR_EDGE: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One (p, n) block of one head's states, over the whole sequence.

    REVERSE=0, with (x, B): the state that enters each chunk; `edge` is the initial state.
    REVERSE=1, with (dy, C): the gradient of the state that leaves each chunk; `edge` is that of
    the final state, and `far_edge` receives that of the initial state.
    """
    p = (tl.program_id(0) // (N // NB)) * PB
    n = (tl.program_id(0) % (N // NB)) * NB
    h = tl.program_id(1)
    b = tl.program_id(2)
    g = h // heads_per_group
    head = b.to(tl.int64) * n_heads + h
    log_decay += head * padded_len
    log_dt += head * padded_len
    start += b.to(tl.int64) * padded_len
    o_edge = (head * P + p + tl.arange(0, PB))[:, None] * N + n + tl.arange(0, NB)[None, :]
    if HAS_EDGE:
        state = tl.load(edge + o_edge).to(tl.float32)
    else:
        state = tl.zeros((PB, NB), tl.float32)
    n_tiles = tl.cdiv(seq_len, Q)
    PER: tl.constexpr = CHUNK // Q
    # Nothing reads the state behind the last chunk, unless it is the far edge. One flat loop, not
    # one inside another: it fetches tiles ahead over the chunks' ends.
    if REVERSE:
        n_read = n_tiles - tl.minimum(n_tiles, PER)
    else:
        n_read = (n_chunks - 1) * PER
    for k in range(n_read):
        i = n_tiles - 1 - k if REVERSE else k
        row = ((b * n_chunks + i // PER) * n_heads + h) * P + p
        if REVERSE:
            at_edge = (k == 0) | (i % PER == PER - 1)
        else:
            at_edge = i % PER == 0
        if PER == 1 or at_edge:
            store_state(states, state, row, n, N, PB, NB, TMA)
        state = carry_state(
            state, x, keys, log_decay, log_dt, start, i * Q, b, h, p, g, n,
            sx_b, sx_t, sx_h, sk_b, sk_t, sk_h, seq_len,
            Q, PB, NB, REVERSE, PACKED, TMA, EXACT,
        )  # fmt: skip
    row = ((b * n_chunks + (0 if REVERSE else n_chunks - 1)) * n_heads + h) * P + p
    store_state(states, state, row, n, N, PB, NB, TMA)
    if TO_FAR_EDGE:
        for k in range(n_read, n_tiles):
            i = n_tiles - 1 - k if REVERSE else k
            state = carry_state(
                state, x, keys, log_decay, log_dt, start, i * Q, b, h, p, g, n,
                sx_b, sx_t, sx_h, sk_b, sk_t, sk_h, seq_len,
                Q, PB, NB, REVERSE, PACKED, TMA, EXACT,
            )  # fmt: skip
    if TO_FAR_EDGE:
        tl.store(far_edge + o_edge, state)


@triton.jit(do_not_specialize=LENGTHS)
def scan_kernel(
    x, B, C, D, log_decay, log_dt, start, initial_state, states, y, final_state,
    sx_b, sx_t, sx_h, sb_b, sb_t, sb_h, sc_b, sc_t, sc_h, sy_b, sy_t, sy_h,
    seq_len, padded_len, n_heads, heads_per_group,
    CHUNK: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_STATES: tl.constexpr,
    HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, STATE_PN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """y of one chunk, one head and PB of its channels; the state stays in registers.

    The state is carried over a tile before the tile's own part is done: that order needs the
    fewest registers. It is held as (p, n) or (n, p), whichever compiles better.
    """
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
    o_edge = (head * P + p + tl.arange(0, PB))[:, None] * N + tl.arange(0, N)[None, :]
    if HAS_D:
        d = tl.load(D + h).to(tl.float32)
    if HAS_STATES:
        row = ((b * tl.num_programs(0) + c) * n_heads + h) * P + p
        state = load_state(states, row, 0, N, PB, N, TMA)
    elif HAS_INITIAL:
        state = tl.load(initial_state + o_edge).to(tl.float32)
    else:
        state = tl.zeros((PB, N), tl.float32)
    if not STATE_PN:
        state = tl.trans(state)
    for i in range(c * (CHUNK // Q), tl.minimum((c + 1) * (CHUNK // Q), tl.cdiv(seq_len, Q))):
        t = i * Q
        whole, rest, all_whole, all_rest = running_decay(log_decay, t, Q, EXACT)
        b_x = load_tile(x, b, t, h, p, sx_b, sx_t, sx_h, seq_len, Q, PB, TMA)
        b_b = load_tile(B, b, t, g, 0, sb_b, sb_t, sb_h, seq_len, Q, N, TMA)
        b_c = load_tile(C, b, t, g, 0, sc_b, sc_t, sc_h, seq_len, Q, N, TMA)
        b_ldt = tl.load(log_dt + t + q)
        w_in = weight_in(whole, rest, start, t, Q, PACKED, EXACT)
        w_out = weight_out(whole, rest, all_whole, all_rest, b_ldt, start, t, Q, PACKED, EXACT)
        w_through = weight_through(all_whole, all_rest, start, t, Q, PACKED, EXACT)
        seen = q[:, None] >= q[None, :]
        if PACKED:
            # False at padding too: its start lies behind every token.
            seen = seen & (q[None, :] >= (tl.load(start + t + q) - t)[:, None])
        b_xw = (b_x * w_out[:, None]).to(b_x.dtype)
        if STATE_PN:
            # [q, n] @ [n, p] -> [q, p], then [p, q] @ [q, n] -> [p, n]
            b_y = dot(b_c, tl.trans(state.to(b_c.dtype)), EXACT) * w_in[:, None]
            state = add_dot(tl.trans(b_xw), b_b, state * w_through, EXACT)
        else:
            b_y = dot(b_c, state.to(b_c.dtype), EXACT) * w_in[:, None]
            state = add_dot(tl.trans(b_b), b_xw, state * w_through, EXACT)
        # [q, n] @ [n, q] -> [q, q]
        cb = dot(b_c, tl.trans(b_b), EXACT) * pair_decay(whole, rest, whole, rest - b_ldt, EXACT)
        cb = tl.where(seen, cb, 0.0)
        if HAS_D:
            cb = tl.where(seen & (q[:, None] == q[None, :]), cb + d, cb)
        # [q, q] @ [q, p] -> [q, p]
        b_y = add_dot(cb.to(b_x.dtype), b_x, b_y, EXACT)
        store_tile(y, b_y, b, t, h, p, sy_b, sy_t, sy_h, seq_len, Q, PB, TMA)
    if HAS_FINAL and c == tl.num_programs(0) - 1:
        tl.store(final_state + o_edge, state if STATE_PN else tl.trans(state))


class Scan(NamedTuple):
    """What the kernels of one call share: sizes, the vectors of every head, and the settings."""

    batch: int
    seq_len: int
    n_heads: int
    headdim: int
    n_groups: int
    d_state: int
    padded_len: int
    log_decay: Tensor
    log_dt: Tensor
    start: Tensor
    config: dict[str, dict[str, Any]]
    packed: bool
    exact: bool

    @property
    def tma(self) -> bool:
        return bool(self.config["scan"]["TMA"])

    @property
    def heads_per_group(self) -> int:
        return self.n_heads // self.n_groups


def forward(
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
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state in float32, empty when it is not asked for."""
    A, D, dt_bias, initial_state = dense(A, D, dt_bias, initial_state)
    s = prepare(x, dt, A, B, dt_bias, seq_idx, dt_softplus, dt_min, dt_max)
    x, B, C = (readable(t, s.tma) for t in (x, B, C))
    settings = dict(s.config["scan"])
    chunk = settings["CHUNK"]
    n_chunks = triton.cdiv(s.seq_len, chunk)
    states = None
    if n_chunks > 1:
        states, _ = chunk_states(s, x, B, chunk, initial_state, reverse=False)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = (s.batch, s.n_heads, s.headdim, s.d_state) if return_final_state else (0,)
    final_state = torch.empty(shape, dtype=torch.float32, device=x.device)
    block, tile = settings["PB"], settings["Q"]
    launch(
        scan_kernel,
        (n_chunks, s.n_heads * (s.headdim // block), s.batch),
        x.device,
        tiles(x, tile, block, s.tma),
        tiles(B, tile, s.d_state, s.tma),
        tiles(C, tile, s.d_state, s.tma),
        D,
        s.log_decay,
        s.log_dt,
        s.start,
        initial_state,
        None if states is None else state_blocks(states, block, s.d_state, s.tma),
        tiles(y, tile, block, s.tma),
        final_state,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *y.stride()[:3],
        s.seq_len,
        s.padded_len,
        s.n_heads,
        s.heads_per_group,
        P=s.headdim,
        N=s.d_state,
        HAS_D=D is not None,
        HAS_INITIAL=initial_state is not None,
        HAS_STATES=states is not None,
        HAS_FINAL=return_final_state,
        PACKED=s.packed,
        EXACT=s.exact,
        **settings,
    )
    return y, final_state


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Scan:
    """Compute what every kernel of a call needs to know of dt, A and the documents."""
    batch, seq_len, n_heads, headdim = x.shape
    padded_len = triton.cdiv(seq_len, LONGEST_TILE) * LONGEST_TILE
    vectors = torch.empty(2, batch, n_heads, padded_len, dtype=torch.float32, device=x.device)
    log_decay, log_dt = vectors.unbind(0)
    start = log_dt  # stands in; never read
    if seq_idx is not None:
        start = torch.empty(batch, padded_len, dtype=torch.int32, device=x.device)
    rows, columns = 64, 32
    launch(
        prepare_kernel,
        (
            triton.cdiv(padded_len, rows),
            triton.cdiv(n_heads, columns) + (seq_idx is not None),
            batch,
        ),
        x.device,
        dt,
        dt_bias,
        A,
        seq_idx,
        log_decay,
        log_dt,
        start,
        *dt.stride(),
        *((0, 0) if seq_idx is None else seq_idx.stride()),
        seq_len,
        padded_len,
        n_heads,
        dt_min,
        dt_max,
        BT=rows,
        BH=columns,
        BLOCK=min(1024, triton.next_power_of_2(padded_len)),
        SOFTPLUS=dt_softplus,
        HAS_BIAS=dt_bias is not None,
        PACKED=seq_idx is not None,
        num_warps=4,
    )
    return Scan(
        batch=batch,
        seq_len=seq_len,
        n_heads=n_heads,
        headdim=headdim,
        n_groups=B.shape[2],
        d_state=B.shape[3],
        padded_len=padded_len,
        log_decay=log_decay,
        log_dt=log_dt,
        start=start,
        config=scan_config(x.device, headdim, B.shape[3], x.dtype),
        packed=seq_idx is not None,
        exact=x.dtype == torch.float32,
    )


def chunk_states(
    s: Scan,
    x: Tensor,
    keys: Tensor,
    chunk: int,
    edge: Tensor | None,
    *,
    reverse: bool,
    to_far_edge: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the states at the chunks' ends, (batch * chunk * head * p, n) in x's dtype.

    With `to_far_edge` also the one behind the last chunk visited, in float32; empty otherwise.
    """
    settings = s.config["states"]
    tile, p_block, n_block = settings["Q"], settings["PB"], settings["NB"]
    n_chunks = triton.cdiv(s.seq_len, chunk)
    rows = s.batch * n_chunks * s.n_heads * s.headdim
    states = torch.empty(rows, s.d_state, dtype=x.dtype, device=x.device)
    shape = (s.batch, s.n_heads, s.headdim, s.d_state) if to_far_edge else (0,)
    far_edge = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        states_kernel,
        ((s.headdim // p_block) * (s.d_state // n_block), s.n_heads, s.batch),
        x.device,
        tiles(x, tile, p_block, s.tma),
        tiles(keys, tile, n_block, s.tma),
        s.log_decay,
        s.log_dt,
        s.start,
        edge,
        state_blocks(states, p_block, n_block, s.tma),
        far_edge,
        *x.stride()[:3],
        *keys.stride()[:3],
        s.seq_len,
        s.padded_len,
        s.n_heads,
        s.heads_per_group,
        n_chunks,
        CHUNK=chunk,
        P=s.headdim,
        N=s.d_state,
        REVERSE=reverse,
        HAS_EDGE=edge is not None,
        TO_FAR_EDGE=to_far_edge,
        PACKED=s.packed,
        EXACT=s.exact,
        **settings,
    )
    return states, far_edge


def dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def readable(t: Tensor, tma: bool) -> Tensor:
    """Return t, or a copy where its layout is one that the kernels cannot read.

    Views of a projection's output are read as they are.
    """
    if t.stride(-1) != 1 or (tma and not fits_descriptor(t)):
        return t.contiguous()
    return t


def tiles(t: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """A (b, t, h, p) tensor as the kernels take it, for tiles of one head."""
    return descriptor(t, [1, rows, 1, columns]) if tma else t


def state_blocks(states: Tensor, rows: int, columns: int, tma: bool) -> Any:
    return descriptor(states, [rows, columns]) if tma else states
