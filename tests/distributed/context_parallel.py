"""Rows split over ranks beside the same rows in one process; what differs goes to the file named,
as JSON.

    torchrun --nproc-per-node 2 context_parallel.py FILE

Run by tests/test_context_parallel.py. Each rank holds the plain model too, which is the single
process: it scans whole rows by the sequential recurrence. An error is the largest difference over
the largest value, on the worst rank.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from tensor_parallel import drawn, error, gradients, quantized_model, redraw, small

from mamba2_train import model as model_file
from mamba2_train.adapters import add_lora, train_in_full
from mamba2_train.parallel import context_parallel
from mamba2_train.parallel.context_parallel import Ranks, awaited, own_part, parallelize

WIDE = {"dt_limit": (0.05, 0.6), "n_groups": 2}


def rows(length: int, kind: str) -> dict[str, Tensor]:
    """Three rows, labels ignored here and there; documents and padding of what `kind` says."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 81, (3, length), generator=generator)
    seq_idx = torch.zeros(3, length, dtype=torch.int32)
    if kind in ("packed", "padded", "left"):
        seq_idx[0, length // 3 :] = 1  # across a cut, and within the first part
        seq_idx[1, length // 2 :] = 1  # at a cut
        seq_idx[2] = torch.arange(length) // 5  # several to a part, some over the tail of a cut
    if kind == "padded":  # the last part is padding alone, and a tail is shorter than d_conv - 1
        seq_idx[0, length // 2 - 1 :] = -1
        seq_idx[1, -3:] = -1
    if kind == "left":
        seq_idx[0, : length // 2 - 1] = -1
        seq_idx[1, :5] = -1
    if kind == "empty":
        seq_idx[:] = -1
        seq_idx[0, :2] = 0
    labels = ids.masked_fill(seq_idx < 0, -100)
    labels[2, 4:9] = -100
    return {"input_ids": ids, "labels": labels, "seq_idx": seq_idx}


def adapted(targets: Any) -> nn.Module:
    """LoRA with neither factor at zero, and some weights trained in full."""
    model = drawn(small(**WIDE))
    add_lora(model, targets, r=4, alpha=8)
    if "in_proj" in targets:
        train_in_full(model, ("conv1d", "A_log", "dt_bias", "norm"))
    model.double()
    redraw(model, ("lora_",))
    return model


def one_process(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of whole rows, every op the sequential recurrence."""
    plain = {name: getattr(model_file, name) for name in ("causal_conv1d", "ssd_scan")}
    try:
        for name, op in plain.items():
            setattr(model_file, name, lambda *a, op=op, **k: op(*a, **k, backend="reference"))
        out = model(**batch, reduction="sum")
        out.loss.backward()
    finally:
        for name, op in plain.items():
            setattr(model_file, name, op)
    return out.loss.detach(), gradients(model)


def split(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all ranks."""
    part = own_part(batch, dist.get_rank(), dist.get_world_size(), model.config.d_conv)
    state = awaited(part.pop("past"), model.config.n_layers)
    out = model(**part, state=state, reduction="sum")
    out.loss.backward()
    found = gradients(model)
    for value in (loss := out.loss.detach(), *found.values()):
        dist.all_reduce(value)
    return loss, found


def compare(plain: Any, batch: dict[str, Tensor], checkpointing: str = "none") -> dict[str, float]:
    parallel = copy.deepcopy(plain)
    parallelize(parallel, Ranks(dist.group.WORLD))
    parallel.set_checkpointing(checkpointing)
    torch.manual_seed(5)
    loss, want = one_process(plain, batch)
    torch.manual_seed(5)
    loss_of_ranks, got = split(parallel, batch)
    assert want.keys() == got.keys(), want.keys() ^ got.keys()
    if (batch["seq_idx"] >= 0).sum() > 20:
        assert all(g.any() for g in want.values()), [n for n, g in want.items() if not g.any()]
    worst = max(want, key=lambda name: error(got[name], want[name]))
    with torch.no_grad():  # rows that are not split, as in generation
        whole = {name: batch[name] for name in ("input_ids", "seq_idx")}
        logits = error(parallel(**whole).logits, plain(**whole).logits)
    return {
        "loss": error(loss_of_ranks, loss),
        "gradients": error(got[worst], want[worst]),
        "worst": worst,  # type: ignore[dict-item]
        "whole": logits,
    }


def under_autocast() -> dict[str, float]:
    """Worst gradient beside float64's, products in bfloat16: of one process, and of the ranks."""
    truth = drawn(small(**WIDE))
    plain = copy.deepcopy(truth).float()
    parallel = copy.deepcopy(plain)
    parallelize(parallel, Ranks(dist.group.WORLD))
    batch = rows(37, "packed")
    _, want = one_process(truth, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, one = one_process(plain, batch)
        _, ranks = split(parallel, batch)
    return {
        "one": max(error(one[name].double(), want[name]) for name in want),
        "ranks": max(error(ranks[name].double(), want[name]) for name in want),
    }


class Bytes(TorchDispatchMode):
    """That this rank hands to collectives and neighbours, by the op."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d" and "recv" not in op.name():
            # of a gather the last list of tensors is what is handed in
            given = args[1] if "allgather" in op.name() else args[0]
            name = op.name().removeprefix("c10d::")
            tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
            self.sent[name] = self.sent.get(name, 0) + sum(t.nbytes for t in tensors)
            self.calls[name] = self.calls.get(name, 0) + 1
        return op(*args, **(kwargs or {}))


def traffic(length: int) -> dict[str, Any]:
    """Of forward and backward, in bytes and calls."""
    model: Any = drawn(small(**WIDE))
    parallelize(model, Ranks(dist.group.WORLD))
    part = own_part(rows(length, "packed"), dist.get_rank(), dist.get_world_size(), 4)
    state = awaited(part.pop("past"), model.config.n_layers)
    found: dict[str, Any] = {}
    for name in ("forward", "backward"):
        with Bytes() as counted:
            if name == "forward":
                loss = model(**part, state=state, reduction="sum").loss
            else:
                loss.backward()
        found[name] = {"bytes": counted.sent, "calls": counted.calls}
    c = model.config
    found["state"] = 8 * 3 * c.n_heads * (c.headdim * c.d_state)
    found["decay"], found["tail"] = 8 * 3 * c.n_heads, 8 * 3 * (c.d_conv - 1) * c.d_conv_channels
    return found


def broken(what: str) -> dict[str, float]:
    """With a part of the exchange left out."""
    module, name, fake = {
        "halo": (Ranks, "shifted", lambda ranks, x, by: torch.zeros_like(x)),
        "halo backward": (
            Ranks,
            "shifted",
            lambda ranks, x, by: whole(ranks, x, by) * (by > 0),
        ),
        "state": (
            Ranks,
            "gathered",
            lambda ranks, x: [torch.zeros_like(part) for part in whole(ranks, x)],
        ),
        "documents": (model_file, "_continued", lambda state, seq_idx: state),
        "labels": (context_parallel, "aligned", lambda batch: without_labels_at_cuts(whole(batch))),
    }[what]
    whole: Any = getattr(module, name)
    setattr(module, name, fake)
    try:
        return compare(drawn(small(**WIDE)), rows(32, "packed"))
    finally:
        setattr(module, name, whole)


def without_labels_at_cuts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["shift_labels"].clone()
    width = labels.shape[1] // dist.get_world_size()
    labels[:, width - 1 :: width] = -100
    return batch | {"shift_labels": labels}


def main() -> None:
    dist.init_process_group("gloo")
    n = dist.get_world_size()
    found: dict[str, Any] = {"equal": {}, "broken": {}, "narrow": {}}
    equal = found["equal"]
    for kind in ("plain", "packed", "padded", "left", "empty"):
        for length in (32, 37) if n == 2 else (41,):
            equal[f"{kind} {length}"] = compare(drawn(small(**WIDE)), rows(length, kind))
    equal["short"] = compare(drawn(small(**WIDE)), rows(2 * n + 1, "plain"))
    for fields in ({"n_groups": 8}, {"d_conv": 2}, {"d_conv": 1}) if n == 2 else ():
        equal[str(fields)] = compare(drawn(small(**fields)), rows(33, "packed"))
    for mode in ("selective", "full", "every_2") if n == 2 else ("full",):
        equal[mode] = compare(drawn(small(**WIDE)), rows(37, "packed"), mode)
    for targets in (("in_proj", "out_proj", "embeddings"), ("out_proj",)):
        equal[f"lora {targets}"] = compare(adapted(targets), rows(37, "packed"))
    context_parallel.POSITIONS_AT_ONCE = 3
    equal["in pieces"] = compare(drawn(small(**WIDE)), rows(37, "packed"))
    for what in ("halo", "halo backward", "state", "documents", "labels"):
        found["broken"][what] = broken(what)
    model = quantized_model("nf4", small(d_model=64, expand=4, headdim=16, n_groups=2))
    found["narrow"]["nf4"] = compare(model, rows(37, "packed"))
    found["narrow"]["float32"] = compare(drawn(small(**WIDE), torch.float32), rows(37, "packed"))
    found["autocast"] = under_autocast()
    found["traffic"] = [traffic(length) for length in (32, 256)]
    gathered: list[Any] = [None] * n
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
