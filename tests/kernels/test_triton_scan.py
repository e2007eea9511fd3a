"""The Triton scan on the interpreter: against the recurrence in float64, in every layout and dtype.

Per case the recurrence in float64 is the truth; the recurrence and the PyTorch path in the inputs'
own dtype show the price of rounding; the kernels must stay within twice that price, plus a floor,
and under a ceiling.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

from mamba2_kernels import reference, ssd_scan  # noqa: E402
from mamba2_kernels.interpreter import repaired  # noqa: E402
from mamba2_kernels.launch import launches, use_architecture  # noqa: E402

INFINITY = float("inf")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
SINGLE = ("A", "D", "dt_bias", "initial_state")  # float32 whatever the dtype of the rest


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 1
    seq_len: int = 100
    n_heads: int = 4
    headdim: int = 32
    n_groups: int = 1
    d_state: int = 16
    dtype: torch.dtype = torch.float32
    arch: int = 90
    packed: bool = False
    carried: bool = False
    plain: bool = False  # no D, no dt_bias
    softplus: bool = True
    spread: float = 0.5  # of dt before softplus
    fast: bool = False  # decays of Mamba2's own initialisation, A in -1 .. -16
    dt_limit: tuple[float, float] = (0.0, INFINITY)
    seed: int = 0

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        given = [f for f in fields if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in given)


@pytest.fixture(autouse=True)
def _on_the_interpreter(interpreter: None) -> Iterator[None]:
    with repaired():
        yield


def draw(case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs, as views into one buffer as in_proj and the convolution leave them; seq_idx."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, t, h, p, g, n = (
        case.batch, case.seq_len, case.n_heads, case.headdim, case.n_groups, case.d_state
    )  # fmt: skip
    xBC = torch.cat([normal(b, t, h * p + g * n), normal(b, t, g * n) / n**0.5], dim=-1)
    x, C, B = xBC.to(case.dtype).split([h * p, g * n, g * n], dim=-1)
    tensors = {
        "x": x.unflatten(-1, (h, p)),
        "dt": (normal(b, t, 3 * h) * case.spread - 1)[..., -h:].to(case.dtype),
        "A": -torch.exp(normal(h) / 2),
        "B": B.unflatten(-1, (g, n)),
        "C": C.unflatten(-1, (g, n)),
    }
    if case.fast:
        tensors["A"] = -(1 + 15 * torch.rand(h, generator=generator, dtype=torch.float64))
    if not case.softplus:
        tensors["dt"] = tensors["dt"].exp()
    if not case.plain:
        tensors |= {"D": normal(h), "dt_bias": normal(h) / 10}
    if case.carried:
        tensors["initial_state"] = normal(b, h, p, n) / 10
    tensors = {
        name: tensor.float() if name in SINGLE else tensor for name, tensor in tensors.items()
    }
    seq_idx = None
    if case.packed:
        seq_idx = torch.randint(0, 9, (b, t), generator=generator).sort(dim=1).values.int() // 2
        seq_idx[torch.rand(b, t, generator=generator) < 0.15] = -1
        seq_idx[0, : t // 4] = -1  # left padding
    return tensors, seq_idx


def recurrence(
    case: Case, tensors: dict[str, Tensor], seq_idx: Tensor | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Outputs and gradients of the reference in `dtype`, or in that of each input."""
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()
        for name, tensor in tensors.items()
    }
    if dtype is None:
        # A recurrence in 16 bits throughout: everything in the dtype of x.
        run = {name: leaf.to(leaves["x"].dtype) for name, leaf in leaves.items()}
    else:
        run = leaves
    y, state = reference.ssd_scan(
        **run, dt_softplus=case.softplus, dt_limit=case.dt_limit, seq_idx=seq_idx
    )
    return outputs_and_gradients(case, y, state, leaves)


def outputs_and_gradients(
    case: Case, y: Tensor, state: Tensor, leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    dy = torch.randn(y.shape, generator=generator).to(case.dtype)
    dstate = torch.randn(state.shape, generator=generator)
    loss = (y * dy.to(y.dtype)).sum().double() + (state * dstate.to(state.dtype)).sum().double()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach()} | named


def kernels(case: Case, tensors: dict[str, Tensor], seq_idx: Tensor | None) -> dict[str, Tensor]:
    before = launches["scan_kernel"], launches["across_kernel"]
    with use_architecture(case.arch):
        results = public_op(case, tensors, seq_idx, "triton")
    # a wide scan in float32 is taken in slices
    wide = case.dtype == torch.float32
    n = -(-case.headdim // 64) * -(-case.d_state // 32) if wide else 1
    assert (launches["scan_kernel"], launches["across_kernel"]) == (before[0] + n, before[1] + n)
    return results


def public_op(
    case: Case, tensors: dict[str, Tensor], seq_idx: Tensor | None, backend: str
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y, state = ssd_scan(
        **leaves,
        dt_softplus=case.softplus,
        dt_limit=case.dt_limit,
        seq_idx=seq_idx,
        return_final_state=True,
        backend=backend,
    )
    return outputs_and_gradients(case, y, state, leaves)


def error(value: Tensor, truth: Tensor) -> float:
    scale = truth.norm().item()
    return (value.double() - truth).norm().item() / (scale if scale > 0 else 1.0)


def check(case: Case, ceiling: float, decay_ceiling: float) -> None:
    """`decay_ceiling` is that of the sums over all tokens, where most of the terms cancel."""
    tensors, seq_idx = draw(case)
    truth = recurrence(case, tensors, seq_idx, torch.float64)
    rounding = recurrence(case, tensors, seq_idx, None)
    plain = public_op(case, tensors, seq_idx, "torch")
    results = kernels(case, tensors, seq_idx)
    assert results.keys() == truth.keys()
    for name, value in results.items():
        worst = decay_ceiling if name in ("dA", "ddt_bias") else ceiling
        floor = 3 * worst / 4
        price = max(error(rounding[name], truth[name]), error(plain[name], truth[name]))
        found = error(value, truth[name])
        assert found <= min(worst, 2 * price + floor), f"{name}: {found:.1e}, rounding {price:.1e}"
    if seq_idx is not None:
        padding = seq_idx < 0
        for name in ("y", "dx", "ddt", "dB", "dC"):
            assert not results[name][padding].any(), f"{name} is not zero at padding"


SHAPES = [
    Case(seq_len=1, carried=True),
    Case(seq_len=2, n_heads=2, packed=True, arch=80),
    Case(seq_len=63, n_groups=2, arch=80),
    Case(seq_len=64, n_groups=4, plain=True),
    Case(seq_len=65, batch=2, n_groups=2, packed=True, carried=True),
    Case(seq_len=100, batch=3, packed=True, carried=True, arch=80),
    Case(seq_len=130, headdim=64, n_heads=2, d_state=64, packed=True, carried=True, arch=100),
    Case(seq_len=70, headdim=128, n_heads=2, d_state=128, packed=True),
    Case(seq_len=70, headdim=64, n_heads=2, d_state=256, carried=True),
    Case(seq_len=70, headdim=64, n_heads=2, d_state=256, carried=True, arch=86),
    Case(seq_len=70, headdim=128, n_heads=2, d_state=32, packed=True, arch=89),
    Case(seq_len=40, headdim=128, n_heads=2, n_groups=2, d_state=256, packed=True, carried=True),
    Case(seq_len=300, n_heads=2, packed=True, carried=True, d_state=32),  # two chunks backward
    Case(seq_len=530, n_heads=2, packed=True, carried=True),  # two chunks forward
    Case(seq_len=530, n_heads=2, arch=80),
    Case(seq_len=20, n_heads=42, packed=True),  # three splits of the heads
    Case(seq_len=50, softplus=False, plain=True),
    Case(seq_len=50, dt_limit=(0.2, 0.4), packed=True),
    Case(seq_len=90, fast=True, packed=True, carried=True),
    Case(seq_len=90, fast=True, n_heads=8, arch=80),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_float32_matches_the_recurrence(case: Case) -> None:
    check(case, ceiling=2e-6, decay_ceiling=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(seq_len=100, n_heads=8, packed=True, carried=True),
        Case(seq_len=100, n_heads=8, fast=True, arch=80, seed=1),
        Case(seq_len=130, batch=2, n_heads=8, n_groups=2, headdim=64, d_state=64),
        Case(seq_len=300, n_heads=8, d_state=32, packed=True, fast=True, arch=100, seed=2),
        Case(seq_len=70, n_heads=8, headdim=128, d_state=128, carried=True),
    ],
    ids=str,
)
def test_16_bits_match_the_recurrence(case: Case, dtype: torch.dtype) -> None:
    check(dataclasses.replace(case, dtype=dtype), ceiling=4e-3, decay_ceiling=4e-3)


@pytest.mark.parametrize("spread", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("arch", [80, 90])
def test_extreme_step_sizes(arch: int, spread: float) -> None:
    case = Case(seq_len=130, arch=arch, spread=spread, packed=True, carried=True)
    check(case, ceiling=1e-4, decay_ceiling=1e-4)


def test_step_size_of_exactly_zero_has_a_gradient() -> None:
    case = Case(seq_len=40, softplus=False, plain=True, carried=True)
    tensors, _ = draw(case)
    tensors["dt"][:, ::3] = 0
    truth = recurrence(case, tensors, None, torch.float64)
    results = kernels(case, tensors, None)
    assert truth["ddt"][:, ::3].any()
    for name, value in results.items():
        assert error(value, truth[name]) <= 1e-5, name


def test_two_runs_give_the_same_bits() -> None:
    case = Case(seq_len=150, n_heads=42, packed=True, carried=True, dtype=torch.bfloat16)
    tensors, seq_idx = draw(case)
    first, second = (kernels(case, tensors, seq_idx) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("arch", [80, 90])
def test_packed_rows_equal_separate_ones(arch: int) -> None:
    """Bit for bit where documents start at tiles' edges, or else to rounding."""
    case = Case(seq_len=128, arch=arch)
    tensors, _ = draw(case)
    seq_idx = torch.zeros(1, 128, dtype=torch.int32)
    seq_idx[:, 50:] = 1
    whole = kernels(case, tensors, seq_idx)
    with use_architecture(arch):
        for part in (slice(0, 50), slice(50, 128)):
            cut = {
                name: tensor if name in SINGLE else tensor[:, part]
                for name, tensor in tensors.items()
            }
            y = ssd_scan(**cut, dt_softplus=True, backend="triton")
            assert error(y, whole["y"][:, part].double()) <= 1e-6


def test_split_with_carried_state_equals_whole() -> None:
    case = Case(seq_len=150)
    tensors, _ = draw(case)
    whole = kernels(case, tensors, None)
    state, outputs = None, []
    for part in (slice(0, 1), slice(1, 90), slice(90, 150)):
        cut = {n: t if n in SINGLE else t[:, part] for n, t in tensors.items()}
        y, state = ssd_scan(
            **cut, dt_softplus=True, initial_state=state, return_final_state=True, backend="triton"
        )
        outputs.append(y)
    assert error(torch.cat(outputs, dim=1), whole["y"].double()) <= 1e-6
    assert error(state, whole["state"].double()) <= 1e-6


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("far", ["tokens", "rows"])
def test_offsets_past_2_to_the_31(arch: int, far: str) -> None:
    """Memory is reserved, not used: only the pages under x are touched."""
    case = Case(batch=2, seq_len=24, n_heads=1, arch=arch, dtype=torch.bfloat16)
    tensors, _ = draw(case)
    b, t, h, p = tensors["x"].shape
    strides = {"tokens": (64, 1 << 27, p, 1), "rows": ((1 << 31) + 64, p, p, 1)}[far]
    extent = 1 + sum((n - 1) * s for n, s in zip((b, t, h, p), strides, strict=True))
    assert extent > 1 << 31
    x = torch.empty(extent, dtype=torch.bfloat16).as_strided((b, t, h, p), strides)
    x.copy_(tensors["x"])
    assert torch.equal(x, tensors["x"])
    near = kernels(case, tensors, None)
    distant = kernels(case, tensors | {"x": x}, None)
    for name in near:
        assert torch.equal(near[name], distant[name]), name


def test_auto_takes_no_kernel_on_a_cpu_and_triton_takes_all() -> None:
    tensors, _ = draw(Case(seq_len=10))
    before = launches.total()
    ssd_scan(**tensors, dt_softplus=True)
    assert launches.total() == before
    ssd_scan(**tensors, dt_softplus=True, backend="triton")
    assert launches.total() == before + 2  # prepare and scan: one chunk needs no states


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ({"headdim": 48}, torch.float32, "headdim is 48"),
        ({"d_state": 24}, torch.float32, "d_state is 24"),
        ({}, torch.float64, "float64"),
    ],
)
def test_shapes_without_a_kernel_are_refused(
    sizes: dict[str, int], dtype: torch.dtype, reason: str
) -> None:
    case = Case(seq_len=4, **sizes)
    tensors = {name: tensor.to(dtype) for name, tensor in draw(case)[0].items()}
    with pytest.raises(ValueError, match=reason):
        ssd_scan(**tensors, dt_softplus=True, backend="triton")
