"""A parallel model beside the plain one; what differs goes to the file named, as JSON.

Run by tests/test_tensor_parallel.py under torchrun. Each rank holds the plain model too: that is
the single process. An error is the largest difference over the largest value.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from mamba2_train import loss
from mamba2_train.adapters import add_lora, train_in_full
from mamba2_train.audit import check_gradients
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.model import Mamba2Config, Mamba2LM
from mamba2_train.parallel import layout, tensor_parallel
from mamba2_train.parallel.layout import pieces, plain_tensors
from mamba2_train.parallel.tensor_parallel import parallelize
from mamba2_train.quantization import dequantized, is_quantized_layer, quantize

torch.set_num_threads(1)
EVERYTHING = ("in_proj", "out_proj", "embeddings", "lm_head")


def small(**fields: Any) -> Mamba2Config:
    """Eight heads, all biases, a vocabulary that no number of ranks divides."""
    shape = {"d_model": 32, "n_layers": 2, "vocab_size": 81, "d_state": 8, "headdim": 8}
    return Mamba2Config(**(shape | {"chunk_size": 8, "use_bias": True} | fields))


def drawn(config: Mamba2Config, dtype: torch.dtype = torch.float64) -> Mamba2LM:
    """No weight at its initial value: biases not zero, norms and D not one."""
    model = Mamba2LM(config).double()
    redraw(model, ("",))
    return model.to(dtype)


@torch.no_grad()
def redraw(model: nn.Module, of: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if any(part in name for part in of):
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "norm" in name or name.endswith(".D") or "magnitude" in name:
                draw = 1 + 0.3 * draw
            elif name.endswith(("A_log", "dt_bias")):
                draw = draw - 1
            elif name.endswith("bias"):
                draw = 0.3 * draw
            elif "embeddings" not in name:
                draw = draw / draw[0].numel() ** 0.5
            p.copy_(draw)


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Packed documents with padding, and labels that are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 81, (3, 21), generator=generator)
    seq_idx = torch.zeros(3, 21, dtype=torch.int32)
    seq_idx[0, 9:] = 1
    seq_idx[1, 4:] = 1
    seq_idx[1, 17:] = -1
    labels = ids.masked_fill(seq_idx < 0, -100)
    labels[2, :7] = -100
    return {"input_ids": ids, "labels": labels, "seq_idx": seq_idx}


def error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    names = (name.replace(".base_layer.", ".") for name, _ in model.named_parameters())
    values = (p.grad for p in model.parameters())
    return {name: v for name, v in zip(names, values, strict=True) if v is not None}


def compare(plain: Mamba2LM, parallel: Mamba2LM, **inputs: Any) -> dict[str, float]:
    """Loss, logits and every gradient; they are left on the models."""
    inputs = inputs or batch()
    losses = []
    for model in (plain, parallel):
        torch.manual_seed(5)
        out = model(**inputs, reduction="sum")
        out.loss.backward()
        losses.append(out.loss.detach())
    want, got = gradients(plain), dict(plain_tensors(parallel, lambda p: p.grad))
    assert want.keys() == got.keys(), want.keys() ^ got.keys()
    worst = max(want, key=lambda name: error(got[name], want[name]))
    plain.eval(), parallel.eval()
    with torch.no_grad():
        del inputs["labels"]
        logits = [model(**inputs).logits for model in (plain, parallel)]
    return {
        "loss": error(losses[1], losses[0]),
        "logits": error(logits[1], logits[0]),
        "gradients": error(got[worst], want[worst]),
        "worst": worst,  # type: ignore[dict-item]
        "n_gradients": len(want),
    }


def full(mesh: DeviceMesh, checkpointing: str = "none", **fields: Any) -> dict[str, float]:
    plain = drawn(small(**fields))
    parallel = copy.deepcopy(plain)
    parallelize(parallel, mesh)
    assert all(isinstance(p, DTensor) for p in parallel.parameters())
    parallel.set_checkpointing(checkpointing)
    return compare(plain, parallel)


def adapted(
    mesh: DeviceMesh, dropout: float = 0.0, dora: bool = False, targets: Any = EVERYTHING, **f: Any
) -> dict[str, float]:
    plain = drawn(small(**f))
    add_lora(plain, targets, r=4, alpha=8, dropout=dropout, dora=dora)
    train_in_full(plain, ("conv1d", "A_log", "norm"))
    plain.double()
    redraw(plain, ("lora_",))
    parallel = copy.deepcopy(plain)
    parallelize(parallel, mesh)
    return compare(plain.train(), parallel.train())


def quantized_model(kind: Any, config: Mamba2Config) -> Mamba2LM:
    """LoRA on 4 or 8 bits, biases as they were."""
    model = drawn(config, torch.float32)
    for name, p in list(model.named_parameters()):
        if name.endswith(("in_proj.weight", "out_proj.weight")):
            path = name.removesuffix(".weight")
            bias = model.get_submodule(path).bias
            quantize(model, name, p.detach(), kind, dtype=torch.float32)
            model.get_submodule(path).bias = bias
    add_lora(model, EVERYTHING, r=4, alpha=8)
    redraw(model, ("lora_",))
    return model


def quantized(mesh: DeviceMesh, kind: str) -> dict[str, float]:
    config = small(d_model=64, expand=4, headdim=16, n_groups=2)
    plain = quantized_model(kind, config)
    parallel = copy.deepcopy(plain)
    parallelize(parallel, mesh)
    local = [dequantized(m) for m in parallel.modules() if is_quantized_layer(m)]
    whole = [dequantized(m) for m in plain.modules() if is_quantized_layer(m)]
    rows, columns = local[0], local[1]
    d_z = config.d_inner // mesh.size()
    own = slice(mesh.get_local_rank() * d_z, (mesh.get_local_rank() + 1) * d_z)
    assert torch.equal(rows[:d_z], whole[0][own])
    assert torch.equal(columns, whole[1][:, own])
    return compare(plain, parallel)


def steps(
    mesh: DeviceMesh, lora: bool, dtype: torch.dtype = torch.float32, **fields: Any
) -> dict[str, float]:
    """Six steps of AdamW."""
    plain = drawn(small(**fields), dtype)
    if lora:
        add_lora(plain, EVERYTHING, r=4, alpha=8)
        with torch.no_grad():  # from B = 0 AdamW would divide rounding by rounding
            redraw(plain, ("lora_",))
            for name, p in plain.to(dtype).named_parameters():
                if "lora_" in name:
                    p *= 0.3
    parallel = copy.deepcopy(plain)
    parallelize(parallel, mesh)
    losses: list[list[float]] = []
    for model in (plain, parallel):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-5)
        losses.append([])
        for i in range(6):
            optimizer.zero_grad()
            of_batch = model(**batch(i)).loss
            of_batch.backward()
            optimizer.step()
            losses[-1].append(of_batch.item())
    want = {n.replace(".base_layer.", "."): p.detach() for n, p in plain.named_parameters()}
    got = dict(plain_tensors(parallel))
    assert want.keys() == got.keys()
    worst = max(want, key=lambda name: error(got[name], want[name]))
    return {
        "losses": max(abs(a - b) / a for a, b in zip(*losses, strict=True)),
        "weights": error(got[worst], want[worst]),
        "worst": worst,  # type: ignore[dict-item]
    }


def cached(mesh: DeviceMesh, **fields: Any) -> dict[str, float]:
    """The state goes on: a prompt in two parts, then token by token, then sampling."""
    plain = drawn(small(**fields))
    parallel = copy.deepcopy(plain)
    parallelize(parallel, mesh)
    ids, logits = batch()["input_ids"], []
    with torch.no_grad():
        for model in (plain, parallel):
            first = model(ids[:, :10], return_state=True)
            second = model(ids[:, 10:15], state=first.state, return_state=True)
            steps = [model.step(ids[:, t], second.state) for t in range(15, 21)]
            logits.append(torch.cat([first.logits, second.logits, torch.stack(steps, 1)], 1))
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    tokens = [generate(model, ids[:, :6], **options) for model in (plain, parallel)]  # type: ignore[arg-type]
    return {"logits": error(logits[1], logits[0]), "tokens": error(tokens[1], tokens[0])}


def from_slices(mesh: DeviceMesh, **fields: Any) -> dict[str, Any]:
    """On the meta device, and filled with what `pieces` says."""
    plain = drawn(small(**fields))
    add_lora(plain, EVERYTHING, r=4, alpha=8)
    plain.double()
    with torch.device("meta"):
        parallel = Mamba2LM(plain.config).double()
        add_lora(parallel, EVERYTHING, r=4, alpha=8)
        parallel.double()
    parallelize(parallel, mesh)
    stored = {n.replace(".base_layer.", "."): p.detach() for n, p in plain.named_parameters()}
    empty = dict(parallel.named_parameters())
    assert stored.keys() == pieces(parallel).keys()
    weights = {}
    for name, of_plain in pieces(parallel).items():
        for piece in of_plain:
            parameter: Any = empty[piece.name]
            local = stored[name][piece.start : piece.stop]
            if parameter.placements[0].is_shard():
                dim = parameter.placements[0].dim
                own = layout.share(local.shape[dim], mesh)
                local = local.narrow(dim, own.start, own.stop - own.start)
            assert local.shape == parameter.to_local().shape
            weights[piece.name] = DTensor.from_local(
                local.clone(memory_format=torch.contiguous_format),
                mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
    parallel.load_state_dict(weights, assign=True, strict=False)
    parallel.tie_weights()
    for p, q in zip(parallel.parameters(), empty.values(), strict=True):
        p.requires_grad_(q.requires_grad)
    found = compare(plain, parallel)
    check_gradients(parallel)  # its B is zero, so its A has none, which is no fault
    parallel.backbone.layers[1].mixer.out_proj.lora_B["default"].weight_tp.grad = None
    try:
        check_gradients(parallel)
    except UserError as e:
        return found | {"silent": str(e)}
    return found


def collectives(mesh: DeviceMesh, n_groups: int) -> dict[str, int]:
    """Of one more layer, full fine-tuning, forward and backward."""
    counts = []
    for n_layers in (1, 2):
        model = drawn(small(n_groups=n_groups, n_layers=n_layers, use_bias=False))
        parallelize(model, mesh)
        hidden = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
        with CommDebugMode() as forward:
            out, _ = model.backbone(None, hidden, None, None, False)
        with CommDebugMode() as backward:
            out.sum().backward()
        counts.append((forward.get_total_counts(), backward.get_total_counts()))
    one, two = counts
    return {"forward": two[0] - one[0], "backward": two[1] - one[1]}


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    messages = {}
    cases = {
        "heads": small(headdim=64, expand=2),
        "groups": small(headdim=4, expand=3, n_groups=3),
        "vocabulary": small(vocab_size=mesh.size() - 1) if mesh.size() > 2 else small(vocab_size=1),
    }
    for name, config in cases.items():
        try:
            parallelize(drawn(config), mesh)
        except UserError as e:
            messages[name] = str(e)
    model = drawn(small(d_model=64, expand=1, use_bias=False), torch.float32)
    name = "backbone.layers.0.mixer.out_proj.weight"
    quantize(model, name, model.get_parameter(name).detach(), "nf4", dtype=torch.float32)
    try:
        parallelize(model, mesh)
    except UserError as e:
        messages["blocks"] = str(e)
    return messages


def naive_columns(mesh: DeviceMesh) -> dict[str, float]:
    """Control: in_proj's rows cut where they stand, z with x and so on."""
    few, split = tensor_parallel._few, layout.local_parts

    def cut(module: nn.Module, name: str) -> list[Tensor]:
        parts = split(module, name)
        if isinstance(module, tensor_parallel.InProjection):
            parameters: Any = [
                module._parameters[f"{name}_{kind}"] for kind in ["z", "x", "B", "C", "dt"]
            ]
            rows = torch.cat([p.full_tensor() for p in parameters]).chunk(mesh.size())
            return list(rows[mesh.get_local_rank()].split([len(p) for p in parts]))
        return parts

    tensor_parallel.local_parts, tensor_parallel._few = cut, few
    try:
        return full(mesh, n_groups=8)
    finally:
        tensor_parallel.local_parts = split


def without(mesh: DeviceMesh, function: str, module: Any, **fields: Any) -> dict[str, float]:
    """Control: a collective that is left out."""
    kept = getattr(module, function)
    setattr(module, function, lambda x, mesh: x)
    try:
        return full(mesh, **fields)
    finally:
        setattr(module, function, kept)


def sharded_twice(mesh: DeviceMesh) -> dict[str, float]:
    """One step of FSDP2 over 2 x 2 ranks, different rows on each data rank."""
    from torch.distributed.fsdp import fully_shard

    errors = {}
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for kind in ("full", "LoRA", "nf4"):
        plain = drawn(small(n_groups=1))
        if kind == "LoRA":
            add_lora(plain, EVERYTHING, r=4, alpha=8)
            plain.double()
            redraw(plain, ("lora_",))
        elif kind == "nf4":
            plain = quantized_model(kind, small(d_model=64, expand=4, headdim=16))
        parallel = copy.deepcopy(plain)
        parallelize(parallel, both["tensor"])
        for layer in parallel.backbone.layers:
            fully_shard(layer, mesh=both["data"])
        fully_shard(parallel, mesh=both["data"])
        rank = both["data"].get_local_rank()
        rows = {"plain": slice(0, 2), "parallel": slice(rank, rank + 1)}
        for which, model in (("plain", plain), ("parallel", parallel)):
            optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
            inputs = {key: value[rows[which]] for key, value in batch().items()}
            out = model(**inputs, reduction="sum")
            # FSDP means over the data ranks
            (out.loss / (2 if which == "plain" else 1)).backward()
            optimizer.step()
        floating = ((n, p.detach()) for n, p in plain.named_parameters() if p.is_floating_point())
        want = {name.replace(".base_layer.", "."): p for name, p in floating}
        got = dict(plain_tensors(parallel))
        assert want.keys() == got.keys()
        worst = max(want, key=lambda name: error(got[name], want[name]))
        errors[kind] = error(got[worst], want[worst])
    return errors


def one_rank(both: DeviceMesh) -> dict[str, Any]:
    """A mesh of one rank: the same parameters, of the same shapes, as one of many."""
    plain = drawn(small(n_groups=1))
    add_lora(plain, EVERYTHING, r=4, alpha=8)
    plain.double()
    alone, many = copy.deepcopy(plain), copy.deepcopy(plain)
    parallelize(alone, both["data"])
    parallelize(many, both["tensor"])
    shapes = [{n: list(p.shape) for n, p in m.named_parameters()} for m in (alone, many)]
    unadapted = drawn(small())
    split = copy.deepcopy(unadapted)
    parallelize(split, both["data"])
    full = compare(unadapted, split)  # with torch's fused loss
    base = quantized_model("nf4", small())  # no multiple of a block
    whole = copy.deepcopy(base)
    parallelize(whole, both["data"])
    others = {"full": full["gradients"], "nf4": compare(base, whole)["gradients"]}
    return {"same": shapes[0] == shapes[1]} | others | compare(plain, alone)


def block_by_block(mesh: DeviceMesh) -> dict[str, Any]:
    """Quantized just before it is split, from the meta device."""
    config = small(d_model=64, expand=4, headdim=16, use_bias=False)
    plain = drawn(config, torch.float32)
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    parallel = drawn(config, torch.float32)
    names = {id(layer): f"backbone.layers.{i}" for i, layer in enumerate(parallel.backbone.layers)}
    for layer in parallel.backbone.layers:
        for name in ("in_proj", "out_proj"):
            getattr(layer.mixer, name).to("meta")
    seen = []

    def fill(layer: nn.Module) -> None:
        for name in ("in_proj", "out_proj"):
            weight = weights[f"{names[id(layer)]}.mixer.{name}.weight"]
            quantize(layer, f"mixer.{name}.weight", weight, "nf4", dtype=torch.float32)
            quantize(
                plain, f"{names[id(layer)]}.mixer.{name}.weight", weight, "nf4", dtype=torch.float32
            )
        seen.append(layer)

    parallelize(parallel, mesh, before_block=fill)
    return {"n_blocks": len(seen)} | compare(plain, parallel)


def compiled(mesh: DeviceMesh) -> dict[str, Any]:
    plain = drawn(small(n_groups=1, n_layers=1))
    add_lora(plain, EVERYTHING, r=4, alpha=8)
    plain.double()
    redraw(plain, ("lora_",))
    parallel = copy.deepcopy(plain)
    parallelize(parallel, mesh)
    for layer in parallel.backbone.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return compare(plain, parallel)


def largest_logits(mesh: DeviceMesh) -> dict[str, int]:
    """Entries of the largest tensor that the loss makes, of many more rows than a chunk has."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t.shape[-1:] == (own.stop - own.start,):
                    self.entries = max(self.entries, t.numel())
            return out

    model = drawn(small(vocab_size=96))
    parallelize(model, mesh)
    own = layout.share(96, mesh)
    hidden = torch.randn(2, 1500, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 96, (2, 1500))
    with Largest() as largest:
        loss.cross_entropy(hidden, model.lm_head, labels).backward()
    return {"rows": largest.entries // (own.stop - own.start), "chunk": loss.CHUNK_ROWS}


def cases(mesh: DeviceMesh) -> dict[str, Callable[[], dict[str, Any]]]:
    n, found = mesh.size(), {}  # type: ignore[var-annotated]
    for groups in (8, 2, 1):
        of = {"n_groups": groups}
        found |= {
            f"full, {groups} groups": partial(full, mesh, **of),
            f"LoRA, {groups} groups": partial(adapted, mesh, **of),
            f"DoRA, {groups} groups": partial(adapted, mesh, dora=True, **of),
            f"cached, {groups} groups": partial(cached, mesh, **of),
            f"collectives, {groups} groups": partial(collectives, mesh, groups),
        }
    found |= {
        "steps, full, 2 groups": partial(steps, mesh, False, n_groups=2),
        "steps, LoRA, 1 groups": partial(steps, mesh, True, n_groups=1),
        "steps, float64, LoRA, 2 groups": partial(steps, mesh, True, torch.float64, n_groups=2),
        "nf4": partial(quantized, mesh, "nf4"),
        "from slices": partial(from_slices, mesh, n_groups=2),
        "refusals": partial(refusals, mesh),
        "control: naive columns": partial(naive_columns, mesh),
        "control: no gradient sum of B and C": partial(
            without, mesh, "copy_to_ranks", layout, n_groups=1
        ),
        "control: no sum in the norm": partial(
            without, mesh, "sum_both_ways", tensor_parallel, n_groups=1
        ),
    }
    if n == 2:
        both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
        found |= {
            "untied": partial(full, mesh, n_groups=2, tie_embeddings=False, use_bias=False),
            "untied LoRA": partial(adapted, mesh, n_groups=2, tie_embeddings=False),
            "dropout": partial(adapted, mesh, dropout=0.3, n_groups=1),
            "dropout, DoRA": partial(adapted, mesh, dropout=0.3, dora=True, n_groups=2),
            "checkpointing selective": partial(full, mesh, "selective", n_groups=1),
            "checkpointing full": partial(full, mesh, "full", n_groups=1),
            "one rank": partial(one_rank, both),
            "fp4": partial(quantized, mesh, "fp4"),
            "int8": partial(quantized, mesh, "int8"),
            "block by block": partial(block_by_block, mesh),
            "compiled": partial(compiled, mesh),
            "largest logits": partial(largest_logits, mesh),
        }
    else:
        found |= {"FSDP2": partial(sharded_twice, mesh)}
    return found


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    only = sys.argv[2:]
    results = {}
    for name, case in cases(mesh).items():
        if not only or any(part in name for part in only):
            began = time.perf_counter()
            results[name] = case()
            if only and dist.get_rank() == 0:
                print(f"{time.perf_counter() - began:5.1f} s", name, results[name], flush=True)
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
