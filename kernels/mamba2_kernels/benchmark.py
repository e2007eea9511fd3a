"""Time the SSD scan beside transformers' own: `python -m mamba2_kernels.benchmark`.

On a GPU the kernels are timed beside other libraries' instead: see `benchmark_gpu`.

Both run in turn, forward and forward with backward; medians are reported. The numbers are checked
first, against the sequential reference and against transformers, and no time is reported for a
shape whose check fails.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba2_kernels import ssd_scan
from mamba2_kernels.testing import (
    as_dtype,
    largest_error,
    random_seq_idx,
    random_ssd_inputs,
    run_with_gradients,
)

MAX_REFERENCE_ERROR = 5e-6  # of float32, relative, outputs and every gradient
MAX_PEER_ERROR = 1e-4  # transformers' own rounding included
PEER_CHUNK_SIZE = 256  # the default of transformers' Mamba2Config


class Shape(NamedTuple):
    batch: int
    seq_len: int
    n_heads: int
    headdim: int
    n_groups: int
    d_state: int


SHAPES = {
    "tiny": Shape(8, 256, 12, 32, 1, 64),
    "130m": Shape(1, 1024, 24, 64, 1, 128),
    "grouped": Shape(1, 512, 32, 64, 8, 128),  # a quarter of Mamba-Codestral-7B's heads
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status, 1 if a check failed."""
    if torch.cuda.is_available():
        from mamba2_kernels import benchmark_gpu

        return benchmark_gpu.main(arguments)
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m mamba2_kernels.benchmark")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--count", action="store_true", help="also count what the kernels move")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    peer = transformers_scan()
    print(f"{machine()}, {options.threads} threads, float32, torch {torch.__version__}")
    print("the torch path beside transformers' mamba2_chunk_scan; median milliseconds")
    print(f"{'shape':10}{'pass':10}{'ours':>9}{'packed':>9}{'theirs':>9}{'speed-up':>10}")
    failed = False
    for name in options.shapes:
        failure = check(SHAPES[name], peer)
        if failure is not None:
            print(f"{name:10}no times: {failure}")
            failed = True
            continue
        for row, times in measure(SHAPES[name], peer, options.repeats).items():
            ours, packed, *theirs = (1000 * seconds for seconds in times)
            line = f"{name:10}{row:10}{ours:9.2f}{packed:9.2f}"
            print(line + (f"{theirs[0]:9.2f}{theirs[0] / ours:9.1f}x" if theirs else ""))
    if options.count:
        from mamba2_kernels import benchmark_gpu

        print(benchmark_gpu.counted_table())
    return int(failed)


def check(shape: Shape, peer: Callable[..., Tensor] | None) -> str | None:
    """Return what is wrong with the numbers of a shape, or None."""
    small = shape._replace(batch=1, seq_len=150, n_heads=2 * shape.n_groups)
    inputs: dict[str, Any] = dict(random_ssd_inputs(*small, dtype=torch.float32))
    for seq_idx in (None, random_seq_idx(1, 150, padding="interior")):
        inputs["seq_idx"] = seq_idx
        actual = run_with_gradients(ssd_scan, inputs, dt_softplus=True)
        wide = as_dtype(inputs, torch.float64)
        truth = run_with_gradients(ssd_scan, wide, dt_softplus=True, backend="reference")
        error, name = largest_error(actual, truth)
        if not error <= MAX_REFERENCE_ERROR:
            return f"{name} is {error:.1e} off the reference"
    if peer is not None:
        whole: dict[str, Any] = dict(random_ssd_inputs(*shape, dtype=torch.float32))
        actual = run_with_gradients(ssd_scan, whole, dt_softplus=True)
        error, name = largest_error(run_with_gradients(peer, whole), actual)
        if not error <= MAX_PEER_ERROR:
            return f"{name} is {error:.1e} off transformers"
    return None


def measure(
    shape: Shape, peer: Callable[..., Tensor] | None, repeats: int
) -> dict[str, tuple[float, ...]]:
    """Return median seconds of each pass: ours, ours on packed documents, transformers'."""
    inputs: dict[str, Any] = dict(random_ssd_inputs(*shape, dtype=torch.float32))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    seq_idx = random_seq_idx(shape.batch, shape.seq_len)
    dy = torch.randn_like(inputs["x"])
    scans = [
        lambda: ssd_scan(**inputs, dt_softplus=True),
        lambda: ssd_scan(**inputs, dt_softplus=True, seq_idx=seq_idx),
    ]
    if peer is not None:
        scans.append(lambda: peer(**inputs))
    forward: list[list[float]] = [[] for _ in scans]
    backward: list[list[float]] = [[] for _ in scans]
    for repeat in range(-2, repeats):  # the first two warm up
        for i, scan in enumerate(scans):
            begin = time.perf_counter()
            y = scan()
            middle = time.perf_counter()
            torch.autograd.grad(y, leaves, dy)
            end = time.perf_counter()
            if repeat >= 0:
                forward[i].append(middle - begin)
                backward[i].append(end - middle)
    return {
        "forward": tuple(map(statistics.median, forward)),
        "backward": tuple(map(statistics.median, backward)),
    }


def transformers_scan() -> Callable[..., Tensor] | None:
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        print("transformers is not installed: no comparison")
        return None

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, PEER_CHUNK_SIZE, dt_softplus=True, **rest)

    return scan


def machine() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
