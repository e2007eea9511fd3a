"""The shipped settings compile without a spill; `make bench` prints the table of every entry."""

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

from mamba2_kernels.launch import ARCHITECTURES, D_STATES, HEADDIMS, WIDEST_FLOAT32, _table  # noqa: E402


def compile_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "mamba2_kernels.compile_report", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_entry_is_shipped() -> None:
    for arch in ARCHITECTURES:
        names = {f"{p}, {n}, 16" for p in HEADDIMS for n in D_STATES}
        names |= {
            f"{p}, {n}, 32"
            for p in HEADDIMS
            for n in D_STATES
            if p <= WIDEST_FLOAT32[0] and n <= WIDEST_FLOAT32[1]
        }
        assert set(_table(arch)) == names


@pytest.mark.timeout(600)
def test_the_reference_shapes_compile_without_a_spill() -> None:
    done = compile_report("--headdim", "64", "--d-state", "128", "--jobs", "2")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_entry_compiles_without_a_spill(arch: int) -> None:
    done = compile_report("--all", "--arch", str(arch), "--bits", "16", "32", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_cold_start_takes_less_than_20_seconds() -> None:
    """One compile per kernel, forward and backward, on one core."""
    done = compile_report("--arch", "90", "--jobs", "1")
    kernels: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("sm_90"):
            fields = line.split()
            kernels[fields[4]] = max(kernels.get(fields[4], 0.0), float(fields[11]))
    assert {"scan_kernel", "across_kernel", "conv_backward_kernel"} <= set(kernels)
    assert sum(kernels.values()) <= 20


def test_a_spill_is_reported() -> None:
    """Registers that cannot hold the state must fail the gate, not only show in the table."""
    from mamba2_kernels.compile_report import Entry, Row

    assert Row(Entry(90, 64, 128, 16), "scan_kernel", stack=8).is_sound is False
    assert Row(Entry(90, 64, 128, 16), "scan_kernel", local=1).is_sound is False
    assert Row(Entry(90, 64, 128, 16), "scan_kernel").is_sound is True


def test_no_length_is_compiled_in() -> None:
    """Triton would tell 1 and the multiples of 16 apart, in the middle of a run."""
    code = """
import importlib
from mamba2_kernels.backend import TRITON_MODULES
from mamba2_kernels.launch import LENGTHS
modules = [*TRITON_MODULES.values(), "mamba2_kernels.sums_triton",
           "mamba2_kernels.ssd.triton_forward", "mamba2_kernels.ssd.triton_backward"]
checked = 0
for module in modules:
    for name, kernel in vars(importlib.import_module(module)).items():
        if name.endswith("_kernel"):
            for parameter in kernel.params:
                if parameter.name in LENGTHS:
                    assert parameter.do_not_specialize, (name, parameter.name)
                    checked += 1
assert checked >= 12, checked
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
