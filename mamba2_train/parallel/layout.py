"""The parameters of a parallel model, and the way between them and the plain ones.

Paths are those of the plain model. A parameter whose rows are of several kinds becomes one
parameter for each kind, so that the same checkpoint serves any number of ranks:

    plain                          parallel                      split over the ranks
    in_proj.weight, .bias          weight_z _x _B _C _dt         by heads; B and C by groups
    conv1d.weight, .bias           weight_x _B _C                the same
    out_proj.weight                weight_tp                     columns, by heads
    dt_bias, A_log, D, mixer.norm  dt_bias_tp, ...               by heads
    embeddings, lm_head            weight_tp                     rows, by tokens
    all else                       weight_tp                     not at all

B and C of fewer groups than ranks are not split either: each rank computes with the rows of the
group that its heads are in. LoRA's factors, and DoRA's magnitudes, follow the weights they add to.
Each parameter is a DTensor on the tensor dimension of the mesh. The plain name (`module.weight`)
reads as a plain tensor, what this rank computes with: no op sees a DTensor.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from mamba2_train.parallel.collectives import copy_to_ranks

_PARALLEL = re.compile(r"(.+)_(z|x|B|C|dt|tp)")


@dataclass(frozen=True)
class Part:
    """What becomes of a parameter, or of some of its rows.

    kind: of the rows, "tp" for all of them. size: number of rows, None for all of them.
    dim: that is split over the ranks; None leaves it whole on each.
    own: of the rows that stay whole, those that this rank computes with; None for all.
    is_partial: this rank's gradient is a summand, for each rank uses the parameter in its own way.
    """

    kind: str = "tp"
    size: int | None = None
    dim: int | None = None
    own: slice | None = None
    is_partial: bool = False


WHOLE = Part()
SUMMED = Part(is_partial=True)
ROWS, COLUMNS = Part(dim=0), Part(dim=1)


class Piece(NamedTuple):
    """Where a parallel parameter is in its plain one: rows `start` to `stop`, all the columns."""

    name: str
    start: int
    stop: int


def pieces(model: nn.Module) -> dict[str, list[Piece]]:
    """For each parameter of the plain model the parallel ones that make it up, in order.

    Base weights below adapters have their names in checkpoints, without `base_layer`. Quantized
    weights are left out. Which part of a piece this rank holds, its DTensor says.
    """
    found: dict[str, list[Piece]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            plain = plain_name(name).replace(".base_layer.", ".")
            before = found.setdefault(plain, [])
            start = before[-1].stop if before else 0
            before.append(Piece(name, start, start + parameter.shape[0]))
    return found


def plain_name(name: str) -> str:
    """Of the parameter that a parallel one is a piece of; a plain one's own."""
    match = _PARALLEL.fullmatch(name)
    return match[1] if match else name


def plain_tensors(
    model: nn.Module, of: Callable[[nn.Parameter], Tensor | None] = nn.Parameter.detach
) -> Iterator[tuple[str, Tensor]]:
    """Each plain parameter's name and full value, one after the other, on all ranks.

    Every rank must go through all of them.

    Args:
        of: what of a parameter is wanted, such as its gradient; None skips it.
    """
    parameters = dict(model.named_parameters())
    for plain, of_plain in pieces(model).items():
        values: list[Any] = [of(parameters[piece.name]) for piece in of_plain]
        if all(value is not None for value in values):
            yield plain, torch.cat([value.full_tensor() for value in values])


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, *parts: Part) -> None:
    """Put DTensors in the place of a parameter, and this rank's part of them under its name.

    Args:
        module: directly above the parameter, which may be None, or on the meta device.
        parts: of its rows, in their order.
    """
    parameter = module._parameters[name]
    if parameter is None:
        return
    del module._parameters[name]
    start = 0
    for part in parts:
        size = parameter.shape[0] if part.size is None else part.size
        piece = parameter.detach().narrow(0, start, size)
        start += size
        value = nn.Parameter(_on_mesh(piece, mesh, part.dim), parameter.requires_grad)
        module.register_parameter(f"{name}_{part.kind}", value)
    assert start == parameter.shape[0], f"{name} has {parameter.shape[0]} rows, not {start}"
    module.__dict__.setdefault("parts_of", {})[name] = parts
    module.mesh = mesh  # type: ignore[assignment]
    specialize(module, names=(name,))


def specialize(module: nn.Module, *mixins: type, names: Sequence[str] = ()) -> None:
    """Let a module's class be preceded by `mixins`, and read `names` as this rank's tensors."""
    cls: Any = type(module)
    module.__class__ = _specialized(cls, mixins, tuple(names))


def local_parts(module: nn.Module, name: str) -> list[Tensor]:
    """What this rank computes with of the parts of a parameter, in their order."""
    parts: Sequence[Part] = module.parts_of[name]  # type: ignore[index,assignment]
    mesh: Any = module.mesh
    values: list[Tensor] = []
    for part in parts:
        parameter: Any = module._parameters[f"{name}_{part.kind}"]
        # of a frozen one without a node of autograd, which costs more than a small op
        with torch.set_grad_enabled(parameter.requires_grad and torch.is_grad_enabled()):
            values.append(parameter.to_local())
    partial = [i for i, part in enumerate(parts) if part.is_partial]
    if partial:
        joined = torch.cat([values[i] for i in partial]) if len(partial) > 1 else values[partial[0]]
        joined = copy_to_ranks(joined, mesh)  # one collective for them all
        sizes = [values[i].shape[0] for i in partial]
        for i, value in zip(partial, joined.split(sizes), strict=True):
            values[i] = value
    return [v if p.own is None else v[p.own] for v, p in zip(values, parts, strict=True)]


def share(size: int, mesh: DeviceMesh) -> slice:
    """What this rank holds of `size` entries: DTensor's rule, the last ranks may have fewer."""
    each = -(-size // mesh.size())
    start = min(each * mesh.get_local_rank(), size)
    return slice(start, min(start + each, size))


@cache
def _specialized(cls: Any, mixins: tuple[type, ...], names: tuple[str, ...]) -> Any:
    """One class for all alike, which torch.compile then compiles once, under its own name, by
    which peft and bitsandbytes know their layers."""
    return type(cls.__name__, (*mixins, cls), {name: _local(name) for name in names})


def _local(name: str) -> property:
    def local(module: nn.Module) -> Tensor:
        values = local_parts(module, name)
        return torch.cat(values) if len(values) > 1 else values[0]

    return property(local)


def _on_mesh(tensor: Tensor, mesh: DeviceMesh, dim: int | None) -> DTensor:
    """Without communication: every rank has all of `tensor`, and keeps a copy of its part."""
    local = tensor
    if dim is not None:
        own = share(tensor.shape[dim], mesh)
        local = tensor.narrow(dim, own.start, own.stop - own.start)
    return DTensor.from_local(
        local.clone(memory_format=torch.contiguous_format),
        mesh,
        [Replicate() if dim is None else Shard(dim)],
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )
