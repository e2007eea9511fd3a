"""One token at a time from a state that is updated in place.

A step of a small model is a few hundred kernels of some microseconds each, and launching them costs
more than they do. On a GPU the step is therefore recorded once, as a CUDA graph, and replayed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba2_train.model import Mamba2LM, Mamba2State

Run = Callable[[], None]
WARM_UP = 3  # runs before the recording: kernels are compiled and libraries choose theirs


class Decoder:
    """Steps of `model` from `state`, which every call updates in place.

    Args:
        record: makes of a function without arguments, which reads and writes tensors that stay
            where they are, one that does the same work. None: `cuda_graph` on a GPU, else nothing
            is recorded.
    """

    def __init__(
        self, model: Mamba2LM, state: Mamba2State, record: Callable[[Run], Run] | None = None
    ) -> None:
        self.model, self.state = model, state
        self.prepared = model.prepare_steps()
        device = state.seq_idx.device
        if record is None and device.type == "cuda":
            record = cuda_graph
        self.replay: Run | None = None
        if record is None:
            return
        self.token = torch.zeros(len(state.seq_idx), dtype=torch.int64, device=device)
        self.logits: Any = None
        # a recording runs the step, some times, on the very tensors it will be replayed on
        before = [tensor.clone() for layer in state.layers for tensor in layer]
        self.replay = record(self._run)
        after = [tensor for layer in state.layers for tensor in layer]
        for tensor, value in zip(after, before, strict=True):
            tensor.copy_(value)

    def __call__(self, token: Tensor) -> Tensor:
        """Logits (b, vocab_size) after `token` (b,); good until the next call."""
        if self.replay is None:
            return self.model.step(token, self.state, self.prepared)
        self.token.copy_(token)
        self.replay()
        return self.logits

    def _run(self) -> None:
        logits = self.model.step(self.token, self.state, self.prepared)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)


def cuda_graph(run: Run) -> Run:
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
