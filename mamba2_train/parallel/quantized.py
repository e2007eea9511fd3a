"""A rank's part of a layer in 4 or 8 bits: the same codes and scales, so the same weights.

In 4 bits a block of 64 weights shares a scale. A part of the rows is whole blocks when the inputs
are a multiple of 64, and a part of the columns when the inputs of each rank are. The scales' own
scales are undone, for a part of the columns has none of their blocks whole: 0.563 bytes a weight
instead of 0.516.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mamba2_train.parallel.layout import specialize
from mamba2_train.quantization import BLOCK, bitsandbytes


def distribute_quantized(
    layer: Any, mesh: DeviceMesh, *, rows: Tensor | None = None, columns: slice | None = None
) -> None:
    """Keep this rank's part of the weight, in place.

    Args:
        rows: indices of those that are kept; None keeps all.
        columns: that are kept, likewise. In 4 bits `check_divisible` has seen that parts are whole
            blocks.
    """
    is_4bit = type(layer).__name__ == "Linear4bit"
    if mesh.size() > 1:  # else all of it, as it is
        rows = torch.arange(layer.out_features) if rows is None else rows
        columns = slice(0, layer.in_features) if columns is None else columns
        (_take_4bit if is_4bit else _take_int8)(layer, rows.to(layer.weight.device), columns)
    local = layer._parameters.pop("weight").data
    # codes follow no plain tensor's order; put together they are what all ranks hold
    packed = DTensor.from_local(local.contiguous(), mesh, [Shard(0)], run_check=False)
    layer.weight_tp = nn.Parameter(packed, requires_grad=False)
    specialize(layer, Part4bit if is_4bit else PartInt8)


class PartInt8(nn.Module):
    weight_tp: Any

    @property
    def weight(self) -> Tensor:
        return self.weight_tp.to_local()


class Part4bit(nn.Module):
    quant_state: Any
    weight_tp: Any

    @property
    def weight(self) -> Any:
        codes = self.weight_tp.to_local()
        if self.quant_state.absmax.device != codes.device:
            self.quant_state.to(codes.device)
        return bitsandbytes().nn.Params4bit(
            codes,
            requires_grad=False,
            quant_state=self.quant_state,
            compress_statistics=False,
            quant_type=self.quant_state.quant_type,
            bnb_quantized=True,
        )


def _take_int8(layer: Any, rows: Tensor, columns: slice) -> None:
    layer.state.SCB = layer.state.SCB[rows]
    layer.weight = nn.Parameter(layer.weight.data[rows, columns], requires_grad=False)


def _take_4bit(layer: Any, rows: Tensor, columns: slice) -> None:
    functional = bitsandbytes().functional
    state, d_in = layer.weight.quant_state, layer.in_features
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = layer.weight.data.view(-1, d_in // 2)[rows, columns.start // 2 : columns.stop // 2]
    absmax = absmax.view(-1, d_in // BLOCK)
    absmax = absmax[rows, columns.start // BLOCK : columns.stop // BLOCK]
    layer.quant_state = functional.QuantState(
        absmax=absmax.reshape(-1).float(),
        shape=torch.Size((len(rows), columns.stop - columns.start)),
        code=state.code,
        blocksize=BLOCK,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    layer._parameters["weight"] = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
