"""Operations of a step counted: Triton's launches against the interpreter, products against
PyTorch's own counter, and the tables of the documentation."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

from mamba2_kernels import causal_conv1d, gated_rms_norm, ssd_scan  # noqa: E402
from mamba2_kernels.launch import use_architecture  # noqa: E402
from mamba2_kernels.traffic import launches  # noqa: E402
from mamba2_train import roofline  # noqa: E402
from mamba2_train.commands.plan import planned_run  # noqa: E402
from mamba2_train.model import PRESETS, Mamba2Config, Mamba2LM, initialize  # noqa: E402
from mamba2_train.roofline import GPUS, MEASURED, PHASES, REACHED, count, seconds  # noqa: E402

SMALL = Mamba2Config(d_model=64, n_layers=3, vocab_size=512, d_state=16, headdim=32)
ROWS = ["data.batch_size=2", "data.seq_len=64"]
DOCS = Path(__file__).parent.parent / "docs" / "planning.md"


def inputs(n_heads, n_groups, seq_len):
    torch.manual_seed(0)

    def normal(*size):
        return torch.randn(*size).bfloat16()

    x, B, C = normal(1, seq_len, n_heads * 64 + 256 * n_groups).split(
        [n_heads * 64, 128 * n_groups, 128 * n_groups], dim=-1
    )
    return {
        "x": x.unflatten(-1, (n_heads, 64)),
        "dt": normal(1, seq_len, n_heads) - 3,
        "A": -torch.linspace(1, 16, n_heads),
        "B": B.unflatten(-1, (n_groups, 128)),
        "C": C.unflatten(-1, (n_groups, 128)),
        "D": torch.ones(n_heads),
    }


def scan(t):
    seq_idx = torch.zeros(t["x"].shape[:2], dtype=torch.int32)
    return ssd_scan(**t, dt_softplus=True, seq_idx=seq_idx, backend="triton")


OPS = {
    # whole chunks, for the work of a ragged one is bounded, not counted
    "scan": (scan, inputs(2, 1, 512)),
    "conv": (
        lambda t: causal_conv1d(**t, backend="triton"),
        {"x": torch.randn(1, 96, 64).bfloat16(), "weight": torch.randn(64, 4)},
    ),
    "norm": (
        lambda t: gated_rms_norm(**t, backend="triton"),
        {
            "x": torch.randn(40, 128).bfloat16(),
            "z": torch.randn(40, 128).bfloat16(),
            "weight": torch.ones(128),
        },
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_launches_against_the_interpreter(op):
    """Every address that the kernels touch, and every product that they take."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton runs on a GPU here")
    from mamba2_kernels.interpreter import count as interpreted

    run, tensors = OPS[op]
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with use_architecture(90):
        with interpreted() as forward:
            y = run(leaves)
        dy = torch.ones_like(y)
        with interpreted() as backward:
            torch.autograd.grad(y, list(leaves.values()), dy)
        kept = []
        told = launches(lambda: kept.append(run(leaves)))
        told_back = launches(lambda: torch.autograd.grad(kept[0], list(leaves.values()), dy))
    for counted, said in ((forward, told), (backward, told_back)):
        kernels = [launch for launch in counted.launches if not launch.name.startswith("aten.")]
        assert [launch.name for launch in kernels] == [launch.name for launch in said]
        assert [launch.flops for launch in kernels] == [launch.flops for launch in said]
        for launch, one in zip(kernels, said, strict=True):
            # nothing but vectors of a few heads, read twice or not at all, is off
            assert one.hbm == pytest.approx(launch.hbm, rel=0.02, abs=200), launch.name


@pytest.mark.parametrize("run", ["adapter=full", "adapter=lora"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_products_against_pytorch(run, mode):
    """A step of the model itself, run: the FLOPs of its products, repeated ones too."""
    from mamba2_train.commands.train import adapt

    plan = planned_run([run, *ROWS, f"model.checkpointing={mode}"], SMALL)
    step = count(plan)
    model = initialize(Mamba2LM(SMALL))
    adapt(model, plan.config)
    model.set_checkpointing(mode)
    model.train()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.backbone(ids, None, None, None, False)[0].sum().backward()
    products = ("in_proj", "out_proj", "LoRA")
    ours = sum(n * op.flops for op, n in step.block.items() if op.part in products)
    first = ours * 3
    if run == "adapter=lora":  # the first block's input has a gradient: the embeddings have LoRA
        first += sum(n * op.flops for op, n in step.rest.items() if op.part == "LoRA")
    assert first == counter.get_total_flops()


def test_phases_and_parts():
    none, full = (
        count(planned_run(["adapter=full", *ROWS, f"model.checkpointing={m}"], SMALL))
        for m in ("none", "full")
    )
    assert {op.phase for op in none.block} == {"forward", "backward"}

    def of(step, phase, parts):
        return Counter(
            {op._replace(phase=""): n for op, n in step.block.items()
             if op.phase == phase and op.part in parts}
        )  # fmt: skip

    ops = ("conv", "scan", "gated norm", "norm", "in_proj")
    assert of(full, "again", ops) == of(none, "forward", ops)
    assert of(full, "backward", ops) == of(none, "backward", ops)
    assert not of(full, "again", ("out_proj",))  # nothing comes after it
    parameter = 48 * none.n_trained  # scaled, clipped, its norm; AdamW reads four and writes three
    assert sum(n * op.hbm for op, n in none.update.items()) == pytest.approx(parameter, rel=0.01)


def test_calls_and_launches_of_a_block():
    """The host's work for a block: a gate, not a wish. Fewer is better: lower it then."""
    runs = (["adapter=full", "precision=bf16-mixed"], ["adapter=lora", "precision=bf16"])
    full, lora = (count(planned_run([*run, *ROWS], SMALL)) for run in runs)
    assert full.block.total() <= 43
    assert full.calls.block <= 70
    assert lora.block.total() <= 69
    assert lora.calls.block <= 118


def test_what_was_measured_on_an_h100():
    """REACHED is the roofline over the times measured, the mean of two shapes."""
    shares = {part: [] for part in REACHED}
    for name, times in MEASURED.items():
        shape = dataclasses.replace(PRESETS[name], n_layers=2)
        row = ["data.seq_len=8192", "data.batch_size=1"]
        step = count(planned_run(["adapter=lora", "precision=bf16", *row], shape))
        for part, milliseconds in zip(REACHED, times, strict=True):
            assert f"{milliseconds:.2f} ms" in DOCS.read_text()
            ops = Counter({op: n for op, n in step.block.items() if op.part == part})
            fastest = seconds(ops, GPUS["h100"], PHASES, achieved=False)
            shares[part].append(1000 * fastest / milliseconds)
    for part, found in shares.items():
        assert REACHED[part] == pytest.approx(sum(found) / 2, abs=0.01), part
        assert max(found) < 1  # nobody is faster than the roofline


@pytest.mark.slow
def test_the_tables_of_the_documentation():
    assert roofline.tables() in DOCS.read_text()


def test_one_row_of_the_documentation():
    """What CI counts of them; `slow` counts all."""
    step = roofline._table_count("130M", roofline.METHODS["full"])
    (line,) = (x for x in roofline._block_table({("130M", "full"): step}) if "130M" in x)
    assert line in DOCS.read_text()
    assert re.search(r"\| 130M, full \|", line)
