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
from mamba2_train.parallel.sizes import CONTEXT, DATA, TENSOR, Sizes
from mamba2_train.parallel.start import to_meta, weightless
from mamba2_train.parallel.wire import Collective, Traffic, over_context, traffic
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
    n_rows: int,
    n_tokens: int,
    accumulate: int,
    reduce_each_batch: bool,
) -> tuple[Table, list[str]]:
    """A row for each kind of parameter, and lines on memory and on what is sent.

    Args:
        n_rows, n_tokens: of a rank's micro-batch; accumulate: micro-batches of a step.
    """
    logging.getLogger("torch").setLevel(logging.ERROR)
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  which registers it

    dist.init_process_group("fake", rank=0, world_size=sizes.weights * sizes.tensor)
    try:
        shared = (sizes.weights, sizes.tensor)
        mesh = init_device_mesh("cpu", shared, mesh_dim_names=(DATA, TENSOR))
        model = weightless(shape, dtype, quantization)
        adapt(model)
        to_meta(model, adapters=True)
        if sizes.tensor > 1:
            from mamba2_train.parallel.tensor_parallel import parallelize

            parallelize(model, mesh[TENSOR], before_block=_unscaled)
        shard(model, mesh[DATA], products=products)
        table = _placements(model)
        weights, trained = _held(model)
        sent = traffic(
            model,
            shape,
            sizes,
            products=products,
            activation=products or dtype,
            n_tokens=n_tokens,
            repeats=False,
        )
        of_context = list(
            over_context(shape, sizes.context, n_sequences=n_rows, activation=products or dtype)
        )
        received = wire_bytes(sent, of_context, sizes, accumulate, reduce_each_batch)
    finally:
        dist.destroy_process_group()
    context = f"{CONTEXT} {sizes.context} x " if sizes.context > 1 else ""
    state = 3 * FLOAT32 * trained  # gradient and AdamW's two moments
    lines = [
        f"mesh      {DATA} {sizes.data} x {context}{TENSOR} {sizes.tensor}",
        f"per rank  weights {_size(weights)}, gradients and optimizer {_size(state)}",
        "per step  "
        + ", ".join(f"{name} {_size(n)}" for name, n in received.items())
        + " received by a rank",
    ]
    return table, lines


def wire_bytes(
    sent: Traffic, of_context: list[Collective], sizes: Sizes, accumulate: int, each: bool
) -> dict[str, float]:
    """Bytes that a rank receives in a step, by what is sent.

    Args:
        of_context: of each block, what ranks that share a row send each other.
        each: gradients are reduced after each of the `accumulate` micro-batches.
    """
    found = {"weights": 0.0, "gradients": 0.0, "activations": 0.0}
    for c, times in sent.step(accumulate, reduce_each_batch=each).items():
        over_data = "weights" if c.kind == "gather" else "gradients"
        what = over_data if c.over == DATA else "activations"
        found[what] += times * c.received(sizes.weights if c.over == DATA else sizes.tensor)
    if of_context:
        ranks = {CONTEXT: sizes.context, "halo": 2}
        received = sum(c.received(ranks[c.over]) for c in of_context) / sizes.tensor
        found["states"] = received * sent.n_layers * accumulate
    return found


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


def _size(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"
