"""A long run keeps its memory and its files: from the 100th step on nothing grows.

Counted in the process itself at the end of every 25 steps: resident memory, tensors that Python can
reach, open files. Validation, saving, logging, dropout and a loader worker are part of it.
"""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

PAGE = os.sysconf("SC_PAGE_SIZE")
SETTLED = 100  # steps


class Gauge(Callback):
    """Notes what the process holds; `leak` keeps a tensor and a file of each step."""

    def __init__(self, leak):
        self.seen, self.leak, self.kept = [], leak, []

    def on_train_batch_end(self, trainer, *_):
        step = trainer.global_step
        if self.leak:
            self.kept.append((torch.ones(30_000), open("/dev/null")))  # noqa: SIM115
        if step % 25:
            return
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        self.seen.append(
            {
                "step": step,
                "rss": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
                "tensors": len(tensors),
                "bytes": sum(t.nbytes for t in tensors),
                "files": len(os.listdir("/proc/self/fd")),
            }
        )
        Path("gauge.json").write_text(json.dumps(self.seen))


def soaked(folder, safe, steps, leak=False):
    def gauge():
        from mamba2_train.commands import train

        build = train.build_callbacks
        train.build_callbacks = lambda config: [*build(config), Gauge(leak)]

    arguments = [
        *(f"run_dir=soak-{steps}-{leak}", f"trainer.max_steps={steps}"),
        *("trainer.validate_every=25", "callbacks.saving.every_steps=20", "data.batch_size=1"),
        *("adapter.dropout=0.1", "data.num_workers=1", "callbacks.samples.prompts=[]"),
    ]
    code, said = safe.finish(*safe.start(folder, "train", *arguments, before=gauge), timeout=1500)
    assert code == 0, said
    return [s for s in json.loads((folder / "gauge.json").read_text()) if s["step"] >= SETTLED]


@pytest.mark.parametrize(
    "steps", [150, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1600)])]
)
def test_nothing_grows(folder, safe, steps):
    first, *later = soaked(folder, safe, steps)
    assert later[-1]["step"] == steps
    for now in later:
        assert now["rss"] <= 1.01 * first["rss"], (first, now)
        assert now["bytes"] <= 1.01 * first["bytes"], (first, now)
        assert now["tensors"] <= 1.01 * first["tensors"], (first, now)
        assert now["files"] <= first["files"], (first, now)


@pytest.mark.slow
def test_a_leak_is_seen(folder, safe):
    first, *_, last = soaked(folder, safe, 200, leak=True)
    assert last["rss"] > 1.01 * first["rss"]
    assert last["bytes"] > 1.01 * first["bytes"]
    assert last["files"] > first["files"]
