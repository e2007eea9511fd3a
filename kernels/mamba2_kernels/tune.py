"""Find launch configurations for the scan and write them into a table.

    python -m mamba2_kernels.tune --headdim 64 --d-state 128            on a GPU: the fastest
    python -m mamba2_kernels.tune --offline --arch 90 --headdim 64     anywhere: the first sound

On a GPU every candidate of every kernel is timed in the running op, the other kernels as they are;
one that fails to compile, or changes a result by more than rounding, is out. The table goes to the
folder that `mamba2_kernels.launch.tuned_folder` names, whose entries come before the shipped ones.

Offline the candidates are compiled, from the one that should be fastest down, until one neither
spills nor wants too much shared memory: this is how the shipped tables were made, all but what was
timed on an H100, the `across` of headdim 64 and d_state 128 on sm_90
(`--out kernels/mamba2_kernels/tuned`).
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from mamba2_kernels import launch
from mamba2_kernels.compile_report import Entry, compile_launch, record_settings

Settings = dict[str, Any]
KERNELS = ("states", "scan", "dx", "inside", "across")
REPEATS = 15


def candidates(entry: Entry) -> dict[str, list[Settings]]:
    """For each kernel its settings worth trying, the most promising first.

    Tiles of 64 tokens feed the tensor cores of sm_90 best and read C and B least often; 16-bit
    pointer kernels do better with 32. A state block of 8,192 float32 is what 128 threads can hold.
    """
    tma = entry.arch >= 90
    wide = entry.bits == 32
    tiles = (32, 16) if wide else ((64, 32, 16) if tma else (32, 64, 16))
    state_tiles = tiles[:2]
    if entry.d_state == 256 and not wide:
        tiles = (16, 32, 64)  # longer ones spill nearly everywhere
    blocks = [(64, 64), (32, 128), (64, 32), (32, 64), (32, 32)]
    if entry.arch != 90:
        blocks = blocks[1:2] + blocks[3:]
    inner = (32, 16) if wide else (64, 32, 16)
    return {
        "states": _distinct(
            {"Q": q, "PB": min(entry.headdim, p), "NB": min(entry.d_state, n), "TMA": tma,
             "num_warps": 4, "num_stages": stages}
            for p, n in blocks for q in state_tiles for stages in (3, 2)
        ),
        "scan": _distinct({"CHUNK": 512} | s for s in _chunk_settings(entry, tiles, tma)),
        "dx": _distinct({"SPAN": 512} | s for s in _chunk_settings(entry, tiles, tma)),
        "inside": _distinct(
            {"Q": q, "LOOP_STAGES": loop, "TMA": tma, "num_warps": warps, "num_stages": stages}
            for q in inner
            for warps, loop, stages in (
                (4, 2, 3), (8, 2, 3), (4, 1, 3), (8, 1, 3), (8, 1, 2), (4, 1, 1), (8, 1, 1)
            )
        ),
        "across": _distinct(
            {"CHUNK": 256, "Q": q, "NB": n, "LOOP_STAGES": 1, "RELOAD": reload, "TMA": tma,
             "num_warps": warps, "num_stages": stages}
            for q in inner
            for n in (256, 128, 64, 32, 16)
            if n <= entry.d_state and entry.headdim * n <= 8192
            for warps, stages, reload in (
                (8, 1, True), (8, 2, True), (8, 1, False), (8, 2, False), (4, 1, True),
                (4, 2, True), (8, 3, True), (4, 2, False),
            )
            if warps == 8 or entry.headdim * n <= 4096
        ),
    }  # fmt: skip


def sound_entry(entry: Entry) -> dict[str, Settings]:
    """Compile candidates until every kernel has settings that neither spill nor overflow.

    Raises:
        RuntimeError: no candidate of some kernel is sound.
    """
    tried = candidates(entry)
    recorded = record_settings(entry, tried)
    chosen: dict[str, Settings] = {}
    for kernel in KERNELS:
        for settings, captures in zip(tried[kernel], recorded[kernel], strict=True):
            # What `inside` writes, `across` reads: their tiles are the same.
            if kernel == "across" and settings["Q"] != chosen["inside"]["Q"]:
                continue
            if all(compile_launch(entry, capture).is_sound for capture in captures):
                chosen[kernel] = settings
                break
        else:
            raise RuntimeError(f"no settings of {kernel} are sound for {entry}")
    return chosen


def fastest_entries(
    entry: Entry, seq_len: int, n_heads: int, n_groups: int
) -> Iterator[dict[str, Settings]]:
    """Time the candidates on this machine's GPU, kernel after kernel; yield the fastest so far."""
    dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
    shipped = launch.scan_config(torch.device("cuda"), entry.headdim, entry.d_state, dtype)
    tried = timed_candidates(entry)
    problem = (entry, seq_len, n_heads, n_groups)
    compile_ahead(problem, [shipped | {k: s} for k in tried for s in tried[k]])
    best: dict[str, Settings] = {kernel: dict(settings) for kernel, settings in shipped.items()}
    with Stopwatch(problem) as watch:
        least = watch.time(best)
        print(f"shipped: {1e6 * least:.0f} us", flush=True)
        for kernel in ("across", "inside", "states", "scan", "dx"):
            for settings in tried[kernel]:
                # What `inside` writes, `across` reads: their tiles are the same.
                other = {"across": "inside", "inside": "across"}.get(kernel)
                if other is not None and settings["Q"] != best[other]["Q"]:
                    continue
                taken = watch.time(best | {kernel: settings})
                if taken < least:
                    least, best = taken, best | {kernel: settings}
            print(f"{kernel}: {1e6 * least:.0f} us with {best[kernel]}", flush=True)
            yield best


def timed_candidates(entry: Entry) -> dict[str, list[Settings]]:
    """More than `candidates` has: what spills or overflows shows in its time, or fails."""
    found = candidates(entry)
    wide, tma = entry.bits == 32, entry.arch >= 90
    tiles = (32, 16) if wide else (64, 32)
    for kernel, length in (("scan", "CHUNK"), ("dx", "SPAN")):
        longest = max(s["Q"] for s in found[kernel])
        found[kernel] = [
            s | {length: n} for s in found[kernel] if s["Q"] == longest for n in (512, 256)
        ]
    found["states"] = _distinct(
        {"Q": q, "PB": min(entry.headdim, p), "NB": min(entry.d_state, n), "TMA": tma,
         "num_warps": warps, "num_stages": stages}
        for q in tiles
        for p, n, warps in ((64, 64, 4), (32, 64, 4), (64, 32, 4), (32, 32, 4), (32, 128, 4),
                            (64, 128, 8), (32, 32, 2))
        for stages in (3, 4, 5)
    )  # fmt: skip
    found["across"] = _distinct(
        {"CHUNK": chunk, "Q": q, "NB": n, "LOOP_STAGES": loop, "RELOAD": reload, "TMA": tma,
         "num_warps": warps, "num_stages": stages}
        for q in tiles
        for n in (128, 64, 32)
        for chunk in (256, 128, 64)
        for warps in (8, 4)
        for loop, stages in (((1, 1), (2, 2), (3, 3)) if chunk == q else ((1, 1), (1, 3)))
        for reload in (True, False)
        if chunk >= q and n <= entry.d_state and entry.headdim * n <= 1024 * warps
    )  # fmt: skip
    return found


class Problem:
    """One scan, and its results with the shipped settings."""

    def __init__(
        self, entry: Entry, seq_len: int, n_heads: int, n_groups: int, compile_only: bool = False
    ) -> None:
        dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

        self.inputs = (
            normal(1, seq_len, n_heads, entry.headdim),
            normal(1, seq_len, n_heads) - 3,
            -torch.ones(n_heads, device="cuda"),
            normal(1, seq_len, n_groups, entry.d_state) / entry.d_state**0.5,
            normal(1, seq_len, n_groups, entry.d_state),
        )
        self.dy = normal(1, seq_len, n_heads, entry.headdim)
        self.expected = [] if compile_only else self.run()

    def run(self) -> list[Tensor]:
        from mamba2_kernels.ssd import triton_scan

        inputs = (*self.inputs, None, None, None, None)
        y, _ = triton_scan.forward(*inputs, True, 0.0, float("inf"), 256, False)
        gradients = triton_scan.backward(self.dy, None, *inputs, True, 0.0, float("inf"), 256)
        return [y, *gradients]

    def is_right(self) -> bool:
        """Whether the settings in force change nothing by more than rounding."""
        return all(
            (found - expected).norm() <= 1e-2 * expected.norm()
            for found, expected in zip(self.run(), self.expected, strict=True)
            if expected.numel()
        )

    def seconds(self) -> float:
        """For forward and backward with the settings in force; infinite if these are wrong."""
        if not self.is_right():
            return float("inf")
        # A graph, for launched one by one the kernels wait for Python.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times) / 1000


class Stopwatch:
    """Times settings in a process of its own, a new one after each fault of the GPU: a fault
    leaves the process that caused it useless."""

    def __init__(self, problem: tuple[Any, ...]) -> None:
        self.problem = problem
        self.pool: ProcessPoolExecutor | None = None
        self.times: dict[str, float] = {}

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def time(self, settings: dict[str, Settings]) -> float:
        """Seconds for forward and backward; infinite for settings that do not work."""
        key = json.dumps(settings, sort_keys=True)
        if key in self.times:
            return self.times[key]
        if self.pool is None:
            self.pool = _processes(1, *self.problem)
        try:
            self.times[key] = self.pool.submit(_seconds, settings).result()
        except Exception as error:  # too much shared memory, or what the hardware refuses
            self.times[key] = float("inf")
            print(f"left out, {type(error).__name__}: {key}", file=sys.stderr)
            if type(error).__name__ != "OutOfResources":  # which is found before the launch
                self._stop()
        return self.times[key]

    def _stop(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def compile_ahead(problem: tuple[Any, ...], tried: list[dict[str, Settings]]) -> None:
    """Compile on as many processes as there are cores what one alone would take minutes for;
    Triton keeps it on disk."""
    with _processes(max(1, min(16, (os.cpu_count() or 1) - 2)), *problem, True) as pool:
        list(pool.map(_compile, tried))


_problem: Problem | None = None  # of a process that compiles or times


def _processes(n: int, *problem: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        n, mp_context=get_context("spawn"), initializer=_set_problem, initargs=problem
    )


def _set_problem(*problem: Any) -> None:
    global _problem
    _problem = Problem(*problem)


def _compile(settings: dict[str, Settings]) -> None:
    assert _problem is not None
    with contextlib.suppress(Exception), launch.use_settings(settings, compile_only=True):
        _problem.run()


def _seconds(settings: dict[str, Settings]) -> float:
    assert _problem is not None
    with launch.use_settings(settings):
        return _problem.seconds()


def write_entry(path: str, entry: Entry, settings: dict[str, Settings]) -> None:
    """Put an entry into a table, which is made if it does not exist."""
    table: dict[str, Any] = {}
    if os.path.exists(path):
        with open(path) as file:
            table = json.load(file)
    table[f"{entry.headdim}, {entry.d_state}, {entry.bits}"] = settings
    lines = [f' "{name}": {json.dumps(table[name])}' for name in table]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _chunk_settings(entry: Entry, tiles: tuple[int, ...], tma: bool) -> Iterator[Settings]:
    for q in tiles:
        for block, warps in ((64, 4), (64, 8), (32, 4), (32, 8), (128, 8)):
            block = min(block, entry.headdim)
            if block * entry.d_state > 8192 * (warps // 4):
                continue
            for state_pn in (tma, not tma):
                for stages in (2, 3, 1) if tma else (3, 2, 1):
                    yield {"Q": q, "PB": block, "TMA": tma, "STATE_PN": state_pn,
                           "num_warps": warps, "num_stages": stages}  # fmt: skip


def _distinct(settings: Iterator[Settings]) -> list[Settings]:
    return list({json.dumps(s, sort_keys=True): s for s in settings}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--headdim", type=int, nargs="+", default=[64], choices=launch.HEADDIMS)
    parser.add_argument("--d-state", type=int, nargs="+", default=[128], choices=launch.D_STATES)
    parser.add_argument("--bits", type=int, nargs="+", default=[16], choices=(16, 32))
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--n-heads", type=int, default=80)
    parser.add_argument("--n-groups", type=int, default=1)
    parser.add_argument("--offline", action="store_true", help="compile instead of timing")
    parser.add_argument("--arch", type=int, nargs="+", choices=launch.ARCHITECTURES)
    parser.add_argument("--out", default=launch.tuned_folder(), help="folder of the tables")
    args = parser.parse_args()
    if not args.offline and not torch.cuda.is_available():
        parser.error("timing needs a GPU and there is none: use --offline, or run it on one")
    if args.offline and not args.arch:
        parser.error("--offline needs --arch, such as --arch 90")
    archs = args.arch if args.offline else [launch.architecture(torch.device("cuda"))]
    for arch in archs:
        for bits in args.bits:
            for headdim in args.headdim:
                for d_state in args.d_state:
                    entry = Entry(arch, headdim, d_state, bits)
                    found: Iterable[dict[str, Settings]]
                    if args.offline:
                        found = [sound_entry(entry)]
                    else:
                        found = fastest_entries(entry, args.seq_len, args.n_heads, args.n_groups)
                    path = os.path.join(args.out, f"sm_{arch}.json")
                    for settings in found:  # written each time: a run cut off has not been in vain
                        write_entry(path, entry, settings)
                    print(f"{entry} -> {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
