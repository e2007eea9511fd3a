"""A model spread over the ranks, of which none ever holds the whole.

    1  the base without memory: each weight is one zero, seen in the weight's shape
    2  adapters on it, whose values are drawn as for a model in one process; they are small
    3  the base goes to the meta device; all is cut (`shards.py`)
    4  every rank reads its own part of each weight of the base, and no other

So the peak of a rank is its share of the model, the adapters, and one tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mamba2_train.checkpoint import StoredWeights, kept_dtype
from mamba2_train.model import Mamba2Config, Mamba2LM, initial_weights
from mamba2_train.parallel import context_parallel
from mamba2_train.parallel.layout import plain_name
from mamba2_train.parallel.shards import boxes, local_extent, shard
from mamba2_train.parallel.sizes import DATA, TENSOR
from mamba2_train.quantization import (
    Quantization,
    is_quantized,
    is_quantized_layer,
    quantize_4bit,
    reserve_4bit,
)

Region = tuple[slice, ...]
# what gives, for each plain name, the regions that are wanted of it, in an order of its own
Source = Callable[[Mapping[str, list[Region]]], Iterator[tuple[str, list[Tensor]]]]


class Sharding(NamedTuple):
    """How to spread a model: see `shards.shard`. context: the ranks that share this one's rows."""

    mesh: DeviceMesh
    products: torch.dtype | None = None
    cpu_offload: bool = False
    context: ProcessGroup | None = None


def sharded_model(
    shape: Mamba2Config,
    source: Source,
    adapt: Callable[[Mamba2LM], PeftModel | None],
    sharding: Sharding,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> tuple[Mamba2LM, PeftModel | None]:
    """A model on the mesh, with its weights, and the adapters that `adapt` has put on it.

    Every rank must call it.

    Args:
        dtype: of the weights, but for A_log, D and dt_bias, as in `load_pretrained`.
        quantization: of in_proj and out_proj, "nf4" or "fp4".
        beside: plain weights that replace the source's, such as those an adapter has beside it.
    """
    model = weightless(shape, dtype, quantization)
    peft_model = adapt(model)
    to_meta(model)
    mesh = sharding.mesh
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if mesh[TENSOR].size() > 1:
        from mamba2_train.parallel.tensor_parallel import parallelize

        parallelize(model, mesh[TENSOR], before_block=partial(_quantize, model, source, device))
    if sharding.context is not None:
        context_parallel.parallelize(model, context_parallel.Ranks(sharding.context))
    shard(model, mesh[DATA], products=sharding.products, cpu_offload=sharding.cpu_offload)
    read_weights(model, source, beside or {}, device, sharding.cpu_offload)
    return model, peft_model


def weightless(
    shape: Mamba2Config, dtype: torch.dtype, quantization: Quantization | None = None
) -> Mamba2LM:
    """A model whose weights are all zeros and take no memory, on the CPU, where adapters will draw
    theirs."""
    with torch.device("meta"):
        model = Mamba2LM(shape)
    if quantization is not None:
        for name in [n for n, _ in model.named_parameters() if is_quantized(n)]:
            reserve_4bit(model, name, quantization, dtype)
    for _, module, key, p in _parameters(model):
        if p.is_meta:
            zero = torch.zeros((), dtype=kept_dtype(key, dtype)).expand(p.shape)
            module._parameters[key] = nn.Parameter(zero, p.requires_grad)
    model.tie_weights()
    return model


def read_weights(
    model: Mamba2LM,
    source: Source,
    beside: Mapping[str, Tensor],
    device: torch.device,
    cpu_offload: bool = False,
) -> None:
    """Give the parameters that are on the meta device their values, in place."""
    box_of = {id(p): box for _, found in boxes(model) for p, box in found}
    places: dict[int, list[tuple[Any, str]]] = {}  # of a parameter: tied ones have several
    of_plain: dict[str, list[nn.Parameter]] = {}
    regions: dict[str, list[Region]] = {}
    for path, module, key, p in _parameters(model):
        if not p.is_meta:
            if cpu_offload and isinstance(p, DTensor):  # an adapter's, cut on the device
                module._parameters[key] = _parameter(p, p.to_local().cpu())
            continue
        places.setdefault(id(p), []).append((module, key))
        if len(places[id(p)]) > 1:
            continue
        name = plain_of(path, key)
        if _is_packed(module, key):  # its blocks share a scale of their scales
            region: Region = (slice(0, module.out_features), slice(0, module.in_features))
        else:
            region = box_of[id(p)].region
        of_plain.setdefault(name, []).append(p)
        regions.setdefault(name, []).append(region)
    for name, parts in source(regions):
        for p, region, part in zip(of_plain[name], regions[name], parts, strict=True):
            target = torch.device("cpu") if cpu_offload and isinstance(p, DTensor) else device
            module, key = places[id(p)][0]
            if _is_packed(module, key):
                value = _parameter(p, _packed(module, p, part, device, target))
                value.quant_state = module.quant_state  # type: ignore[attr-defined]
            else:
                part = beside[name][region] if name in beside else part
                value = _parameter(p, part.to(target, p.dtype))
            for module, key in places[id(p)]:
                module._parameters[key] = value


def stored(weights: StoredWeights) -> Source:
    """Weights of a checkpoint."""

    def parts(regions: Mapping[str, list[Region]]) -> Iterator[tuple[str, list[Tensor]]]:
        for name, some in regions.items():
            yield name, [weights.read(name, region) for region in some]

    return parts


def drawn(shape: Mamba2Config, seed: int) -> Source:
    """Fresh weights: every rank draws all of them, one after the other, and keeps its parts."""

    def parts(regions: Mapping[str, list[Region]]) -> Iterator[tuple[str, list[Tensor]]]:
        for name, weight in initial_weights(shape, seed=seed):
            yield name, [weight[region].clone() for region in regions[name]]

    return parts


def plain_of(path: str, key: str) -> str:
    """Name of a parameter in a checkpoint."""
    return plain_name(f"{path}.{key}").replace(".base_layer.", ".")


def _quantize(model: nn.Module, source: Source, device: torch.device, block: nn.Module) -> None:
    """Give a block its quantized weights, of which tensor parallelism will keep a part."""
    for path, module in model.named_modules():
        if not is_quantized_layer(module) or all(module is not m for m in block.modules()):
            continue
        name, p = plain_of(path, "weight"), module._parameters["weight"]
        assert p is not None
        whole = (slice(0, module.out_features), slice(0, module.in_features))
        _, (weight,) = next(source({name: [whole]}))
        packed = nn.Parameter(_packed(module, p, weight, device, device), requires_grad=False)
        packed.quant_state = module.quant_state  # type: ignore[attr-defined]
        module._parameters["weight"] = packed


def _is_packed(module: nn.Module, key: str) -> bool:
    return key == "weight" and is_quantized_layer(module)


def _packed(
    module: Any, p: nn.Parameter, weight: Tensor, device: torch.device, target: torch.device
) -> Tensor:
    """This rank's rows of the packed weight, whose state goes into the module."""
    packed, module.quant_state = quantize_4bit(
        weight.float() if weight.dtype == torch.float64 else weight,
        module.weight_kind,
        dtype=module.compute_dtype,
        device=device,
    )
    offsets, sizes = local_extent(p)
    return packed[offsets[0] : offsets[0] + sizes[0]].to(target, copy=True)


def _parameter(p: nn.Parameter, value: Tensor) -> nn.Parameter:
    """`value` where `p` is, on the device of `value`."""
    if isinstance(p, DTensor) and value.device.type == p.device_mesh.device_type:
        value = DTensor.from_local(
            value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    elif isinstance(p, DTensor):
        # on the host: `DTensor.from_local` would move it to the mesh's device
        whole: Any = torch.empty_like(p, device=value.device, requires_grad=False)
        whole.to_local().copy_(value)
        value = whole
    return nn.Parameter(value, requires_grad=p.requires_grad)


def to_meta(model: nn.Module, adapters: bool = False) -> None:
    """All but the adapters' own parameters, or these too."""
    moved: dict[int, nn.Parameter] = {}
    for _, module, key, p in _parameters(model, adapters):
        if _is_packed(module, key):
            module.weight_kind = p.quant_type  # type: ignore[attr-defined]
        if id(p) not in moved:
            value = torch.empty(p.shape, dtype=p.dtype, device="meta")
            moved[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
        module._parameters[key] = moved[id(p)]


def _parameters(
    model: nn.Module, adapters: bool = True
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(path, module, name in it, parameter), tied ones once for each of their places."""
    for path, module in list(model.named_modules()):
        if not adapters and "lora_" in path:
            continue
        for key, p in list(module._parameters.items()):
            if p is not None:
                yield path, module, key, p
