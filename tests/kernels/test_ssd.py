"""The SSD scan against the sequential recurrence in float64, and the promises of its docstring."""

import pytest
import torch

from mamba2_kernels import ssd_scan
from mamba2_kernels.ssd import chunks, torch_path
from mamba2_kernels.testing import (
    PADDINGS,
    as_dtype,
    largest_error,
    random_seq_idx,
    random_ssd_inputs,
    random_state,
    relative_error,
    run_with_gradients,
    strided,
)

# batch, seq_len, n_heads, headdim, n_groups, d_state
SHAPES = [
    (1, 1, 2, 16, 1, 16),
    (2, 2, 4, 16, 2, 16),
    (1, 63, 8, 32, 8, 16),
    (2, 64, 4, 16, 1, 64),
    (1, 65, 2, 64, 1, 128),
    (2, 127, 4, 32, 2, 16),
    (2, 300, 8, 16, 8, 32),
]
RAGGED = (2, 150, 4, 16, 2, 16)


def scan_inputs(shape, *, state=True, padding=None, dtype=torch.float64):
    batch, seq_len, n_heads, headdim, _, d_state = shape
    inputs = random_ssd_inputs(*shape, dtype=dtype)
    if state:
        inputs["initial_state"] = random_state(
            batch, n_heads, headdim, d_state, dtype=inputs["A"].dtype
        )
    if padding is not None:
        inputs["seq_idx"] = random_seq_idx(batch, seq_len, padding=padding)
    return inputs


def run(inputs, backend="torch", **options):
    options = {"dt_softplus": True, "return_final_state": True, "backend": backend} | options
    return run_with_gradients(ssd_scan, inputs, **options)


def assert_close(actual, expected, tolerance):
    error, name = largest_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["zero state", "initial state"])
def test_float64_equals_the_recurrence(shape, state):
    inputs = scan_inputs(shape, state=state)
    assert_close(run(inputs), run(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", [RAGGED, SHAPES[-1]], ids=str)
def test_packed_float64_equals_the_recurrence(shape, padding):
    inputs = scan_inputs(shape, padding=padding)
    assert_close(run(inputs), run(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_as_good_as_float32_gets(shape):
    inputs = scan_inputs(shape, padding="interior", dtype=torch.float32)
    truth = run(as_dtype(inputs, torch.float64), "reference")
    assert_close(run(inputs), truth, 2e-6)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_autocast_does_not_reach_the_scan(backward):
    """Its state stays in float32: a product in bfloat16 would be 1e-3 off."""
    inputs = random_ssd_inputs(*RAGGED, dtype=torch.float32)
    for tensor in inputs.values():
        tensor.requires_grad_()
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = ssd_scan(**inputs)
            results.append(torch.autograd.grad(y.sum(), list(inputs.values())) if backward else [y])
    for outside, inside in zip(*results, strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [RAGGED, SHAPES[4]], ids=str)
def test_half_precision_costs_at_most_twice_its_rounding(shape, dtype):
    inputs = scan_inputs(shape, padding="interior", dtype=dtype)
    truth = run(as_dtype(inputs, torch.float64), "reference")
    price = run(inputs, "reference")
    actual = run(inputs)
    for name, expected in truth.items():
        error = relative_error(actual[name], expected)
        assert error <= min(2 * relative_error(price[name], expected) + 2e-6, 5e-3), name


@pytest.mark.parametrize(
    "options",
    [
        {"dt_softplus": False},
        {"dt_limit": (0.2, 0.9)},
        {"dt_softplus": False, "dt_limit": (0.0, 0.5)},
        {"dt_limit": (0.5, 0.5)},
    ],
    ids=str,
)
def test_step_size_options(options):
    inputs = scan_inputs(RAGGED, padding="left")
    expected = run(inputs, "reference", **options)
    assert_close(run(inputs, **options), expected, 1e-12)
    assert expected["d dt"].count_nonzero() < expected["d dt"].numel()


def test_optional_inputs_may_be_left_out():
    inputs = scan_inputs(RAGGED, state=False)
    del inputs["D"], inputs["dt_bias"]
    expected = run(inputs, "reference", return_final_state=False)
    assert_close(run(inputs, return_final_state=False), expected, 1e-12)


def test_a_step_size_of_zero_has_a_gradient():
    inputs = scan_inputs(RAGGED)
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt"][:, ::3] = 0
    inputs["dt_bias"] = None
    expected = run(inputs, "reference", dt_softplus=False)
    assert expected["d dt"][:, ::3].abs().min() > 0
    assert_close(run(inputs, dt_softplus=False), expected, 1e-12)


def test_huge_step_sizes_take_the_linear_branch_of_softplus():
    inputs = scan_inputs(RAGGED)
    inputs["dt"] = inputs["dt"] * 30
    assert_close(run(inputs), run(inputs, "reference"), 1e-12)


def test_weak_decay_behind_a_strong_one_keeps_its_precision():
    """A cumulative sum in float32 would lose six digits here."""
    inputs = scan_inputs((1, 64, 2, 16, 1, 16), state=False, dtype=torch.float32)
    inputs["A"] = torch.tensor([-1.0, -0.5])
    inputs["dt_bias"] = None
    inputs["dt"] = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs["dt"][:, 3] = 10_000.0
    truth = run(as_dtype(inputs, torch.float64), "reference", dt_softplus=False)
    actual = run(inputs, dt_softplus=False)
    assert relative_error(actual["output 0"], truth["output 0"]) <= 1e-6
    assert relative_error(actual["d dt"], truth["d dt"]) <= 1e-5


@pytest.mark.parametrize("padding", PADDINGS)
def test_packed_documents_equal_each_alone(padding):
    inputs = scan_inputs(RAGGED, state=False, padding=padding)
    seq_idx = inputs["seq_idx"]
    packed, final_state = ssd_scan(**inputs, dt_softplus=True, return_final_state=True)
    for row in range(len(seq_idx)):
        for document in seq_idx[row].unique():
            here = seq_idx[row] == document
            if document < 0:
                assert packed[row, here].count_nonzero() == 0
                continue
            alone = {name: inputs[name][row : row + 1, here] for name in ("x", "dt", "B", "C")}
            rest = {name: inputs[name] for name in ("A", "D", "dt_bias")}
            y, state = ssd_scan(**alone, **rest, dt_softplus=True, return_final_state=True)
            assert relative_error(packed[row, here], y[0]) < 1e-12
        assert relative_error(final_state[row], state[0]) < 1e-12


@pytest.mark.parametrize("padding", ["left", "right", "interior"])
def test_padding_is_as_if_absent(padding):
    """Whatever it holds: outputs and gradients of the tokens stay, its own are exactly 0."""
    inputs = scan_inputs(RAGGED, padding=padding)
    is_padding = inputs["seq_idx"] < 0
    expected = run(inputs)
    for name in ("x", "dt", "B", "C"):
        inputs[name][is_padding] = float("nan")
    actual = run(inputs)
    assert_close(actual, expected, 1e-14)
    for name in ("output 0", "d x", "d dt", "d B", "d C"):
        assert actual[name][is_padding].count_nonzero() == 0


def test_left_padded_equals_right_padded_equals_unpadded():
    inputs = scan_inputs(RAGGED)
    whole = ssd_scan(**inputs, return_final_state=True, dt_softplus=True)
    n_padding = 37
    pads = {"left": (n_padding, 0), "right": (0, n_padding)}
    for side, pad in pads.items():
        padded = dict(inputs)
        for name in ("x", "dt", "B", "C"):
            zeros = (0, 0) * (inputs[name].dim() - 2)
            padded[name] = torch.nn.functional.pad(inputs[name], zeros + pad, value=1.0)
        seq_idx = torch.zeros(inputs["x"].shape[:2], dtype=torch.int32)
        padded["seq_idx"] = torch.nn.functional.pad(seq_idx, pad, value=-1)
        y, state = ssd_scan(**padded, return_final_state=True, dt_softplus=True)
        tokens = y[:, n_padding:] if side == "left" else y[:, :-n_padding]
        assert relative_error(tokens, whole[0]) < 1e-12
        assert relative_error(state, whole[1]) < 1e-12


def test_rows_of_nothing_but_padding_pass_the_state_through():
    inputs = scan_inputs(RAGGED)
    inputs["seq_idx"] = torch.full((2, 150), -1, dtype=torch.int32)
    y, state = ssd_scan(**inputs, return_final_state=True)
    assert y.count_nonzero() == 0
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("cut", [1, 64, 101])
def test_split_with_carried_state_equals_whole(cut):
    inputs = scan_inputs(RAGGED, padding="interior")
    # The caller's part: a document that begins with the second half must not see the first.
    inputs["seq_idx"] = inputs["seq_idx"].clamp(max=0)

    def in_two(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, **options):
        state, parts = initial_state, []
        for part in (slice(None, cut), slice(cut, None)):
            y, state = ssd_scan(
                x[:, part],
                dt[:, part],
                A,
                B[:, part],
                C[:, part],
                D=D,
                dt_bias=dt_bias,
                seq_idx=seq_idx[:, part].contiguous(),
                initial_state=state,
                **options,
            )
            parts.append(y)
        return torch.cat(parts, dim=1), state

    options = {"dt_softplus": True, "return_final_state": True}
    halves = run_with_gradients(in_two, inputs, **options)
    assert_close(halves, run(inputs), 1e-12)


def test_no_token_sees_a_later_one_or_another_document():
    inputs = scan_inputs(RAGGED, state=False)
    inputs["seq_idx"] = (torch.arange(150) // 50).int().expand(2, -1).contiguous()
    before = ssd_scan(**inputs, dt_softplus=True)
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 70] += 100
    # Matrix products are not bit for bit the same in every place in memory.
    changed = ((ssd_scan(**inputs, dt_softplus=True) - before).abs() > 1e-12).any(dim=(0, 2, 3))
    assert not changed[:70].any()
    assert changed[70:100].all()
    assert not changed[100:].any()


def test_the_first_tokens_of_a_row_continue_the_initial_state():
    """Whatever document number they carry; the next document does not."""
    inputs = scan_inputs(RAGGED)
    inputs["seq_idx"] = torch.full((2, 150), 7, dtype=torch.int32)
    inputs["seq_idx"][:, 100:] = 3
    y = ssd_scan(**inputs)
    inputs["initial_state"] = inputs["initial_state"] + 100
    changed = ((ssd_scan(**inputs) - y).abs() > 1e-12).any(dim=(0, 2, 3))
    assert changed[0]
    assert not changed[100:].any()


@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_result_does_not_depend_on_the_chunk_length(monkeypatch, chunk_size):
    inputs = scan_inputs((1, 90, 4, 16, 2, 16), padding="interior")
    expected = run(inputs)
    monkeypatch.setattr(chunks, "CHUNK_SIZE", chunk_size)
    assert_close(run(inputs), expected, 1e-12)


def test_backward_in_blocks_equals_backward_at_once(monkeypatch):
    inputs = scan_inputs((1, 300, 4, 16, 2, 16), padding="none")
    expected = run(inputs)
    monkeypatch.setattr(chunks, "CHUNK_SIZE", 16)
    monkeypatch.setattr(torch_path, "CHUNKS_PER_BLOCK", 3)
    assert_close(run(inputs), expected, 1e-12)


def test_strided_views_need_no_copy():
    inputs = scan_inputs(RAGGED, padding="interior")

    def of_views(x, dt, B, C, **others):
        return ssd_scan(strided(x), strided(dt), B=strided(B), C=strided(C), **others)

    options = {"dt_softplus": True, "return_final_state": True}
    assert_close(run_with_gradients(of_views, inputs, **options), run(inputs), 1e-14)


def test_output_gradients_may_be_expanded_or_absent():
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(RAGGED).items()}
    options = {"dt_softplus": True, "return_final_state": True}
    for index in (0, 1):
        results = [
            torch.autograd.grad(
                ssd_scan(**inputs, **options, backend=backend)[index].sum(),
                list(inputs.values()),
                materialize_grads=True,
                allow_unused=True,
            )
            for backend in ("torch", "reference")
        ]
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < 1e-12


def test_dtypes_of_outputs_and_gradients():
    inputs = scan_inputs(RAGGED, dtype=torch.bfloat16)
    inputs["D"] = inputs["D"].bfloat16()
    result = run(inputs)
    assert result["output 0"].dtype == torch.bfloat16
    assert result["output 1"].dtype == torch.float32
    for name, tensor in inputs.items():
        assert result[f"d {name}"].dtype == tensor.dtype, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 0, 4, 16)}, "seq_len = 0.*at least 1"),
        ({"x": torch.zeros(2, 8, 64)}, r"x has shape \(2, 8, 64\).*\(batch, seq_len, n_heads"),
        ({"x": torch.zeros(2, 8, 4, 16, dtype=torch.int64)}, "x has dtype int64"),
        ({"x": torch.zeros(2, 8, 16, 4).transpose(2, 3)}, "x has stride 4.*contiguous"),
        ({"dt": torch.zeros(2, 9, 4)}, "dt has shape.*seq_len = 9: x has seq_len = 8"),
        ({"A": torch.zeros(5)}, "A has.*n_heads = 5: x has n_heads = 4"),
        ({"B": torch.zeros(2, 8, 2, 16).bfloat16()}, "B has dtype bfloat16.*float32.*of x"),
        ({"C": torch.zeros(2, 8, 2, 24)}, "C has.*d_state = 24: B has d_state = 16"),
        ({"A": torch.zeros(4, device="meta")}, "A is on meta: move it to cpu"),
        ({"D": torch.zeros(4, 16)}, r"D has shape \(4, 16\): it must be \(n_heads\)"),
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int64)}, "seq_idx has dtype int64.*int32"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, "initial_state has.*d_state = 8"),
        ({"B": torch.zeros(2, 8, 3, 16), "C": torch.zeros(2, 8, 3, 16)}, "n_groups = 3 does not"),
        ({"dt_limit": (1.0, 0.0)}, r"dt_limit is \(1.0, 0.0\)"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'.*auto, triton, torch, reference"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    inputs = random_ssd_inputs(2, 8, 4, 16, 2, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ssd_scan(**(inputs | changes))


def test_values_are_checked_only_on_request(monkeypatch):
    inputs = random_ssd_inputs(2, 8, 4, 16, 2, 16)
    wrong_A = inputs | {"A": -inputs["A"]}
    wrong_seq_idx = inputs | {"seq_idx": torch.full((2, 8), -2, dtype=torch.int32)}
    ssd_scan(**wrong_A)
    ssd_scan(**wrong_seq_idx)
    monkeypatch.setenv("MAMBA2_CHECK", "1")
    ssd_scan(**inputs)
    with pytest.raises(ValueError, match=r"A must be negative.*-exp\(A_log\)"):
        ssd_scan(**wrong_A)
    with pytest.raises(ValueError, match="seq_idx reaches -2"):
        ssd_scan(**wrong_seq_idx)
