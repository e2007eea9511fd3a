"""How long a step of ours takes beside one of Lightning's bare DDP, with the same model and data.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tests/distributed/overhead.py

Both run in the same processes, some steps of the one and some of the other in turns, so that what
else the machine does falls on both; CPU time hears less of it, but not of waiting. Compute and
collectives of the model are the same, so what is left is our own: the loss of all ranks, the vote
on signals, the look for nan, the watch, the figures. Prints the medians of the first rank in ms and
their ratio.
"""

import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from mamba2_train.callbacks import Throughput
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.nonfinite import NonFinite
from mamba2_train.optim import build_optimizer
from mamba2_train.saving import Checkpoints
from mamba2_train.schema import AdamWConfig, SavingConfig, SchedulerConfig
from mamba2_train.watch import Watch

ROUNDS, STEPS, WARM = 6, 12, 2
ADAMW = AdamWConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
CONSTANT = SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0)


class Bare(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return build_optimizer(self.model, ADAMW)


class Clock(L.Callback):
    """From one batch to the next, (seconds, seconds of this process's CPU time)."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *_):
        self.starts.append((time.perf_counter(), time.process_time()))

    @property
    def steps(self):
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairs][WARM:]


class Data(L.LightningDataModule):
    position = (0, 0)

    def train_dataloader(self):
        ids = torch.randint(0, 4096, (STEPS, 4, 256), generator=torch.Generator().manual_seed(0))
        seq_idx = torch.zeros(4, 256, dtype=torch.int32)
        batches = [{"input_ids": row, "labels": row, "seq_idx": seq_idx} for row in ids]
        return torch.utils.data.DataLoader(batches, batch_size=None)


def fit(ours: bool, model: Mamba2LM, folder: Path) -> list[tuple[float, float]]:
    clock = Clock()
    callbacks: list[L.Callback] = [clock]
    module: L.LightningModule = Bare(model)
    if ours:
        saver = Checkpoints(folder / "checkpoints", SavingConfig(keep=1), 0, lambda: 0)
        nonfinite = NonFinite("stop", 1, saver, folder)
        module = Mamba2Module(model, ADAMW, CONSTANT, STEPS, nonfinite=nonfinite)
        callbacks += [Throughput(), Watch(timedelta(minutes=30), folder), nonfinite, saver]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        use_distributed_sampler=False,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=Data())
    return clock.steps


def main() -> None:
    shape = Mamba2Config(d_model=128, n_layers=8, vocab_size=4096, d_state=64, headdim=32)
    model = initialize(Mamba2LM(shape))
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ROUNDS):
            for ours in (i % 2 == 0, i % 2 == 1):
                times[ours] += fit(ours, model, Path(folder) / f"{i}-{ours}")
    if torch.distributed.get_rank() == 0:
        result = {}
        for i, clock in enumerate(("wall", "cpu")):
            bare, own = (median(step[i] for step in times[ours]) for ours in (False, True))
            result |= {f"{clock}_bare_ms": bare * 1e3, f"{clock}_ours_ms": own * 1e3}
            result[f"{clock}_ratio"] = own / bare
        json.dump({k: round(v, 4) for k, v in result.items()}, sys.stdout)
        print()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
