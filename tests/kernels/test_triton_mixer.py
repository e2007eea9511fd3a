"""Convolution, norms and decoding steps in Triton on the interpreter, against float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

from mamba2_kernels import (  # noqa: E402
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    gated_scale,
    gated_square_sum,
    reference,
    rms_norm,
    ssd_scan,
    ssd_step,
)
from mamba2_kernels.interpreter import repaired  # noqa: E402
from mamba2_kernels.launch import launches  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _on_the_interpreter(interpreter: None) -> Iterator[None]:
    torch.manual_seed(0)
    with repaired():
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_equals_truth(
    op: Callable[..., Any],
    truth: Callable[..., Any],
    tensors: dict[str, Tensor],
    kernels: set[str],
    ceiling: float,
) -> None:
    """Outputs and every gradient of `op` and `truth`; `kernels` must have been launched."""
    wide = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    before = launches.copy()
    expected, found = truth(**wide), op(**leaves)
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    gradients = [torch.randn(e.shape, dtype=f.dtype) for e, f in zip(expected, found, strict=True)]
    torch.autograd.backward(expected, [g.double() for g in gradients])
    torch.autograd.backward(found, gradients)
    assert kernels <= set(launches - before)
    results = {f"output {i}": pair for i, pair in enumerate(zip(found, expected, strict=True))}
    results |= {f"d{name}": (leaves[name].grad, wide[name].grad) for name in tensors}
    for name, (value, right) in results.items():
        error = (value.double() - right).norm() / right.norm().clamp_min(1e-30)
        assert error <= ceiling, f"{name}: {error:.1e}"


def ceiling_of(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 4e-3


CONV = {"conv_kernel", "conv_backward_kernel", "sum_rows_kernel"}


def documents(seq_len: int) -> Tensor:
    """Four rows: padding everywhere, left padding, no token at all, one document around padding."""
    seq_idx = torch.randint(0, 5, (4, seq_len)).sort(dim=1).values.int()
    seq_idx[torch.rand(4, seq_len) < 0.3] = -1
    seq_idx[1, : seq_len - 2] = -1
    seq_idx[2] = -1
    seq_idx[3] = 5
    seq_idx[3, 1 : seq_len - 1] = -1
    return seq_idx


@DTYPES
@pytest.mark.parametrize("seq_len", [1, 3, 40, 300])
def test_packed_convolution_with_carried_state(seq_len: int, dtype: torch.dtype) -> None:
    channels, d_conv = 16, 4
    seq_idx = documents(max(seq_len, 3))[:, :seq_len].contiguous()
    projected = normal(4, seq_len, 2 * channels + 8).to(dtype)
    tensors = {
        "x": projected[..., 8 : 8 + channels],
        "weight": normal(channels, d_conv).to(dtype),
        "bias": normal(channels).to(dtype),
        "initial_state": normal(4, d_conv - 1, channels).to(dtype),
    }
    assert_equals_truth(
        lambda **t: causal_conv1d(**t, seq_idx=seq_idx, return_final_state=True, backend="triton"),
        lambda **t: reference.causal_conv1d(**t, seq_idx=seq_idx),
        tensors,
        CONV,
        ceiling_of(dtype),
    )


@pytest.mark.parametrize("d_conv", [1, 2, 3, 4])
def test_plain_convolution(d_conv: int) -> None:
    tensors = {"x": normal(2, 37, 70).float(), "weight": normal(70, d_conv).float()}
    assert_equals_truth(
        lambda **t: causal_conv1d(**t, activation=None, backend="triton"),
        lambda **t: reference.causal_conv1d(**t, activation=None)[0],
        tensors,
        CONV,
        1e-6,
    )


def test_convolution_of_a_row_longer_than_one_program() -> None:
    tensors = {"x": normal(1, 290, 16).float(), "weight": normal(16, 4).float()}
    assert_equals_truth(
        lambda **t: causal_conv1d(**t, backend="triton"),
        lambda **t: reference.causal_conv1d(**t)[0],
        tensors,
        CONV,
        1e-6,
    )


@DTYPES
@pytest.mark.parametrize("channels", [16, 100])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(channels: int, with_residual: bool, dtype: torch.dtype) -> None:
    tensors = {"x": normal(3, 7, channels).to(dtype), "weight": normal(channels).float()}
    if with_residual:
        tensors["residual"] = normal(3, 7, channels).float()

    def truth(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return reference.rms_norm(x, weight)
        total = x + residual
        return reference.rms_norm(total, weight), total

    assert_equals_truth(
        lambda **t: rms_norm(**t, backend="triton"),
        truth,
        tensors,
        {"norm_kernel", "norm_backward_kernel"},
        ceiling_of(dtype),
    )


def gated(dtype: torch.dtype, channels: int = 96) -> dict[str, Tensor]:
    """x, z and the weight; z is a view into in_proj's output."""
    return {
        "x": normal(2, 19, channels).to(dtype),
        "z": normal(2, 19, 3 * channels)[..., channels : 2 * channels].to(dtype),
        "weight": normal(channels).float(),
    }


NORM = {"norm_kernel", "norm_backward_kernel"}


@DTYPES
@pytest.mark.parametrize("group_size", [96, 24])
def test_gated_rms_norm(group_size: int, dtype: torch.dtype) -> None:
    assert_equals_truth(
        lambda **t: gated_rms_norm(**t, group_size=group_size, backend="triton"),
        lambda **t: reference.gated_rms_norm(**t, group_size=group_size),
        gated(dtype),
        NORM,
        ceiling_of(dtype),
    )


@DTYPES
@pytest.mark.parametrize("group_size", [96, 24])
def test_square_sum_then_scale(group_size: int, dtype: torch.dtype) -> None:
    tensors = gated(dtype)
    x_and_z = {name: tensors[name] for name in ("x", "z")}
    assert_equals_truth(
        lambda **t: gated_square_sum(**t, group_size=group_size, backend="triton"),
        lambda **t: reference.gated_square_sum(**t, group_size=group_size),
        x_and_z,
        NORM,
        ceiling_of(dtype),
    )
    # Two ranks hold half of each group: the sum is over twice the channels.
    options = {"group_size": group_size, "count": 2 * group_size}
    square_sum = normal(2, 19, 96 // group_size).square().float() * group_size
    assert_equals_truth(
        lambda **t: gated_scale(**t, **options, backend="triton"),
        lambda **t: reference.gated_scale(**t, eps=1e-5, **options),
        tensors | {"square_sum": square_sum},
        NORM,
        ceiling_of(dtype),
    )


@DTYPES
def test_steps_follow_the_whole_sequence(dtype: torch.dtype) -> None:
    batch, seq_len, n_heads, headdim, n_groups, d_state = 2, 5, 4, 8, 2, 16
    x = normal(batch, seq_len, n_heads, headdim).to(dtype)
    dt = normal(batch, seq_len, n_heads).to(dtype)
    B, C = (normal(batch, seq_len, n_groups, d_state).to(dtype) for _ in range(2))
    A, D, dt_bias = -normal(n_heads).exp().float(), normal(n_heads).float(), normal(n_heads).float()
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.05, 2.0)}
    wide = [t.double() for t in (x, dt, A, B, C)]
    expected, last = reference.ssd_scan(*wide, D=D.double(), dt_bias=dt_bias.double(), **options)
    state = torch.zeros(batch, n_heads, headdim, d_state)
    before = launches.copy()
    outputs = [
        ssd_step(
            x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D, dt_bias=dt_bias,
            backend="triton", **options,
        )
        for t in range(seq_len)
    ]  # fmt: skip
    assert (launches - before)["ssd_step_kernel"] == seq_len
    torch.testing.assert_close(
        torch.stack(outputs, dim=1).double(), expected, rtol=1e-2, atol=ceiling_of(dtype)
    )
    assert (state.double() - last).norm() <= 1e-6 * last.norm()


@DTYPES
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_convolution_steps_follow_the_whole_sequence(d_conv: int, dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in (normal(2, 6, 20), normal(20, d_conv), normal(20)))
    expected, last = reference.causal_conv1d(x.double(), weight.double(), bias.double())
    state = torch.zeros(2, d_conv - 1, 20, dtype=dtype)
    before = launches.copy()
    outputs = [causal_conv1d_step(x[:, t], state, weight, bias, backend="triton") for t in range(6)]
    assert (launches - before)["conv_step_kernel"] == 6
    torch.testing.assert_close(
        torch.stack(outputs, dim=1).double(), expected, rtol=1e-2, atol=ceiling_of(dtype)
    )
    assert torch.equal(state.double(), last)


def test_the_mixer_gives_the_same_bits_twice() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        seq_idx = torch.tensor([[0] * 20 + [1] * 30 + [-1] * 10], dtype=torch.int32)
        z = torch.randn(1, 60, 64, dtype=torch.bfloat16, requires_grad=True)
        xBC = torch.randn(1, 60, 64 + 32, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(96, 4, dtype=torch.bfloat16, requires_grad=True)
        norm = torch.ones(64, requires_grad=True)
        convolved = causal_conv1d(xBC, weight, seq_idx=seq_idx, backend="triton")
        x, B, C = convolved.split([64, 16, 16], dim=-1)
        y = ssd_scan(
            x.unflatten(-1, (2, 32)), torch.rand(1, 60, 2), -torch.ones(2), B[:, :, None],
            C[:, :, None], seq_idx=seq_idx, backend="triton",
        )  # fmt: skip
        out = gated_rms_norm(y.flatten(-2), z, norm, backend="triton")
        out.float().square().sum().backward()
        return [out.detach(), *(t.grad for t in (z, xBC, weight, norm) if t.grad is not None)]

    first, second = run(), run()
    assert len(first) == 5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
