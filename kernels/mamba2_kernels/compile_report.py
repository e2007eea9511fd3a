"""What the shipped kernels cost on GPUs that are not here: registers, spills, shared memory.

    python -m mamba2_kernels.compile_report                          the two reference shapes
    python -m mamba2_kernels.compile_report --headdim 64 --d-state 128 --arch 80 90
    python -m mamba2_kernels.compile_report --all                    every shipped entry

Every launch that the ops make is recorded on the interpreter, in a process of its own, and compiled
for each architecture with the ptxas that comes with Triton, specialised as a real launch would be.
The exit status is 1 if a kernel spills, fails to compile, or wants more shared memory than a block
may have.

Columns: registers per thread; bytes of stack, and local loads and stores in the machine code (0
means no spill); shared memory per block; tensor-core instructions; blocks per multiprocessor;
processor seconds to compile, ptxas included.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from mamba2_kernels.launch import ARCHITECTURES, D_STATES, HEADDIMS, WIDEST_FLOAT32


@dataclasses.dataclass(frozen=True)
class Part:
    """Limits of one architecture: per multiprocessor and, for shared memory, per block."""

    shared_kib: int
    block_kib: int
    warps: int
    blocks: int


PARTS = {
    80: Part(shared_kib=164, block_kib=163, warps=64, blocks=32),
    86: Part(shared_kib=100, block_kib=99, warps=48, blocks=16),
    89: Part(shared_kib=100, block_kib=99, warps=48, blocks=24),
    90: Part(shared_kib=228, block_kib=227, warps=64, blocks=32),
    100: Part(shared_kib=228, block_kib=227, warps=64, blocks=32),
}
REGISTERS = 65536  # per multiprocessor, given out to warps in units of 256


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the tuned tables."""

    arch: int
    headdim: int
    d_state: int
    bits: int


@dataclasses.dataclass
class Row:
    """One compiled kernel."""

    entry: Entry
    kernel: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    tensor_core: int = 0
    blocks: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def is_sound(self) -> bool:
        return not (self.error or self.stack or self.local)

    def __str__(self) -> str:
        e = self.entry
        fault = self.error or ("" if self.is_sound else "SPILLS")
        return (
            f"sm_{e.arch:<4}{e.headdim:>4}{e.d_state:>5}{e.bits:>4}  {self.kernel:22}"
            f"{self.registers:>5}{self.stack:>7}{self.local:>7}{self.shared:>8}"
            f"{self.tensor_core:>6}{self.blocks:>7}{self.seconds:>8.1f}  {fault}"
        )


HEADER = (
    f"{'arch':7}{'p':>4}{'n':>5}{'bit':>4}  {'kernel':22}{'regs':>5}{'stack':>7}{'local':>7}"
    f"{'shared':>8}{'mma':>6}{'blocks':>7}{'sec':>8}"
)


def report(entries: Iterable[Entry], jobs: int = 1) -> list[Row]:
    """Compile every launch of some entries; launches that agree compile once."""
    captures = _recorded(list(entries))
    if jobs == 1:
        return [compile_launch(*capture) for capture in captures]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return list(pool.map(compile_launch, *zip(*captures, strict=True)))


def _processor_seconds() -> float:
    """Of this process and its children: a busy machine does not make a compile look slow."""
    return sum(os.times()[:4])


def compile_launch(entry: Entry, capture: dict[str, Any]) -> Row:
    """Compile one recorded launch for its architecture. Needs the interpreter off."""
    import triton
    from triton.backends.compiler import GPUTarget

    triton.knobs.compilation.always_compile = True
    target = GPUTarget("cuda", entry.arch, 32)
    row = Row(entry, capture["kernel"])
    source = _source(capture, target)
    started = _processor_seconds()
    try:
        with _quiet():
            kernel = triton.compile(source, target=target, options=capture["options"])
    except Exception as error:  # that a kernel cannot compile is a result
        row.error = f"{type(error).__name__}: {str(error).strip()[:60]}"
        return row
    row.seconds = _processor_seconds() - started
    usage, machine_code = _disassembled(kernel.asm["cubin"])
    part, warps = PARTS[entry.arch], kernel.metadata.num_warps
    row.registers = int(_match(r"REG:(\d+)", usage))
    row.stack = int(_match(r"STACK:(\d+)", usage))
    row.local = len(re.findall(r"\b(?:LDL|STL)\b", machine_code))
    row.shared = kernel.metadata.shared
    row.tensor_core = len(
        re.findall(r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma", kernel.asm["ptx"])
    )
    per_warp = -(-row.registers * 32 // 256) * 256
    row.blocks = min(
        part.blocks,
        part.warps // warps,
        REGISTERS // per_warp // warps,
        part.shared_kib * 1024 // (row.shared + 1024),
    )
    if row.shared > part.block_kib * 1024:
        row.error = f"wants more than the {part.block_kib} KiB of shared memory a block may have"
    return row


def record(entry: Entry) -> list[dict[str, Any]]:
    """Record every launch of the ops with an entry's settings. Needs the interpreter."""
    return [*_scan_launches(entry), *_other_launches(entry)]


def record_settings(
    entry: Entry, settings: dict[str, list[dict[str, Any]]]
) -> dict[str, list[list[dict[str, Any]]]]:
    """Record, for each kernel of the scan and each of its settings, the launches of that kernel."""
    asked = {"entry": dataclasses.astuple(entry), "settings": settings}
    recorded: dict[str, list[list[dict[str, Any]]]] = _in_interpreter("--record-settings", asked)
    return recorded


def _record_settings(entry: Entry, settings: dict[str, list[dict[str, Any]]]) -> Any:
    from mamba2_kernels.launch import use_settings

    first = {kernel: tried[0] for kernel, tried in settings.items()}
    recorded: dict[str, list[list[dict[str, Any]]]] = {}
    for kernel, tried in settings.items():
        recorded[kernel] = []
        for one in tried:
            chosen = first | {kernel: one}
            if kernel == "across":
                chosen["inside"] = first["inside"] | {"Q": one["Q"]}
            with use_settings(chosen):
                captures = _scan_launches(entry)
            recorded[kernel].append([c for c in captures if c["kernel"] == f"{kernel}_kernel"])
    return recorded


def _other_launches(entry: Entry) -> list[dict[str, Any]]:
    """Convolution, norms and steps, whose settings are the same for every entry."""
    import torch

    from mamba2_kernels import conv1d_triton, norm_triton, step_triton
    from mamba2_kernels.interpreter import capture

    dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
    batch, seq_len, channels, d_conv = 2, 512, 5120, 4
    x, z = torch.empty(2, batch, seq_len, channels, dtype=dtype)
    seq_idx = torch.empty(batch, seq_len, dtype=torch.int32)
    past = torch.empty(batch, d_conv - 1, channels, dtype=dtype)
    weight, norm_weight = torch.empty(channels, d_conv), torch.empty(channels)
    square_sum = torch.empty(batch, seq_len, 1)
    heads, state = torch.empty(80), torch.empty(batch, 80, 64, 128)
    step = (torch.empty(batch, 80, 64, dtype=dtype), torch.empty(batch, 80, dtype=dtype))
    B, C = torch.empty(2, batch, 1, 128, dtype=dtype)
    with capture() as captures:
        for documents, carried in ((None, None), (seq_idx, past)):
            conv = (x, weight, norm_weight, documents, carried)
            conv1d_triton.forward(*conv, "silu", carried is not None)
            conv1d_triton.backward(x, carried, *conv, "silu")
        stream = torch.empty(batch, seq_len, channels // 2, dtype=dtype)  # between the blocks
        stream_weight = norm_weight[: channels // 2]
        for residual in (None, stream.float()):
            norm_triton.rms_norm(stream, stream_weight, residual, 1e-5)
            norm_triton.rms_norm_backward(stream, residual, stream, stream_weight, residual, 1e-5)
        norm_triton.gated_rms_norm(x, z, norm_weight, 1e-5, channels)
        norm_triton.gated_rms_norm_backward(x, x, z, norm_weight, 1e-5, channels)
        norm_triton.gated_square_sum(x, z, channels)
        norm_triton.gated_square_sum_backward(square_sum, x, z, channels)
        scale = (square_sum, norm_weight, 1e-5, channels, 2 * channels)
        norm_triton.gated_scale(x, z, *scale)
        norm_triton.gated_scale_backward(x, x, z, *scale)
        inputs = (*step, heads, B, C, state, heads, heads)
        step_triton.ssd_step(*inputs, True, 0.0, float("inf"))
        step_triton.causal_conv1d_step(x[:, 0], past, weight, norm_weight, "silu")
    return captures


def _scan_launches(entry: Entry) -> list[dict[str, Any]]:
    """The scan once as in training on packed rows, once with states carried in and out."""
    import torch

    from mamba2_kernels.interpreter import capture
    from mamba2_kernels.launch import use_architecture
    from mamba2_kernels.ssd.triton_scan import backward, forward

    batch, seq_len, n_heads, n_groups = 2, 1536, 48, 1
    dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
    d_inner, d_bc = n_heads * entry.headdim, n_groups * entry.d_state
    xBC = torch.empty(batch, seq_len, d_inner + 2 * d_bc, dtype=dtype)
    x, B, C = xBC.split([d_inner, d_bc, d_bc], dim=-1)
    x = x.unflatten(-1, (n_heads, entry.headdim))
    B, C = (t.unflatten(-1, (n_groups, entry.d_state)) for t in (B, C))
    dt = torch.empty(batch, seq_len, 16 * n_heads, dtype=dtype)[..., -n_heads:]
    heads = torch.empty(n_heads)
    documents = torch.empty(batch, seq_len, dtype=torch.int32)
    state = torch.empty(batch, n_heads, entry.headdim, entry.d_state)
    options = (True, 0.0, float("inf"), 256)
    with use_architecture(entry.arch), capture() as captures:
        for carried in (None, state):
            inputs = (x, dt, heads, B, C, heads, heads, documents, carried)
            forward(*inputs, *options, carried is not None)
            backward(torch.empty_like(x), carried, *inputs, *options)
    return captures


def _recorded(entries: list[Entry]) -> list[tuple[Entry, dict[str, Any]]]:
    asked = [dataclasses.astuple(entry) for entry in entries]
    seen, recorded = set(), []
    for entry, captures in zip(entries, _in_interpreter("--record", asked), strict=True):
        for capture in captures:
            key = (entry.arch, json.dumps(capture, sort_keys=True))
            if key not in seen:
                seen.add(key)
                recorded.append((entry, capture))
    return recorded


def _in_interpreter(option: str, asked: Any) -> Any:
    """Record in a process of its own: the interpreter is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "mamba2_kernels.compile_report", option],
        input=json.dumps(asked),
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"could not record the launches:\n{done.stderr}")
    return json.loads(done.stdout)


class _Pointer:
    """Stands for a tensor's address: all a launcher looks at is its type and its alignment."""

    def __init__(self, dtype: str, aligned: bool) -> None:
        import torch

        self.dtype = getattr(torch, dtype)
        self.address = 0 if aligned else 1

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


def _argument(described: dict[str, Any]) -> Any:
    if "tensor" in described:
        return _Pointer(described["tensor"], described["aligned"])
    if "descriptor" in described:
        import torch
        from triton.tools.tensor_descriptor import TensorDescriptor

        base = torch.empty(16, dtype=getattr(torch, described["descriptor"]))
        return TensorDescriptor(base, *(described[k] for k in ("shape", "strides", "block")))
    return described["value"]


def _source(capture: dict[str, Any], target: Any) -> Any:
    """The kernel's source, specialised for its arguments by Triton's own launcher code."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    function = getattr(importlib.import_module(capture["module"]), capture["kernel"])
    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    arguments = {name: _argument(value) for name, value in capture["arguments"].items()}
    bound, specialization, options = bind(**arguments, **capture["options"])
    _, signature, constants, attributes = function._pack_args(
        backend, capture["options"], bound, specialization, options
    )
    return ASTSource(function, signature, constants, attributes)


class _quiet:
    """Keeps what the compiler prints from C++, such as the failing program, off the terminal."""

    def __enter__(self) -> None:
        self.sink = tempfile.TemporaryFile()
        self.saved = os.dup(1), os.dup(2)
        os.dup2(self.sink.fileno(), 1)
        os.dup2(self.sink.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        for number, saved in zip((1, 2), self.saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        self.sink.close()


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, from the cuobjdump that comes with Triton."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return dump("-res-usage"), dump("-sass")


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no {pattern}")
    return found[1]


def _entries(args: argparse.Namespace) -> Iterator[Entry]:
    headdims = args.headdim or (HEADDIMS if args.all else (64,))
    d_states = args.d_state or (D_STATES if args.all else (128,))
    for arch in args.arch:
        for bits in args.bits:
            for headdim in headdims:
                for d_state in d_states:
                    if bits == 16 or (
                        headdim <= WIDEST_FLOAT32[0] and d_state <= WIDEST_FLOAT32[1]
                    ):
                        yield Entry(arch, headdim, d_state, bits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--headdim", type=int, nargs="+", choices=HEADDIMS)
    parser.add_argument("--d-state", type=int, nargs="+", choices=D_STATES)
    parser.add_argument("--bits", type=int, nargs="+", default=(16,), choices=(16, 32))
    parser.add_argument("--all", action="store_true", help="every headdim and d_state")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record-settings", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        entries = [Entry(*numbers) for numbers in json.load(sys.stdin)]
        print(json.dumps([record(entry) for entry in entries]))
        return 0
    if args.record_settings:
        asked = json.load(sys.stdin)
        print(json.dumps(_record_settings(Entry(*asked["entry"]), asked["settings"])))
        return 0
    rows = report(_entries(args), args.jobs)
    print(HEADER)
    for row in rows:
        print(row)
    unsound = sum(not row.is_sound for row in rows)
    print(
        f"{len(rows)} kernels, {unsound} unsound, {sum(r.seconds for r in rows):.0f} s to compile"
    )
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
