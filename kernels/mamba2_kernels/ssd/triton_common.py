"""Device functions that the forward and backward kernels of the scan share.

Letters: b batch, t position, h head, p headdim, g group, n d_state; a tile is `Q` tokens.

A tensor (b, t, h, p) comes either as a tensor descriptor (`TMA`, sm_90 and later) or as a pointer
with three strides, which is why every load names its batch row, its first token and its head.
Vectors of one head are float32 (b, h, padded_len):

    log_decay   log2 of what one token leaves of the state: dt A log2(e); 0 at padding
    log_dt      log2 dt; -inf at padding, so that its weight exp2(log_dt + ...) is 0

and `start` (b, padded_len) int32 is the first token of each token's document, negative for the one
that continues the initial state; padding has that of the document it stands in, plus `PADDING`.
"""

import triton
import triton.language as tl

PADDING: tl.constexpr = tl.constexpr(1 << 30)


@triton.jit
def load_tile(
    x, b, t, h, c, stride_b, stride_t, stride_h, seq_len,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[b, t : t + ROWS, h, c : c + COLS]; tokens past the end read as 0."""
    if TMA:
        tile = x.load([b, t, h, c]).reshape(ROWS, COLS)
    else:
        rows = t + tl.arange(0, ROWS)
        x += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + c
        p_x = x + rows.to(tl.int64)[:, None] * stride_t + tl.arange(0, COLS)[None, :]
        tile = tl.load(p_x, mask=(rows < seq_len)[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(
    x, tile, b, t, h, c, stride_b, stride_t, stride_h, seq_len,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[b, t : t + ROWS, h, c : c + COLS] = tile; tokens past the end are left out."""
    if TMA:
        x.store([b, t, h, c], tile.to(x.dtype).reshape(1, ROWS, 1, COLS))
    else:
        rows = t + tl.arange(0, ROWS)
        x += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + c
        p_x = x + rows.to(tl.int64)[:, None] * stride_t + tl.arange(0, COLS)[None, :]
        tl.store(p_x, tile.to(x.dtype.element_ty), mask=(rows < seq_len)[:, None])


@triton.jit
def load_state(
    states, row, n, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, TMA: tl.constexpr
):
    """A (p, n) block of the states, which lie as one matrix of `N` columns."""
    if TMA:
        state = states.load([row, n])
    else:
        rows = row.to(tl.int64) + tl.arange(0, PB)
        state = tl.load(states + rows[:, None] * N + n + tl.arange(0, NB)[None, :])
    return state.to(tl.float32)


@triton.jit
def store_state(
    states, state, row, n, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, TMA: tl.constexpr
):
    if TMA:
        states.store([row, n], state.to(states.dtype))
    else:
        rows = row.to(tl.int64) + tl.arange(0, PB)
        p_states = states + rows[:, None] * N + n + tl.arange(0, NB)[None, :]
        tl.store(p_states, state.to(states.dtype.element_ty))


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """a @ b with float32 sums; float32 operands keep their precision on tensor cores."""
    if EXACT:
        product = tl.dot(a, b, input_precision="tf32x3")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def add_dot(a, b, total, EXACT: tl.constexpr):
    """total + a @ b."""
    if EXACT:
        total = tl.dot(a, b, total, input_precision="tf32x3")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def total_of(v):
    """The sum of a vector, shape (1,).

    Triton 3.7.1 crashes on sm_100 when a 1-d reduction follows a reduced dot.
    """
    return tl.sum(v[None, :], 1)


@triton.jit
def running_decay(p_decay, t, Q: tl.constexpr, EXACT: tl.constexpr):
    """Running sums of the tile's log2 decays and their totals, as whole numbers and remainders.

    A running sum near -1000 is off by 6e-5, and so is every decay taken from a difference of two.
    Whole numbers add without error, and remainders below 1/2 stay small, which leaves 1e-6. 16-bit
    operands do not show the difference: for them (EXACT=0) all of it is remainder.
    """
    a = tl.load(p_decay + t + tl.arange(0, Q))
    whole = tl.floor(a + 0.5) if EXACT else tl.zeros_like(a)
    rest = a - whole
    return tl.cumsum(whole, 0), tl.cumsum(rest, 0), tl.sum(whole, 0), tl.sum(rest, 0)


@triton.jit
def log_sum(whole, rest, EXACT: tl.constexpr):
    return whole + rest if EXACT else rest


@triton.jit
def pair_decay(row_whole, row_rest, col_whole, col_rest, EXACT: tl.constexpr):
    """exp2 of rows minus columns: what is left of a column's token at a row's."""
    log_decay = row_rest[:, None] - col_rest[None, :]
    if EXACT:
        log_decay += row_whole[:, None] - col_whole[None, :]
    return tl.exp2(log_decay)


@triton.jit
def weight_in(whole, rest, p_start, t, Q: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr):
    """What is left, at each token, of the state that enters the tile; 0 in later documents."""
    weight = tl.exp2(log_sum(whole, rest, EXACT))
    if PACKED:
        weight = tl.where(tl.load(p_start + t + tl.arange(0, Q)) < t, weight, 0.0)
    return weight


@triton.jit
def weight_out(
    whole, rest, all_whole, all_rest, log_dt, p_start, t,
    Q: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dt times what is left of each token in the state that leaves; 0 in earlier documents."""
    weight = tl.exp2(log_sum(all_whole - whole, all_rest - (rest - log_dt), EXACT))
    if PACKED:
        weight = tl.where(tl.arange(0, Q) >= last_start(p_start, t, Q), weight, 0.0)
    return weight


@triton.jit
def weight_through(
    all_whole, all_rest, p_start, t, Q: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr
):
    """What is left of the entering state in the one that leaves; 0 if a document starts."""
    weight = tl.exp2(log_sum(all_whole, all_rest, EXACT))
    if PACKED:
        weight = tl.where(last_start(p_start, t, Q) < 0, weight, 0.0)
    return weight


@triton.jit
def last_start(p_start, t, Q: tl.constexpr):
    """Where the document whose state leaves the tile begins, counted from the tile's start."""
    first = tl.load(p_start + t + Q - 1)
    return tl.where(first >= PADDING // 2, first - PADDING, first) - t


@triton.jit
def carry_state(
    state, x, keys, p_decay, p_log_dt, p_start, t, b, h, p, g, n,
    sx_b, sx_t, sx_h, sk_b, sk_t, sk_h, seq_len,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Carry a (p, n) block of the state over the tile that begins at token t.

    REVERSE=0, with (x, B): the state, forwards in time. REVERSE=1, with (dy, C): its gradient,
    backwards.
    """
    whole, rest, all_whole, all_rest = running_decay(p_decay, t, Q, EXACT)
    if REVERSE:
        weight = weight_in(whole, rest, p_start, t, Q, PACKED, EXACT)
    else:
        log_dt = tl.load(p_log_dt + t + tl.arange(0, Q))
        weight = weight_out(whole, rest, all_whole, all_rest, log_dt, p_start, t, Q, PACKED, EXACT)
    through = weight_through(all_whole, all_rest, p_start, t, Q, PACKED, EXACT)
    b_x = load_tile(x, b, t, h, p, sx_b, sx_t, sx_h, seq_len, Q, PB, TMA)
    b_k = load_tile(keys, b, t, g, n, sk_b, sk_t, sk_h, seq_len, Q, NB, TMA)
    # [p, q] @ [q, n] -> [p, n]
    return add_dot(tl.trans((b_x * weight[:, None]).to(b_x.dtype)), b_k, state * through, EXACT)
