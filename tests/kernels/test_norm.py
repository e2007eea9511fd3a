"""The norms against their definition, against transformers, and split as tensor parallel does."""

import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm, MambaRMSNormGated

from mamba2_kernels import gated_rms_norm, gated_scale, gated_square_sum, rms_norm
from mamba2_kernels.testing import (
    as_dtype,
    largest_error,
    random_state,
    relative_error,
    run_with_gradients,
    strided,
)

EPS = 1e-3  # large, so that a test sees where it goes


def scale_after_sum(x, z, weight, **options):
    square_sum = gated_square_sum(
        x, z, group_size=options["group_size"], backend=options["backend"]
    )
    return gated_scale(x, z, square_sum, weight, **options)


GATED = [gated_rms_norm, scale_after_sum]


def norm_inputs(*names, shape=(2, 7, 48), dtype=torch.float64):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {}
    for seed, name in enumerate(names):
        tensor = random_state(*shape[-1:], seed=seed) if name == "weight" else None
        tensor = random_state(*shape, seed=seed) if tensor is None else tensor
        inputs[name] = tensor.to(wide if name in ("weight", "residual") else dtype)
    return inputs


def assert_close(actual, expected, tolerance):
    error, name = largest_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_worth_its_rounding(op, inputs, **options):
    truth = run_with_gradients(op, as_dtype(inputs, torch.float64), backend="reference", **options)
    price = run_with_gradients(op, inputs, backend="reference", **options)
    actual = run_with_gradients(op, inputs, backend="torch", **options)
    for name, expected in truth.items():
        error = relative_error(actual[name], expected)
        assert error <= min(2 * relative_error(price[name], expected) + 1e-6, 8e-3), name


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 7, 48), (2, 1, 3, 48)], ids=str)
@pytest.mark.parametrize("names", [("x", "weight"), ("x", "weight", "residual")], ids=len)
def test_rms_norm_equals_its_definition(shape, names):
    inputs = norm_inputs(*names, shape=shape)
    results = [
        run_with_gradients(rms_norm, inputs, eps=EPS, backend=backend)
        for backend in ("torch", "reference")
    ]
    assert_close(*results, 1e-12)


@pytest.mark.parametrize("shape", [(48,), (2, 7, 48), (2, 1, 3, 48)], ids=str)
@pytest.mark.parametrize("group_size", [1, 6, 24, 48])
@pytest.mark.parametrize("op", GATED)
def test_gated_norm_equals_its_definition(op, shape, group_size):
    inputs = norm_inputs("x", "z", "weight", shape=shape)
    options = {"eps": EPS, "group_size": group_size}
    expected = run_with_gradients(gated_rms_norm, inputs, backend="reference", **options)
    assert_close(run_with_gradients(op, inputs, backend="torch", **options), expected, 1e-12)


@pytest.mark.parametrize("op", GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gated_norm_costs_at_most_twice_its_rounding(op, dtype):
    inputs = norm_inputs("x", "z", "weight", dtype=dtype)
    assert_worth_its_rounding(op, inputs, group_size=24)


@pytest.mark.parametrize("names", [("x", "weight"), ("x", "weight", "residual")], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_costs_at_most_twice_its_rounding(names, dtype):
    assert_worth_its_rounding(rms_norm, norm_inputs(*names, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [12, 48])
def test_gated_norm_equals_transformers(dtype, group_size):
    inputs = norm_inputs("x", "z", "weight", dtype=dtype)
    theirs = MambaRMSNormGated(48, group_size, eps=EPS)

    def of_transformers(x, z, weight):
        return torch.func.functional_call(theirs, {"weight": weight}, (x, z)).to(x.dtype)

    expected = run_with_gradients(of_transformers, inputs)
    for op in GATED:
        options = {"eps": EPS, "group_size": group_size, "backend": "torch"}
        actual = run_with_gradients(op, inputs, **options)
        assert_close(actual, expected, 1e-6 if dtype == torch.float32 else 1e-2)
        if dtype == torch.bfloat16:  # bit for bit, but for ties that a last float32 bit decides
            assert (actual["output 0"] != expected["output 0"]).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_transformers(dtype):
    inputs = norm_inputs("x", "weight", dtype=dtype)
    theirs = Mamba2RMSNorm(48, eps=EPS)

    def of_transformers(x, weight):
        return torch.func.functional_call(theirs, {"weight": weight}, (x,)).to(x.dtype)

    expected = run_with_gradients(of_transformers, inputs)
    actual = run_with_gradients(rms_norm, inputs, eps=EPS)
    assert_close(actual, expected, 1e-6 if dtype == torch.float32 else 1e-2)
    if dtype == torch.bfloat16:
        assert (actual["output 0"] != expected["output 0"]).float().mean() < 0.01


def test_a_residual_keeps_its_dtype():
    inputs = norm_inputs("x", "weight", "residual", dtype=torch.bfloat16)
    y, total = rms_norm(**inputs)
    assert y.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert relative_error(y, rms_norm(total, inputs["weight"])) < 4e-3
    low = inputs | {"residual": inputs["residual"].bfloat16()}
    assert rms_norm(**low)[1].dtype == torch.bfloat16


def test_only_the_sum_may_be_used():
    inputs = {k: t.requires_grad_() for k, t in norm_inputs("x", "weight", "residual").items()}
    rms_norm(**inputs)[1].sum().backward()
    assert torch.equal(inputs["x"].grad, torch.ones_like(inputs["x"]))
    assert inputs["weight"].grad.count_nonzero() == 0


def test_group_channels_split_over_two_ranks_equal_the_whole():
    """Sums of squares are added between the two halves, as tensor parallel does."""
    inputs = norm_inputs("x", "z", "weight")

    def in_two(x, z, weight):
        halves = (slice(None, 24), slice(24, None))
        total = sum(gated_square_sum(x[..., half], z[..., half]) for half in halves)
        parts = [
            gated_scale(x[..., half], z[..., half], total, weight[half], count=48)
            for half in halves
        ]
        return torch.cat(parts, dim=-1)

    assert_close(
        run_with_gradients(in_two, inputs), run_with_gradients(gated_rms_norm, inputs), 1e-12
    )


@pytest.mark.parametrize("op", GATED)
def test_strided_views_need_no_copy(op):
    inputs = norm_inputs("x", "z", "weight")
    options = {"group_size": 24, "backend": "torch"}

    def of_views(x, z, weight):
        return op(strided(x), strided(z), weight, **options)

    expected = run_with_gradients(op, inputs, **options)
    assert_close(run_with_gradients(of_views, inputs), expected, 1e-14)


def test_square_sums_are_float32_and_gradients_have_their_inputs_dtypes():
    inputs = norm_inputs("x", "z", dtype=torch.bfloat16)
    result = run_with_gradients(gated_square_sum, inputs, group_size=24)
    assert result["output 0"].dtype == torch.float32
    assert result["output 0"].shape == (2, 7, 2)
    assert result["d x"].dtype == result["d z"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        (rms_norm, {"weight": torch.ones(3)}, "rms_norm: weight has.*channels = 3: x has channels"),
        (rms_norm, {"residual": torch.ones(7, 48)}, r"residual has shape \(7, 48\): x has shape"),
        (rms_norm, {"eps": 0.0}, "eps is 0.0: give a small positive number"),
        (gated_rms_norm, {"z": torch.ones(7, 48)}, r"z has shape \(7, 48\): x has shape"),
        (gated_rms_norm, {"group_size": 5}, "group_size = 5 does not divide channels = 48"),
        (gated_rms_norm, {"backend": "gpu"}, "unknown backend 'gpu'"),
        (gated_scale, {"square_sum": torch.ones(2, 7, 2)}, r"square_sum has.*expected \(2, 7, 1\)"),
        (gated_scale, {"count": 47}, "count is 47, less than group_size = 48"),
    ],
)
def test_wrong_arguments_are_refused(op, changes, message):
    arguments = {"x": torch.ones(2, 7, 48), "weight": torch.ones(48)}
    if op is not rms_norm:
        arguments["z"] = torch.ones(2, 7, 48)
    if op is gated_scale:
        arguments["square_sum"] = torch.ones(2, 7, 1)
    with pytest.raises(ValueError, match=message):
        op(**(arguments | changes))
