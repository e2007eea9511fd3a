"""Tensor parallelism: each rank computes with its heads, and with its part of the vocabulary.

    z, x, B, C, dt = in_proj(u)     rows by heads and groups; the gradient of u is summed
    conv, scan                      each rank alone
    norm                            each rank alone, or with those that share its group
    out = sum over ranks of out_proj(y), whose columns are split by heads

So a layer has one all-reduce forward and one backward, of (b, t, d_model). Fewer groups than ranks
add one each way of (b, t, n_groups) for the norm, and one for the gradient of each parameter that
ranks use in different ways: B's and C's rows, LoRA's A on in_proj and its B on out_proj.

The model's own code runs unchanged. Its modules become subclasses of themselves that read their
parameters as this rank's tensors (`layout.py`), and its mixers get this rank's shape.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mamba2_kernels import gated_scale, gated_square_sum
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, RMSNorm
from mamba2_train.parallel.collectives import copy_to_ranks, sum_both_ways, sum_over_ranks
from mamba2_train.parallel.layout import (
    COLUMNS,
    ROWS,
    SUMMED,
    WHOLE,
    Part,
    distribute,
    local_parts,
    share,
    specialize,
)
from mamba2_train.parallel.quantized import distribute_quantized
from mamba2_train.parallel.vocabulary import VocabularyEmbedding, VocabularyHead
from mamba2_train.quantization import BLOCK, is_quantized_layer


def parallelize(
    model: Mamba2LM, mesh: DeviceMesh, *, before_block: Callable[[nn.Module], None] | None = None
) -> None:
    """Split a model over the ranks of `mesh`, in place; adapters and quantized weights included.

    Every rank calls this with the same model, perhaps on the meta device, and keeps copies of its
    parts: nothing is sent. Afterwards each parameter is a DTensor, also on a mesh of one rank, so
    that checkpoints go from one number of ranks to another. The ranks of the mesh must be given
    the same batches, and the same random state where there is dropout.

    Args:
        mesh: of one dimension.
        before_block: called with each block before it is split, to read or to quantize its weights
            where no rank has room for more than one whole block.

    Raises:
        UserError: heads, groups, vocabulary or 4-bit blocks that cannot be split so.
    """
    check_divisible(model.config, mesh.size())
    for layer in model.backbone.layers:
        if before_block is not None:
            before_block(layer)
        in_4bit = any(type(module).__name__ == "Linear4bit" for module in layer.modules())
        check_divisible(model.config, mesh.size(), in_4bit=in_4bit)
        _split_mixer(layer.mixer, mesh)
    _split_vocabulary(model, mesh)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, DTensor):
                distribute(module, name, mesh, WHOLE)


def check_divisible(config: Mamba2Config, n_ranks: int, *, in_4bit: bool = False) -> None:
    """Raise a UserError that names the numbers of ranks that work, unless this one does."""
    ranks = f"{n_ranks} tensor-parallel ranks"
    sizes = [n for n in range(1, config.n_heads + 1) if _divides(config, n)]
    if n_ranks not in sizes:
        raise UserError(
            f"{ranks} cannot share {config.n_heads} heads in {config.n_groups} groups evenly; "
            f"choose a number of {', '.join(map(str, sizes))}"
        )
    if -(-config.vocab_size // n_ranks) * (n_ranks - 1) >= config.vocab_size:
        raise UserError(
            f"{ranks} cannot share {config.vocab_size} tokens, some would have none; choose fewer"
        )
    aligned = config.d_model % BLOCK == 0
    sizes = [n for n in sizes if n == 1 or (aligned and config.d_inner // n % BLOCK == 0)]
    if in_4bit and n_ranks not in sizes:
        raise UserError(
            f"in 4 bits {BLOCK} weights share a scale, and {ranks} would cut these blocks: in_proj "
            f"has {config.d_model} inputs, out_proj {config.d_inner}; choose a number of "
            f"{', '.join(map(str, sizes))}, or quantization=int8"
        )


def _divides(config: Mamba2Config, n: int) -> bool:
    groups = config.n_groups
    return config.n_heads % n == 0 and (groups % n == 0 or n % groups == 0)


@dataclass(frozen=True)
class LocalConfig(Mamba2Config):
    """What one of `n_ranks` computes of a mixer: its heads, and `n_groups` that they are in."""

    n_ranks: int = 1

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model // self.n_ranks


def _split_mixer(mixer: Any, mesh: DeviceMesh) -> None:
    config: Mamba2Config = mixer.config
    n, d_bc = mesh.size(), config.n_groups * config.d_state
    if config.n_groups % n == 0:
        bc, n_groups = ROWS, config.n_groups // n
    else:
        group = mesh.get_local_rank() * config.n_groups // n
        own = slice(group * config.d_state, (group + 1) * config.d_state)
        bc, n_groups = Part(own=own, is_partial=True), 1
        mixer.norm.group, mixer.norm.n_groups = group, config.n_groups
    z, x, dt = (
        Part(kind, size, dim=0)
        for kind, size in (("z", config.d_inner), ("x", config.d_inner), ("dt", config.n_heads))
    )
    B, C = (dataclasses.replace(bc, kind=kind, size=d_bc) for kind in "BC")

    _split_rows(mixer.in_proj, mesh, (z, x, B, C, dt))
    specialize(mixer.in_proj, SharedInput)
    for name in ("weight", "bias"):
        distribute(mixer.conv1d, name, mesh, x, B, C)
    for name in ("dt_bias", "A_log", "D"):
        distribute(mixer, name, mesh, ROWS)
    distribute(mixer.norm, "weight", mesh, ROWS)
    if bc.is_partial:
        specialize(mixer.norm, SharedGroupNorm)
    _split_columns(mixer.out_proj, mesh)
    specialize(mixer.out_proj, SummedOutput)
    shape = dataclasses.asdict(config) | {"n_groups": n_groups, "n_ranks": n}
    mixer.config = LocalConfig(**shape)


class SharedInput(nn.Module):
    """Around a layer whose rows are split: its input is whole, so its gradient is summed."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(copy_to_ranks(x, self.mesh))


class SummedOutput(nn.Module):
    """Around a layer whose columns are split, adapters included: its output is a summand."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        out = sum_over_ranks(super().forward(x), self.mesh)
        base = _base(self)
        if "bias_tp" in base._parameters:  # added once, not once on each rank
            out = out + local_parts(base, "bias")[0].to(out.dtype)
        return out


class InProjection(nn.Module):
    """A projection in parts. One joined weight would be kept for the backward, beside the parts."""

    def forward(self, x: Tensor) -> Tensor:
        weights = _few(local_parts(self, "weight"))
        has_bias = "bias_z" in self._parameters
        biases: list[Any] = _few(local_parts(self, "bias")) if has_bias else [None] * 3
        return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


class WithoutBias(nn.Module):
    """Of which `SummedOutput` takes care."""

    bias = None


class ChannelDropout(nn.Dropout):
    """Of channels that are split: each rank draws for all of them, so that they are dropped as on
    one rank, and the ranks' random states stay the same."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        n_channels = x.shape[-1] * self.mesh.size()
        kept = F.dropout(x.new_ones(*x.shape[:-1], n_channels), self.p)
        return x * kept[..., share(n_channels, self.mesh)]


class SummedWeightNorm(nn.Module):
    """DoRA's ||W + B A|| of rows whose columns are split."""

    mesh: DeviceMesh

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        norm = super().get_weight_norm(*args, **kwargs)  # type: ignore[misc]
        return sum_over_ranks(norm.detach().square(), self.mesh).sqrt()


class SharedGroupNorm(RMSNorm):
    """The gated norm where this rank has a part of one group's channels."""

    mesh: DeviceMesh
    group: int
    n_groups: int

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        assert gate is not None
        squares = gated_square_sum(x, gate)  # (b, t, 1), or (b, 1)
        # each group has a column: one all-reduce for all serves any number of ranks to a group
        columns = F.pad(squares, (self.group, self.n_groups - 1 - self.group))
        columns = sum_both_ways(columns, self.mesh)
        squares = columns[..., self.group : self.group + 1]
        return gated_scale(x, gate, squares, self.weight, eps=self.eps, count=self.group_size)


def _split_rows(layer: Any, mesh: DeviceMesh, parts: tuple[Part, ...]) -> None:
    """A linear layer, perhaps adapted, whose outputs are split: in_proj or lm_head."""
    base = _base(layer)
    if is_quantized_layer(base):
        rows = torch.cat([_rows(part, start, mesh) for part, start in _starts(parts)])
        distribute_quantized(base, mesh, rows=rows)
    else:
        distribute(base, "weight", mesh, *parts)
        if len(parts) > 1:
            specialize(base, InProjection)
    distribute(base, "bias", mesh, *parts)
    for adapter in getattr(layer, "lora_A", ()):
        distribute(layer.lora_A[adapter], "weight", mesh, SUMMED)
        distribute(layer.lora_B[adapter], "weight", mesh, *parts)
        if adapter in layer.lora_magnitude_vector:
            distribute(layer.lora_magnitude_vector[adapter], "weight", mesh, *parts)
    layer.mesh = mesh


def _split_columns(layer: Any, mesh: DeviceMesh) -> None:
    """A linear layer, perhaps adapted, whose inputs are split: out_proj."""
    base = _base(layer)
    if is_quantized_layer(base):
        distribute_quantized(base, mesh, columns=share(base.in_features, mesh))
    else:
        distribute(base, "weight", mesh, COLUMNS)
    distribute(base, "bias", mesh, WHOLE)
    specialize(base, WithoutBias)
    for adapter in getattr(layer, "lora_A", ()):
        distribute(layer.lora_A[adapter], "weight", mesh, COLUMNS)
        distribute(layer.lora_B[adapter], "weight", mesh, SUMMED)
        if adapter in layer.lora_magnitude_vector:
            _split_magnitude(layer.lora_magnitude_vector[adapter], mesh)
        if isinstance(layer.lora_dropout[adapter], nn.Dropout):
            layer.lora_dropout[adapter].mesh = mesh
            specialize(layer.lora_dropout[adapter], ChannelDropout)
    layer.mesh = mesh


def _split_vocabulary(model: Any, mesh: DeviceMesh) -> None:
    embeddings, head = model.backbone.embeddings, model.lm_head
    tied = _base(head)._parameters["weight"] is _base(embeddings)._parameters["weight"]
    distribute(_base(embeddings), "weight", mesh, ROWS)
    for adapter in getattr(embeddings, "lora_embedding_A", ()):
        distribute(embeddings.lora_embedding_A, adapter, mesh, COLUMNS)
        distribute(embeddings.lora_embedding_B, adapter, mesh, SUMMED)
        if adapter in embeddings.lora_magnitude_vector:
            _split_magnitude(embeddings.lora_magnitude_vector[adapter], mesh)
    _split_rows(head, mesh, (ROWS,))
    for layer, mixin in ((embeddings, VocabularyEmbedding), (head, VocabularyHead)):
        layer.mesh, layer.vocab_size = mesh, model.config.vocab_size
        if mesh.size() > 1:
            specialize(layer, mixin)
    specialize(model, TiedModel)
    if tied:
        model.tie_weights()


def _split_magnitude(dora: Any, mesh: DeviceMesh) -> None:
    distribute(dora, "weight", mesh, SUMMED)
    specialize(dora, SummedWeightNorm)


class TiedModel(Mamba2LM):
    def tie_weights(self) -> None:
        """As of the plain model, whose attributes are parameters."""
        if self.config.tie_embeddings:
            _base(self.lm_head).weight_tp = _base(self.backbone.embeddings).weight_tp


def _base(layer: Any) -> Any:
    """The layer itself, or the one below its adapters."""
    return getattr(layer, "base_layer", layer)


def _few(parts: list[Tensor]) -> list[Tensor]:
    """z and x as they are, the thin B, C and dt joined."""
    return [*parts[:2], torch.cat(parts[2:])]


def _starts(parts: tuple[Part, ...]) -> Any:
    start = 0
    for part in parts:
        assert part.size is not None
        yield part, start
        start += part.size


def _rows(part: Part, start: int, mesh: DeviceMesh) -> Tensor:
    """Indices of the plain weight's rows that this rank computes with."""
    assert part.size is not None
    own = share(part.size, mesh) if part.dim == 0 else part.own
    assert own is not None
    return torch.arange(start + own.start, start + own.stop)
