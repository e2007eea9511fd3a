"""What is done with a step whose loss or gradient is no number: it is not taken.

The loss and the norm of the gradient are those of all ranks, so each comes to the same answer. To
look at it before the weights are changed, the host waits for the backward of each step: a GPU then
has nothing queued for a moment, and the weights never need to be thrown away.
"""

import logging
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mamba2_train.errors import UserError
from mamba2_train.saving import Checkpoints

logger = logging.getLogger(__name__)

FOLDER = "nonfinite"  # of a run


class NonFinite(Callback):
    """Leaves out steps that would spoil the weights, or ends the run before the first of them.

    The batches of such a step go to `nonfinite/step-N-rank-R.pt`, of the ranks whose own loss is
    not finite, or of all if only the gradient is not: a dict of `step`, `rank`, `batches` (as the
    module takes them, of each micro-batch), `losses` (their sums, float) and `rng`, the state of
    the random generators before the first. Weights and optimizer stay as they are, bit by bit; the
    schedule counts the step.

    Args:
        max_skipped: of the whole run, whatever it was resumed from.
    """

    def __init__(
        self, policy: Literal["stop", "skip"], max_skipped: int, saver: Checkpoints, run_dir: Path
    ) -> None:
        self.policy, self.max_skipped, self.saver = policy, max_skipped, saver
        self.run_dir = run_dir
        self.skipped = 0
        self.window: list[tuple[dict[str, Tensor], Tensor]] = []

    def note(self, batch: dict[str, Tensor], loss_sum: Tensor) -> None:
        """A micro-batch of the step in progress and the sum of its losses."""
        self.window.append((batch, loss_sum.detach()))

    def refuses(self, trainer: L.Trainer, loss: Tensor, norm: Tensor) -> bool:
        """Whether the step must be left out, because `loss` or `norm`, of all ranks, is not finite;
        all ranks must ask.

        Raises:
            UserError: it is the end of the run; what the last step left is on the disk.
        """
        window, self.window = self.window, []
        finite = (loss.isfinite() & norm.isfinite()).item()  # the host waits here
        if finite:
            return False
        step = trainer.global_step + 1
        losses = [float(value) for _, value in window]
        mine = all(map(math.isfinite, losses))
        everyone: list[Any] = [mine]
        if self.saver.control is not None:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine, group=self.saver.control)
        spoilt = [i for i, ok in enumerate(everyone) if not ok] or list(range(len(everyone)))
        if trainer.global_rank in spoilt:
            self._write(step, trainer.global_rank, window, losses)
        what = (
            f"in step {step} the loss is {float(loss)} and the norm of its gradient {float(norm)}"
        )
        where = f"{self.run_dir / FOLDER}/step-{step:08d}-rank-{spoilt[0]}.pt has the batch"
        if len(spoilt) < len(everyone):
            what += f", because of rank {', '.join(map(str, spoilt))}"
        if self.policy == "skip" and self.skipped < self.max_skipped:
            self.skipped += 1
            logger.warning("%s: skipped, %d of %d; %s", what, self.skipped, self.max_skipped, where)
            return True
        if self.saver.save_before_step(trainer):
            where += f", {self.saver.path(self.saver.at.step)} the weights before it"
        cure = "lower optimizer.lr or set trainer.on_nan=skip"
        if self.policy == "skip":
            what = f"{self.skipped} steps have been skipped, and {what}"
            cure = f"lower optimizer.lr, or raise trainer.max_skipped={self.max_skipped}"
        raise UserError(f"{what}; {where}: look at it, {cure}, and go on with resume=auto")

    def _write(
        self, step: int, rank: int, window: list[tuple[dict[str, Tensor], Tensor]], losses: Any
    ) -> None:
        path = self.run_dir / FOLDER / f"step-{step:08d}-rank-{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = [{name: tensor.cpu() for name, tensor in batch.items()} for batch, _ in window]
        what = {"step": step, "rank": rank, "batches": batches, "losses": losses}
        torch.save(what | {"rng": self.saver.at.rng}, path)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
