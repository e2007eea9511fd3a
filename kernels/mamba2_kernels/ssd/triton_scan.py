"""The scan on Triton, with the signatures of `torch_path`."""

from torch import Tensor

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
    return triton_forward.forward(
        x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, dt_softplus, dt_min, dt_max,
        return_final_state,
    )  # fmt: skip


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
    return triton_backward.backward(
        dy, d_final_state, x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, dt_softplus, dt_min,
        dt_max,
    )  # fmt: skip
