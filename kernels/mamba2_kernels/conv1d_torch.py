"""The causal convolution and its gradient in plain PyTorch.

Channels lie innermost, where d_conv shifted multiply-adds beat every convolution PyTorch has. Such
a sum reads the wrong inputs where a document has just begun or where padding lies between its
tokens: those rows, few as a rule, are computed once more from an index of the right inputs.

The inputs are laid out as `lane` = [a row of zeros, the d_conv - 1 inputs before x, x], so that one
index reaches each of them and 0 stands for an input that does not exist.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_kernels.packing import documents
from mamba2_kernels.precision import compute_dtype


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, empty when it is not asked for."""
    packing = None if seq_idx is None else _Packing.of(seq_idx, weight.shape[1])
    lane = _lane(x, weight, packing, initial_state)
    y = _before_activation(lane, weight, bias, packing)
    if activation == "silu":
        F.silu(y, inplace=True)
    if packing is not None:
        y[packing.padding] = 0
    final_state = y.new_empty(0)
    if return_final_state:
        final_state = lane[_tail(packing, x.shape[1])].clone()
    return y.to(x.dtype), final_state.to(x.dtype)


def backward(
    dy: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and d_initial_state; empty for inputs left out."""
    seq_len, d_conv = x.shape[1], weight.shape[1]
    packing = None if seq_idx is None else _Packing.of(seq_idx, d_conv)
    lane = _lane(x, weight, packing, initial_state)
    taps = _taps(weight, lane)
    dy = dy.to(lane.dtype, copy=packing is not None and not activation)
    if activation == "silu":
        dy = torch.ops.aten.silu_backward(dy, _before_activation(lane, weight, bias, packing))
    d_special = None
    if packing is not None:
        dy[packing.padding] = 0
    d_bias = x.new_empty(0) if bias is None else dy.sum(dim=(0, 1)).to(bias.dtype)
    if packing is not None:
        d_special = dy[packing.special]
        dy[packing.special] = 0

    d_taps = torch.stack([(dy * _window(lane, k, d_conv)).sum(dim=(0, 1)) for k in range(d_conv)])
    d_lane = torch.empty_like(lane)
    d_lane[:, :d_conv] = 0
    torch.mul(dy, taps[-1], out=_window(d_lane, d_conv - 1, d_conv))
    for k in range(d_conv - 1):
        _window(d_lane, k, d_conv).addcmul_(dy, taps[k])
    if packing is not None:
        assert d_special is not None
        for k, source in enumerate(packing.sources):
            d_taps[k] += (d_special * lane[source]).sum(dim=0)
            d_lane[source] += d_special * taps[k]  # only position 0, of no use, comes up twice
    if d_final_state is not None:
        d_lane[_tail(packing, seq_len)] += d_final_state

    d_initial_state = x.new_empty(0)
    if initial_state is not None:
        d_initial_state = d_lane[:, 1:d_conv].to(initial_state.dtype, copy=True)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dx.copy_(d_lane[:, d_conv:])
    return dx, d_taps.T.to(weight.dtype).contiguous(), d_bias, d_initial_state


def _lane(
    x: Tensor, weight: Tensor, packing: "_Packing | None", initial_state: Tensor | None
) -> Tensor:
    """Lay out zeros, past and x as (batch, d_conv + seq_len, channels), float32 or float64."""
    batch, seq_len, channels = x.shape
    d_conv = weight.shape[1]
    lane = x.new_empty(batch, d_conv + seq_len, channels, dtype=compute_dtype(x))
    lane[:, :d_conv] = 0
    if initial_state is not None:
        lane[:, 1:d_conv] = initial_state
    lane[:, d_conv:] = x
    if packing is not None:
        # Whatever padding holds, even NaN, it must not reach a gradient as 0 * NaN.
        lane[:, d_conv:][packing.padding] = 0
    return lane


def _taps(weight: Tensor, lane: Tensor) -> Tensor:
    """The weights as (d_conv, channels), that of the oldest input first."""
    return weight.to(lane.dtype).T.contiguous()


def _window(lane: Tensor, k: int, d_conv: int) -> Tensor:
    """View the inputs that tap k meets, (batch, seq_len, channels)."""
    return lane[:, 1 + k : 1 + k + lane.shape[1] - d_conv]


def _tail(packing: "_Packing | None", seq_len: int) -> Any:
    """Index of the final state in the lane."""
    return (slice(None), slice(1 + seq_len, None)) if packing is None else packing.tail


def _before_activation(
    lane: Tensor, weight: Tensor, bias: Tensor | None, packing: "_Packing | None"
) -> Tensor:
    taps = _taps(weight, lane)
    d_conv = len(taps)
    y = _window(lane, 0, d_conv) * taps[0]
    for k in range(1, d_conv):
        y.addcmul_(_window(lane, k, d_conv), taps[k])
    if packing is not None:
        special = lane[packing.sources[0]] * taps[0]
        for k in range(1, d_conv):
            special.addcmul_(lane[packing.sources[k]], taps[k])
        y[packing.special] = special
    return y if bias is None else y.add_(bias.to(y.dtype))


Index = tuple[Tensor, Tensor]  # rows of the batch, and positions in a row


class _Packing(NamedTuple):
    """Where the shifted sums go wrong, and which inputs are right there."""

    padding: Index  # positions in x
    special: Index  # positions in x of tokens that have other inputs than the last d_conv
    sources: list[Index]  # for each tap, the positions in the lane of their inputs
    tail: Index  # positions in the lane of the final state

    @classmethod
    def of(cls, seq_idx: Tensor, d_conv: int) -> "_Packing":
        valid, document = documents(seq_idx)
        # The past belongs to document 0, padding to none.
        owner = F.pad(torch.where(valid, document, -1), (d_conv - 1, 0), value=0)
        expected = owner.unfold(1, d_conv, 1) == owner[:, d_conv - 1 :, None]
        row, position = (valid & ~expected.all(dim=2)).nonzero(as_tuple=True)

        # The lane position of every row's k-th token, behind those of the past.
        past = torch.arange(1, d_conv, device=seq_idx.device).expand(len(seq_idx), -1)
        token = torch.cat([past, d_conv + (~valid).sort(dim=1, stable=True).indices], dim=1)
        count = valid.cumsum(dim=1)
        here = count[row, position] + d_conv - 2
        sources = []
        for lag in range(d_conv - 1, -1, -1):
            source = token[row, here - lag]
            same_document = owner[row, source - 1] == document[row, position]
            sources.append((row, torch.where(same_document, source, 0)))

        last = token.gather(1, count[:, -1:] + torch.arange(d_conv - 1, device=seq_idx.device))
        tail = torch.where(owner.gather(1, last - 1) == document[:, -1:], last, 0)
        rows = torch.arange(len(seq_idx), device=seq_idx.device)[:, None]
        padding_row, padding_position = (~valid).nonzero(as_tuple=True)
        return cls((padding_row, padding_position), (row, position), sources, (rows, tail))
