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
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
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
        super().__init__(theme=RichProgressBarTheme(metrics_format=".3g"), leave=False)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        shown = {"train/loss": "loss", "val/perplexity": "val ppl", "perf/tokens_per_sec": "tok/s"}
        metrics = super().get_metrics(trainer, module)
        return {label: metrics[key] for key, label in shown.items() if key in metrics}


class Throughput(Callback):
    """Real (not padding) tokens per second, step time, MFU, and peak memory, over all ranks.

    Time spent validating, sampling and saving is left out. MFU counts 2 FLOPs per multiply-add
    of the forward pass, as many again for the gradient of the activations, and as many for that
    of the weights that are trained; recomputation does not count.
    """

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model: Mamba2LM = module.model  # type: ignore[assignment]
        weights = [p for p in model.parameters() if p.dim() > 1]
        trained = sum(p.numel() for p in weights if p.requires_grad)
        share = min(1.0, trained / max(1, sum(p.numel() for p in weights if not p.requires_grad)))
        if all(p.requires_grad for p in weights):
            share = 1.0
        self.flops_per_token = flops_per_token(model.config) * (2 + share)
        products = torch.bfloat16 if trainer.precision == "bf16-mixed" else weights[0].dtype
        self.peak_flops = peak_flops(module.device, products)
        self.every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        # waits for the device where there is one: else only the launches would be timed
        tokens = int((batch["seq_idx"] >= 0).sum())
        self.seconds += time.perf_counter() - self.started
        self.tokens += tokens
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self.steps += stepped
        if not stepped or trainer.global_step % self.every:
            return
        strategy = trainer.strategy
        total = strategy.reduce(
            torch.tensor(float(self.tokens), device=module.device), reduce_op="sum"
        )
        rate = float(total) / self.seconds
        metrics = {
            "perf/tokens_per_sec": rate,
            "perf/step_seconds": self.seconds / max(1, self.steps),
            "perf/peak_mem_gib": peak_memory(module.device) / GIB,
        }
        if self.peak_flops:
            metrics["perf/mfu"] = (
                rate * self.flops_per_token / (self.peak_flops * trainer.world_size)
            )
        module.log_dict(metrics, prog_bar=True)
        self._restart()

    def _restart(self) -> None:
        self.tokens, self.seconds, self.steps = 0, 0.0, 0


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
