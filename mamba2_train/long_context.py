"""Sequences of any length in the memory of one segment.

All that a segment needs of the past is each layer's conv tail and SSM state, together S_k:

    loss_k, S_{k+1} = f(segment k, S_k)                                       k = 0 ... n - 1

"exact": forward over the segments, keeping S_k alone, then backward from the last segment, each
computed again from its S_k and handing the gradient of S_k to the segment before:

    g_k        = d loss_k / d S_k  +  (d S_{k+1} / d S_k)^T  g_{k+1}               g_n = 0
    d / d w   += d loss_k / d w    +  (d S_{k+1} / d w)^T    g_{k+1}

This is the chain rule of the whole sequence, cut at the only place where it is narrow: loss and
gradients are those of one pass over it. It costs a second forward pass of all segments but the
last, and n - 1 states.

"truncated": g_k = 0. A batch begins with the states that the batch before it left, which hold any
past but pass no gradient to it (truncated backpropagation through time, Williams & Peng 1990).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mamba2_train.loss import aligned
from mamba2_train.model import LayerState, Mamba2Config, Mamba2LM, Mamba2State
from mamba2_train.saving import rng_state, set_rng_state

Batch = dict[str, Tensor]


def cut(batch: Batch, segment_len: int) -> list[Batch]:
    """A batch (b, t) as batches of `segment_len` positions; the last may be shorter."""
    parts = {name: tensor.split(segment_len, dim=1) for name, tensor in aligned(batch).items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def continued(
    model: Mamba2LM, batch: Batch, state: Mamba2State | None
) -> tuple[Tensor, Tensor, Mamba2State]:
    """Sum of the losses and number of tokens of a batch that begins in `state`, and the state that
    it ends in, which passes no gradient on."""
    out = model(**aligned(batch), state=state, return_state=True, reduction="sum")
    return out.loss, out.n_tokens, _mapped(out.state, Tensor.detach)


@torch.no_grad()
def evaluated(model: Mamba2LM, batch: Batch, segment_len: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of tokens, in the memory of one segment."""
    segments = cut(batch, segment_len)
    losses, counts, state = [], [], None
    for k, segment in enumerate(segments, 1):
        out = model(**segment, state=state, return_state=k < len(segments), reduction="sum")
        losses.append(out.loss)
        counts.append(out.n_tokens)
        state = out.state
    return torch.stack(losses).sum(), torch.stack(counts).sum()


@dataclass
class Boundary:
    """What a segment is computed again from: the state it begins in, and the random numbers."""

    state: Mamba2State | None
    rng: dict[str, Tensor]


class ExactStep:
    """One micro-batch: `forward`, once, then `backward`, once, which adds to the gradients what one
    pass over the whole would have added.

    Args:
        batch: `input_ids`, `labels` (or `shift_labels`) and `seq_idx`, each (b, t).
        offload: keep the states at the boundaries on the host.
        context: entered around a forward pass within the backward; autocast, where there is one.
    """

    def __init__(
        self,
        model: Mamba2LM,
        batch: Batch,
        segment_len: int,
        *,
        offload: bool = False,
        context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.model, self.offload, self.context = model, offload, context
        self.segments = cut(batch, segment_len)
        self.device = batch["input_ids"].device
        self.boundaries: list[Boundary] = []

    def forward(self) -> tuple[Tensor, Tensor]:
        """Sum of the losses, for `backward` to begin with, and number of tokens."""
        losses, counts = [], []
        state: Mamba2State | None = None
        with torch.no_grad():
            for segment in self.segments[:-1]:
                held = state if state is None or not self.offload else _mapped(state, _on_host)
                self.boundaries.append(Boundary(held, rng_state(self.device)))
                out = self.model(**segment, state=state, return_state=True, reduction="sum")
                losses.append(out.loss)
                counts.append(out.n_tokens)
                state = out.state
        # the backward begins with the last, which need not be computed twice
        self.last_state = state and _mapped(state, self._leaf)
        out = self.model(**self.segments[-1], state=self.last_state, reduction="sum")
        self.last_loss = out.loss
        self.loss = torch.stack([*losses, out.loss.detach()]).sum().requires_grad_()
        return self.loss, torch.stack([*counts, out.n_tokens]).sum()

    def backward(self, loss: Tensor, sync: "GradientSync | None" = None) -> None:
        """
        Args:
            loss: what has been made of the loss of `forward`; it is differentiable.
            sync: of the ranks; withheld for all segments but the one that comes last, the first.
        """
        (scale,) = torch.autograd.grad(loss, self.loss)
        after = rng_state(self.device)
        gradients: list[Tensor | None] = []
        for k in reversed(range(len(self.segments))):
            with sync.withheld() if sync is not None and k else contextlib.nullcontext():
                if sync is not None and not k:
                    sync.release()
                gradients = self._segment_backward(k, scale, gradients)
        # the next step draws what it would have drawn
        set_rng_state(after, self.device)

    def _segment_backward(
        self, k: int, scale: Tensor, gradients: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Takes the gradients of the state that segment k ends in, returns those of the state that
        it begins in. A method, so that nothing of a segment outlives it."""
        if k == len(self.segments) - 1:
            state, loss, end = self.last_state, self.last_loss, None
            del self.last_state, self.last_loss
        else:
            boundary = self.boundaries.pop()
            state = boundary.state and _mapped(boundary.state, self._leaf)
            set_rng_state(boundary.rng, self.device)
            with self.context():
                out = self.model(
                    **self.segments[k], state=state, return_state=True, reduction="sum"
                )
            loss, end = out.loss, out.state
        # where nothing before it is trained, a first layer's state has no gradient
        handed = [
            (tensor, gradient)
            for tensor, gradient in zip(_tensors(end), gradients, strict=True)
            if tensor.requires_grad and gradient is not None
        ]
        roots, weights = zip((loss, scale), *handed, strict=True)
        torch.autograd.backward(roots, weights)
        return [tensor.grad for tensor in _tensors(state)]

    def _leaf(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True).detach().requires_grad_()


class GradientSync:
    """Lets the ranks exchange gradients once for several backward passes, with the last of them.

    To be made within `training_step`: behind it, DDP prepares to exchange in the next backward.
    """

    def __init__(self, trainer: Any) -> None:
        self.strategy = trainer.strategy
        model = self.strategy.model
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        if self.ddp is not None:
            self.due = self.ddp.require_backward_grad_sync  # not in the middle of an accumulation
            self.ddp.require_backward_grad_sync = False
        else:
            self.due = not trainer.fit_loop._should_accumulate()

    @contextlib.contextmanager
    def withheld(self) -> Iterator[None]:
        block = getattr(self.strategy, "block_backward_sync", None)
        if self.due and self.ddp is None and block is not None:
            with block():
                yield
        else:
            yield

    def release(self) -> None:
        """The next backward is the last."""
        if self.ddp is not None and self.due:
            self.ddp.require_backward_grad_sync = True
            prepare_for_backward(self.ddp, None)


def zero_state(config: Mamba2Config, rows: int, dtype: torch.dtype) -> Mamba2State:
    """The state of rows that have seen nothing, for a model whose products are in `dtype`."""
    tails = (rows, config.d_conv - 1, config.d_conv_channels)
    matrices = (rows, config.n_heads, config.headdim, config.d_state)
    wide = torch.promote_types(dtype, torch.float32)
    layers = [
        LayerState(torch.zeros(tails, dtype=dtype), torch.zeros(matrices, dtype=wide))
        for _ in range(config.n_layers)
    ]
    return Mamba2State(layers, torch.full((rows,), -1, dtype=torch.int32))


def _tensors(state: Mamba2State | None) -> list[Tensor]:
    return [] if state is None else [tensor for layer in state.layers for tensor in layer]


def _mapped(state: Mamba2State, function: Callable[[Tensor], Tensor]) -> Mamba2State:
    """`state`, its layers' tensors put through `function`."""
    layers = [LayerState(function(layer.conv), function(layer.ssm)) for layer in state.layers]
    return Mamba2State(layers, state.seq_idx)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy; from a GPU into pinned memory, while the next segment is under way."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
