"""Start-up: `mamba2-train` on the embedded base, from the start of its process to its first step.

Then the steps that follow: none may be far slower than the others, as where kernels are compiled or
tuned while training.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

STEPS = 40


def measure() -> dict[str, Any]:
    """Seconds to the end of the first step, the median of the others and the slowest of them."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "mamba2_train.benchmarks.startup", folder],
            capture_output=True,
            text=True,
            env={"HF_HUB_OFFLINE": "1", **os.environ},
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no word"]
            return {"failure": lines[-1]}
        ends, cpu = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = [b - a for a, b in pairwise(ends)]
    return {
        "first": ends[0] - begun,
        "first_cpu": cpu,
        "median": statistics.median(seconds),
        "slowest": max(seconds),
        "steps": len(seconds),
    }


def main() -> None:
    """In the process that is measured."""
    from lightning.pytorch.callbacks import Callback

    from mamba2_train.commands import train

    ends: list[float] = []
    cpu: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.time())
            cpu.append(time.process_time())
            if len(ends) > STEPS:
                print(json.dumps([ends, cpu[0]]), flush=True)
                os._exit(0)

    build = train.build_callbacks
    train.build_callbacks = lambda config: [*build(config), Clock()]
    settings = ["logger=csv", "trainer.progress_bar=false", f"run_dir={sys.argv[1]}"]
    sys.argv[1:] = [*settings, "trainer.validate_every=1000"]
    train.main()


if __name__ == "__main__":
    main()
