"""The causal depthwise convolution in front of the scan, with its activation.

    y_t = activation(bias + sum_k weight[:, k] x_{t - d_conv + 1 + k})

Source: Gu and Dao, "Mamba" (arXiv:2312.00752), section 3.4.
"""

from typing import Any

import torch
from torch import Tensor

from mamba2_kernels import conv1d_torch, reference
from mamba2_kernels.backend import resolve_backend, triton_path
from mamba2_kernels.checks import ArgumentCheck, check_activation, check_values
from mamba2_kernels.launch import no_mixer_kernel
from mamba2_kernels.precision import compute_dtype, widen


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:  # Tensor, or a pair of them: see Returns
    """Convolve each channel with its own weights over the last d_conv inputs.

    Gradients reach x, weight, bias and initial_state, through y and the final state, in each
    input's dtype. float16 and bfloat16 are computed in float32.

    Args:
        x: (batch, seq_len, channels), any float dtype.
        weight: (channels, d_conv), the weight of the newest input last.
        bias: (channels,).
        activation: "silu" or None.
        seq_idx: (batch, seq_len) int32, the document of each token; no document sees another's
            inputs. -1 marks padding: y is 0 there, and a document's tokens on both sides of it
            are neighbours.
        initial_state: (batch, d_conv - 1, channels), the inputs before x, oldest first. A row's
            first document continues them. Zeros when left out.
        return_final_state: also return the last d_conv - 1 inputs of each row's last document,
            zeros where it is shorter.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y (batch, seq_len, channels) in x's dtype or, with `return_final_state`, y and the final
        state (batch, d_conv - 1, channels) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, an unknown activation, or a
            backend that cannot run here.
    """
    op = "causal_conv1d"
    check = ArgumentCheck(op)
    check.tensor("x", x, "batch, seq_len, channels", dense=True)
    check.at_least_one("seq_len")
    check.tensor("weight", weight, "channels, d_conv")
    check.tensor("bias", bias, "channels")
    check.tensor("seq_idx", seq_idx, "batch, seq_len", dtypes=(torch.int32,))
    check.at_least_one("d_conv")
    check.sizes["d_conv - 1"] = (check.size("d_conv") - 1, "weight")
    check.tensor("initial_state", initial_state, "batch, d_conv - 1, channels")
    check_activation(op, activation)
    check_values(op, seq_idx=seq_idx)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, d_conv=weight.shape[1]))
    if backend == "reference":
        wide_x, weight, bias, initial_state = widen(
            compute_dtype(x), x, weight, bias, initial_state
        )
        y, final_state = reference.causal_conv1d(
            wide_x,
            weight,
            bias,
            activation=activation,
            seq_idx=seq_idx,
            initial_state=initial_state,
        )
        y, final_state = y.to(x.dtype), final_state.to(x.dtype)
    else:
        y, final_state = _causal_conv1d(
            x, weight, bias, seq_idx, initial_state, activation or "", return_final_state, backend
        )
    return (y, final_state) if return_final_state else y


@torch.library.custom_op("mamba2_kernels::causal_conv1d", mutates_args=())
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    path = triton_path("causal_conv1d") if backend == "triton" else conv1d_torch
    return path.forward(x, weight, bias, seq_idx, initial_state, activation, return_final_state)


@_causal_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    state_shape = (x.shape[0], weight.shape[1] - 1, x.shape[2]) if return_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(state_shape)


@torch.library.custom_op("mamba2_kernels::causal_conv1d_backward", mutates_args=())
def _causal_conv1d_backward(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path = triton_path("causal_conv1d") if backend == "triton" else conv1d_torch
    return path.backward(dy, d_final_state, x, weight, bias, seq_idx, initial_state, activation)


@_causal_conv1d_backward.register_fake
def _(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, d_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    d_bias, d_initial_state = (
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, initial_state)
    )
    return dx, d_weight, d_bias, d_initial_state


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.activation, ctx.has_final_state, ctx.backend = inputs[5:]


def _gradients(ctx: Any, dy: Tensor | None, d_final_state: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: under checkpointing each look recomputes them
    x, _, bias, _, initial_state = saved
    dx, d_weight, d_bias, d_initial_state = _causal_conv1d_backward(
        torch.zeros_like(x) if dy is None else dy,
        d_final_state if ctx.has_final_state else None,
        *saved,
        ctx.activation,
        ctx.backend,
    )
    return (
        dx,
        d_weight,
        None if bias is None else d_bias,
        None,
        None if initial_state is None else d_initial_state,
        None,
        None,
        None,
    )


_causal_conv1d.register_autograd(_gradients, setup_context=_save_inputs)
