"""What a training step must move and multiply, operation by operation, and how long that takes.

    time = sum over operations of max(bytes / bandwidth, FLOPs / peak)

A step is taken on tensors without contents, as in `plan`, and every operation that PyTorch
dispatches is counted:

    Triton kernels    each element of each tensor once for each launch, as `mamba2_kernels.traffic`
                      tells it, which tests hold to the interpreter's count of every address
    all others        inputs once, outputs once; a view nothing. FLOPs of matrix products
    nf4, int8         before each product with a quantized weight: what is stored read, the weight
                      in the dtype of the product written. Their kernels are bitsandbytes': this is
                      arithmetic, the rest is counted

So a step of two blocks less that of one is a block. `python -m mamba2_train.roofline` prints the
tables of docs/planning.md.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mamba2_kernels.launch import use_architecture
from mamba2_kernels.traffic import distinct_bytes, launches
from mamba2_train.loss import cross_entropy_of_rows
from mamba2_train.model import PRESETS, Mamba2Config, checkpointing_interval
from mamba2_train.parallel.shards import scale_gradients, total_norm
from mamba2_train.plan import Plan, _first, _materialized
from mamba2_train.quantization import is_quantized

PHASES = ("forward", "again", "backward", "optimizer")  # again: what checkpointing repeats
PARTS = (
    *("in_proj", "conv", "scan", "gated norm", "out_proj", "norm", "LoRA", "dequantize"),
    *("head", "optimizer", "other"),  # other: sums, casts, copies
)
PARTS_OF = {  # of our operations
    "causal_conv1d": "conv",
    "ssd_scan": "scan",
    "gated_rms_norm": "gated norm",
    "gated_square_sum": "gated norm",
    "gated_scale": "gated norm",
    "rms_norm": "norm",
}
# what moves nothing, besides views
FREE = ("empty", "new_empty", "detach", "alias", "set_", "is_", "_local_", "_unsafe_view", "lift")
OVERWRITE = ("copy_", "zero_", "fill_")


class GPU(NamedTuple):
    """Peaks of one GPU, from its data sheet; products are dense, with float32 sums."""

    name: str
    arch: int  # compute capability
    bf16: float  # FLOP/s
    fp32: float  # FLOP/s, without tf32, as PyTorch multiplies unless told otherwise
    hbm: float  # bytes/s
    memory: float  # GB
    link: float  # bytes/s to the other GPUs of a node, one way: NVLink, or PCIe
    source: str


GPUS = {
    "h100": GPU("H100 SXM", 90, 989e12, 67e12, 3.35e12, 80, 450e9, "NVIDIA H100 datasheet"),
    "h200": GPU("H200 SXM", 90, 989e12, 67e12, 4.8e12, 141, 450e9, "NVIDIA H200 datasheet"),
    "a100": GPU("A100 SXM 80 GB", 80, 312e12, 19.5e12, 2.039e12, 80, 300e9,
                "NVIDIA A100 datasheet"),
    "l40s": GPU("L40S", 89, 362e12, 91.6e12, 0.864e12, 48, 32e9, "NVIDIA L40S datasheet"),
    "4090": GPU("RTX 4090", 89, 165.2e12, 82.6e12, 1.008e12, 24, 32e9,
                "NVIDIA Ada GPU architecture, v2.1, appendix A"),
}  # fmt: skip


class Measured(NamedTuple):
    """Milliseconds of an op, forward and backward, on an H100: 8,192 tokens, batch 1, bf16."""

    scan: float
    conv: float
    gated_norm: float


MEASURED_TOKENS = 8192
MEASURED = {  # README, Speed
    "mamba2-2.7b": Measured(1.19, 0.30, 0.35),
    "mamba-codestral-7b": Measured(1.62, 0.46, 0.41),
}
# Share of the roofline that these times are, the mean of both shapes (a test divides them anew).
REACHED = {"scan": 0.51, "conv": 0.51, "gated norm": 0.69}
STREAMED = "gated norm"  # what other operations that only move bytes are taken to reach
PRODUCTS = 0.7  # of the peak, which matrix products are taken to reach: not measured


class Op(NamedTuple):
    """One operation, or one launch of it."""

    part: str
    phase: str
    name: str
    hbm: int
    flops: int
    narrow: bool  # multiplies 16-bit numbers

    def seconds(self, gpu: GPU) -> float:
        return max(self.hbm / gpu.hbm, self.flops / (gpu.bf16 if self.narrow else gpu.fp32))

    def achieved(self, gpu: GPU) -> float:
        """Seconds at the share of the roofline that was measured for such an operation."""
        if self.part in REACHED:
            return self.seconds(gpu) / REACHED[self.part]
        peak = gpu.bf16 if self.narrow else gpu.fp32
        return max(self.hbm / gpu.hbm / REACHED[STREAMED], self.flops / peak / PRODUCTS)


Ops = Counter[Op]


class Calls(NamedTuple):
    """Of PyTorch's dispatcher, views included: what the host does in a step."""

    block: int
    rest: int


@dataclass(frozen=True)
class Step:
    """Operations of one micro-batch in one process.

    block: of one block (of two where checkpointing takes every second, and so on).
    rest: of all that is in no block. update: of the optimizer, once for a step.
    """

    n_blocks: float
    n_tokens: int
    n_trained: int
    block: Ops
    rest: Ops
    update: Ops
    calls: Calls

    def seconds(self, gpu: GPU, part: str = "all", *, achieved: bool = True) -> float:
        """Of the blocks' "forward" or "backward", of the "rest", the "update", or of "all"."""
        times = {
            "forward": self.n_blocks * seconds(self.block, gpu, ("forward",), achieved),
            "backward": self.n_blocks * seconds(self.block, gpu, ("again", "backward"), achieved),
            "rest": seconds(self.rest, gpu, PHASES, achieved),
            "update": seconds(self.update, gpu, PHASES, achieved),
        }
        return sum(times.values()) if part == "all" else times[part]


def seconds(ops: Ops, gpu: GPU, phases: Iterable[str] = PHASES, achieved: bool = True) -> float:
    one = Op.achieved if achieved else Op.seconds
    return sum(n * one(op, gpu) for op, n in ops.items() if op.phase in phases)


def count(plan: Plan, arch: int = 90) -> Step:
    """The operations of a micro-batch of `plan`'s run, in 16 bits or 32, on a GPU of `arch`."""
    c, period = plan.config, checkpointing_interval(plan.config.model.checkpointing)
    with use_architecture(arch):
        one, two = (_of_blocks(plan, n * period) for n in (1, 2))
    block, rest = two.ops - one.ops, one.ops - (two.ops - one.ops)
    return Step(
        plan.shape.n_layers / period,
        c.data.batch_size * c.data.seq_len,
        plan.n_trained,
        block + _dequantized(block, plan),
        rest,
        update(plan),
        Calls(two.calls - one.calls, 2 * one.calls - two.calls),
    )


def update(plan: Plan) -> Ops:
    """Of all gradients their scaling to the mean over tokens, norm and clipping; AdamW's update.

    Of other optimizers the same is taken: they move less, and multiply more.
    """
    with FakeTensorMode():
        trained = [p for p in plan.model.parameters() if p.requires_grad]
        sizes = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in trained]
        for p in sizes:
            p.grad = torch.empty_like(p)
        gradients = [p.grad for p in sizes if p.grad is not None]
        optimizer = torch.optim.AdamW(sizes, fused=True)
        optimizer.step()  # makes the moments
        with Dispatched(_Shape.of(plan.shape, 0), "optimizer", "optimizer") as counted:
            scale_gradients(gradients, torch.empty(()))
            scale_gradients(gradients, total_norm(gradients))
            optimizer.step()
    return counted.ops


def host_seconds(plan: Plan) -> tuple[float, float]:
    """CPU time that Python, autograd and the dispatcher take for one block and for the rest of a
    micro-batch: a step on the meta device, where no operation does anything. The launches of
    Triton kernels are not in it."""

    def of(n_layers: int) -> float:
        model = _first(plan.model, n_layers)
        ids = torch.zeros(1, 64, dtype=torch.int64, device="meta")
        times = []
        for _ in range(5):
            begin = time.process_time()
            hidden, _ = model.backbone(ids, None, None, None, False)
            hidden.backward(torch.empty_like(hidden))
            times.append(time.process_time() - begin)
        return min(times)

    few, many = of(2), of(10)
    return (many - few) / 8, few - (many - few) / 4


class Dispatched(TorchDispatchMode):
    """Counts the operations dispatched while it is entered."""

    def __init__(self, shape: "_Shape", phase: str = "", part: str = "") -> None:
        super().__init__()
        self.shape, self.phase, self.part = shape, phase, part
        self.ops: Ops = Counter()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if name.startswith("prim::"):  # a question about a tensor
            return result
        self.calls += 1
        if name in OPDEFS:
            self._within(name, args, kwargs)
        elif not _is_free(func):
            # only what is computed again builds a graph inside a backward
            phase = self._phase("again" if torch.is_grad_enabled() else "backward")
            self._add(func, phase, args, kwargs, result)
        return result

    def _add(self, func: Any, phase: str, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        name = func.name().removeprefix("aten::").partition(".")[0]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_to_copy" and result is args[0]:
            return
        # what is written in place is in both
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)] or (
            [t for t in tree_leaves(args[0]) if isinstance(t, Tensor)] if args else []
        )
        if name == "_fused_adamw_":
            written = [t for group in (args[0], args[2], args[3]) for t in group]
        hbm = distinct_bytes(read[name in OVERWRITE :]) + distinct_bytes(written)
        registered = flop_registry.get(func._overloadpacket)
        flops = registered(*args, **kwargs, out_val=result) if registered else 0
        if hbm:
            part = self.part or self.shape.part(name, [*read, *written])
            narrow = any(t.is_floating_point() and t.element_size() == 2 for t in read)
            self.ops[Op(part, phase, name, hbm, flops, narrow)] += 1

    def _within(self, name: str, args: tuple[Any, ...], kwargs: Any) -> None:
        """Of an operation of ours, or torch's, that is one call: what its definition does."""
        ours = name.startswith("mamba2_kernels::")
        if ours:
            args = tuple("triton" if isinstance(a, str) and a == "torch" else a for a in args)
        short = name.rpartition("::")[2]
        phase = self._phase("backward" if short.endswith("_backward") else "again")
        part = PARTS_OF.get(short.removesuffix("_backward"), "head")
        with torch.no_grad(), Dispatched(self.shape, phase, part) as inner:
            made = launches(lambda: OPDEFS[name]._init_fn(*args, **kwargs))
        self.ops += inner.ops
        narrow = any(isinstance(a, Tensor) and a.element_size() == 2 for a in args)
        for kernel, hbm, flops in made:
            self.ops[Op(part, phase, kernel, hbm, flops, narrow)] += 1

    def _phase(self, in_backward: str) -> str:
        inside = torch._C._current_graph_task_id() >= 0
        return self.phase or (in_backward if inside else "forward")


class _Shape(NamedTuple):
    """By which a product of matrices is recognized."""

    vocab_size: int
    ranks: frozenset[int]  # of LoRA
    in_proj: frozenset[int]
    out_proj: frozenset[int]

    @classmethod
    def of(cls, c: Mamba2Config, rank: int) -> "_Shape":
        ranks = frozenset([rank]) if rank else frozenset()
        in_proj = frozenset((c.d_model, c.d_in_proj))
        return cls(c.vocab_size, ranks, in_proj, frozenset((c.d_inner, c.d_model)))

    def part(self, name: str, tensors: list[Tensor]) -> str:
        sizes = {n for t in tensors for n in t.shape}
        if self.vocab_size in sizes:
            return "head"
        if self.ranks & sizes or name.startswith("native_dropout"):
            return "LoRA"
        if name in ("mm", "addmm", "bmm"):
            return "in_proj" if self.in_proj <= sizes else "out_proj"
        return "other"


def _of_blocks(plan: Plan, n_layers: int) -> Dispatched:
    c = plan.config
    model = _first(plan.model, n_layers)
    model.train()
    model.set_checkpointing(c.model.checkpointing)
    rank = getattr(c.adapter, "r", 0)
    with FakeTensorMode():
        _materialized(model, gpu=True)
        ids = torch.zeros(c.data.batch_size, c.data.seq_len, dtype=torch.int64)
        seq_idx = torch.zeros(ids.shape, dtype=torch.int32)
        rows = torch.arange(ids.numel())
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=c.precision.autocast is not None)
        with Dispatched(_Shape.of(plan.shape, rank)) as counted:
            with autocast:
                hidden, _ = model.backbone(ids, None, seq_idx, None, False)
                chosen = hidden.flatten(0, 1)[rows]
                loss = cross_entropy_of_rows(chosen, model.lm_head, ids.flatten())
            loss.backward()
    return counted


def _dequantized(block: Ops, plan: Plan) -> Ops:
    """Before each product with a quantized weight, the weight: bitsandbytes' three launches (scales
    of scales, their offset, the weight) in 4 bits, one in 8."""
    made: Ops = Counter()
    kind = plan.config.quantization.kind
    if kind == "none":
        return made
    for name, p in plan.model.backbone.layers[0].named_parameters():
        if not is_quantized(name.replace(".base_layer", "")):
            continue
        part = "in_proj" if "in_proj" in name else "out_proj"
        n, wide = p.numel(), p.element_size() * p.numel()
        in_4_bits = [n // 64 * 5, n // 64 * 8, n // 2 + n // 64 * 4 + wide]
        moved = [n + wide] if kind == "int8" else in_4_bits
        for op, times in block.items():
            if op.part == part and op.flops:
                for i, hbm in enumerate(moved):
                    made[Op("dequantize", op.phase, f"{part} {i}", hbm, 0, True)] += times
    return made


def _is_free(func: Any) -> bool:
    """Whether it makes a view, or moves nothing."""
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return is_view or func.name().removeprefix("aten::").startswith(FREE)


# -- the tables of docs/planning.md

MODELS = {"130M": "mamba2-130m", "2.7B": "mamba2-2.7b", "Codestral": "mamba-codestral-7b"}
METHODS = {
    "full": ["adapter=full", "precision=bf16-mixed"],
    "LoRA": ["adapter=lora", "precision=bf16"],
    "QLoRA": ["adapter=lora", "precision=bf16", "quantization=nf4"],
}
# KB per token and layer between the projections, forward and backward, of mamba_ssm 2.3.2, counted
# as ours are; nobody counted it at 130M
MAMBA_SSM = {"2.7B": (119, 375), "Codestral": (215, 661)}
BETWEEN = ("conv", "scan", "gated norm")


def tables() -> str:
    """Of a block at each model and method; of one block part by part; of what is in no block."""
    counts = {(m, k): _table_count(m, METHODS[k]) for m in MODELS for k in METHODS}
    lora = METHODS["LoRA"]
    repeated = {
        mode: _table_count("2.7B", [*lora, f"model.checkpointing={mode}"])
        for mode in ("selective", "full")
    }
    return "\n".join(
        [*_block_table(counts), "", *_parts_table(counts["2.7B", "LoRA"], repeated), "",
         *_rest_table(counts)]
    )  # fmt: skip


def _table_count(model: str, overrides: list[str]) -> Step:
    from mamba2_train.commands.plan import planned_run

    shape = dataclasses.replace(PRESETS[MODELS[model]], n_layers=2)
    row = [f"data.seq_len={MEASURED_TOKENS}", "data.batch_size=1"]
    return count(planned_run([*overrides, *row], shape))


def _block_table(counts: dict[tuple[str, str], Step]) -> list[str]:
    lines = [
        "| | launches | calls | KB | between the projections: ours / mamba_ssm / floor | MFLOP "
        "| H100 | reached | A100 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, method), step in counts.items():
        c = PRESETS[MODELS[model]]
        # z, x, B, C, dt in and the norm's output out; backward all of it, and its gradients
        floor = 2 * 3 * (c.d_in_proj + c.d_inner) / 1000
        split = sum(n * op.hbm for op, n in step.block.items() if op.name == "cat")
        between = (_sum(step, "hbm", BETWEEN) + split) / step.n_tokens / 1000
        theirs = f"{sum(MAMBA_SSM[model])}" if model in MAMBA_SSM else "–"
        h100, reached, a100 = (
            1e9 * seconds(step.block, GPUS[gpu], PHASES, achieved) / step.n_tokens
            for gpu, achieved in (("h100", False), ("h100", True), ("a100", False))
        )
        lines.append(
            f"| {model}, {method} | {step.block.total()} | {step.calls.block} "
            f"| {_sum(step, 'hbm') / step.n_tokens / 1000:.0f} "
            f"| {between:.0f} / {theirs} / {floor:.0f} "
            f"| {_sum(step, 'flops') / step.n_tokens / 1e6:.0f} "
            f"| {h100:.0f} ns | {reached:.0f} ns | {a100:.0f} ns |"
        )
    return lines


def _parts_table(step: Step, repeated: dict[str, Step]) -> list[str]:
    lines = [
        "| 2.7B, LoRA | launches | KB forward | KB backward | MFLOP forward | MFLOP backward "
        "| H100 | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    h100 = GPUS["h100"]

    def row(name: str, ops: Ops, first: str, second: str) -> str:
        figures = [
            sum(n * getattr(op, field) for op, n in ops.items() if op.phase == phase)
            / step.n_tokens / unit
            for field, unit in (("hbm", 1e3), ("flops", 1e6))
            for phase in (first, second)
        ]  # fmt: skip
        times = [1e9 * seconds(ops, h100, PHASES, a) / step.n_tokens for a in (False, True)]
        cells = [f"{x:.1f}" for x in figures] + [f"{x:.1f} ns" for x in times]
        return f"| {name} | {ops.total()} | " + " | ".join(cells) + " |"

    for part in PARTS:
        ops = Counter({op: n for op, n in step.block.items() if op.part == part})
        if ops:
            lines.append(row(part, ops, "forward", "backward"))
    for mode, other in repeated.items():
        ops = Counter({op: n for op, n in other.block.items() if op.phase == "again"})
        lines.append(row(f"{mode} checkpointing repeats", ops, "forward", "again"))
    return lines


def _rest_table(counts: dict[tuple[str, str], Step]) -> list[str]:
    lines = [
        "| in no block | KB a token | MFLOP a token | H100 | update, bytes a trained parameter |",
        "|---|---|---|---|---|",
    ]
    for (model, method), step in counts.items():
        if method == "QLoRA":
            continue
        kb, mflop = (
            sum(n * getattr(op, field) for op, n in step.rest.items()) / step.n_tokens / unit
            for field, unit in (("hbm", 1e3), ("flops", 1e6))
        )
        time_ = 1e9 * seconds(step.rest, GPUS["h100"], PHASES, False) / step.n_tokens
        update_ = sum(n * op.hbm for op, n in step.update.items()) / step.n_trained
        lines.append(
            f"| {model}, {method} | {kb:.0f} | {mflop:.0f} | {time_:.0f} ns | {update_:.0f} |"
        )
    return lines


def _sum(step: Step, field: str, parts: tuple[str, ...] = PARTS) -> int:
    return sum(n * getattr(op, field) for op, n in step.block.items() if op.part in parts)


if __name__ == "__main__":
    print(tables())
