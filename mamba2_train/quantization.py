"""in_proj and out_proj in 4 or 8 bits, frozen under adapters, through bitsandbytes.

    nf4, fp4   64 weights share a scale, and 256 scales another: 0.516 bytes a weight
               (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3)
    int8       a row shares a scale: 1 byte a weight

A product is that of an ordinary linear layer whose weight is the dequantized one, in the dtype that
the model computes in, forward and backward, in training and in generation. So there is one model,
which a merge can equal. Embeddings, head, convolution and norms are not quantized.
"""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mamba2_train.errors import UserError, nearest

Quantization = Literal["nf4", "fp4", "int8"]
KINDS: tuple[Quantization, ...] = ("nf4", "fp4", "int8")
PROJECTIONS = ("in_proj", "out_proj")
BLOCK = 64  # weights that share a scale in 4 bits
AT_ONCE = 1024 * BLOCK  # weights quantized in one go
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bitsandbytes() -> ModuleType:
    """The library.

    Raises:
        UserError: it is not installed, or has nothing for this machine.
    """
    instead = "do without: quantization=none and optimizer=adamw"
    try:
        import bitsandbytes as library
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"4 and 8 bits need bitsandbytes, which cannot be imported ({error}): pip install "
            f"'bitsandbytes>=0.50,<0.51', or {instead}"
        ) from error
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        built_for = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "this CPU"
        raise UserError(
            f"4 and 8 bits need bitsandbytes, and version {library.__version__} has no library for "
            f"{built_for}: pip install another one, or {instead}"
        )
    return library


def is_quantized(name: str) -> bool:
    """Whether this is the name of a weight that quantization is for."""
    return name.endswith(tuple(f".{projection}.weight" for projection in PROJECTIONS))


def quantize(
    model: nn.Module,
    name: str,
    weight: Tensor,
    kind: Quantization,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> None:
    """Put a quantized layer in the place of the one whose weight is called `name`.

    Args:
        weight: (d_out, d_in) on the CPU, float32, bfloat16 or float16.
        dtype: that the model computes in.
        device: where the weight is quantized, and stays; None is the CPU.
    """
    if kind not in KINDS:
        raise UserError(f"quantization={kind} is unknown.{nearest(kind, KINDS)} Known: {KINDS}")
    if dtype not in COMPUTE_DTYPES:
        raise UserError(
            f"quantization={kind} computes in float32, bfloat16 or float16, not in {dtype}; load "
            f"with one of these"
        )
    if weight.dtype not in COMPUTE_DTYPES:
        weight = weight.float()
    bitsandbytes()
    path = name.removesuffix(".weight")
    old = model.get_submodule(path)
    (d_out, d_in), bias = weight.shape, old.bias is not None
    new: Any
    if kind == "int8":
        from mamba2_train.int8 import Int8Linear  # needs bitsandbytes where it is defined

        with torch.device("meta"):
            new = Int8Linear(d_in, d_out, bias=bias, compute_dtype=dtype)
        codes, scales = quantize_int8(weight, device=device)
        new.set_weight(codes, scales)
        model.is_loaded_in_8bit = True  # type: ignore[assignment]  # what peft decides by
    else:
        packed, state = quantize_4bit(weight, kind, dtype=dtype, device=device)
        new = _linear_4bit(weight.shape, bias, kind, dtype, packed, state)
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    _replace(model, path, new)


def reserve_4bit(model: nn.Module, name: str, kind: Quantization, dtype: torch.dtype) -> None:
    """Put a layer in 4 bits in the place of the one whose weight is called `name`, the values of
    which are to come: its weight takes no memory, and its `quant_state` is None."""
    path = name.removesuffix(".weight")
    old: Any = model.get_submodule(path)
    shape = old.weight.shape
    packed = torch.zeros((), dtype=torch.uint8).expand(-(-shape.numel() // 2), 1)
    _replace(model, path, _linear_4bit(shape, old.bias is not None, kind, dtype, packed, None))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _linear_4bit(
    shape: torch.Size, bias: bool, kind: str, dtype: torch.dtype, packed: Tensor, state: Any
) -> nn.Module:
    bnb = bitsandbytes()
    d_out, d_in = shape
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(d_in, d_out, bias=bias, compute_dtype=dtype, quant_type=kind)
    new.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        compress_statistics=True,
        quant_type=kind,
        module=new,
        bnb_quantized=True,
    )
    new.quant_state = state
    # on CPUs with AVX512-BF16 generation would repack the weights and round to bf16
    new.support_avx512bf16_for_cpu = False
    return new


def quantize_4bit(
    weight: Tensor, kind: str, *, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[Tensor, Any]:
    """bitsandbytes' quantize_4bit with double quantization, bit by bit, in little memory.

    Theirs takes up to seven times the weight on a CPU, most of which malloc then keeps.

    Returns:
        packed (ceil(weight.numel() / 2), 1) uint8, and the QuantState by which it is dequantized
        to `dtype`.
    """
    functional = bitsandbytes().functional
    flat = weight.reshape(-1)
    packed = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=device)
    for begin in range(0, flat.numel(), AT_ONCE):
        part = flat[begin : begin + AT_ONCE].to(packed.device)
        codes, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type=kind)
        packed[begin // 2 :][: len(codes)] = codes
        absmax[begin // BLOCK :][: len(state.absmax)] = state.absmax
    offset = absmax.mean()
    scales, of_scales = functional.quantize_blockwise(absmax - offset, blocksize=256)
    return packed, functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        code=state.code,
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dtype,
        offset=offset,
        state2=of_scales,
    )


def quantize_int8(weight: Tensor, *, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """bitsandbytes' int8_vectorwise_quant, bit by bit, in little memory.

    Returns:
        (d_out, d_in) int8, and the largest absolute value of each row, (d_out,) float32.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=device)
    n_rows = max(1, AT_ONCE // weight.shape[1])
    for begin in range(0, len(weight), n_rows):
        rows = weight[begin : begin + n_rows].to(codes.device, torch.float16).contiguous()
        part, of_rows, _ = bitsandbytes().functional.int8_vectorwise_quant(rows)
        codes[begin : begin + n_rows], scales[begin : begin + n_rows] = part, of_rows
    return codes, scales


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Make all quantized layers ordinary ones, in place, with the weights that they multiply by.

    Adapters stay as they are, and can then be merged like those of any model.
    """
    if not is_quantized_model(model):
        return model
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import Linear4bit, Linear8bitLt

    for path, layer in list(model.named_modules()):
        if is_quantized_layer(layer):
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(dequantized(layer), requires_grad=False)
            plain.bias = layer.bias
            _replace(model, path, plain)
        elif isinstance(layer, Linear4bit | Linear8bitLt):
            # peft's classes differ in how they merge alone: all hold the same adapters
            layer.__class__ = LoraLinear
            layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(flag, None)
    return model


def dequantized(layer: nn.Module) -> Tensor:
    """(d_out, d_in): the weight that a quantized layer multiplies by."""
    bnb = bitsandbytes()
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.dequantized(layer.compute_dtype)  # type: ignore[operator]


def is_quantized_model(model: nn.Module) -> bool:
    return any(is_quantized_layer(module) for module in model.modules())


def is_quantized_layer(module: nn.Module) -> bool:
    """By name: a model that is not quantized needs no bitsandbytes."""
    return isinstance(module, nn.Linear) and type(module).__name__ in ("Linear4bit", "Int8Linear")


def count_parameters(model: nn.Module) -> int:
    """Of the model as it was before quantization."""
    return sum(map(n_elements, model.parameters()))


def n_elements(parameter: nn.Parameter) -> int:
    """Of the weight that a parameter stands for: 4 bits hold two in an element."""
    return getattr(parameter, "quant_state", parameter).shape.numel()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
