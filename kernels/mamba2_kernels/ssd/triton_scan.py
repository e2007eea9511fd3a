"""The scan on Triton, with the signatures of `torch_path`.

In float32, tiles of a wide head do not fit the registers: their kernels spill kilobytes. The
channels of a head are independent of one another, and y is a sum over the channels of its state, so
a wide scan is a few narrow ones, each over a slice of every head:

    y[p] = sum over slices n of scan(x[p], dt, A, B[n], C[n])
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mamba2_kernels.launch import WIDEST_FLOAT32
from mamba2_kernels.ssd import triton_backward, triton_forward


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
    """Return y and the final state, empty when it is not asked for.

    `chunk_size` is not used: the tuned tables know better.
    """
    options = dt_softplus, dt_min, dt_max, return_final_state
    if not _is_wide(x, B):
        return triton_forward.forward(x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, *options)
    batch, _, n_heads, headdim = x.shape
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    shape = (batch, n_heads, headdim, B.shape[3]) if return_final_state else (0,)
    final_state = torch.empty(shape, dtype=torch.float32, device=x.device)
    for p, n in _slices(x, B):
        start = None if initial_state is None else initial_state[:, :, p, n]
        # D x enters once
        d = D if n.start == 0 else None
        part, end = triton_forward.forward(
            x[..., p], dt, A, B[..., n], C[..., n], d, dt_bias, seq_idx, start, *options
        )
        y[..., p] += part
        if return_final_state:
            final_state[:, :, p, n] = end
    return y, final_state


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
    options = dt_softplus, dt_min, dt_max
    if not _is_wide(x, B):
        return triton_backward.backward(
            dy, d_final_state, x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, *options
        )
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    sums = tuple(
        torch.zeros(0 if t is None else t.shape, dtype=torch.float32, device=x.device)
        for t in inputs
    )
    for p, n in _slices(x, B):
        end = None if d_final_state is None else d_final_state[:, :, p, n]
        start = None if initial_state is None else initial_state[:, :, p, n]
        d = D if n.start == 0 else None
        found = triton_backward.backward(
            dy[..., p], end, x[..., p], dt, A, B[..., n], C[..., n], d, dt_bias, seq_idx, start,
            *options,
        )  # fmt: skip
        dx, ddt, dA, dB, dC, dD, ddt_bias, d_initial_state = sums
        places = (
            dx[..., p], ddt, dA, dB[..., n], dC[..., n], dD, ddt_bias,
            d_initial_state if start is None else d_initial_state[:, :, p, n],
        )  # fmt: skip
        for place, part in zip(places, found, strict=True):
            if part.numel():  # empty for D in all but the first slice, and for inputs left out
                place += part
    dtypes = (x.dtype if t is None else t.dtype for t in inputs)
    return tuple(t.to(dtype) for t, dtype in zip(sums, dtypes, strict=True))  # type: ignore[return-value]


def _is_wide(x: Tensor, B: Tensor) -> bool:
    headdim, d_state = WIDEST_FLOAT32
    return x.dtype == torch.float32 and (x.shape[3] > headdim or B.shape[3] > d_state)


def _slices(x: Tensor, B: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of headdim and d_state that one scan takes."""
    headdim, d_state = WIDEST_FLOAT32
    for p in range(0, x.shape[3], headdim):
        for n in range(0, B.shape[3], d_state):
            yield slice(p, p + headdim), slice(n, n + d_state)
