"""What rows of many lengths take: `python -m mamba2_train.benchmark_long_context [tiny|130m]`.

Each line is a process of its own: one step (or one evaluation) after a short one, its CPU time and
its resident memory at the highest, less that before. Random weights, fp32, one thread.
"""

import ctypes
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace

import torch
from rich.table import Table

from mamba2_train.commands import console
from mamba2_train.long_context import ExactStep, evaluated
from mamba2_train.model import PRESETS, Mamba2LM, initialize

SHAPES = {
    "tiny": PRESETS["tiny"],
    # mamba2-130m but for the number of its blocks, and for its vocabulary, which no block sees
    "130m": replace(PRESETS["mamba2-130m"], n_layers=2, vocab_size=512),
}
RUNS = [  # tokens, checkpointing, what, segment_len
    (8192, "full", "one pass", 8192),
    (8192, "none", "one pass", 8192),
    (65536, "none", "segments", 8192),
    (65536, "full", "segments", 8192),
    (65536, "none", "segments", 1024),
    (262144, "none", "evaluation", 8192),
]


def work(model: Mamba2LM, tokens: int, what: str, segment_len: int) -> int:
    """Do it once; returns the bytes of the states between segments."""
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    batch = {"input_ids": ids, "labels": ids, "seq_idx": torch.zeros_like(ids).int()}
    if what == "evaluation":
        evaluated(model, batch, segment_len)
        return 0
    if what == "one pass":
        loss = model(ids, labels=ids, seq_idx=batch["seq_idx"], reduction="sum").loss
        loss.backward()
        return 0
    step = ExactStep(model, batch, segment_len)
    loss, _ = step.forward()
    states = [b.state for b in step.boundaries if b.state is not None]
    held = sum(t.nbytes for state in states for layer in state.layers for t in layer)
    del states
    step.backward(loss)
    return held


def measure(
    shape: str, tokens: int, checkpointing: str, what: str, segment_len: int
) -> dict[str, float]:
    torch.set_num_threads(1)
    # every large tensor in pages of its own, which go back when it is freed
    for mmap_or_trim_threshold in (-3, -1):
        ctypes.CDLL(None).mallopt(mmap_or_trim_threshold, 65536)
    model = initialize(Mamba2LM(SHAPES[shape]))
    model.set_checkpointing(checkpointing)
    work(model, 256, what, 128)
    model.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    states = work(model, tokens, what, segment_len)
    seconds = time.process_time() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": 1024 * (after - before), "states": states}


def main() -> None:
    if len(sys.argv) == 6:
        shape, length, checkpointing, what, segment = sys.argv[1:]
        print(json.dumps(measure(shape, int(length), checkpointing, what, int(segment))))
        return
    shape = sys.argv[1] if len(sys.argv) == 2 else "tiny"
    columns = ("tokens", "checkpointing", "in", "of", "peak MB", "states MB", "CPU ms/1k tokens")
    table = Table(*columns, box=None, title=shape, title_justify="left")
    for run in RUNS:
        command = [sys.executable, "-m", "mamba2_train.benchmark_long_context", shape]
        done = subprocess.run(
            [*command, *map(str, run)], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout)
        tokens, checkpointing, what, segment_len = run
        figures = f"{found['peak'] / 1e6:.0f}", f"{found['states'] / 1e6:.1f}"
        time_per = f"{found['seconds'] / tokens * 1e6:.0f}"
        table.add_row(f"{tokens:,}", checkpointing, what, f"{segment_len:,}", *figures, time_per)
    console.print(table)


if __name__ == "__main__":
    main()
