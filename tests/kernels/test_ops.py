"""What all ops share: their registration with the dispatcher, and the choice of a backend."""

import logging
import subprocess
import sys

import pytest
import torch

from mamba2_kernels import backend as backends
from mamba2_kernels import causal_conv1d, conv1d, norm, rms_norm, ssd, ssd_scan, step
from mamba2_kernels.testing import random_seq_idx, random_ssd_inputs, random_state

INFINITY = float("inf")


def ssd_arguments(dtype, *, everything):
    inputs = random_ssd_inputs(2, 9, 4, 8, 2, 8, dtype=dtype)
    if not everything:
        optional = (None, None, None, None)
    else:
        seq_idx = random_seq_idx(2, 9, padding="interior", mean_length=4)
        state = random_state(2, 4, 8, 8, dtype=inputs["A"].dtype)
        optional = (inputs["D"], inputs["dt_bias"], seq_idx, state)
    required = [inputs[name] for name in ("x", "dt", "A", "B", "C")]
    return (*required, *optional, True, 0.0, INFINITY, 256, everything, "torch")


def conv_arguments(dtype, *, everything):
    x, weight = random_state(2, 9, 8, dtype=dtype), random_state(8, 4, dtype=torch.float32)
    if not everything:
        return (x, weight, None, None, None, "", False, "torch")
    bias, state = random_state(8, dtype=torch.float32), random_state(2, 3, 8, dtype=dtype)
    seq_idx = random_seq_idx(2, 9, padding="interior", mean_length=4)
    return (x, weight, bias, seq_idx, state, "silu", True, "torch")


def norm_arguments(dtype):
    x, z, residual = (random_state(2, 5, 8, dtype=dtype, seed=seed) for seed in range(3))
    return x, z, random_state(8, dtype=torch.float32), residual.float()


def with_gradients(arguments):
    return tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


def op_calls(dtype):
    """Yield every forward op with arguments, each backward op being reached through it."""
    x, z, weight, residual = norm_arguments(dtype)
    square_sum = random_state(2, 5, 2, dtype=torch.float32).square()
    for everything in (False, True):
        yield ssd._ssd_scan, ssd_arguments(dtype, everything=everything)
        yield conv1d._causal_conv1d, conv_arguments(dtype, everything=everything)
    yield norm._rms_norm, (x, weight, None, 1e-5, "torch")
    yield norm._rms_norm, (x, weight, residual, 1e-5, "torch")
    yield norm._gated_rms_norm, (x, z, weight, 1e-5, 4, "torch")
    yield norm._gated_square_sum, (x, z, 4, "torch")
    yield norm._gated_scale, (x, z, square_sum, weight, 1e-5, 4, 8, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(9))
def test_opcheck(index, dtype):
    op, arguments = list(op_calls(dtype))[index]
    torch.library.opcheck(op, with_gradients(arguments), rtol=1e-2, atol=1e-2)


def backward_calls(dtype):
    x, z, weight, residual = norm_arguments(dtype)
    square_sum = random_state(2, 5, 2, dtype=torch.float32).square()
    for everything in (False, True):
        scan = ssd_arguments(dtype, everything=everything)
        d_state = random_state(2, 4, 8, 8, dtype=torch.float32) if everything else None
        yield ssd._ssd_scan_backward, (scan[0], d_state, *scan[:13], "torch")
        conv = conv_arguments(dtype, everything=everything)
        d_state = random_state(2, 3, 8, dtype=dtype) if everything else None
        yield conv1d._causal_conv1d_backward, (conv[0], d_state, *conv[:6], "torch")
    yield norm._rms_norm_backward, (x, None, x, weight, None, 1e-5, "torch")
    yield norm._rms_norm_backward, (x, residual, x, weight, residual, 1e-5, "torch")
    yield norm._gated_rms_norm_backward, (x, x, z, weight, 1e-5, 4, "torch")
    yield norm._gated_square_sum_backward, (square_sum, x, z, 4, "torch")
    yield norm._gated_scale_backward, (x, x, z, square_sum, weight, 1e-5, 4, 8, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(9))
def test_opcheck_of_backward_ops(index, dtype):
    op, arguments = list(backward_calls(dtype))[index]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_steps(dtype):
    scan = ssd_arguments(dtype, everything=True)
    x, dt, A, B, C, D, dt_bias, _, state = scan[:9]
    token = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D, dt_bias, True, 0.0, INFINITY)
    torch.library.opcheck(step._ssd_step, (*token, "torch"))
    x, weight, bias, _, state = conv_arguments(dtype, everything=True)[:5]
    torch.library.opcheck(step._causal_conv1d_step, (x[:, 0], state, weight, bias, "silu", "torch"))


def test_ops_compile_without_a_graph_break():
    inputs = random_ssd_inputs(1, 9, 2, 8, 1, 8, dtype=torch.float32)

    def layer(x, weight, norm_weight, **rest):
        x = rms_norm(causal_conv1d(x, weight), norm_weight)
        return ssd_scan(x.unflatten(-1, (2, 8)), **rest, dt_softplus=True)

    x = inputs.pop("x").flatten(2).requires_grad_()
    weight, norm_weight = random_state(16, 4, dtype=torch.float32), torch.ones(16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = [
        torch.autograd.grad(function(x, weight, norm_weight, **inputs).sum(), x)
        for function in (compiled, layer)
    ]
    torch.testing.assert_close(*results)


def test_meta_tensors_give_shapes():
    inputs = random_ssd_inputs(2, 9, 4, 8, 2, 8, dtype=torch.bfloat16)
    meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    y, state = ssd_scan(**meta, return_final_state=True)
    assert y.shape == (2, 9, 4, 8)
    assert y.dtype == torch.bfloat16
    assert state.shape == (2, 4, 8, 8)
    assert state.dtype == torch.float32


def test_auto_is_torch_on_a_cpu(caplog):
    assert backends.resolve_backend("ssd_scan", "auto", torch.device("cpu")) == "torch"
    assert not caplog.records


def test_a_gpu_without_kernels_falls_back_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "TRITON_MODULES", {})
    backends._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mamba2_kernels"):
        for _ in range(3):
            assert backends.resolve_backend("ssd_scan", "auto", torch.device("cuda")) == "torch"
    assert len(caplog.records) == 1
    assert "no Triton kernel for ssd_scan" in caplog.text


def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    inputs = random_ssd_inputs(1, 4, 2, 8, 1, 8)
    monkeypatch.setattr(backends, "TRITON_MODULES", {})
    with pytest.raises(ValueError, match=r"'triton' cannot run: this version.*backend='auto'"):
        ssd_scan(**inputs, backend="triton")
    monkeypatch.setattr(backends, "TRITON_MODULES", {"ssd_scan": "missing"})
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        ssd_scan(**inputs, backend="triton")
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu, and Triton needs a GPU"):
        ssd_scan(**inputs, backend="triton")


def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mamba2_kernels as k\n"
        "print(k.rms_norm(torch.ones(1, 4), torch.ones(4)).sum())\n"
        "assert not any(name.startswith(('triton.', 'transformers')) for name in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_dtensors_are_refused():
    class DTensor(torch.Tensor):
        def to_local(self):
            return self

    x = torch.ones(1, 4).as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"x is a DTensor.*to_local"):
        rms_norm(x, torch.ones(4))


def test_the_environment_decides_where_a_call_does_not(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    cpu = torch.device("cpu")
    assert backends.resolve_backend("ssd_scan", "auto", cpu) == "reference"
    assert backends.resolve_backend("ssd_scan", "torch", cpu) == "torch"
    monkeypatch.setenv("MAMBA2_BACKEND", "tritn")
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        backends.resolve_backend("ssd_scan", "auto", cpu)


def test_triton_is_there_on_linux():
    """Elsewhere its tests are skipped; here that would hide that the kernels went untested."""
    assert sys.platform != "linux" or backends._triton_installed()
