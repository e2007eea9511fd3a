"""The two collectives of tensor parallelism, each the other's transpose (Shoeybi et al. 2019,
arXiv 1909.08053, section 3: f and g).

                       forward       backward
    copy_to_ranks      identity      all-reduce    what all ranks hold, each uses in its own way
    sum_over_ranks     all-reduce    identity      what each rank holds a summand of
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def copy_to_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x`, equal on all ranks; its gradient is the sum of those that the ranks have of it.

    Args:
        x: any shape and float dtype.
        mesh: of one dimension.
    """
    return x if mesh.size() == 1 else _Copy.apply(x, mesh.get_group())


def sum_over_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' `x`, on each of them; arguments as in `copy_to_ranks`."""
    return x if mesh.size() == 1 else _Sum.apply(x, mesh.get_group())


def sum_both_ways(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' `x`, which each uses in its own way."""
    return sum_over_ranks(copy_to_ranks(x, mesh), mesh)


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
