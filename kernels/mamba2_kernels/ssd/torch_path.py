"""The SSD scan and its gradient as matrix products, chunk after chunk, in plain PyTorch.

Inside a chunk the recurrence is a product with a lower triangular matrix; between chunks one state
per head carries the past. With cs the cumulative sum of dt A from the start of the chunk, S the
state there and S' the state at its end, for every head:

    y_i = sum_{j <= i} exp(cs_i - cs_j) dt_j (C_i . B_j) x_j  +  exp(cs_i) S C_i  +  D x_i
    S'  = exp(cs_end) S  +  sum_j exp(cs_end - cs_j) dt_j x_j B_j^T

(Dao and Gu, arXiv:2405.21060, section 6). A state lies as (d_state, heads of a group x headdim), so
that a product with B or C serves all heads of a group at once.

The backward pass has only the inputs and recomputes the rest: the state at the start of each block
of chunks first, then, from the last block to the first, the state at each chunk of the block.

Shapes in comments: b batch, l seq_len, c chunk, q position in a chunk (i the later, j the earlier),
h head, g group, r head of a group, p headdim, n d_state.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_kernels.precision import compute_dtype
from mamba2_kernels.ssd.chunks import Chunk, Chunks

CHUNKS_PER_BLOCK = 16  # the least number of states the backward pass holds at a time
TINY_STEP = 1e-20  # stands for smaller step sizes where the backward pass divides by them
SOFTPLUS_THRESHOLD = 20.0  # F.softplus is the identity above it


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
    chunk_size: int,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, empty when it is not asked for."""
    steps = _steps(x, dt, dt_bias, seq_idx, dt_softplus, dt_min, dt_max)
    chunks = Chunks(x, steps.dt, A, B, C, seq_idx)
    skip = None if D is None else D.to(chunks.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = _pack(initial_state, chunks)
    for index in range(chunks.n_chunks):
        chunk = chunks[index]
        y[:, chunk.tokens] = _output(chunk, skip, state)
        if return_final_state or index + 1 < chunks.n_chunks:
            state = _next_state(chunk, state)
    if not return_final_state:
        return y, y.new_empty(0, dtype=chunks.dtype)
    return y, _unpack(state, x.shape[3])


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, ddt, dA, dB, dC, dD, ddt_bias and d_initial_state; empty for inputs left out."""
    steps = _steps(x, dt, dt_bias, seq_idx, dt_softplus, dt_min, dt_max)
    dt_factor = torch.where(steps.dt.abs() < TINY_STEP, TINY_STEP, steps.dt)
    chunks = Chunks(x, steps.dt, A, B, C, seq_idx, dy, dt_factor=dt_factor)
    skip = None if D is None else D.to(chunks.dtype)
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    d_factor = torch.empty_like(steps.dt)
    # float64: sums that cancel, up to the little that passes a position, follow.
    d_cs = torch.empty_like(d_factor, dtype=torch.float64)
    d_end = torch.empty_like(chunks.keep, dtype=torch.float64)
    dD = torch.zeros_like(steps.dt[0, 0])
    d_state = _pack(d_final_state, chunks)
    for index, state in _states_backwards(chunks, _pack(initial_state, chunks)):
        chunk = chunks[index]
        gradient = _chunk_backward(chunk, skip, state, d_state)
        dx[:, chunk.tokens] = gradient.x
        dB[:, chunk.tokens] = gradient.B.transpose(1, 2)
        dC[:, chunk.tokens] = gradient.C.transpose(1, 2)
        d_cs[:, chunk.tokens] = gradient.cs
        d_factor[:, chunk.tokens] = gradient.factor
        d_end[:, index] = gradient.end
        dD += gradient.D
        d_state = gradient.state
    # dt A at a position is part of cs there and at all that follow in the chunk.
    following = chunks.split(d_cs).flip(2).cumsum(2).flip(2)
    d_log_decay = chunks.join(following + d_end[:, :, None]).to(chunks.dtype)
    ddt = (d_factor / dt_factor + d_log_decay * A.to(chunks.dtype)) * steps.slope
    dA = (d_log_decay * steps.dt).sum(dim=(0, 1)).to(A.dtype)
    d_skip, d_bias, d_initial_state = (x.new_empty(0) for _ in range(3))
    if D is not None:
        d_skip = dD.to(D.dtype)
    if dt_bias is not None:
        d_bias = ddt.sum(dim=(0, 1)).to(dt_bias.dtype)
    if initial_state is not None:
        d_initial_state = _unpack(d_state, x.shape[3]).to(initial_state.dtype)
    return dx, ddt.to(dt.dtype), dA, dB, dC, d_skip, d_bias, d_initial_state


class _Steps(NamedTuple):
    dt: Tensor  # (b, l, h) after bias, softplus and limits, 0 at padding
    slope: Tensor  # (b, l, h) its derivative


def _steps(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> _Steps:
    dt = dt.to(compute_dtype(x))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    slope = torch.ones_like(dt)
    if dt_softplus:
        slope = torch.where(dt > SOFTPLUS_THRESHOLD, 1.0, dt.sigmoid())
        dt = F.softplus(dt, threshold=SOFTPLUS_THRESHOLD)
    slope = slope * ((dt >= dt_min) & (dt <= dt_max))
    dt = dt.clamp(dt_min, dt_max)
    if seq_idx is not None:
        padding = (seq_idx < 0)[..., None]
        dt, slope = dt.masked_fill(padding, 0), slope.masked_fill(padding, 0)
    return _Steps(dt, slope)


def _pack(state: Tensor | None, chunks: Chunks) -> Tensor | None:
    """(b, h, p, n) to (b, g, n, r p)."""
    if state is None:
        return None
    n_groups = chunks.tensors[1].shape[2]
    grouped = state.to(chunks.dtype).unflatten(1, (n_groups, -1))
    return grouped.permute(0, 1, 4, 2, 3).flatten(3)


def _unpack(state: Tensor | None, headdim: int) -> Tensor:
    """(b, g, n, r p) to (b, h, p, n)."""
    assert state is not None
    return state.unflatten(3, (-1, headdim)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _weights(decay: Tensor, scores: Tensor, D: Tensor | None) -> Tensor:
    """What y_i sees of x_j: (b, h, i, j)."""
    weights = (decay.unflatten(1, (scores.shape[1], -1)) * scores[:, :, None]).flatten(1, 2)
    if D is not None:
        weights.diagonal(dim1=2, dim2=3).add_(D[:, None])
    return weights


def _output(chunk: Chunk, D: Tensor | None, state: Tensor | None) -> Tensor:
    weights = _weights(chunk.pair_decay(), chunk.scores(), D)
    # (b, h, i, j) @ (b, h, j, p) -> (b, h, i, p)
    y = (weights @ chunk.x.transpose(1, 2)).transpose(1, 2)
    if state is not None:
        # (b, g, i, n) @ (b, g, n, r p) -> (b, g, i, r p)
        past = chunk.by_head(chunk.C @ state)
        y = torch.addcmul(y, past, chunk.from_start[..., None])
    return y


def _next_state(chunk: Chunk, state: Tensor | None) -> Tensor:
    # (b, g, n, j) @ (b, g, j, r p) -> (b, g, n, r p)
    update = chunk.B.transpose(2, 3) @ chunk.by_group(chunk.x * chunk.to_end[..., None])
    return update if state is None else chunk.carry(state, update)


def _states_backwards(chunks: Chunks, state: Tensor | None) -> Iterator[tuple[int, Tensor | None]]:
    """Yield the index of every chunk and the state at its start, from the last to the first."""
    block = max(CHUNKS_PER_BLOCK, math.isqrt(chunks.n_chunks))
    starts = range(0, chunks.n_chunks, block)
    at_blocks = [state]
    for index in range(starts[-1]):
        state = _next_state(chunks[index], state)
        if (index + 1) % block == 0:
            at_blocks.append(state)
    for start in reversed(starts):
        stop = min(start + block, chunks.n_chunks)
        at_chunks = [at_blocks.pop()]
        for index in range(start, stop - 1):
            at_chunks.append(_next_state(chunks[index], at_chunks[-1]))
        for index in range(stop - 1, start - 1, -1):
            yield index, at_chunks.pop()


class _ChunkGradient(NamedTuple):
    x: Tensor  # (b, q, h, p)
    B: Tensor  # (b, g, q, n)
    C: Tensor  # (b, g, q, n)
    D: Tensor  # (h,)
    cs: Tensor  # (b, q, h) float64
    end: Tensor  # (b, h) float64, of the part of cs_end that is not in `cs`
    factor: Tensor  # (b, q, h) of dt where it multiplies x, times dt
    state: Tensor | None  # (b, g, n, r p) of the state at the chunk's start


def _chunk_backward(
    chunk: Chunk, D: Tensor | None, state: Tensor | None, d_state: Tensor | None
) -> _ChunkGradient:
    """The gradient of one chunk, given the state at its start and the gradient of that at its end.

    A factor exp(cs_i - cs_j) that stands in a product has the product times its gradient as its
    own gradient. So the gradient of cs is, row by row and column by column, a sum of the same
    numbers that go into the other gradients.
    """
    assert chunk.dy is not None
    decay, scores = chunk.pair_decay(), chunk.scores()
    x_heads, dy_heads = chunk.x.transpose(1, 2), chunk.dy.transpose(1, 2)
    # Within the chunk. (b, h, j, i) @ (b, h, i, p) -> (b, h, j, p)
    dx = (_weights(decay, scores, D).transpose(2, 3) @ dy_heads).transpose(1, 2)
    # (b, h, i, p) @ (b, h, p, j) -> (b, h, i, j)
    d_weights = dy_heads @ x_heads.transpose(2, 3)
    dD = d_weights.diagonal(dim1=2, dim2=3).sum(dim=(0, 2))
    d_weights = d_weights.mul_(decay).unflatten(1, (scores.shape[1], -1))
    d_scores = chunk.causal(d_weights.sum(dim=2))
    dB, dC = d_scores.transpose(2, 3) @ chunk.C, d_scores @ chunk.B
    products = d_weights.mul_(scores[:, :, None]).flatten(1, 2)
    # The diagonal has no decay. Left in, it would cancel only up to rounding.
    diagonal = products.diagonal(dim1=2, dim2=3)
    d_factor = diagonal.clone()
    diagonal.zero_()
    columns = products.sum(dim=2)
    d_factor += columns
    d_cs = (products.sum(dim=3).double() - columns).transpose(1, 2)
    d_factor = d_factor.transpose(1, 2)
    d_end = torch.zeros_like(d_cs[:, 0])
    d_start: Tensor | None = None

    if state is not None:
        # The part of y that sees the state at the start.
        dy_start = chunk.dy * chunk.from_start[..., None]
        grouped = chunk.by_group(dy_start)
        dC += grouped @ state.transpose(2, 3)
        d_cs += (dy_start * chunk.by_head(chunk.C @ state)).sum(dim=3)
        d_start = chunk.C.transpose(2, 3) @ grouped
    if d_state is not None:
        # The part of x that the state at the end sees.
        x_end = chunk.x * chunk.to_end[..., None]
        dB += chunk.by_group(x_end) @ d_state.transpose(2, 3)
        dx_end = chunk.by_head(chunk.B @ d_state)
        through = (x_end * dx_end).sum(dim=3)
        dx = torch.addcmul(dx, dx_end, chunk.to_end[..., None])
        d_factor += through
        d_cs -= through
        d_end += through.sum(dim=1, dtype=torch.float64)
    if state is not None and d_state is not None:
        assert d_start is not None
        chunk.carry(d_state, d_start)
        d_end += chunk.keep * chunk.sum_by_head(d_state * state)
    return _ChunkGradient(dx, dB, dC, dD, d_cs, d_end, d_factor, d_start)
