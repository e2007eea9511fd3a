"""What the kernels move and how often they are launched, counted at the shipped configurations.

Bytes are per token and layer, in bfloat16, at 1,024 tokens, on packed rows. The groups of
Codestral's shape are alike, so one is counted for all eight; of the 2.7B shape two of the four
splits of the heads are. Both count what the parts share (B, C, the documents) more than once: they
are upper bounds. `slow` counts the shapes whole.
"""

from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

from mamba2_kernels import causal_conv1d, gated_rms_norm, ssd_scan  # noqa: E402
from mamba2_kernels.interpreter import Traffic, count  # noqa: E402
from mamba2_kernels.launch import use_architecture  # noqa: E402

SEQ_LEN = 1024
HEADDIM, D_STATE = 64, 128


class Shape(NamedTuple):
    n_heads: int
    n_groups: int
    parts: int  # how many times as large the model is


class Limits(NamedTuple):
    """KB per token."""

    scan_forward: float
    scan_backward: float
    mixer_forward: float
    mixer_backward: float


MODELS = {
    "2.7B": (Shape(n_heads=40, n_groups=1, parts=2), Limits(39, 126, 91, 242)),
    "Codestral": (Shape(n_heads=16, n_groups=1, parts=8), Limits(67, 206, 157, 405)),
}
# On an H100 the entry that was fastest writes a state at every tile, and reads it, instead of
# carrying one over up to three: half again the bytes, three quarters of the time.
MEASURED = {
    "2.7B": MODELS["2.7B"][1]._replace(scan_backward=190, mixer_backward=306),
    "Codestral": MODELS["Codestral"][1]._replace(scan_backward=306, mixer_backward=505),
}


@pytest.fixture(autouse=True)
def _on_the_interpreter(interpreter: None) -> None:
    torch.manual_seed(0)


def scan_traffic(shape: Shape) -> tuple[Traffic, Traffic]:
    n_heads, n_groups, _ = shape
    d_inner, d_bc = n_heads * HEADDIM, n_groups * D_STATE
    xBC = torch.randn(1, SEQ_LEN, d_inner + 2 * d_bc).bfloat16()
    x, B, C = xBC.split([d_inner, d_bc, d_bc], dim=-1)
    x = x.unflatten(-1, (n_heads, HEADDIM)).requires_grad_()
    B, C = (t.unflatten(-1, (n_groups, D_STATE)).requires_grad_() for t in (B, C))
    dt = torch.randn(1, SEQ_LEN, 8 * n_heads)[..., -n_heads:].bfloat16().requires_grad_()
    A = (-torch.rand(n_heads) - 0.5).requires_grad_()
    D, dt_bias = (torch.rand(n_heads, requires_grad=True) for _ in range(2))
    seq_idx = torch.zeros(1, SEQ_LEN, dtype=torch.int32)
    with count() as forward:
        y = ssd_scan(
            x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, seq_idx=seq_idx,
            backend="triton",
        )  # fmt: skip
    dy = torch.randn_like(y)
    with count() as backward:
        torch.autograd.grad(y, [x, dt, A, B, C, D, dt_bias], dy)
    return forward, backward


def around_traffic(channels: int, d_inner: int, group_size: int) -> tuple[int, int]:
    """Bytes per channel of the convolution and of the gated norm, forward and backward, added up
    over `channels` and `d_inner`. Channels of the convolution are all alike: 64 are counted."""
    counted = 64
    x = torch.randn(1, SEQ_LEN, counted).bfloat16().requires_grad_()
    weight = torch.randn(counted, 4, requires_grad=True)
    bias = torch.randn(counted, requires_grad=True)
    seq_idx = torch.zeros(1, SEQ_LEN, dtype=torch.int32)
    with count() as conv_forward:
        y = causal_conv1d(x, weight, bias, seq_idx=seq_idx, backend="triton")
    dy = torch.randn_like(y)
    with count() as conv_backward:
        torch.autograd.grad(y, [x, weight, bias], dy)
    x, z = (torch.randn(1, SEQ_LEN, group_size).bfloat16().requires_grad_() for _ in range(2))
    norm_weight = torch.ones(group_size, requires_grad=True)
    with count() as norm_forward:
        y = gated_rms_norm(x, z, norm_weight, backend="triton")
    dy = torch.randn_like(y)
    with count() as norm_backward:
        torch.autograd.grad(y, [x, z, norm_weight], dy)
    for traffic in (conv_forward, conv_backward, norm_forward, norm_backward):
        assert traffic.total("atomic") == traffic.total("outside") == 0
    conv, groups = channels / counted, d_inner / group_size
    return (
        round(conv_forward.total("hbm") * conv + norm_forward.total("hbm") * groups),
        round(conv_backward.total("hbm") * conv + norm_backward.total("hbm") * groups),
    )


def check(shape: Shape, limits: Limits) -> None:
    forward, backward = scan_traffic(shape)
    print("\n".join(["", "forward", forward.table(SEQ_LEN), "backward", backward.table(SEQ_LEN)]))
    for traffic, most in ((forward, 3), (backward, 12)):
        assert len(traffic.launches) <= most
        assert traffic.total("atomic") == traffic.total("outside") == 0
    per_token = shape.parts / SEQ_LEN / 1000
    scan_forward, scan_backward = (t.total("hbm") * per_token for t in (forward, backward))
    assert scan_forward <= limits.scan_forward
    assert scan_backward <= limits.scan_backward
    n_heads, n_groups = shape.n_heads * shape.parts, shape.n_groups * shape.parts
    if shape is MODELS["2.7B"][0]:
        n_groups = 1
    d_inner = n_heads * HEADDIM
    channels = d_inner + 2 * n_groups * D_STATE
    around = around_traffic(channels, d_inner, d_inner // n_groups)
    # Autograd gathers the gradients of x, B and C, which are parts of one tensor: read and written.
    gather = 2 * 2 * channels / 1000
    mixer_forward = scan_forward + around[0] / SEQ_LEN / 1000
    mixer_backward = scan_backward + around[1] / SEQ_LEN / 1000 + gather
    print(f"scan {scan_forward:.1f} {scan_backward:.1f}, mixer {mixer_forward:.1f} "
          f"{mixer_backward:.1f} KB per token")  # fmt: skip
    assert mixer_forward <= limits.mixer_forward
    assert mixer_backward <= limits.mixer_backward


@pytest.mark.parametrize("model", MODELS)
def test_bytes_and_launches(model: str) -> None:
    with use_architecture(100):
        check(*MODELS[model])


@pytest.mark.parametrize("model", ["2.7B", pytest.param("Codestral", marks=pytest.mark.slow)])
def test_bytes_and_launches_of_the_entry_that_a_gpu_chose(model: str) -> None:
    with use_architecture(90):
        check(MODELS[model][0], MEASURED[model])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_and_launches_of_the_whole_shape(model: str) -> None:
    shape, limits = MODELS[model]
    n_groups = 1 if model == "2.7B" else shape.n_groups * shape.parts
    with use_architecture(100):
        forward, backward = scan_traffic(Shape(shape.n_heads * shape.parts, n_groups, 1))
    assert forward.total("hbm") / SEQ_LEN / 1000 <= limits.scan_forward
    assert backward.total("hbm") / SEQ_LEN / 1000 <= limits.scan_backward


def test_the_counter_sees_what_it_should() -> None:
    """A kernel too many, a tensor read twice, or bytes outside would show."""
    x = torch.randn(2, 32, 64, requires_grad=True)
    z, weight = torch.randn(2, 32, 64), torch.ones(64)
    with count() as traffic:
        gated_rms_norm(x, z, weight, backend="triton")
    (launch,) = traffic.launches
    assert launch.read == x.nbytes + z.nbytes + weight.nbytes
    assert launch.written == x.nbytes
    assert launch.loaded == x.nbytes + z.nbytes + 2 * 32 * weight.nbytes
    assert launch.programs == 2 * 32
    with count() as traffic:
        (x.detach() + z).sum()
    assert [launch.name for launch in traffic.launches] == ["aten.add", "aten.sum"]
