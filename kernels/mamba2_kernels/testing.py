"""Helpers for tests and benchmarks: random inputs, ragged packings, errors and gradients."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PADDINGS = ("none", "left", "right", "interior")


def random_ssd_inputs(
    batch: int,
    seq_len: int,
    n_heads: int,
    headdim: int,
    n_groups: int,
    d_state: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return x, dt, A, B, C, D and dt_bias for `ssd_scan` with dt_softplus.

    The heads range from one that forgets within a token to one that remembers hundreds. x, dt, B
    and C have `dtype`; A, D and dt_bias are float32, or float64 beside float64.
    """
    draw = _drawer(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": draw(batch, seq_len, n_heads, headdim).to(dtype),
        "dt": draw(batch, seq_len, n_heads).to(dtype),
        "A": -torch.logspace(1.5, -2, n_heads, dtype=torch.float64).to(wide),
        "B": draw(batch, seq_len, n_groups, d_state).to(dtype),
        "C": (draw(batch, seq_len, n_groups, d_state) / d_state**0.5).to(dtype),
        "D": draw(n_heads).to(wide),
        "dt_bias": (draw(n_heads) - 1).to(wide),
    }


def random_state(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Return a normally distributed tensor, the same for the same seed in every dtype."""
    return _drawer(seed)(*shape).to(dtype)


def random_seq_idx(
    batch: int, seq_len: int, *, padding: str = "none", mean_length: int = 40, seed: int = 2
) -> Tensor:
    """Return (batch, seq_len) int32: ragged documents, one token long at times, with padding.

    Args:
        padding: "none", "left", "right" or "interior", the last also inside documents.
        mean_length: tokens per document, on average.
    """
    if padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}: use one of {', '.join(PADDINGS)}")
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(batch, seq_len, generator=generator) < 1 / mean_length
    seq_idx = begins.cumsum(dim=1).int()
    position = torch.arange(seq_len)
    for row in range(batch):
        amount = (seq_len * (row + 1)) // (4 * batch)
        if padding == "left":
            seq_idx[row, position < amount] = -1
        elif padding == "right":
            seq_idx[row, position >= seq_len - amount] = -1
    if padding == "interior":
        seq_idx[torch.rand(batch, seq_len, generator=generator) < 0.3] = -1
    return seq_idx


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the 2-norm, infinity for NaN.

    Where `expected` is 0, the plain norm of the difference.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    scale = float(expected.norm())
    error = float((actual - expected).norm()) / (scale if scale > 0 else 1.0)
    return math.inf if math.isnan(error) else error


def run_with_gradients(
    op: Callable[..., Any], inputs: dict[str, Tensor | None], seed: int = 3, **options: Any
) -> dict[str, Tensor]:
    """Call op(**inputs, **options) and return its outputs and the gradient of every float input.

    Outputs are named "output 0", "output 1", ...; gradients "d x" and so on. They are those of a
    random linear function of all outputs, whose weights are numbers that every dtype holds.

    Raises:
        AssertionError: the op wrote to an input or to the gradient of an output.
    """
    leaves = {  # views stay views
        name: tensor.detach().requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_floating_point()
    }
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    returned = op(**(inputs | leaves), **options)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    draw = _drawer(seed)
    weights = [draw(*output.shape).bfloat16().to(output.device, output.dtype) for output in outputs]
    originals = [weight.clone() for weight in weights]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    for name, leaf in leaves.items():
        unchanged = torch.equal(leaf.nan_to_num(), before[name].nan_to_num())
        assert unchanged, f"the op wrote to {name}"
    for weight, original in zip(weights, originals, strict=True):
        assert torch.equal(weight, original), "the op wrote to the gradient of an output"
    result = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return result | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of two results of `run_with_gradients` and its name."""
    return max((relative_error(actual[name], expected[name]), name) for name in expected)


def as_dtype(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Convert the float tensors of a dictionary."""
    return {
        name: t.to(dtype) if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }


def strided(tensor: Tensor) -> Tensor:
    """Return the same values as a view into a wider buffer, as `split` returns them."""
    flat = tensor.flatten(2) if tensor.dim() > 2 else tensor
    wide = flat.new_full((*flat.shape[:-1], flat.shape[-1] + 24), float("nan"))
    wide[..., 8 : 8 + flat.shape[-1]] = flat
    return wide[..., 8 : 8 + flat.shape[-1]].unflatten(-1, tensor.shape[flat.dim() - 1 :])


def _drawer(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
