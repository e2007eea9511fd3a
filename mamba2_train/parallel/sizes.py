"""How many ranks share the rows, the length of a row, and the heads: the sizes of the mesh.

strategy   data_size     tensor_size
fsdp       all           1
tp         1             all
fsdp_tp    the rest      as asked; otherwise those of one node, or 2 where there is only one

With long_context=parallel, `ranks` of all share each row, and the table is of what is left: 4
processes with ranks=2 are 2 x 2. Left at auto they are all but those that share the heads.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config
from mamba2_train.schema import StrategyConfig

DATA, CONTEXT, TENSOR = "data", "context", "tensor"  # dimensions of the mesh


class Sizes(NamedTuple):
    """Ranks that see rows of their own, ranks that share the heads of a layer, and ranks that share
    the length of a row."""

    data: int
    tensor: int
    context: int = 1

    @property
    def weights(self) -> int:
        """Ranks that share the weights: all that see other tokens."""
        return self.data * self.context


def mesh_sizes(
    strategy: StrategyConfig,
    shape: Mamba2Config,
    world: int,
    local: int,
    context: int | Literal["auto"] = 1,
) -> Sizes:
    """The sizes asked for, those left at auto filled in.

    Args:
        world: number of processes; local: of one node.
        context: `long_context.ranks`.

    Raises:
        UserError: sizes that do not multiply to the processes, or heads that cannot be shared so,
            with the nearest choice that works.
    """
    asked = (strategy.data_size, strategy.tensor_size)
    fixed = {"fsdp": (None, 1), "tp": (1, None), "fsdp_tp": (None, None)}[strategy.kind]
    for name, size, only in zip(("data_size", "tensor_size"), asked, fixed, strict=True):
        if only is not None and size not in ("auto", only):
            raise UserError(
                f"strategy={strategy.kind} has {name}=1, not {size}: use strategy=fsdp_tp for both"
            )
    data, tensor = (
        size if size != "auto" else only for size, only in zip(asked, fixed, strict=True)
    )
    if context == "auto":
        if tensor is None:
            tensor = local if world > local or local % 2 else 2
        context = world // ((data or 1) * tensor) or 1
    there_are, total = f"there are {world} processes", world
    if context > 1:
        if world % context:
            near = min((n for n in range(1, world + 1) if world % n == 0), key=_nearest(context))
            raise UserError(
                f"long_context.ranks={context} cannot share {world} processes evenly: set "
                f"long_context.ranks={near}, or start {-(-world // context) * context}"
            )
        world, local = world // context, min(local, world // context)
        there_are += f", {world} for each of long_context.ranks={context}"
    if tensor is None:
        if data is not None:
            tensor = world // data or 1
        else:
            of_node = local if world > local or local % 2 else 2
            tensor = world if strategy.kind == "tp" else of_node
    if data is None:
        data = world // tensor or 1
    possible = [t for t in range(1, world + 1) if world % t == 0 and shape.n_heads % t == 0]
    if strategy.kind == "fsdp":
        possible = [1]
    near = min(possible, key=_nearest(tensor))
    cure = (
        f"set strategy=fsdp_tp strategy.data_size={world // near} strategy.tensor_size={near}"
        if near > 1
        else "use strategy=fsdp"
    )
    if context > 1 and total % (data * tensor) == 0 and shape.n_heads % tensor == 0:
        cure = f"set long_context.ranks={total // (data * tensor)}"
    if data * tensor != world:
        raise UserError(
            f"strategy.data_size={data} x strategy.tensor_size={tensor} is {data * tensor}, but "
            f"{there_are}: {cure}, or start {data * tensor * context}"
        )
    if shape.n_heads % tensor:
        raise UserError(
            f"strategy.tensor_size={tensor} does not divide the model's {shape.n_heads} heads: "
            f"{cure}"
        )
    return Sizes(data, tensor, context)


def _nearest(n: int) -> Callable[[int], tuple[int, int]]:
    return lambda other: (abs(other - n), other)
