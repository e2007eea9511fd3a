"""Bytes in use, counted tensor by tensor.

`LiveMemory` sees every operation and adds up the storages that are alive, each once, however many
views it has. It counts real tensors as well as those of `FakeTensorMode`, which have a shape and
no contents: there a training step of any size takes a second and no memory.

An operation defined through `torch.library.custom_op` (our scan, convolution and norms, torch's
fused cross-entropy) is one call to PyTorch, and what it allocates within is seen by nobody. So its
definition is run once for each set of shapes, on fake tensors, under a count of its own. On a
GPU, `gpu=True`, that definition is the one that launches Triton kernels; they are not launched.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mamba2_kernels.launch import dry_run

_peaks_within: dict[tuple[Any, ...], int] = {}  # of the custom ops, by what they were given


class LiveMemory(TorchDispatchMode):
    """Counts the storages made while it is entered: `live` bytes now, `peak` since `restart`."""

    def __init__(self, *, gpu: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.gpu = gpu
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> int:
        """Begin a new peak; returns the last."""
        last, self.peak = self.peak, self.live
        return last

    def add(self, *tensors: Tensor) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (name := func.name().partition(".")[0]) in OPDEFS:
            self.peak = max(self.peak, self.live + self._peak_within(name, args, kwargs))
        result = func(*args, **kwargs)
        self.add(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result

    def _peak_within(self, name: str, args: tuple[Any, ...], kwargs: Any) -> int:
        """Peak inside one call of a custom op, its results included."""

        def sketch(t: Tensor) -> Any:
            return tuple(t.shape), t.stride(), t.dtype

        leaves = tree_leaves(tree_map_only(Tensor, sketch, (args, kwargs)))
        key = (name, self.gpu, *leaves)
        if key not in _peaks_within:
            _peaks_within[key] = _peak_of(name, args, kwargs, gpu=self.gpu)
        return _peaks_within[key]


def _peak_of(name: str, args: tuple[Any, ...], kwargs: Any, *, gpu: bool) -> int:
    if gpu and name.startswith("mamba2_kernels::"):
        args = tuple("triton" if a == "torch" else a for a in args)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(dry_run())
        if not any(isinstance(leaf, torch._subclasses.FakeTensor) for leaf in tree_leaves(args)):
            fake = stack.enter_context(FakeTensorMode())
            args = tree_map_only(Tensor, fake.from_tensor, args)
        count = stack.enter_context(LiveMemory(gpu=gpu))
        count.add(*(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        before = count.live
        OPDEFS[name]._init_fn(*args, **kwargs)
        return count.peak - before


@contextlib.contextmanager
def counted(*, gpu: bool = False) -> Iterator[LiveMemory]:
    """Fake tensors inside the block, and a count of them."""
    with FakeTensorMode(), LiveMemory(gpu=gpu) as count:
        yield count
