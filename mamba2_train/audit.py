"""What a run trains, seen before its first step; and that all of it learns, seen in that step.

A target that an op reads past, or that no loss depends on, keeps its initial weights in silence:
the run looks well and has trained a part of what was asked for.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mamba2_train.adapters import KINDS, kind_of
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2LM
from mamba2_train.parallel.layout import plain_name
from mamba2_train.parallel.shards import local
from mamba2_train.quantization import n_elements


def coverage(model: Mamba2LM) -> Table:
    """A row for each kind of module: how many of how many are trained and how, and the share of
    all parameters, LoRA's included."""
    total: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    holders: dict[str, set[str]] = defaultdict(set)  # modules or parameters of a kind
    moving: dict[str, set[str]] = defaultdict(set)  # those of them that are trained
    how: dict[str, set[str]] = defaultdict(set)
    for name, p in model.named_parameters():
        kind, holder, is_lora = kind_of(name), _holder(name), "lora_" in name
        holders[kind].add(holder)
        total[kind] += n_elements(p)
        if p.requires_grad:
            trained[kind] += p.numel()
            moving[kind].add(holder)
            how[kind].add(f"LoRA, r {_ranks(model, kind)}" if is_lora else "in full")
    everything = sum(total.values())
    table = Table("", "trained", "modules", "parameters", "share", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    for kind in (k for k in KINDS if k in total):
        n, style = trained[kind], None if trained[kind] else "dim"
        table.add_row(
            kind,
            " and ".join(sorted(how[kind])) or "frozen",
            f"{len(moving[kind])} of {len(holders[kind])}",
            f"{n:,}" if n else "",
            f"{n / everything:.2%}" if n else "",
            style=style,
        )
    return table


def check_gradients(model: nn.Module) -> None:
    """After a backward: raise a UserError that names what is to be trained and got no gradient.

    LoRA's product is zero at first because one of its factors is, and the gradient of the other
    is then zero too: that one is excused.
    """
    trained: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            trained[plain_name(name)].append(p)  # a parallel model has some in pieces
    moving = _any({name: [p.grad for p in parts] for name, parts in trained.items()})
    nonzero = _any(trained)
    silent = [name for name in trained if not moving[name]]
    silent = [name for name in silent if not _is_excused(name, trained, nonzero)]
    if silent:
        raise UserError(
            f"{len(silent)} of {len(trained)} trained tensors got no gradient in the first step, "
            f"such as {silent[0]}: the loss does not depend on them, so leave them out of "
            f"adapter.targets or adapter.train, or freeze them"
        )


def _any(tensors: Mapping[str, Sequence[Tensor | None]]) -> dict[str, bool]:
    """Whether anything in them is not zero, on whichever rank it is."""
    found = [any(t is not None and local(t).any() for t in parts) for parts in tensors.values()]
    every = (t for parts in tensors.values() for t in parts)
    mesh = next((t.device_mesh for t in every if isinstance(t, DTensor)), None)
    if mesh is not None:
        seen = torch.tensor(found, dtype=torch.int32, device=mesh.device_type)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        found = seen.bool().tolist()
    return dict(zip(tensors, found, strict=True))


def _is_excused(
    name: str, trained: Mapping[str, list[nn.Parameter]], nonzero: Mapping[str, bool]
) -> bool:
    other = name
    for mine, partner in (
        ("lora_A.", "lora_B."),
        ("lora_B.", "lora_A."),
        ("lora_embedding_A.", "lora_embedding_B."),
        ("lora_embedding_B.", "lora_embedding_A."),
    ):
        if f".{mine}" in name:
            other = name.replace(f".{mine}", f".{partner}")
    has_gradient = all(p.grad is not None for p in trained[name])
    return other != name and has_gradient and not nonzero.get(other, True)


def _holder(name: str) -> str:
    """The module that a parameter or its adapter is in; A_log and its like stand for themselves."""
    before = plain_name(name).split(".lora_")[0].replace(".base_layer", "")
    return before.removesuffix(".weight").removesuffix(".bias")


def _ranks(model: nn.Module, kind: str) -> str:
    ranks = {
        module.r["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "r", None), dict) and kind_of(name) == kind
    }
    return ", ".join(map(str, sorted(ranks)))
