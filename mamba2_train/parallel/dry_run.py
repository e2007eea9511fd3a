"""What a strategy would do with a model, told before any weight is read.

The model is spread over ranks that do not exist: torch's `fake` process group has as many as are
asked for, its collectives do nothing, and the parameters stay on the meta device. So what is told
of a rank is what the first rank would hold.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mamba2_train.model import Mamba2Config, Mamba2LM
from mamba2_train.parallel.shards import cut_dim, local_extent, shard
from mamba2_train.parallel.sizes import DATA, TENSOR, Sizes
from mamba2_train.parallel.start import to_meta, weightless
from mamba2_train.quantization import BLOCK, Quantization, bitsandbytes, is_quantized_layer

FLOAT32 = 4  # bytes


def dry_run(
    shape: Mamba2Config,
    sizes: Sizes,
    adapt: Callable[[Mamba2LM], PeftModel | None],
    *,
    dtype: torch.dtype,
    quantization: Quantization | None,
    products: torch.dtype | None,
    n_tokens: int,
    accumulate: int,
    reduce_each_batch: bool,
) -> tuple[Table, list[str]]:
    """A row for each kind of parameter, and lines on memory and on what is sent.

    Args:
        n_tokens: of a rank's micro-batch; accumulate: micro-batches of a step.
    """
    logging.getLogger("torch").setLevel(logging.ERROR)
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  which registers it

    dist.init_process_group("fake", rank=0, world_size=sizes.data * sizes.tensor)
    try:
        mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=(DATA, TENSOR))
        model = weightless(shape, dtype, quantization)
        adapt(model)
        to_meta(model, adapters=True)
        if sizes.tensor > 1:
            from mamba2_train.parallel.tensor_parallel import parallelize

            parallelize(model, mesh[TENSOR], before_block=_unscaled)
        shard(model, mesh[DATA], products=products)
        table = _placements(model)
        weights, trained = _held(model)
        sent = wire_bytes(
            model,
            sizes,
            products=products,
            n_tokens=n_tokens,
            accumulate=accumulate,
            reduce_each_batch=reduce_each_batch,
            activation=products or dtype,
        )
    finally:
        dist.destroy_process_group()
    state = 3 * FLOAT32 * trained  # gradient and AdamW's two moments
    lines = [
        f"mesh      {DATA} {sizes.data} x {TENSOR} {sizes.tensor}",
        f"per rank  weights {_size(weights)}, gradients and optimizer {_size(state)}",
        "per step  "
        + ", ".join(f"{name} {_size(n)}" for name, n in sent.items())
        + " received by a rank",
    ]
    return table, lines


def wire_bytes(
    model: nn.Module,
    sizes: Sizes,
    *,
    products: torch.dtype | None,
    n_tokens: int,
    accumulate: int,
    reduce_each_batch: bool,
    activation: torch.dtype,
) -> dict[str, int]:
    """Bytes that a rank receives in a step, by ring algorithms: (n - 1) / n of what is gathered or
    scattered, twice that of what is reduced for all.

    A block is gathered for its forward and again for its backward; what is outside of the blocks
    once for both.
    """
    gathered = scattered = replicated = 0
    for name, p in model.named_parameters():
        n = _tensor_share(p)
        if p.dim() != 2:
            replicated += n * FLOAT32 * p.requires_grad
            continue
        in_block = ".layers." in f".{name}"
        narrow = products if products is not None and in_block else p.dtype
        gathered += n * narrow.itemsize * (2 if in_block else 1)
        scattered += n * FLOAT32 * p.requires_grad
    reductions = accumulate if reduce_each_batch else 1
    data, tensor = ((n - 1) / n for n in sizes)
    config = model.config
    stream = n_tokens * config.d_model * activation.itemsize  # type: ignore[union-attr, operator]
    return {
        "weights": int(data * gathered * accumulate),
        "gradients": int(data * (scattered * reductions + 2 * replicated)),
        # an all-reduce each way for a block, for the embeddings and for the head
        "activations": int(2 * tensor * 2 * stream * (config.n_layers + 1) * accumulate),  # type: ignore[union-attr, operator]
    }


def _unscaled(block: nn.Module) -> None:
    """Give quantized weights the state by which a part is taken, without values."""
    for module in block.modules():
        if is_quantized_layer(module):
            layer: Any = module
            layer.weight.quant_state = bitsandbytes().functional.QuantState(
                absmax=torch.empty(layer.out_features * layer.in_features // BLOCK, device="meta"),
                shape=torch.Size((layer.out_features, layer.in_features)),
                blocksize=BLOCK,
                quant_type=layer.weight_kind,
                dtype=layer.compute_dtype,
            )


def _placements(model: nn.Module) -> Table:
    """How parameters lie on the mesh, those of all blocks together; `data 0` cuts the rows."""
    rows: dict[tuple[str, str, str, str, str], int] = defaultdict(int)
    for name, p in model.named_parameters():
        name = re.sub(r"^.*layers\.\d+\.", "layers.*.", name.replace(".base_layer", ""))
        where = "whole"
        if isinstance(p, DTensor):
            names = p.device_mesh.mesh_dim_names or ()
            cut = [
                f"{n} {cut_dim(p.placements[i])}"
                for i, n in enumerate(names)
                if cut_dim(p.placements[i]) is not None and p.device_mesh.size(i) > 1
            ]
            where = ", ".join(cut) or "whole"
        here = "x".join(map(str, local_extent(p)[1]))
        whole = "x".join(map(str, p.shape))
        rows[name, whole, here, where, str(p.dtype).removeprefix("torch.")] += 1
    table = Table("", "shape", "on a rank", "cut", "", "", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap, column.overflow = True, "fold"
    for key, n in rows.items():
        table.add_row(*key, f"x {n}" if n > 1 else "")
    return table


def _held(model: nn.Module) -> tuple[int, int]:
    """Bytes of weights on this rank, and elements that are trained."""
    weights = trained = 0
    for p in model.parameters():
        n = torch.Size(local_extent(p)[1]).numel()
        weights += n * p.element_size()
        trained += n * p.requires_grad
    return weights, trained


def _tensor_share(p: torch.Tensor) -> int:
    """Elements that the ranks of a data dimension have together."""
    n = p.numel()
    if isinstance(p, DTensor):
        names = p.device_mesh.mesh_dim_names or ()
        for i, name in enumerate(names):
            if name == TENSOR and cut_dim(p.placements[i]) is not None:
                n //= p.device_mesh.size(i)
    return n


def _size(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"
