"""The causal convolution against its sequential definition, and the promises of its docstring."""

import pytest
import torch
import torch.nn.functional as F

from mamba2_kernels import causal_conv1d
from mamba2_kernels.testing import (
    PADDINGS,
    as_dtype,
    largest_error,
    random_seq_idx,
    random_state,
    relative_error,
    run_with_gradients,
    strided,
)

CHANNELS = 24


def conv_inputs(batch, seq_len, d_conv, *, state=True, padding=None, dtype=torch.float64):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": random_state(batch, seq_len, CHANNELS, dtype=dtype, seed=1),
        "weight": random_state(CHANNELS, d_conv, dtype=wide, seed=2),
        "bias": random_state(CHANNELS, dtype=wide, seed=3),
    }
    if state:
        inputs["initial_state"] = random_state(batch, d_conv - 1, CHANNELS, dtype=dtype, seed=4)
    if padding is not None:
        inputs["seq_idx"] = random_seq_idx(batch, seq_len, padding=padding, mean_length=6)
    return inputs


def run(inputs, backend="torch", **options):
    options = {"return_final_state": True, "backend": backend} | options
    return run_with_gradients(causal_conv1d, inputs, **options)


def assert_close(actual, expected, tolerance):
    error, name = largest_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("seq_len", [1, 2, 3, 65])
@pytest.mark.parametrize("d_conv", [1, 2, 4, 7])
@pytest.mark.parametrize("padding", [None, *PADDINGS])
@pytest.mark.parametrize("state", [False, True], ids=["zero state", "initial state"])
def test_float64_equals_the_definition(seq_len, d_conv, padding, state):
    inputs = conv_inputs(2, seq_len, d_conv, state=state, padding=padding)
    assert_close(run(inputs), run(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_activation_and_bias_are_optional(activation, bias):
    inputs = conv_inputs(2, 40, 4, padding="interior")
    if not bias:
        del inputs["bias"]
    options = {"activation": activation, "return_final_state": False}
    assert_close(run(inputs, **options), run(inputs, "reference", **options), 1e-12)


def test_equals_pytorchs_convolution():
    inputs = conv_inputs(2, 40, 4, state=False)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=CHANNELS)
    expected = F.silu(y[..., :40]).transpose(1, 2)
    assert relative_error(causal_conv1d(**inputs), expected) < 1e-14


def test_float32_is_as_good_as_float32_gets():
    inputs = conv_inputs(2, 127, 4, padding="interior", dtype=torch.float32)
    truth = run(as_dtype(inputs, torch.float64), "reference")
    assert_close(run(inputs), truth, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_costs_at_most_twice_its_rounding(dtype):
    inputs = conv_inputs(2, 127, 4, padding="interior", dtype=dtype)
    truth = run(as_dtype(inputs, torch.float64), "reference")
    price = run(inputs, "reference")
    actual = run(inputs)
    for name, expected in truth.items():
        error = relative_error(actual[name], expected)
        assert error <= min(2 * relative_error(price[name], expected) + 1e-6, 4e-3), name


@pytest.mark.parametrize("padding", PADDINGS)
def test_packed_documents_equal_each_alone(padding):
    inputs = conv_inputs(2, 90, 4, state=False, padding=padding)
    seq_idx, parameters = inputs["seq_idx"], (inputs["weight"], inputs["bias"])
    packed, final_state = causal_conv1d(**inputs, return_final_state=True)
    for row in range(len(seq_idx)):
        for document in seq_idx[row].unique():
            here = seq_idx[row] == document
            if document < 0:
                assert packed[row, here].count_nonzero() == 0
                continue
            alone = inputs["x"][row : row + 1, here]
            y, state = causal_conv1d(alone, *parameters, return_final_state=True)
            assert relative_error(packed[row, here], y[0]) < 1e-14
        assert torch.equal(final_state[row], state[0])


@pytest.mark.parametrize("padding", ["left", "right", "interior"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_padding_is_as_if_absent(padding, activation):
    """Whatever it holds: outputs and gradients of the tokens stay, its own are exactly 0."""
    inputs = conv_inputs(2, 90, 4, padding=padding)
    is_padding = inputs["seq_idx"] < 0
    expected = run(inputs, activation=activation)
    inputs["x"][is_padding] = float("nan")
    actual = run(inputs, activation=activation)
    assert_close(actual, expected, 0.0)
    for name in ("output 0", "d x"):
        assert actual[name][is_padding].count_nonzero() == 0


def test_rows_of_nothing_but_padding_pass_the_state_through():
    inputs = conv_inputs(2, 5, 4)
    inputs["seq_idx"] = torch.full((2, 5), -1, dtype=torch.int32)
    y, state = causal_conv1d(**inputs, return_final_state=True)
    assert y.count_nonzero() == 0
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_split_with_carried_state_equals_whole(cut):
    inputs = conv_inputs(2, 60, 4, padding="interior")
    inputs["seq_idx"] = inputs["seq_idx"].clamp(max=0)

    def in_two(x, weight, bias, initial_state, seq_idx, **options):
        state, parts = initial_state, []
        for part in (slice(None, cut), slice(cut, None)):
            y, state = causal_conv1d(
                x[:, part],
                weight,
                bias,
                seq_idx=seq_idx[:, part].contiguous(),
                initial_state=state,
                **options,
            )
            parts.append(y)
        return torch.cat(parts, dim=1), state

    halves = run_with_gradients(in_two, inputs, return_final_state=True)
    assert_close(halves, run(inputs), 1e-12)


def test_no_token_sees_a_later_one_or_another_document():
    inputs = conv_inputs(2, 30, 4, state=False)
    inputs["seq_idx"] = (torch.arange(30) // 10).int().expand(2, -1).contiguous()
    before = causal_conv1d(**inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, 8] += 1
    changed = (causal_conv1d(**inputs) != before).any(dim=(0, 2))
    assert changed.nonzero().flatten().tolist() == [8, 9]


def test_strided_views_need_no_copy():
    inputs = conv_inputs(2, 60, 4, padding="interior")

    def of_views(x, **others):
        return causal_conv1d(strided(x), **others)

    views = run_with_gradients(of_views, inputs, return_final_state=True)
    assert_close(views, run(inputs), 1e-14)


def test_output_gradients_may_be_absent():
    inputs = {name: t.requires_grad_() for name, t in conv_inputs(2, 20, 4).items()}
    for index in (0, 1):
        results = [
            torch.autograd.grad(
                causal_conv1d(**inputs, return_final_state=True, backend=backend)[index].sum(),
                list(inputs.values()),
                materialize_grads=True,
                allow_unused=True,
            )
            for backend in ("torch", "reference")
        ]
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < 1e-12


def test_dtypes_of_outputs_and_gradients():
    inputs = conv_inputs(2, 20, 4, dtype=torch.bfloat16)
    result = run(inputs)
    assert result["output 0"].dtype == result["output 1"].dtype == torch.bfloat16
    for name, tensor in inputs.items():
        assert result[f"d {name}"].dtype == tensor.dtype, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 0, 24)}, "seq_len = 0.*at least 1"),
        ({"x": torch.zeros(2, 24)}, r"x has shape \(2, 24\): it must be \(batch, seq_len, chan"),
        ({"x": torch.zeros(2, 24, 8).mT}, "x has stride 8 in its last dimension.*contiguous"),
        ({"weight": torch.zeros(24, 1, 4)}, r"weight has shape.*\(channels, d_conv\)"),
        ({"bias": torch.zeros(4)}, "bias has.*channels = 4: x has channels = 24"),
        ({"activation": "relu"}, "unknown activation 'relu': use 'silu' or None"),
        ({"seq_idx": torch.zeros(2, 8)}, "seq_idx has dtype float32.*int32"),
        ({"initial_state": torch.zeros(2, 4, 24)}, "d_conv - 1 = 4: weight has d_conv - 1 = 3"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    inputs = {"x": torch.zeros(2, 8, 24), "weight": torch.zeros(24, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(inputs | changes))
