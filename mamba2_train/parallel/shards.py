"""Which part of which tensor a rank holds: FSDP2 over the data dimension of the mesh.

Matrices (projections, embeddings, head, LoRA's factors) are cut into rows over the data dimension,
gathered block by block when they are needed, and their gradients reduced to the same rows.
What has another shape (A_log, D, dt_bias, norms, biases, the convolution) is small and stays whole
on every rank, in its own dtype; its gradients are averaged by `average_replicated`.

A `Box` is a part of a *plain* tensor, one that a model in a single process has. Weights are read
and checkpoints written in boxes, so that neither knows how many ranks there are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement

from mamba2_train.model import Mamba2LM
from mamba2_train.parallel.layout import pieces


class Box(NamedTuple):
    """This rank's part of a plain tensor: `local`, which begins at `offsets` in one of `size`."""

    local: Tensor
    offsets: tuple[int, ...]
    size: torch.Size

    @property
    def region(self) -> tuple[slice, ...]:
        sizes = zip(self.offsets, self.local.shape, strict=True)
        return tuple(slice(start, start + n) for start, n in sizes)


def shard(
    model: Mamba2LM,
    mesh: DeviceMesh,
    *,
    products: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> None:
    """Cut the matrices of `model` over `mesh`, in place; it may be on the meta device.

    A block is gathered for its forward, freed, and gathered again for its backward.

    Args:
        mesh: of one dimension.
        products: dtype that the blocks' matrices are gathered in; gradients are reduced in their
            own. Embeddings and head, whose outputs are not products of blocks, keep theirs.
    """
    whole = {p for p in model.parameters() if p.dim() != 2}
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    # the residual stream is float32, and stays so
    mixed = MixedPrecisionPolicy(param_dtype=products, cast_forward_inputs=False)
    if products is not None:
        mixed = MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload, "ignored_params": whole}
    for layer in model.backbone.layers:
        fully_shard(layer, mp_policy=mixed, **options)
        register_fsdp_forward_method(layer, "step")
    fully_shard(model, mp_policy=root, **options)
    register_fsdp_forward_method(model, "step")


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether a backward ends with the gradients reduced, or leaves them to be added to."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now, recurse=False)


def give_back(model: nn.Module) -> None:
    """Free what has been gathered: after a forward without a backward, the root's is still there,
    in the place of the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def average_replicated(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of what `mesh` does not cut over it, in one collective per dtype."""
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None and not _is_on(p, mesh):
            gradients.setdefault(p.grad.dtype, []).append(local(p.grad))
    if mesh.size() == 1:
        return
    for some in gradients.values():
        flat = torch.cat([g.flatten() for g in some])
        dist.all_reduce(flat, group=mesh.get_group())
        flat /= mesh.size()
        for g, mean in zip(some, flat.split([g.numel() for g in some]), strict=True):
            g.copy_(mean.view_as(g))


def scale_gradients(gradients: list[Tensor], scale: Tensor) -> None:
    """Multiply them all, in place; `scale` is a number in a tensor."""
    held: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in map(local, gradients):
        held.setdefault((g.device, g.dtype), []).append(g)
    for (device, dtype), some in held.items():
        torch._foreach_mul_(some, scale.to(device, dtype))


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements, of whichever rank; the same on each of them.

    Args:
        tensors: plain ones, of which every rank holds the same, and DTensors.
    """
    if not any(isinstance(t, DTensor) for t in tensors):
        return torch.nn.utils.get_total_norm(tensors)
    parts: dict[frozenset[str], list[Tensor]] = {}
    groups: dict[str, Any] = {}
    device = "cpu"  # of the collectives
    for t in tensors:
        cut = _cut_over(t)
        if isinstance(t, DTensor):
            groups |= {n: t.device_mesh.get_group(n) for n in cut}
            device = t.device_mesh.device_type
        parts.setdefault(frozenset(cut), []).append(local(t))
    total = torch.zeros((), dtype=torch.float64, device=device)
    # in one order on all ranks, each of which holds something of every kind
    for over in sorted(parts, key=sorted):
        norms = torch.stack(torch._foreach_norm(parts[over])).to(device, torch.float64)
        squares = norms.square().sum()
        for name in sorted(over):
            dist.all_reduce(squares, group=groups[name])
        total += squares
    return total.sqrt().to(tensors[0].dtype)


def boxes(
    model: nn.Module, of: Callable[[nn.Parameter], Tensor | None] = lambda p: p
) -> Iterator[tuple[str, list[tuple[nn.Parameter, Box]]]]:
    """For each plain parameter the ones that make it up here, and the boxes that they are.

    Args:
        of: what of a parameter is wanted, of its shape and placement; None skips it.
    """
    give_back(model)
    parameters = dict(model.named_parameters())
    for plain, of_plain in pieces(model).items():
        found = []
        n_rows = max(stop for _, _, stop in of_plain)
        for name, start, _ in of_plain:
            p = parameters[name]
            value = of(p)
            if value is None:
                continue
            size = torch.Size((n_rows, *p.shape[1:])) if p.dim() else p.shape
            offsets = local_extent(p)[0]
            if p.dim():
                offsets = (offsets[0] + start, *offsets[1:])
            found.append((p, Box(local(value), offsets, size)))
        if found:
            yield plain, found


def local_extent(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of what this rank holds of a tensor.

    The inner dimension of the mesh is cut first: FSDP cuts what tensor parallelism has left, where
    both take the rows.
    """
    offsets, sizes = [0] * p.dim(), list(p.shape)
    if isinstance(p, DTensor):
        for i in reversed(range(p.device_mesh.ndim)):
            if (dim := cut_dim(p.placements[i])) is not None:
                each = -(-sizes[dim] // p.device_mesh.size(i))
                start = min(each * p.device_mesh.get_local_rank(i), sizes[dim])
                offsets[dim] += start
                sizes[dim] = min(each, sizes[dim] - start)
    return tuple(offsets), tuple(sizes)


def cut_dim(placement: Placement) -> int | None:
    """That is cut over a dimension of the mesh. FSDP's, of rows that tensor parallelism has cut
    too, is no `is_shard()`."""
    return getattr(placement, "dim", None)


def trained_names(model: nn.Module) -> set[str]:
    """Plain names of what is trained."""
    return {name for name, _ in boxes(model, lambda p: p if p.requires_grad else None)}


def whole_tensors(
    model: nn.Module, of: Callable[[nn.Parameter], Tensor | None] = nn.Parameter.detach
) -> Iterator[tuple[str, Tensor]]:
    """Plain name and all of a tensor, one after the other; every rank must take part.

    Args:
        of: what of a parameter is wanted, as in `boxes`.
    """
    give_back(model)
    parameters = dict(model.named_parameters())
    for plain, of_plain in pieces(model).items():
        parts = [value for name, _, _ in of_plain if (value := of(parameters[name])) is not None]
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in parts]
        if whole:
            yield plain, torch.cat(whole) if len(whole) > 1 else whole[0]


def is_first_holder(model: nn.Module, tensor: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part of a tensor of `model`."""
    mesh = mesh_of(model)
    return mesh is None or all(
        mesh.get_local_rank(name) == 0
        for name in mesh.mesh_dim_names or ()
        if name not in _cut_over(tensor)
    )


def summed_over_ranks(model: nn.Module, value: Tensor) -> Tensor:
    """The sum of `value` over the ranks that `model` is spread over."""
    mesh = mesh_of(model)
    if mesh is None:
        return value
    value = value.to(mesh.device_type)
    dist.all_reduce(value)
    return value


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """That a model is spread over; None for one that is not."""
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def _cut_over(tensor: Tensor) -> set[str]:
    """Dimensions of the mesh."""
    if not isinstance(tensor, DTensor):
        return set()
    names = tensor.device_mesh.mesh_dim_names or ()
    places = zip(names, tensor.placements, strict=True)
    return {name for name, placement in places if cut_dim(placement) is not None}


def _is_on(p: Tensor, mesh: DeviceMesh) -> bool:
    """Whether `p` is cut over the dimension that `mesh` is."""
    names = mesh.mesh_dim_names or ()
    return isinstance(p, DTensor) and names[0] in (p.device_mesh.mesh_dim_names or ())
