"""How fast the kernels are on this GPU, after checking that they are right.

    python -m mamba2_kernels.benchmark [--seq-len 8192] [--json FILE] [--ours]

Forward and backward of the scan, the convolution and the gated norm, ours beside those of
mamba_ssm, causal_conv1d and fla where installed, in bfloat16; `--ours` leaves these out, for some
tune themselves for minutes. Each is first checked against the PyTorch path in float32; one that
fails is named and not timed, and then no speed-up is reported. Times are medians, the cache cold;
bytes are what an op must read and write at least, and bytes per second stand beside what a copy of
a large tensor reaches on the same part.

Without a GPU `counted_table` says what the kernels move, counted on Triton's interpreter.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba2_kernels import causal_conv1d, gated_rms_norm, ssd_scan

CEILING = 8e-3  # relative error of a bfloat16 result against float32
REPEATS = 15

Op = Callable[[dict[str, Tensor], str], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    n_heads: int
    headdim: int
    d_state: int
    n_groups: int


SHAPES = (
    Shape("2.7B", n_heads=80, headdim=64, d_state=128, n_groups=1),
    Shape("Codestral", n_heads=128, headdim=64, d_state=128, n_groups=8),
)


@dataclasses.dataclass
class Result:
    """One op of one library. Times in milliseconds, memory in MiB, bandwidth in GB/s."""

    shape: str
    op: str
    library: str
    error: float
    forward: float | None = None
    both: float | None = None
    bandwidth: float | None = None
    memory: float | None = None

    @property
    def is_right(self) -> bool:
        return self.error <= CEILING

    def __str__(self) -> str:
        if not self.is_right:
            return f"{self.shape:10} {self.op:14} {self.library:10} WRONG: error {self.error:.1e}"
        return (
            f"{self.shape:10} {self.op:14} {self.library:10} {self.forward:>9.3f} ms forward "
            f"{self.both:>9.3f} ms with backward {self.bandwidth:>7.0f} GB/s "
            f"{self.memory:>8.0f} MiB  error {self.error:.1e}"
        )


def scan_inputs(shape: Shape, seq_len: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    d_inner, d_bc = shape.n_heads * shape.headdim, shape.n_groups * shape.d_state
    x, B, C = normal(1, seq_len, d_inner + 2 * d_bc).split([d_inner, d_bc, d_bc], dim=-1)
    return {
        "x": x.unflatten(-1, (shape.n_heads, shape.headdim)),
        "dt": normal(1, seq_len, shape.n_heads) - 3,
        "A": -torch.linspace(1, 16, shape.n_heads, device=device),
        "B": B.unflatten(-1, (shape.n_groups, shape.d_state)),
        "C": C.unflatten(-1, (shape.n_groups, shape.d_state)) / shape.d_state**0.5,
        "D": torch.ones(shape.n_heads, device=device),
    }


def conv_inputs(shape: Shape, seq_len: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    channels = shape.n_heads * shape.headdim + 2 * shape.n_groups * shape.d_state
    return {
        "x": torch.randn(1, seq_len, channels, device=device).to(dtype),
        "weight": torch.randn(channels, 4, device=device).to(dtype) / 2,
        "bias": torch.randn(channels, device=device).to(dtype),
    }


def norm_inputs(shape: Shape, seq_len: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    d_inner = shape.n_heads * shape.headdim
    x, z = torch.randn(2, 1, seq_len, d_inner, device=device).to(dtype)
    return {"x": x, "z": z, "weight": torch.ones(d_inner, device=device, dtype=dtype)}


def our_scan(shape: Shape) -> Op:
    return lambda t, backend: _call(ssd_scan, t, dt_softplus=True, backend=backend)


def our_conv(shape: Shape) -> Op:
    return lambda t, backend: _call(causal_conv1d, t, backend=backend)


def our_norm(shape: Shape) -> Op:
    group_size = shape.n_heads * shape.headdim // shape.n_groups
    return lambda t, backend: _call(gated_rms_norm, t, group_size=group_size, backend=backend)


def peers(op: str, shape: Shape) -> Iterator[tuple[str, Op]]:
    """The same op of other libraries that are installed."""
    if op == "scan" and _installed("mamba_ssm.ops.triton"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        yield (
            "mamba_ssm",
            lambda t, _: mamba_chunk_scan_combined(
                t["x"], t["dt"], t["A"], t["B"], t["C"], 256, D=t["D"], dt_softplus=True
            ),
        )
    if op == "scan" and _installed("fla.ops"):
        from fla.ops.simple_gla import chunk_simple_gla

        def fla_scan(t: dict[str, Tensor], _: str) -> Tensor:
            dt = torch.nn.functional.softplus(t["dt"].float())
            repeats = shape.n_heads // shape.n_groups
            q, k = (t[name].repeat_interleave(repeats, dim=2) for name in ("C", "B"))
            v = (t["x"] * dt[..., None]).to(t["x"].dtype)
            y, _state = chunk_simple_gla(q, k, v, g=dt * t["A"], scale=1.0)
            return y + t["D"].to(y.dtype)[:, None] * t["x"]

        yield "fla", fla_scan
    if op == "conv" and _installed("causal_conv1d_cuda"):
        from causal_conv1d import causal_conv1d_fn

        yield (
            "causal_conv1d",
            lambda t, _: causal_conv1d_fn(
                t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu"
            ).transpose(1, 2),
        )
    if op == "norm" and _installed("mamba_ssm.ops.triton"):
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        group_size = shape.n_heads * shape.headdim // shape.n_groups
        yield (
            "mamba_ssm",
            lambda t, _: rmsnorm_fn(
                t["x"], t["weight"], None, z=t["z"], eps=1e-5, group_size=group_size,
                norm_before_gate=False,
            ),
        )  # fmt: skip


OPS: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[Shape], Op]]] = {
    "scan": (scan_inputs, our_scan),
    "conv": (conv_inputs, our_conv),
    "norm": (norm_inputs, our_norm),
}


def on_gpu(seq_len: int, beside: bool = True) -> list[Result]:
    """Check, then time, every op of every library, or of ours alone."""
    results = []
    for shape in SHAPES:
        for op, (make_inputs, ours) in OPS.items():
            tensors = make_inputs(shape, seq_len, "cuda", torch.bfloat16)
            wide = {name: tensor.float() for name, tensor in tensors.items()}
            expected = gradients(ours(shape), wide, "torch")
            others = peers(op, shape) if beside else ()
            for library, run in [("ours", ours(shape)), *others]:
                result = Result(shape.name, op, library, worst_error(run, tensors, expected))
                if result.is_right:
                    measure(result, run, tensors)
                results.append(result)
                print(result, flush=True)
            del expected
    return results


def gradients(run: Op, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = run(leaves, backend)
    generator = torch.Generator(y.device).manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device=y.device)
    # The same numbers for every dtype.
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.bfloat16().to(y.dtype))]


def worst_error(run: Op, tensors: dict[str, Tensor], expected: list[Tensor]) -> float:
    found = gradients(run, tensors, "triton")
    return max(
        ((f.float() - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)
    )


def measure(result: Result, run: Op, tensors: dict[str, Tensor]) -> None:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = run(leaves, "triton")
    dy = torch.randn_like(y)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result.forward = milliseconds(lambda: run(leaves, "triton"))
    result.both = milliseconds(
        lambda: torch.autograd.grad(run(leaves, "triton"), list(leaves.values()), dy)
    )
    result.memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    least = sum(t.numel() * t.element_size() for t in (*tensors.values(), y))
    result.bandwidth = least / result.forward / 1e6


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of one run on the GPU, the cache cold."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a copy, read and written bytes together: the part's practical limit."""
    source = torch.empty(2**29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def speed_ups(results: list[Result]) -> list[str]:
    """Ours against each other library; nothing at all if any of ours was wrong."""
    if any(r.library == "ours" and not r.is_right for r in results):
        return ["no speed-up is reported: a check of ours failed"]
    ours = {(r.shape, r.op): r for r in results if r.library == "ours"}
    lines = []
    for r in results:
        mine = ours[r.shape, r.op]
        if r.library != "ours" and r.both is not None and mine.both is not None:
            lines.append(f"{r.shape} {r.op}: {r.both / mine.both:.2f} x as fast as {r.library}")
    return lines


def counted_table(seq_len: int = 128) -> str:
    """Bytes per token of each kernel, from the interpreter, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mamba2_kernels.benchmark_gpu",
            "--count-here",
            "--seq-len",
            str(seq_len),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def count_here(seq_len: int) -> str:
    from mamba2_kernels.interpreter import count

    # One group of Codestral's eight: they are alike.
    shape = Shape("one group of Codestral", n_heads=16, headdim=64, d_state=128, n_groups=1)
    tensors = scan_inputs(shape, seq_len, "cpu", torch.bfloat16)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with count() as forward:
        y = our_scan(shape)(leaves, "triton")
    dy = torch.ones_like(y)
    with count() as backward:
        torch.autograd.grad(y, list(leaves.values()), dy)
    title = f"bytes per token at {seq_len} tokens, {shape.name}"
    return (
        f"{title}, forward\n{forward.table(seq_len)}\n\n"
        f"{title}, backward\n{backward.table(seq_len)}"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _call(op: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> Tensor:
    result: Tensor = op(**tensors, **options)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status, 1 if a check of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m mamba2_kernels.benchmark")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--ours", action="store_true", help="leave other libraries out")
    parser.add_argument("--count", action="store_true", help="also count what the kernels move")
    parser.add_argument("--count-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.count_here:
        print(count_here(args.seq_len))
        return 0
    results = on_gpu(args.seq_len, beside=not args.ours)
    limit = copy_bandwidth()
    lines = speed_ups(results)
    print(f"a copy reaches {limit:.0f} GB/s on {torch.cuda.get_device_name()}")
    print("\n".join(lines))
    if args.count:
        print(counted_table())
    if args.json:
        report = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(),
            "copy_gb_per_s": limit,
            "results": [dataclasses.asdict(result) for result in results],
            "speed_ups": lines,
        }
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    return int(any(r.library == "ours" and not r.is_right for r in results))


if __name__ == "__main__":
    sys.exit(main())
