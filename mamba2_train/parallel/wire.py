"""What a step sends: each collective of a run that shards, with its bytes.

    over data      a block's matrices gathered for its forward and again for its backward, their
                   gradients scattered; embeddings and head once each; gradients of all that stays
                   whole reduced once in a step
    over tensor    the residual stream reduced once each way in a block, for the embeddings and for
                   each chunk of rows of the head, whose losses are reduced too; the gradients of
                   what ranks use in different ways; with a norm's group on several ranks its sums
    over context   each way in a block the states of all ranks gathered, and what the convolution
                   looks back on

A rank receives (n - 1) / n of what is gathered or scattered over n, and twice that of what is
reduced for all, by ring algorithms. Collectives of a few numbers, such as those of loss and norm,
are left out. Tests count what real processes call.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mamba2_train.loss import CHUNK_ROWS
from mamba2_train.model import Mamba2Config
from mamba2_train.parallel.shards import cut_dim
from mamba2_train.parallel.sizes import TENSOR, Sizes

FLOAT32 = 4  # bytes
Kind = Literal["gather", "scatter", "reduce"]
When = Literal["forward", "backward", "rest", "last", "end"]


class Collective(NamedTuple):
    """Of one micro-batch, or of a step.

    nbytes: of the whole that is gathered, scattered or reduced.
    when: in a block's "forward" or "backward", in the "rest" of each micro-batch; in the blocks'
        backward of the "last" micro-batch of a step alone; or at the "end" of the step.
    times: it happens there. is_stream: of the gradient of a block's input.
    """

    kind: Kind
    over: str
    nbytes: int
    when: When
    times: int = 1
    is_stream: bool = False

    def received(self, n: int) -> float:
        """Bytes that reach each of `n` ranks, every time together."""
        return self.times * self.nbytes * (n - 1) / n * (2 if self.kind == "reduce" else 1)


@dataclass(frozen=True)
class Traffic:
    """Of a run: of each block, all alike, and of what is in none."""

    block: list[Collective]
    rest: list[Collective]
    n_layers: int
    starts_frozen: bool  # nothing before the first block is trained: its input has no gradient

    def step(self, accumulate: int = 1, *, reduce_each_batch: bool = False) -> Counter[Collective]:
        """How often each is called in a step."""
        found: Counter[Collective] = Counter()
        for c in (*self.block, *self.rest):
            in_step = c.when == "end" or (c.when == "last" and not reduce_each_batch)
            n = c.times * (1 if in_step else accumulate)
            is_input = c.when == "backward" and c.is_stream and self.starts_frozen
            n *= (self.n_layers - is_input) if c in self.block else 1
            found[c._replace(times=1)] += n
        return found


def traffic(
    model: nn.Module,
    config: Mamba2Config,
    sizes: Sizes,
    *,
    products: torch.dtype | None,
    activation: torch.dtype,
    n_tokens: int,
    repeats: bool,
) -> Traffic:
    """What a run sends.

    Args:
        model: split by `parallelize` if there are tensor ranks, on any device.
        products: dtype that the blocks' matrices are gathered in, their own if None.
        activation: dtype of the blocks' outputs.
        n_tokens: of a micro-batch. repeats: the norms are computed again in the backward.
    """
    n_layers = config.n_layers
    block, rest = _over_data(model, sizes.weights, products, n_layers)
    if sizes.tensor > 1:
        outside = _base(model.lm_head).weight.dtype
        for made, found in zip(
            (block, rest),
            _over_tensor(model, config, sizes.tensor, n_tokens, activation, outside, repeats),
            strict=True,
        ):
            made += found
    embeddings = model.backbone.embeddings.parameters()  # type: ignore[union-attr]
    return Traffic(block, rest, n_layers, not any(p.requires_grad for p in embeddings))


def _over_data(
    model: nn.Module, n: int, products: torch.dtype | None, n_layers: int
) -> tuple[list[Collective], list[Collective]]:
    block: list[Collective] = []
    rest: list[Collective] = []
    if n == 1:
        return block, rest
    replicated: Counter[torch.dtype] = Counter()
    for made, parameters, narrow, layers in (
        (block, _of_first_block(model), products, n_layers),
        (rest, _in_no_block(model), None, 1),
    ):
        gathered = scattered = 0
        for p in parameters:
            shape = _on_rank(p)
            if len(shape) == 2:
                size = n * -(-shape[0] // n) * shape[1]  # rows are filled up
                gathered += size * (narrow or p.dtype).itemsize
                scattered += size * (FLOAT32 if narrow else p.dtype.itemsize) * p.requires_grad
            elif p.requires_grad:
                replicated[p.dtype] += layers * shape.numel() * p.dtype.itemsize
        if made is block:
            made.append(Collective("gather", "data", gathered, "forward"))
            made.append(Collective("gather", "data", gathered, "backward"))
        else:
            made.append(Collective("gather", "data", gathered, "rest"))
        if scattered:
            made.append(Collective("scatter", "data", scattered, "last"))
    rest += [Collective("reduce", "data", size, "end") for size in replicated.values()]
    return block, rest


def _over_tensor(
    model: nn.Module,
    config: Mamba2Config,
    n: int,
    n_tokens: int,
    activation: torch.dtype,
    outside: torch.dtype,
    repeats: bool,
) -> tuple[list[Collective], list[Collective]]:
    def reduced(nbytes: int, when: When, times: int = 1, stream: bool = False) -> Collective:
        return Collective("reduce", "tensor", nbytes, when, times, stream)

    stream = n_tokens * config.d_model
    block = [
        reduced(stream * activation.itemsize, "forward"),
        reduced(stream * outside.itemsize, "backward", stream=True),  # of what autocast narrows
    ]
    if config.n_groups % n:
        sums = n_tokens * config.n_groups * FLOAT32
        block += [reduced(sums, "forward"), reduced(sums, "backward", 2 if repeats else 1)]
    first = model.backbone.layers[0]  # type: ignore[union-attr, index]
    block += [reduced(size, "backward") for size in _partial(first)]
    rest = [reduced(stream * outside.itemsize, "rest")]
    for rows, times in ((CHUNK_ROWS, n_tokens // CHUNK_ROWS), (n_tokens % CHUNK_ROWS, 1)):
        if rows and times:
            rest += [
                reduced(rows * config.d_model * outside.itemsize, "rest", times),
                # the largest logit and two sums, again in the backward
                reduced(rows * FLOAT32, "rest", 2 * times),
                reduced(2 * rows * FLOAT32, "rest", 2 * times),
            ]
    for module in (model.backbone.embeddings, model.lm_head):  # type: ignore[union-attr]
        rest += [reduced(size, "rest") for size in _partial(module)]
    return block, rest


def over_context(
    config: Mamba2Config, n: int, *, n_sequences: int, activation: torch.dtype
) -> Iterator[Collective]:
    """Of rows cut over `n` ranks: states and their decays, and the convolution's halo, in a block.

    Args:
        config: of the heads that a rank has.
    """
    if n == 1:
        return
    c = config
    states = n_sequences * c.n_heads * c.headdim * c.d_state * FLOAT32
    decays = n_sequences * c.n_heads * FLOAT32
    halo = n_sequences * (c.d_conv - 1) * c.d_conv_channels * activation.itemsize
    directions: tuple[tuple[When, int], ...]
    directions = (("forward", states + decays), ("backward", states))
    for when, size in directions:
        yield Collective("gather", "context", n * size, when)
        yield Collective("gather", "halo", 2 * halo, when)  # as if two neighbours gathered theirs


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _of_first_block(model: nn.Module) -> list[nn.Parameter]:
    return list(model.backbone.layers[0].parameters())  # type: ignore[union-attr, index]


def _in_no_block(model: nn.Module) -> list[nn.Parameter]:
    inside = set(model.backbone.layers.parameters())  # type: ignore[union-attr]
    return [p for p in model.parameters() if p not in inside]


def _on_rank(p: torch.Tensor) -> torch.Size:
    """Shape of what the first rank of a tensor dimension has."""
    shape = list(p.shape)
    if isinstance(p, DTensor):
        for i, name in enumerate(p.device_mesh.mesh_dim_names or ()):
            if name == TENSOR and (dim := cut_dim(p.placements[i])) is not None:
                shape[dim] = -(-shape[dim] // p.device_mesh.size(i))
    return torch.Size(shape)


def _partial(module: Any) -> Iterator[int]:
    """Bytes of each gradient that is a summand on each rank."""
    for layer in module.modules():
        for name, parts in getattr(layer, "parts_of", {}).items():
            parameters = [layer._parameters[f"{name}_{part.kind}"] for part in parts]
            pairs = zip(parts, parameters, strict=True)
            partial = [p for part, p in pairs if part.is_partial and p.requires_grad]
            if partial:
                yield sum(p.numel() * p.dtype.itemsize for p in partial)
