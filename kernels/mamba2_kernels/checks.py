"""What every op checks before any work: shapes, dtypes, devices and strides, never values.

Reading a value would make the host wait for the GPU, so the checks of values (A negative, seq_idx
not below -1) run only under `MAMBA2_CHECK=1`. Every error is a ValueError that carries the value
received and the cure.
"""

import math
import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = (None, "silu")


class ArgumentCheck:
    """Checks the tensors of one call against each other.

    A dimension's name stands for one size throughout the call: the first tensor that has it fixes
    it, and the others must agree.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.device: torch.device | None = None
        self.first = ""
        self.sizes: dict[str, tuple[int, str]] = {}

    def tensor(
        self,
        name: str,
        value: Tensor | None,
        dimensions: str,
        *,
        dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
        dtype_of: str = "",
        dense: bool = False,
    ) -> None:
        """Check one tensor; None passes, for arguments that may be left out.

        Args:
            dimensions: names, as in "batch, seq_len"; "..." in front stands for any number of them.
            dtypes: the dtypes that are accepted; `dtype_of` names the argument they come from.
            dense: the last dimension must have stride 1.
        """
        if value is None:
            return
        if hasattr(value, "to_local"):
            self.fail(name, "is a DTensor, and ops take local tensors", "pass value.to_local()")
        names = dimensions.split(", ")
        leading = names[0] == "..."
        if leading:
            names = names[1:]
        if value.dim() < len(names) or (value.dim() > len(names) and not leading):
            shape = ", ".join((["..."] if leading else []) + names)
            self.fail(name, f"has shape {tuple(value.shape)}", f"it must be ({shape})")
        if value.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            source = f", the dtype of {dtype_of}" if dtype_of else ""
            cure = f"convert it to {allowed}{source}"
            self.fail(name, f"has dtype {str(value.dtype).removeprefix('torch.')}", cure)
        if self.device is None:
            self.device, self.first = value.device, name
        elif value.device != self.device:
            cure = f"move it to {self.device}, where {self.first} is"
            self.fail(name, f"is on {value.device}", cure)
        for dimension, size in zip(names, value.shape[value.dim() - len(names) :], strict=True):
            known, owner = self.sizes.setdefault(dimension, (size, name))
            if size != known:
                shape = f"shape {tuple(value.shape)}, so {dimension} = {size}"
                self.fail(name, f"has {shape}", f"{owner} has {dimension} = {known}")
        if dense and value.numel() > 0 and value.shape[-1] > 1 and value.stride(-1) != 1:
            cure = "call .contiguous() on it, or lay it out with that dimension innermost"
            self.fail(name, f"has stride {value.stride(-1)} in its last dimension", cure)

    def same_shape(self, name: str, value: Tensor | None, other_name: str, other: Tensor) -> None:
        """Check that a tensor has the shape of another, leading dimensions included."""
        if value is not None and value.shape != other.shape:
            cure = f"{other_name} has shape {tuple(other.shape)}"
            self.fail(name, f"has shape {tuple(value.shape)}", cure)

    def no_gradient(self, name: str, value: Tensor) -> None:
        """Check that a tensor an op writes to takes no part in autograd."""
        if value.requires_grad:
            self.fail(name, "requires a gradient and is updated in place", "pass it detached")

    def size(self, dimension: str) -> int:
        """The size that a dimension's name stands for in this call."""
        return self.sizes[dimension][0]

    def at_least_one(self, dimension: str) -> None:
        size, owner = self.sizes[dimension]
        if size < 1:
            self.fail(owner, f"has {dimension} = {size}", "it must be at least 1")

    def divides(self, divisor: str, dimension: str) -> None:
        few, many = self.size(divisor), self.size(dimension)
        if few < 1 or many % few != 0:
            raise ValueError(
                f"{self.op}: {divisor} = {few} does not divide {dimension} = {many}: "
                f"choose {divisor} so that every group has as many as the others"
            )

    def fail(self, name: str, received: str, cure: str) -> None:
        raise ValueError(f"{self.op}: {name} {received}: {cure}")


def check_activation(op: str, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}: use 'silu' or None")


def check_dt_limit(op: str, dt_limit: tuple[float, float]) -> tuple[float, float]:
    """Return dt_limit as two floats."""
    if len(dt_limit) != 2 or not float(dt_limit[0]) <= float(dt_limit[1]):
        raise ValueError(f"{op}: dt_limit is {dt_limit!r}: give (smallest, largest) step size")
    return float(dt_limit[0]), float(dt_limit[1])


def check_eps(op: str, eps: float) -> None:
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{op}: eps is {eps!r}: give a small positive number, such as 1e-5")


def check_values(op: str, *, A: Tensor | None = None, seq_idx: Tensor | None = None) -> None:
    """Check values, which waits for the device: only under MAMBA2_CHECK=1."""
    if os.environ.get("MAMBA2_CHECK") != "1":
        return
    if A is not None and not bool((A < 0).all()):
        worst = float(A.max())
        raise ValueError(
            f"{op}: A must be negative and reaches {worst}: pass -exp(A_log), not A_log"
        )
    if seq_idx is not None and bool((seq_idx < -1).any()):
        least = int(seq_idx.min())
        raise ValueError(
            f"{op}: seq_idx reaches {least}: number documents from 0 and mark padding with -1"
        )
