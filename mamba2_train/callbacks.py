"""What is watched during a run: speed, memory, the held-out loss."""

import math
import resource
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from torch import Tensor

from mamba2_train.health import Health
from mamba2_train.model import Mamba2LM, flops_per_token
from mamba2_train.parallel.strategy import data_ranks
from mamba2_train.schema import TrainConfig

GIB = 1024**3


def build_callbacks(config: TrainConfig) -> list[Callback]:
    callbacks: list[Callback] = [Throughput()]
    if config.callbacks.early_stopping is not None:
        patience = config.callbacks.early_stopping.patience
        # when validated: at the end of an epoch that was cut short there is no val/loss to look at
        stopping = EarlyStopping("val/loss", patience=patience, check_on_train_epoch_end=False)
        callbacks.append(stopping)
    if config.callbacks.health is not None:
        callbacks.append(Health(config.callbacks.health.every_steps))
    if config.trainer.progress_bar:
        callbacks.append(ProgressBar())
    return callbacks


def validate_every(trainer: L.Trainer, every: int | float) -> None:
    """Validate after every so many optimizer steps, or at a share of an epoch's steps.

    Lightning counts micro-batches and would validate in the middle of an accumulation: where the
    last window of an epoch is short, and wherever a share is not a multiple of the window.
    """
    loop = trainer.fit_loop.epoch_loop

    def due(fetcher: Any) -> bool:
        n_batches = loop.batch_idx + 1
        if not n_batches or loop._should_accumulate():
            return False
        if isinstance(every, int):
            return trainer.global_step % every == 0
        window = trainer.accumulate_grad_batches
        n_steps = math.ceil(trainer.num_training_batches / window)
        return math.ceil(n_batches / window) % max(1, int(n_steps * every)) == 0

    loop._should_check_val_fx = due  # type: ignore[method-assign, assignment]


class ProgressBar(RichProgressBar):
    """Lightning's bar, without the run's version and with short numbers.

    They are those of the steps that are logged. Lightning's way, `log(prog_bar=True)`, reads each
    of them from the device at every step, with a bar or without: the host would wait for the
    step's end before it prepares the next one.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self.numbers: dict[str, Any] = {}

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        if self.numbers and trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return self.numbers
        shown = {
            "train/loss": "{:.2f}",
            "val/perplexity": "ppl {:.1f}",
            "perf/tokens_per_sec": "{:,.0f} tok/s",
        }
        metrics = trainer.callback_metrics
        texts = [text.format(float(metrics[key])) for key, text in shown.items() if key in metrics]
        self.numbers = {"loss": ", ".join(texts)} if "train/loss" in metrics else {}
        return self.numbers


class Throughput(Callback):
    """Real (not padding) tokens per second and per slot, step time, the share of it spent waiting
    for the loader, MFU, and peak memory, over all ranks.

    The clock stands still from the start of a validation to the next training batch. MFU counts 2
    FLOPs per multiply-add of the forward pass, as many again for the gradient of the activations,
    and as many for that of the weights, times the share of them that is trained; and those of the
    reference of objective=dpo; recomputation does not count.
    """

    def __init__(self) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.slots, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0
        self.since: float | None = None  # None while the clock stands still
        self.waited_since = 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model: Mamba2LM = module.model  # type: ignore[assignment]
        weights = [p for p in model.parameters() if p.dim() > 1]
        trained = sum(p.numel() for p in weights if p.requires_grad)
        share = trained / sum(p.numel() for p in weights)
        passes = 2 + share + module.reference_passes  # type: ignore[operator]
        self.flops_per_token = flops_per_token(model.config) * passes
        products = torch.bfloat16 if trainer.precision == "bf16-mixed" else weights[0].dtype
        self.peak_flops = peak_flops(module.device, products)
        self.every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.since is None:
            self._start(trainer)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._pause(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        self.tokens = self.tokens + (batch["seq_idx"] >= 0).sum()  # not read: no wait in a step
        self.slots += batch["seq_idx"].numel()
        if trainer.fit_loop._should_accumulate():
            return
        self.steps += 1
        if trainer.global_step % self.every:
            return
        self._pause(trainer)
        local = [float(self.tokens), float(self.slots), self.waited]
        total = torch.tensor(local, dtype=torch.float64, device=module.device)
        ranks, group = data_ranks(trainer)
        tokens, slots, waited = trainer.strategy.reduce(total, group, reduce_op="sum").tolist()
        peak = torch.tensor(peak_memory(module.device), device=module.device)
        highest = trainer.strategy.reduce(peak, reduce_op="max")
        metrics = {
            "perf/packing_efficiency": tokens / slots,
            "perf/loader_wait": waited / (self.seconds * ranks),
            "perf/tokens_per_sec": tokens / self.seconds,
            "perf/step_seconds": self.seconds / self.steps,
            "perf/peak_mem_gib": float(highest) / GIB,
        }
        if self.peak_flops:
            reached = metrics["perf/tokens_per_sec"] * self.flops_per_token
            metrics["perf/mfu"] = reached / (self.peak_flops * trainer.world_size)
        module.log_dict(metrics)
        self.tokens = torch.zeros_like(self.tokens)
        self.slots, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self.since, self.waited_since = time.perf_counter(), _loader_waited(trainer)

    def _pause(self, trainer: L.Trainer) -> None:
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
            self.waited += _loader_waited(trainer) - self.waited_since
        self.since = None


def _loader_waited(trainer: L.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited", 0.0)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device could reach: a GPU's data sheet; a CPU's largest matrix product,
    measured, for there is no sheet that knows its clock and its cores."""
    if device.type == "cuda":
        return get_available_flops(device, dtype)
    if device.type != "cpu":
        return None
    n, best = 1024, float("inf")
    a = torch.randn(n, n, dtype=dtype)
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best
