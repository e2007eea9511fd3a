"""What is written while training goes on.

The weights change with the next step, so what is to be written is copied to the host first; the
step waits for the copy and not for the disk. There is one thread: what is asked for later is
written later, and an error stops all that follows.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class Background:
    """Does things one after the other, in a thread that is waited for before the process ends."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self.waiting: list[Future[None]] = []

    def do(self, work: Callable[[], None]) -> None:
        """Do `work` after all that was asked for before, if nothing of that has failed."""
        before = self.waiting[-1] if self.waiting else None

        def unless_failed() -> None:
            if before is None or before.exception() is None:
                work()

        self.waiting.append(self.pool.submit(unless_failed))

    def check(self) -> None:
        """Raise the error of what has failed, if anything has."""
        for future in self.waiting:
            if future.done() and future.exception() is not None:
                self.wait()

    def wait(self) -> None:
        """Until all is done; raises the first error, once."""
        waiting, self.waiting = self.waiting, []
        errors = [future.exception() for future in waiting]
        for error in errors:
            if error is not None:
                raise error


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that no later step changes: dicts, lists and tuples anew, tensors on the host.

    Tensors that are one in `checkpoint` are one in the copy.
    """
    copies: dict[int, Tensor] = {}

    def on_host(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)]

    return apply_to_collection(checkpoint, torch.Tensor, on_host)
