"""The LightningModule: what a step of training is.

The loss of an optimizer step is the mean over all tokens that count, whichever micro-batch and
rank holds them:

    loss = sum of token losses / number of tokens        over accumulation and ranks

A micro-batch cannot know the others' counts, so it back-propagates its *sum*, and the gradients
are divided once, by the total, before they are clipped. Averaging the means of the micro-batches
instead would weigh a token by how empty its batch is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mamba2_train.audit import check_gradients
from mamba2_train.errors import UserError
from mamba2_train.long_context import ExactStep, GradientSync, continued, evaluated
from mamba2_train.loss import aligned
from mamba2_train.model import Mamba2LM, Mamba2State
from mamba2_train.nonfinite import NonFinite
from mamba2_train.optim import build_optimizer, lr_factor
from mamba2_train.parallel.checkpoint import indexed, optimizer_names
from mamba2_train.parallel.context_parallel import awaited
from mamba2_train.parallel.shards import (
    average_replicated,
    scale_gradients,
    total_norm,
    trained_names,
)
from mamba2_train.parallel.strategy import MeshStrategy, data_ranks
from mamba2_train.schema import (
    ExactConfig,
    LongContextConfig,
    OptimizerConfig,
    SchedulerConfig,
    TruncatedConfig,
)


class TokenMean:
    """Sum of losses and number of tokens, since the last `reset`, on this rank."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.loss: Tensor | float = 0.0
        self.tokens: Tensor | int = 0

    def add(self, loss_sum: Tensor, tokens: Tensor) -> None:
        # fp64: an fp32 sum of a whole validation set loses digits
        self.loss = self.loss + loss_sum.detach().double()
        self.tokens = self.tokens + tokens

    def reduced(self, module: L.LightningModule) -> tuple[Tensor, Tensor]:
        """Mean loss and number of tokens over all ranks; every rank must call this."""
        local = torch.stack(
            [
                torch.as_tensor(v, dtype=torch.float64, device=module.device)
                for v in (self.loss, self.tokens)
            ]
        )
        _, group = data_ranks(module.trainer)  # ranks that see the same rows count them once
        total = module.trainer.strategy.reduce(local, group, reduce_op="sum")
        return total[0] / total[1].clamp(min=1), total[1]


class Mamba2Module(L.LightningModule):
    """Trains a Mamba2LM, whole or through the adapters that have been put on it.

    Batches are dicts of `input_ids`, `labels` (or, with packing=continued, `shift_labels`) (b, t)
    int64 and `seq_idx` (b, t) int32.
    """

    # a checkpoint holds what is trained; the frozen rest is where it came from
    strict_loading = False
    reference_passes = 0  # forward passes of a step beside its own

    def __init__(
        self,
        model: Mamba2LM,
        optimizer: OptimizerConfig,
        scheduler: SchedulerConfig,
        total_steps: int,
        lora_plus_ratio: float = 1.0,
        nonfinite: NonFinite | None = None,
        long_context: LongContextConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.scheduler_config = scheduler
        # Lightning's estimate would make the loader before a resumed run knows where it stands
        self.total_steps = total_steps
        self.lora_plus_ratio = lora_plus_ratio
        self.nonfinite = nonfinite  # decides about steps that would spoil the weights
        self.segments = long_context if isinstance(long_context, ExactConfig) else None
        self.truncated = isinstance(long_context, TruncatedConfig)
        # of a row in segments, between its forward and its backward
        self.exact: tuple[ExactStep, GradientSync] | None = None
        # truncated: in which states the next batch, of training and of validation, begins
        self.carried: Mamba2State | None = None
        self.carried_in_validation: Mamba2State | None = None
        # called when the gradients of a step are summed and not yet clipped
        self.on_gradients: Callable[[nn.Module], None] | None = None
        self.audited = False  # whether all that is trained has been seen to get a gradient
        self.window = TokenMean()  # the micro-batches of one optimizer step
        self.validation = TokenMean()

    def on_train_start(self) -> None:
        """The first step's learning rate: a run that goes on may have another length, and what it
        was saved with is of the old one."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, (base, factor) in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor(scheduler.last_epoch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if (c := self._cutting(batch)) is not None:
            loss_sum, n_tokens = self._begin_exact(batch, c)
        elif self.truncated:
            before = self.carried if batch_idx else None  # an epoch begins with other documents
            loss_sum, n_tokens, self.carried = continued(self.model, batch, before)
        else:
            loss_sum, n_tokens = self._losses(batch)
        self.window.add(loss_sum, n_tokens)
        if self.nonfinite is not None:
            self.nonfinite.note(batch, loss_sum)
        return loss_sum

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.exact is None:
            super().backward(loss, *args, **kwargs)
            return
        (step, sync), self.exact = self.exact, None
        step.backward(loss, sync)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        loss, tokens = self.window.reduced(self)
        self.window.reset()
        strategy = self.trainer.strategy
        if isinstance(strategy, MeshStrategy):
            average_replicated(self.parameters(), strategy.device_mesh["data"])
        # Lightning has divided by the accumulation, DDP by the ranks; a window at the end of an
        # epoch may be shorter, and is divided by the full accumulation all the same
        shares = self.trainer.accumulate_grad_batches * data_ranks(self.trainer)[0]
        scale = shares / tokens.clamp(min=1)
        gradients = _gradients(optimizer)
        scale_gradients(gradients, scale)
        self.norm = norm = total_norm(gradients)
        if self.nonfinite is not None and self.nonfinite.refuses(self.trainer, loss, norm):
            optimizer.zero_grad()  # no gradient, and no optimizer touches its weight
            self.carried = None  # what it left may be no number either
            self.log("train/skipped", float(self.nonfinite.skipped))
            return
        if not self.audited and tokens > 0:  # without a label, no gradient
            check_gradients(self.model)
            self.audited = True
        if self.on_gradients is not None:
            self.on_gradients(self.model)
        self.log_dict(
            {
                "train/loss": loss.float(),
                "train/grad_norm": norm,
                "train/lr": optimizer.param_groups[0]["lr"],
            }
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale the gradients to a norm of at most `gradient_clip_val`; their norm is known."""
        if gradient_clip_val:
            scale = (gradient_clip_val / (self.norm + 1e-6)).clamp(max=1.0)
            scale_gradients(_gradients(optimizer), scale)

    def on_validation_epoch_start(self) -> None:
        self.validation.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if (c := self._cutting(batch)) is not None:
            loss_sum, n_tokens = evaluated(self.model, batch, c.segment_len)
        elif self.truncated:
            before = self.carried_in_validation if batch_idx else None
            loss_sum, n_tokens, self.carried_in_validation = continued(self.model, batch, before)
        else:
            loss_sum, n_tokens = self._losses(batch)
        self.validation.add(loss_sum, n_tokens)

    def on_validation_epoch_end(self) -> None:
        self.carried_in_validation = None
        loss, _ = self.validation.reduced(self)
        self.log("val/loss", loss.float())
        self.log("val/perplexity", loss.exp().float())

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.optimizer_config, self.lora_plus_ratio)
        factor = lr_factor(self.scheduler_config, self.total_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights, trained = checkpoint["state_dict"], self._trained()
        checkpoint["state_dict"] = {k: v for k, v in weights.items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_trained(checkpoint["state_dict"])
        if states := checkpoint.pop("optimizers", None):  # of a folder, in one process
            optimizer = build_optimizer(self.model, self.optimizer_config, self.lora_plus_ratio)
            names = optimizer_names(self, optimizer)
            checkpoint["optimizer_states"] = [indexed(state, names) for state in states]

    def check_trained(self, names: Iterable[str]) -> None:
        """Raise a UserError if a checkpoint's weights are not those that are trained."""
        different = self._trained() ^ set(names)
        if different:
            raise UserError(
                f"the checkpoint was trained on other weights: {len(different)} differ, such as "
                f"{min(different)}; give the model and the adapter that it was made with"
            )

    def _trained(self) -> set[str]:
        return trained_names(self)

    def _cutting(self, batch: dict[str, Tensor]) -> ExactConfig | None:
        """How rows that are longer than a segment are cut."""
        c = self.segments
        return c if c is not None and batch["input_ids"].shape[1] > c.segment_len else None

    def _begin_exact(self, batch: dict[str, Tensor], c: ExactConfig) -> tuple[Tensor, Tensor]:
        context = self.trainer.precision_plugin.forward_context
        step = ExactStep(self.model, batch, c.segment_len, offload=c.offload, context=context)
        self.exact = step, GradientSync(self.trainer)
        return step.forward()

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        before = None
        if "past" in batch:  # a part of rows that are split over ranks
            before = awaited(batch["past"], self.model.config.n_layers)
        out = self.model(**aligned(batch), state=before, reduction="sum")
        return out.loss, out.n_tokens


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in parameters if p.grad is not None]
