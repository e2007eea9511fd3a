"""Rows from 1k to 64k tokens under long_context=exact and full checkpointing."""

import json
import subprocess
import sys
from typing import Any

SEGMENT = 2048
LENGTHS = (1024, 4096, 65_536)


def measure(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """CPU seconds and bytes above the weights of one step of the tiny shape, one thread, fp32; each
    length in a process of its own."""
    found = []
    for n in lengths:
        command = [sys.executable, "-m", "mamba2_train.benchmark_long_context", "tiny", str(n)]
        done = subprocess.run(
            [*command, "full", "segments", str(SEGMENT)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append({"tokens": n, **json.loads(done.stdout)})
    return found
