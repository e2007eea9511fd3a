"""A linear layer whose weight is stored in int8, one scale to a row, and multiplied as

    y = x W^T    with    W = CB * SCB / 127    in x's dtype

bitsandbytes' own layer rounds the inputs to int8 too, in generation and on a GPU, and does not in
training on a CPU: three models, none of which a merge could equal. This one keeps its storage, and
its class, by which peft finds it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor


class Int8Linear(Linear8bitLt):
    """(..., d_in) -> (..., d_out). No gradient for the weight and the bias: both are frozen."""

    weight: Any  # an Int8Params

    def __init__(self, d_in: int, d_out: int, bias: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(d_in, d_out, bias=bias, has_fp16_weights=False)
        self.compute_dtype = compute_dtype

    def set_weight(self, codes: Tensor, scales: Tensor) -> None:
        """Take what `quantize_int8` returned."""
        self.weight = Int8Params(codes, requires_grad=False, SCB=scales)
        self.state.SCB = scales

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        assert self.state.SCB is not None
        return _dequantized(self.weight, self.state.SCB, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.state.SCB, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        super()._apply(fn, recurse)
        # moved with the weight, never narrowed
        if self.state.SCB is not None:
            self.state.SCB = self.state.SCB.to(self.weight.device)
            self.weight.SCB = self.state.SCB
        return self


class _Product(torch.autograd.Function):
    """Keeps nothing for its backward but the int8 weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dequantized(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = gradients
        weight, scale = ctx.saved_tensors
        return grad @ _dequantized(weight, scale, grad.dtype), None, None, None


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return int8_vectorwise_dequant(weight, scale).to(dtype)
