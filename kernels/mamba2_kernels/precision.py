"""The dtype an op computes in: float64 for float64 inputs, float32 for all others."""

from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Convert tensors to one dtype; arguments that were left out stay so."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)
