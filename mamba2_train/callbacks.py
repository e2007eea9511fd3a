"""What is watched during a run: speed, memory, samples, checkpoints."""

import resource
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
)
from torch import Tensor

from mamba2_train.model import Mamba2LM, flops_per_token
from mamba2_train.schema import TrainConfig

GIB = 1024**3
CHECKPOINTS = "checkpoints"


def build_callbacks(config: TrainConfig) -> list[Callback]:
    """Checkpoints after each validation: the `keep` best by val/loss, the newest as `last`, and
    `interrupted` if the run is cut short."""
    folder = config.run_dir / CHECKPOINTS
    callbacks: list[Callback] = [
        Throughput(),
        ModelCheckpoint(
            folder,
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="val/loss",
            save_top_k=config.callbacks.saving.keep,
            save_last=True,
        ),
        OnExceptionCheckpoint(folder, filename="interrupted"),
    ]
    if config.callbacks.early_stopping is not None:
        patience = config.callbacks.early_stopping.patience
        callbacks.append(EarlyStopping("val/loss", patience=patience))
    if config.trainer.progress_bar:
        callbacks.append(ProgressBar())
    return callbacks


class ProgressBar(RichProgressBar):
    """Lightning's bar, without the run's version and with short numbers."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        shown = {
            "train/loss": "{:.2f}",
            "val/perplexity": "ppl {:.1f}",
            "perf/tokens_per_sec": "{:,.0f} tok/s",
        }
        metrics = super().get_metrics(trainer, module)
        texts = [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
        return {"loss": ", ".join(texts)} if "train/loss" in metrics else {}


class Throughput(Callback):
    """Real (not padding) tokens per second, step time, MFU, and peak memory, over all ranks.

    The clock stands still from the start of a validation to the next training batch. MFU counts 2
    FLOPs per multiply-add of the forward pass, as many again for the gradient of the activations,
    and as many for that of the weights, times the share of them that is trained; recomputation
    does not count.
    """

    def __init__(self) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.seconds, self.steps = 0.0, 0
        self.since: float | None = None  # None while the clock stands still

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model: Mamba2LM = module.model  # type: ignore[assignment]
        weights = [p for p in model.parameters() if p.dim() > 1]
        trained = sum(p.numel() for p in weights if p.requires_grad)
        share = trained / sum(p.numel() for p in weights)
        self.flops_per_token = flops_per_token(model.config) * (2 + share)
        products = torch.bfloat16 if trainer.precision == "bf16-mixed" else weights[0].dtype
        self.peak_flops = peak_flops(module.device, products)
        self.every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._pause()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        self.tokens = self.tokens + (batch["seq_idx"] >= 0).sum()  # not read: no wait in a step
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.steps += 1
        if trainer.global_step % self.every:
            return
        tokens = float(trainer.strategy.reduce(self.tokens.double(), reduce_op="sum"))
        self._pause()
        metrics = {
            "perf/tokens_per_sec": tokens / self.seconds,
            "perf/step_seconds": self.seconds / self.steps,
            "perf/peak_mem_gib": peak_memory(module.device) / GIB,
        }
        if self.peak_flops:
            reached = metrics["perf/tokens_per_sec"] * self.flops_per_token
            metrics["perf/mfu"] = reached / (self.peak_flops * trainer.world_size)
        module.log_dict(metrics, prog_bar=True)
        self.tokens = torch.zeros_like(self.tokens)
        self.seconds, self.steps, self.since = 0.0, 0, time.perf_counter()

    def _pause(self) -> None:
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
        self.since = None


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
