"""Two processes that step in turn, so that what else the machine does falls on both.

Each repetition starts both sides anew and lets the other one step first. A step of one begins when
that of the other has ended.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mamba2_train.benchmarks.workloads import Workload

SIDES = ("ours", "peer")
LIMIT = 1800  # seconds of a side in one repetition


@dataclass
class Measured:
    """One side of a workload, over all repetitions."""

    seconds: list[float] = field(default_factory=list)  # of each step but the first
    cpu: list[float] = field(default_factory=list)  # of all cores
    tokens: list[int] = field(default_factory=list)  # that each step learned from
    losses: list[float] = field(default_factory=list)  # of every step, by repetition
    peaks: list[int] = field(default_factory=list)  # bytes above the weights, by repetition
    quotes: float | None = None  # loss of some documents before the first step

    @property
    def rate(self) -> float:
        """Median of tokens per second."""
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        rates = [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]
        return min(rates), max(rates)

    @property
    def cpu_per_token(self) -> float:
        return sum(self.cpu) / sum(self.tokens)

    @property
    def peak(self) -> float:
        return statistics.median(self.peaks)


@dataclass
class Result:
    workload: Workload
    ours: Measured
    peer: Measured
    failure: str | None = None  # why there is nothing to compare

    @property
    def difference(self) -> float:
        """Largest difference of the losses; nan if one is."""
        if self.ours.quotes is not None and self.peer.quotes is not None:
            return abs(self.ours.quotes - self.peer.quotes)
        pairs = zip(self.ours.losses, self.peer.losses, strict=True)
        differences = [abs(a - b) for a, b in pairs]
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def check(self) -> None:
        """A side that computes something else is not faster at the same thing."""
        if self.failure is None and not self.difference <= self.workload.tolerance:
            self.failure = (
                f"no times: the losses differ by {self.difference:.2g}, "
                f"more than {self.workload.tolerance:g}"
            )


class Failed(Exception):
    pass


class _Side:
    """A process that trains; see `side`."""

    def __init__(self, name: str, request: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        # waiting threads must not take the other side's cores
        environment = {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "3000", **os.environ}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"mamba2_train.benchmarks.{name}", json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )
        self.limit = threading.Timer(LIMIT, self.process.kill)
        self.limit.start()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            lines = self.log.read_text().strip().splitlines() or ["no word"]
            raise Failed(f"{self.name} ended: {lines[-1][:300]}")
        return json.loads(line)

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def end(self) -> None:
        self.limit.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def run(w: Workload, made: dict[str, str], folder: Path, repetitions: int) -> Result:
    """Both sides of a workload; a side that cannot do it is the result's failure."""
    result = Result(w, Measured(), Measured())
    request = {"workload": asdict(w), **made}
    try:
        for i in range(repetitions):
            order = SIDES if i % 2 == 0 else SIDES[::-1]
            _repetition(w, request, folder, order, result)
    except Failed as failure:
        result.failure = str(failure)
    result.check()
    return result


def _repetition(
    w: Workload, request: dict[str, Any], folder: Path, order: tuple[str, ...], result: Result
) -> None:
    sides = {name: _Side(name, request, folder / f"{w.name}-{name}.log") for name in order}
    found: dict[str, Measured] = {name: getattr(result, name) for name in order}
    try:
        for name in order:
            if w.rows == "quotes":
                found[name].quotes = sides[name].read()["quotes"]
            found[name].losses.append(sides[name].read()["loss"])
        for _ in range(w.steps):
            for name in order:
                sides[name].say("go")
                step = sides[name].read()
                found[name].seconds.append(step["seconds"])
                found[name].cpu.append(step["cpu"])
                found[name].tokens.append(step["tokens"])
                found[name].losses.append(step["loss"])
        for name in order:
            sides[name].say("stop")
            found[name].peaks.append(sides[name].read()["peak"])
    finally:
        for side in sides.values():
            side.end()
