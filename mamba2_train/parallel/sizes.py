"""How many ranks share the rows and how many share the heads: the two sizes of the mesh.

strategy   data_size     tensor_size
fsdp       all           1
tp         1             all
fsdp_tp    the rest      as asked; otherwise those of one node, or 2 where there is only one
"""

from typing import NamedTuple

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config
from mamba2_train.schema import StrategyConfig

DATA, TENSOR = "data", "tensor"  # dimensions of the mesh


class Sizes(NamedTuple):
    """Ranks that share the rows, and ranks that share the heads of a layer."""

    data: int
    tensor: int


def mesh_sizes(strategy: StrategyConfig, shape: Mamba2Config, world: int, local: int) -> Sizes:
    """The sizes asked for, those left at auto filled in.

    Args:
        world: number of processes; local: of one node.

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
    near = min(possible, key=lambda t: (abs(t - tensor), t))
    cure = (
        f"set strategy=fsdp_tp strategy.data_size={world // near} strategy.tensor_size={near}"
        if near > 1
        else "use strategy=fsdp"
    )
    if data * tensor != world:
        raise UserError(
            f"strategy.data_size={data} x strategy.tensor_size={tensor} is {data * tensor}, but "
            f"there are {world} processes: {cure}, or start {data * tensor}"
        )
    if shape.n_heads % tensor:
        raise UserError(
            f"strategy.tensor_size={tensor} does not divide the model's {shape.n_heads} heads: "
            f"{cure}"
        )
    return Sizes(data, tensor)
