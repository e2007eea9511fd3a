"""Which implementation an op runs on: Triton kernels, plain PyTorch, or the reference.

`auto` is Triton for tensors on a GPU and PyTorch everywhere else. A GPU without Triton falls back
to PyTorch and says so once in the log; asking for `triton` where it cannot run is an error.
`MAMBA2_BACKEND` in the environment decides for every call that leaves it at `auto`.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

logger = logging.getLogger("mamba2_kernels")

BACKENDS = ("auto", "triton", "torch", "reference")

# Public op -> the module that holds its Triton path. It is imported at the op's first call on that
# path, because Triton exists only on Linux, and has the functions of the op's PyTorch path with the
# same parameters; for the steps, one function named like the op, with the dispatcher op's
# parameters up to `backend`.
TRITON_MODULES: dict[str, str] = {
    "ssd_scan": "mamba2_kernels.ssd.triton_scan",
    "ssd_step": "mamba2_kernels.step_triton",
    "causal_conv1d": "mamba2_kernels.conv1d_triton",
    "causal_conv1d_step": "mamba2_kernels.step_triton",
    "MixerStep": "mamba2_kernels.step_triton",
    "rms_norm": "mamba2_kernels.norm_triton",
    "gated_rms_norm": "mamba2_kernels.norm_triton",
    "gated_square_sum": "mamba2_kernels.norm_triton",
    "gated_scale": "mamba2_kernels.norm_triton",
}


def resolve_backend(
    op: str, backend: str, device: torch.device, no_kernel: str | None = None
) -> str:
    """Return "triton", "torch" or "reference" for the backend a caller named.

    Args:
        no_kernel: why there is no kernel for a call's shapes and dtypes, or None if there is one.

    Raises:
        ValueError: the name is unknown, or it is "triton" and Triton cannot run this op here.
    """
    if backend == "auto":
        backend = os.environ.get("MAMBA2_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type != "cuda":
            return "torch"
        reason = why_no_triton(op, device) or no_kernel
        if reason is None:
            return "triton"
        _log_fallback(op, reason)
        return "torch"
    if backend == "triton":
        reason = why_no_triton(op, device) or no_kernel
        if reason is not None:
            raise ValueError(
                f"{op}: backend 'triton' cannot run: {reason}. "
                "Use backend='auto' to take the fastest one that can, or backend='torch'"
            )
    return backend


def why_no_triton(op: str, device: torch.device) -> str | None:
    """Return why `op` cannot run on Triton for tensors on `device`, or None when it can."""
    if op not in TRITON_MODULES:
        return f"this version has no Triton kernel for {op}"
    if not _triton_installed():
        return "Triton is not installed (`pip install triton`; it exists for Linux only)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, and Triton needs a GPU"
    return None


def triton_path(op: str) -> ModuleType:
    """Import and return the module that holds the Triton path of `op`."""
    return importlib.import_module(TRITON_MODULES[op])


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _log_fallback(op: str, reason: str) -> None:
    logger.warning("%s runs on the slower PyTorch path on this GPU: %s", op, reason)
