"""One side of a comparison, as its process sees it: it trains, and stops after each step.

Two lines of text hold the two sides together: `go` lets one step begin, `stop` ends the process.
Each step is answered by a line of JSON.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor


class Steps:
    """Called at the end of every step; returns when the next one may begin."""

    def __init__(self) -> None:
        # whatever the libraries print goes to the log
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.before, self.begun, self.cpu = 0, 0.0, 0.0

    def ended(self, loss: float, tokens: int, weights: Iterable[Tensor], optimizer: Any) -> None:
        """
        Args:
            loss: mean over the step's tokens.
            tokens: that were learned from, padding not counted.
        """
        seconds, cpu = time.perf_counter() - self.begun, time.process_time() - self.cpu
        if not self.begun:  # the first step, in which everything is loaded and allocated
            self.before = _resident_without(_training_state(weights, optimizer))
            _forget_peak()
        self._answer({"seconds": seconds, "cpu": cpu, "loss": loss, "tokens": tokens})
        if sys.stdin.readline() != "go\n":
            self._leave()
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def tell(self, **values: Any) -> None:
        """Before the first step."""
        self._answer(values)

    def _leave(self) -> NoReturn:
        self._answer({"peak": resident("VmHWM") - self.before})
        os._exit(0)  # neither side's last checkpoint is of interest

    def _answer(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self.answers, flush=True)


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the highest."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _training_state(weights: Iterable[Tensor], optimizer: Any) -> int:
    """Bytes of gradients and of what the optimizer remembers."""
    state = [t for of_one in optimizer.state.values() for t in of_one.values()]
    gradients = [w.grad for w in weights if w.grad is not None]
    return sum(t.nbytes for t in state + gradients if isinstance(t, Tensor))


def _resident_without(state: int) -> int:
    """Libraries and weights: what is there between two steps, less `state`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS") - state


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
