"""Decoding token by token against the whole sequence at once."""

import pytest
import torch

from mamba2_kernels import (
    MixerStep,
    causal_conv1d,
    causal_conv1d_step,
    reference,
    ssd_scan,
    ssd_step,
)
from mamba2_kernels.testing import random_ssd_inputs, random_state, relative_error

SHAPE = (2, 20, 4, 16, 2, 16)  # batch, seq_len, n_heads, headdim, n_groups, d_state
BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.2, 0.9)], ids=str)
def test_steps_equal_the_scan(backend, dtype, dt_limit):
    inputs = random_ssd_inputs(*SHAPE, dtype=dtype)
    state = random_state(2, 4, 16, 16, dtype=inputs["A"].dtype)
    options = {"dt_softplus": True, "dt_limit": dt_limit}
    y, final_state = ssd_scan(
        **inputs, **options, initial_state=state, return_final_state=True, backend="torch"
    )
    in_place = state.clone()
    steps = []
    for t in range(SHAPE[1]):
        token = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        rest = {name: inputs[name] for name in ("A", "D", "dt_bias")}
        steps.append(ssd_step(**token, **rest, **options, state=in_place, backend=backend))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(torch.stack(steps, dim=1), y) < tolerance
    assert relative_error(in_place, final_state) < min(tolerance, 1e-6)
    assert steps[0].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_needs_neither_D_nor_bias_nor_softplus(backend):
    inputs = random_ssd_inputs(*SHAPE)
    first = {name: inputs[name].abs()[:, :1] for name in ("x", "dt", "B", "C")}
    state = torch.zeros(2, 4, 16, 16, dtype=torch.float64)
    y = ssd_step(
        **{name: t[:, 0] for name, t in first.items()},
        A=inputs["A"],
        state=state,
        backend=backend,
    )
    whole, final_state = ssd_scan(**first, A=inputs["A"], return_final_state=True)
    assert relative_error(y, whole[:, 0]) < 1e-14
    assert relative_error(state, final_state) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_state_is_rounded_once_per_token(backend):
    inputs = random_ssd_inputs(*SHAPE, dtype=torch.bfloat16)
    token = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    narrow = random_state(2, 4, 16, 16, dtype=torch.bfloat16)
    wide = narrow.float()
    for state in (narrow, wide):
        ssd_step(**token, A=inputs["A"], state=state, dt_softplus=True, backend=backend)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution_steps_equal_the_convolution(backend, dtype, d_conv, activation):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = random_state(2, 12, 24, dtype=dtype, seed=1)
    weight, bias = random_state(24, d_conv, dtype=wide, seed=2), random_state(24, dtype=wide)
    state = random_state(2, d_conv - 1, 24, dtype=dtype, seed=3)
    y, final_state = causal_conv1d(
        x, weight, bias, activation=activation, initial_state=state, return_final_state=True
    )
    options = {"activation": activation, "backend": backend}
    steps = [causal_conv1d_step(x[:, t], state, weight, bias, **options) for t in range(12)]
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(torch.stack(steps, dim=1), y) < tolerance
    assert torch.equal(state, final_state)
    assert steps[0].dtype == dtype


def test_states_may_be_slices_of_a_larger_cache():
    inputs = random_ssd_inputs(*SHAPE)
    token = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    cache = random_state(2, 3, 4, 16, 16)
    dense = cache[:, 1].clone()
    before = cache.clone()
    ys = [ssd_step(**token, A=inputs["A"], state=state) for state in (cache[:, 1], dense)]
    assert torch.equal(*ys)
    assert torch.equal(cache[:, 1], dense)
    assert torch.equal(cache[:, ::2], before[:, ::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": torch.zeros(2, 4, 16, 8)}, "state has.*d_state = 8: B has d_state = 16"),
        ({"state": torch.zeros(2, 4, 16, 16).mT}, "state has stride 16 in its last dimension"),
        ({"state": torch.zeros(2, 4, 16, 16, requires_grad=True)}, "state requires a gradient"),
        ({"x": torch.zeros(2, 1, 4, 16)}, r"x has shape.*\(batch, n_heads, headdim\)"),
        ({"C": torch.zeros(2, 2, 16).half()}, "C has dtype float16"),
        ({"backend": "mps"}, "unknown backend 'mps'"),
    ],
)
def test_wrong_arguments_of_a_step_are_refused(changes, message):
    inputs = random_ssd_inputs(*SHAPE, dtype=torch.float32)
    arguments = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    arguments |= {"A": inputs["A"], "state": torch.zeros(2, 4, 16, 16)}
    with pytest.raises(ValueError, match=message):
        ssd_step(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": torch.zeros(2, 4, 24)}, "d_conv - 1 = 4: weight has d_conv - 1 = 3"),
        ({"state": torch.zeros(2, 24, 3).mT}, "state has stride 3 in its last dimension"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
    ],
)
def test_wrong_arguments_of_a_convolution_step_are_refused(changes, message):
    arguments = {"x": torch.zeros(2, 24), "state": torch.zeros(2, 3, 24)}
    arguments["weight"] = torch.zeros(24, 4)
    with pytest.raises(ValueError, match=message):
        causal_conv1d_step(**(arguments | changes))


def mixer_inputs(batch, n_groups, dtype):
    """What the step reads (8 heads of 4, d_state 6), and six tokens."""
    wide = torch.promote_types(dtype, torch.float32)
    channels = 8 * 4 + 2 * n_groups * 6
    made = [random_state(channels, 4, dtype=dtype, seed=1), random_state(channels, dtype=dtype)]
    made += [-random_state(8, dtype=wide, seed=2).abs() - 0.1]
    made += [random_state(8, dtype=wide, seed=seed) for seed in (3, 4)]
    norm_weight = random_state(32, dtype=dtype, seed=5)
    states = random_state(batch, 3, channels, dtype=dtype), random_state(batch, 8, 4, 6, dtype=wide)
    tokens = random_state(6, batch, 32 + channels + 8, dtype=dtype, seed=6)
    return [*made, norm_weight], states, tokens


def mixer_truth(weights, states, token, n_groups, dt_limit, eps):
    """The recurrence as `reference` has it, in float64."""
    conv_weight, conv_bias, A, D, dt_bias, norm_weight = weights
    channels = len(conv_weight)
    z, xBC, dt = token.split([32, channels, 8], -1)
    xBC, conv = reference.causal_conv1d_step(
        xBC, states[0], conv_weight, conv_bias, activation="silu"
    )
    x, B, C = xBC.split([32, n_groups * 6, n_groups * 6], -1)
    y, ssm = reference.ssd_step(
        x.unflatten(-1, (8, 4)), dt, A, B.unflatten(-1, (n_groups, 6)),
        C.unflatten(-1, (n_groups, 6)), states[1], D=D, dt_bias=dt_bias, dt_softplus=True,
        dt_limit=dt_limit,
    )  # fmt: skip
    y = reference.gated_rms_norm(y.flatten(1), z, norm_weight, eps=eps, group_size=32 // n_groups)
    return y, (conv, ssm)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in BACKENDS for d in (torch.float64, torch.float32, torch.bfloat16)]
    + [("triton", torch.float32), ("triton", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("batch", "n_groups"), [(1, 1), (3, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("dt_limit", [(0.0, float("inf")), (0.2, 0.9)], ids=str)
def test_a_mixers_step_is_the_recurrence(backend, dtype, batch, n_groups, dt_limit):
    weights, states, tokens = mixer_inputs(batch, n_groups, dtype)
    step = MixerStep(
        *weights, headdim=4, n_groups=n_groups, dt_limit=dt_limit, eps=1e-4, backend=backend
    )
    exact_weights, exact = [w.double() for w in weights], tuple(s.double() for s in states)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for token in tokens:
        expected, exact = mixer_truth(
            exact_weights, exact, token.double(), n_groups, dt_limit, 1e-4
        )
        y = step(token, *states)
        assert y.dtype == dtype
        assert relative_error(y, expected) < tolerance
        assert relative_error(states[0], exact[0]) < tolerance
        assert relative_error(states[1], exact[1]) < tolerance


def test_a_mixers_step_without_a_bias_on_a_slice_of_a_cache():
    weights, (conv, ssm), tokens = mixer_inputs(2, 1, torch.float64)
    weights[1] = None
    step = MixerStep(*weights, headdim=4, n_groups=1)
    cache = random_state(2, 3, 8, 4, 6, dtype=torch.float64)
    cache[:, 1] = ssm
    before = cache.clone()
    expected, (_, after) = mixer_truth(weights, (conv, ssm), tokens[0], 1, (0, float("inf")), 1e-5)
    assert relative_error(step(tokens[0], conv, cache[:, 1]), expected) < 1e-14
    assert relative_error(cache[:, 1], after) < 1e-14
    assert torch.equal(cache[:, ::2], before[:, ::2])


def test_wrong_arguments_of_a_mixers_step_are_refused():
    weights, states, tokens = mixer_inputs(2, 1, torch.float32)
    with pytest.raises(ValueError, match="8 heads of 5 and 1 groups do not fit 32 channels"):
        MixerStep(*weights, headdim=5, n_groups=1)
    with pytest.raises(ValueError, match="n_groups = 3 does not divide n_heads = 8"):
        MixerStep(*weights, headdim=4, n_groups=3)
    with pytest.raises(ValueError, match=r"dt_bias has shape.*n_heads = 7"):
        MixerStep(*weights[:4], torch.ones(7), weights[5], headdim=4, n_groups=1)
    step = MixerStep(*weights, headdim=4, n_groups=1)
    with pytest.raises(ValueError, match=r"zxBCdt has shape \(2, 83\)"):
        step(tokens[0][:, 1:], *states)
    with pytest.raises(ValueError, match=r"ssm_state \(1, 8, 4, 6\)"):
        step(tokens[0], states[0], states[1][:1])
