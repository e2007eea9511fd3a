"""How the Triton kernels are launched: the shipped launch configurations, and a count of launches.

`tuned/sm_XX.json` holds, for each "headdim, d_state" and element size, the tile sizes, warps and
stages of every kernel of the scan. Nothing is timed or searched when the program runs. A part or a
shape without an entry of its own takes the nearest safe one, which is said once in the log.
"""

import contextlib
import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("mamba2_kernels")

HEADDIMS = (32, 64, 128)
D_STATES = (16, 32, 64, 128, 256)
WIDEST_FLOAT32 = (64, 32)  # headdim and d_state of one scan; wider ones are taken in slices
ARCHITECTURES = (80, 86, 89, 90, 100)
LONGEST_ROW = 1 << 29  # tokens; what document starts leave room for
LONGEST_CONV = 4  # taps, as in causal_conv1d
WIDEST_GROUP = 16384  # channels that one program of a norm holds

# What changes with the data is not compiled in. Strides are told apart by their divisors, which
# decide how wide a load may be: a batch stride that is no multiple of 16 compiles once more.
LENGTHS = ["seq_len", "n_chunks", "n_rows", "n_tile_rows", "rows_per_program"]

# kernel name -> launches so far in this process; a test of the Triton path asserts that it grew.
launches: Counter[str] = Counter()

_override: int | None = None
_dry: list[tuple[str, tuple[int, ...], dict[str, Any]]] | None = None
_settings: dict[str, dict[str, Any]] | None = None
_compile_only = False


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **kw: Any) -> None:
    """Launch a Triton kernel on the device of its tensors, and count it."""
    if _dry is not None:
        _dry.append(
            (kernel.fn.__name__, grid, dict(zip(kernel.arg_names, args, strict=False)) | kw)
        )
        return
    launches[kernel.fn.__name__] += 1
    # Triton launches on the current device, which need not be where the tensors are.
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        # Said aloud because Triton 3.10 changes the default.
        kw["enable_fp_fusion"] = True
        if _compile_only:
            kernel.warmup(*args, grid=grid, **kw)
        else:
            kernel[grid](*args, **kw)


@contextlib.contextmanager
def dry_run() -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any]]]]:
    """Launch nothing inside the block, so that what is allocated around the kernels can be counted;
    gives the name, grid and arguments of each launch."""
    global _dry
    before, _dry = _dry, []
    try:
        yield _dry
    finally:
        _dry = before


def architecture(device: torch.device) -> int:
    """Return the compute capability of a device as one number, such as 90.

    On the interpreter there is none: it is 90, or what `use_architecture` says.
    """
    if _override is not None:
        return _override
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def use_architecture(arch: int) -> Iterator[None]:
    """Take the launch configurations of `arch` inside the block: for tests and offline counts."""
    global _override
    before, _override = _override, arch
    try:
        yield
    finally:
        _override = before


@contextlib.contextmanager
def use_settings(
    settings: dict[str, dict[str, Any]], *, compile_only: bool = False
) -> Iterator[None]:
    """Run the scan with these settings inside the block, or only compile it: for tuning."""
    global _settings, _compile_only
    before = _settings, _compile_only
    _settings, _compile_only = settings, compile_only
    try:
        yield
    finally:
        _settings, _compile_only = before


def scan_config(
    device: torch.device, headdim: int, d_state: int, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Return kernel name -> tile sizes, warps and stages for one scan."""
    if _settings is not None:
        return _settings
    arch = architecture(device)
    table = _table(_nearest(arch))
    bits = "32" if dtype == torch.float32 else "16"
    entry: dict[str, dict[str, Any]] = table[f"{headdim}, {d_state}, {bits}"]
    return entry


@functools.cache
def _nearest(arch: int) -> int:
    if arch in ARCHITECTURES:
        return arch
    # 86 needs the least shared memory and no tensor descriptors: safe on any older or odd part.
    # Parts numbered from 100 to 109 are the data-centre family of 100.
    nearest = 100 if 100 <= arch < 110 else 86
    logger.warning(
        "no launch configurations are shipped for sm_%d: taking those of sm_%d. "
        "`python -m mamba2_kernels.tune` measures and writes its own",
        arch,
        nearest,
    )
    return nearest


@functools.cache
def _table(arch: int) -> dict[str, Any]:
    own = os.path.join(tuned_folder(), f"sm_{arch}.json")
    shipped = resources.files("mamba2_kernels").joinpath(f"tuned/sm_{arch}.json").read_text()
    table: dict[str, Any] = json.loads(shipped)
    if os.path.exists(own):
        with open(own) as file:
            table |= json.load(file)
    return table


def tuned_folder() -> str:
    """Return the folder where `tune` writes and where tables of one's own are looked for."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return os.environ.get("MAMBA2_TUNED", os.path.join(cache, "mamba2_kernels"))


def descriptor(tensor: Tensor, block: list[int]) -> Any:
    """A tensor descriptor over `tensor` for tiles of shape `block` (sm_90 and later)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The stride of a dimension of one is never used, and may be one that no descriptor takes.
    unused = 16 // tensor.element_size()
    strides = [
        unused if size == 1 and stride != 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block)


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether a descriptor can read the tensor: 16-byte aligned, innermost dimension dense."""
    strides = [
        stride * tensor.element_size()
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if size > 1
    ]
    # nothing to ask of a tensor that exists in a dry run alone
    start = 0 if _dry is not None else tensor.data_ptr()
    aligned = start % 16 == 0 and all(s % 16 == 0 and 0 < s < 2**40 for s in strides)
    return aligned and tensor.stride(-1) == 1


def no_scan_kernel(x: Tensor, d_state: int) -> str | None:
    """Return why the scan has no kernel for these inputs, or None when it has one."""
    headdim, seq_len = x.shape[-1], x.shape[1]
    if x.dtype == torch.float64:
        return "x is float64, and the kernels compute in float32"
    if headdim not in HEADDIMS:
        return f"headdim is {headdim}, and the kernels take {_either(HEADDIMS)}"
    if d_state not in D_STATES:
        return f"d_state is {d_state}, and the kernels take {_either(D_STATES)}"
    if seq_len > LONGEST_ROW:
        return f"seq_len is {seq_len}, and the kernels take up to {LONGEST_ROW}"
    return None


def no_mixer_kernel(x: Tensor, *, d_conv: int = 1, group_size: int = 1) -> str | None:
    """Return why convolution, norms and steps have no kernel for these inputs, or None."""
    if x.dtype == torch.float64:
        return "x is float64, and the kernels compute in float32"
    if d_conv > LONGEST_CONV:
        return f"d_conv is {d_conv}, and the kernels take up to {LONGEST_CONV}"
    if group_size > WIDEST_GROUP:
        return f"a group has {group_size} channels, and the kernels take up to {WIDEST_GROUP}"
    return None


def _either(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
