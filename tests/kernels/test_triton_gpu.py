"""The kernels as compiled for the GPU at hand: right, the same twice, and without a copy.

Each op is held to the torch path in float64 on the same inputs: in a chain of ops the 16-bit
roundings between them, which both paths make, would hide a kernel's own error.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba2_kernels import causal_conv1d, gated_rms_norm, ssd_scan
from mamba2_kernels.launch import launches
from mamba2_kernels.testing import largest_error, random_ssd_inputs, run_with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CEILINGS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
# headdim, d_state, n_groups
SHAPES = [(64, 128, 1), (64, 128, 4), (32, 16, 2), (128, 64, 1), (128, 256, 2)]
N_HEADS = 8


def scan(seq_len: int, headdim: int, d_state: int, n_groups: int, dtype: torch.dtype) -> Any:
    """x, B and C are views of one projection, as in the model."""
    sizes = (2, seq_len, N_HEADS, headdim, n_groups, d_state)
    inputs = random_ssd_inputs(*sizes, dtype=dtype)
    wide = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=-1).cuda()
    parts = wide.split([N_HEADS * headdim, n_groups * d_state, n_groups * d_state], dim=-1)
    for name, part in zip(("x", "B", "C"), parts, strict=True):
        inputs[name] = part.unflatten(-1, inputs[name].shape[-2:])
    inputs["initial_state"] = normal(2, N_HEADS, headdim, d_state) / 10
    return ssd_scan, inputs, {"dt_softplus": True, "return_final_state": True}


def conv(seq_len: int, headdim: int, d_state: int, n_groups: int, dtype: torch.dtype) -> Any:
    channels = N_HEADS * headdim + 2 * n_groups * d_state
    inputs = {
        "x": normal(2, seq_len, channels + 8).to(dtype)[..., :channels],
        "weight": normal(channels, 4).to(dtype) / 2,
        "bias": normal(channels).to(dtype),
        "initial_state": normal(2, 3, channels).to(dtype),
    }
    return causal_conv1d, inputs, {"return_final_state": True}


def norm(seq_len: int, headdim: int, d_state: int, n_groups: int, dtype: torch.dtype) -> Any:
    d_inner = N_HEADS * headdim
    inputs = {
        "x": normal(2, seq_len, d_inner).to(dtype),
        "z": normal(2, seq_len, d_inner + 8).to(dtype)[..., :d_inner],
        "weight": 1 + normal(d_inner) / 10,
    }
    return gated_rms_norm, inputs, {"group_size": d_inner // n_groups}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def packed(seq_len: int) -> Tensor:
    torch.manual_seed(2)
    seq_idx = torch.randint(0, 9, (2, seq_len), device="cuda").sort(dim=1).values.int()
    seq_idx[:, : seq_len // 9] = -1
    return seq_idx


@pytest.mark.parametrize("dtype", list(CEILINGS), ids=str)
@pytest.mark.parametrize(("headdim", "d_state", "n_groups"), SHAPES)
@pytest.mark.parametrize("seq_len", [1, 200, 1500])
@pytest.mark.parametrize(
    ("problem", "kernel"), [(scan, "scan_kernel"), (conv, "conv_kernel"), (norm, "norm_kernel")]
)
def test_kernels_match_the_torch_path(
    problem: Any, kernel: str, seq_len: int, headdim: int, d_state: int, n_groups: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    op, inputs, options = problem(seq_len, headdim, d_state, n_groups, dtype)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    if problem is not norm:
        options["seq_idx"] = packed(seq_len)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    truth = run_with_gradients(op, wide, backend="torch", **options)
    before = launches.copy()
    found = run_with_gradients(op, inputs, backend="auto", **options)
    assert kernel in launches - before
    error, name = largest_error(found, truth)
    assert error <= CEILINGS[dtype], f"{name}: {error:.1e}"
    again = run_with_gradients(op, inputs, backend="auto", **options)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_step_does_not_wait_for_the_gpu() -> None:
    problems = [p(512, 64, 128, 1, torch.bfloat16) for p in (scan, conv, norm)]

    def step() -> None:
        for op, inputs, options in problems:
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            outputs = op(**leaves, backend="triton", **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = [torch.ones_like(output) for output in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), gradients)

    for _, inputs, _ in problems:
        inputs.update({name: tensor.cuda() for name, tensor in inputs.items()})
    step()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    before = launches.copy()
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {"scan_kernel", "across_kernel", "conv_backward_kernel"} <= set(launches - before)
