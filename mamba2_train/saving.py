"""Checkpoints from which a run goes on to the same bits, and the signals that ask for one.

A checkpoint says what was true when its last optimizer step ended: trained weights, optimizer,
schedule, random state of every rank, position in the data. Between two steps of the optimizer none
of these but the random state and the position change, and both are noted at the end of each step;
so it may be written at any moment, also in the middle of an accumulation or of a validation, and a
run that resumes begins with the first micro-batch of the next step.
"""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from mamba2_train.background import Background, copied
from mamba2_train.model import LayerState, Mamba2State
from mamba2_train.parallel.checkpoint import META, load_whole, remove
from mamba2_train.parallel.strategy import MeshStrategy
from mamba2_train.processes import log_only
from mamba2_train.schema import SavingConfig

CHECKPOINTS = "checkpoints"  # folder of a run
RECENT = 2  # newest checkpoints kept: the disk may have spoilt one
SUFFIX, TEMPORARY = ".ckpt", ".tmp"
SAVE = 1  # a wish, below every signal that is heard
RUN = "mamba2_train"  # our key in a checkpoint: which run it belongs to
HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # Slurm sends the second if told to


class Stopped(Exception):
    """A signal ended the training; its checkpoint has been written."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Position:
    """Where a run stood when an optimizer step ended."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # micro-batches of the epoch
    total: int = 0  # micro-batches of the run
    ends_epoch: bool = False
    block: tuple[int, int] = (0, 0)  # in streamed data, of this rank
    rng: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank
    carried: Mamba2State | None = None  # of this rank's rows, where a batch goes on in the last's


class Checkpoints(Callback):
    """Writes `step-N.ckpt`, or the folder `step-N` where the model is spread over the ranks, every
    so many steps or minutes, after each validation, on a signal, and at the end.

    Kept are the newest, and the best by val/loss. SIGTERM, SIGUSR1 and Ctrl-C are heard by any
    rank, agreed upon by all when the step ends, and raised as `Stopped` once the checkpoint is on
    disk; a second Ctrl-C does not wait. Put it behind the callbacks whose state it must save.

    To agree, the ranks exchange one integer per optimizer step and per batch of a validation,
    through the CPU: a GPU is not waited for.

    Args:
        seed: of what a step draws; a run that resumes goes on where it was.
        csv_rows: tells how many rows of metrics have been written so far.
        timeout: how long a rank waits for the others.

    `run`, set later, says what a checkpoint belongs to and is kept in it: see `resume.identity`.
    """

    def __init__(
        self,
        folder: Path,
        config: SavingConfig,
        seed: int,
        csv_rows: Callable[[], int],
        timeout: timedelta | None = None,
    ) -> None:
        self.folder, self.config, self.seed, self.csv_rows = folder, config, seed, csv_rows
        self.timeout = timeout
        self.control: Any = None  # process group of all ranks, on the CPU
        self.run: dict[str, Any] = {}
        self.scores: dict[int, float] = {}  # step -> val/loss
        self.at = Position()
        self.restored: list[dict[str, Any]] | None = None  # of each rank
        self.stopped_early = False
        self.signal = self.wish = 0
        self.heard_in = 0  # the step in which the signal came
        self.handlers: dict[int, Any] = {}  # of before the training
        self.started, self.seconds_before = time.monotonic(), 0.0
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.background = Background() if config.asynchronous else None

    def path(self, step: int) -> Path | None:
        """Of the checkpoint of this step, whichever strategy has written it, if there is one."""
        return next((p for p in checkpoints_in(self.folder) if step_of(p) == step), None)

    @property
    def best_step(self) -> int | None:
        """Of the checkpoints that are there, the one with the lowest val/loss."""
        there = [step for p in checkpoints_in(self.folder) if (step := step_of(p)) in self.scores]
        return min(there, key=self._rank, default=None)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time in which no process worked on it."""
        return self.seconds_before + time.monotonic() - self.started

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if torch.distributed.is_initialized() and self.control is None:
            self.control = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        # Lightning's own handler talks to the other ranks from within, and hangs
        connector = trainer._signal_connector
        connector.register_signal_handlers = lambda: self._listen(trainer)  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.restored is not None and len(self.restored) == trainer.world_size:
            rng = self.restored[trainer.global_rank]["rng"]
            set_rng_state(rng, trainer.strategy.root_device)
            carried = self.restored[trainer.global_rank].get("carried")
            module.carried = carried and unpacked(carried, trainer.strategy.root_device)  # type: ignore[assignment]
        else:
            # each drops units of its own, but for those that compute parts of the same
            rank = (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
            torch.manual_seed(self.seed + rank + 1_000_003 * trainer.global_step)
        trainer.should_stop = self.stopped_early
        self.at = self._here(trainer)
        self.saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        ends_step = trainer.global_step > self.at.step
        if ends_step:
            self.at = self._here(trainer)
            if self.background is not None:
                self.background.check()
        if ends_step or trainer.world_size == 1:
            self.wish = self._agreed(trainer, ends_step)
        every = self.config.every_steps
        if ends_step and every and self.at.step % every == 0:
            self.wish = max(self.wish, SAVE)

    # Lightning logs a step's metrics behind the hook above, and a checkpoint comes after them: in
    # whichever of these is next
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.restored is not None:
            # the count by which metrics are logged: restarting, Lightning may be one off
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self.restored = None
        self._grant(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._grant(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.saved_step != self.at.step:  # so that a longer run can go on from its end
            self._save(trainer)
        self._settle()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        try:
            self._settle()
        except Exception as error:  # `exception` is what is to be said
            log_only.error("the checkpoint under way was not written", exc_info=error)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._grant(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":  # all ranks come here, for they have equally many batches
            wish = self._agreed(trainer, False)
            if wish > SAVE:
                self.wish = wish
                self._grant(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.scores[self.at.step] = float(trainer.callback_metrics["val/loss"])
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        mine = {
            "rng": self.at.rng,
            "block": list(self.at.block),
            "carried": self.at.carried and packed(self.at.carried),
        }
        ranks: list[Any] = [mine]
        if torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine, group=self.control)
        return {
            "ranks": ranks,
            "scores": self.scores,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "csv_rows": self.csv_rows(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state["ranks"]
        self.scores = state["scores"]
        self.stopped_early = state["stopped_early"]
        self.seconds_before = state["seconds"]
        self.started = time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RUN] = self.run
        validated = self.at.step in self.scores
        set_position(checkpoint["loops"]["fit_loop"], self.at, validated)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        ranks = checkpoint["callbacks"][self.state_key]["ranks"]
        if len(ranks) == trainer.world_size:
            block, row = ranks[trainer.global_rank]["block"]
            data.position = (block, row)
        before = checkpoint[RUN]["config"]["trainer"]["accumulate"]
        batches = data.batches_per_epoch()
        if batches is not None and checkpoint[RUN]["world"] != self.run["world"]:
            # a step takes the same rows, but in another number of micro-batches
            fit_loop = checkpoint["loops"]["fit_loop"]
            progress = fit_loop["epoch_loop.batch_progress"]
            epoch = fit_loop["epoch_progress"]["current"]["processed"]
            steps = math.ceil(progress["current"]["ready"] / before)
            ends = progress["is_last_batch"]
            batch = batches if ends else steps * trainer.accumulate_grad_batches
            at = Position(
                step=checkpoint["global_step"],
                epoch=epoch,
                batch=batch,
                total=epoch * batches + batch,
                ends_epoch=ends,
            )
            scores = checkpoint["callbacks"][self.state_key]["scores"]
            set_position(fit_loop, at, at.step in scores)

    def _here(self, trainer: L.Trainer) -> Position:
        loop = trainer.fit_loop
        return Position(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            batch=loop.batch_idx + 1,
            total=loop.total_batch_idx + 1,
            ends_epoch=loop.batch_idx + 1 == trainer.num_training_batches,
            block=trainer.datamodule.position,  # type: ignore[attr-defined]
            rng=rng_state(trainer.strategy.root_device),
            carried=trainer.lightning_module.carried,  # type: ignore[arg-type]
        )

    def _agreed(self, trainer: L.Trainer, ends_step: bool) -> int:
        """The wish of the ranks: 0, to save, or to stop on a signal, which is its number."""
        wish = self.signal
        minutes = self.config.every_minutes
        if minutes and ends_step and trainer.is_global_zero and not wish:
            wish = SAVE * (time.monotonic() - self.saved_at >= 60 * minutes)
        if self.control is None:
            return wish
        wishes = torch.tensor(wish)
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(wishes)

    def _grant(self, trainer: L.Trainer) -> None:
        wish, self.wish = self.wish, 0
        if wish:
            self._save(trainer)
        if wish > SAVE:
            self._settle()
            name = signal.Signals(wish).name
            heard = f"heard after step {self.heard_in}" if self.signal else "heard by another rank"
            log_only.info("%s, %s; saved at step %d", name, heard, self.at.step)
            raise Stopped(wish)

    def save_before_step(self, trainer: L.Trainer) -> bool:
        """Save what the last step has left, if it is not on the disk yet: for a step that must not
        be taken. All ranks must call this. Returns whether there is a checkpoint now."""
        if self.saved_step != self.at.step and self.at.step > 0:
            self._save(trainer)
        self._settle()
        return self.at.step > 0

    def _save(self, trainer: L.Trainer) -> None:
        self._settle()
        self.stopped_early = trainer.should_stop
        for metrics in trainer.loggers:
            metrics.save()  # the curves reach as far as the checkpoint does
        suffix = "" if isinstance(trainer.strategy, MeshStrategy) else SUFFIX
        trainer.save_checkpoint(self.folder / f"step-{self.at.step:08d}{suffix}")
        self.saved_at, self.saved_step = time.monotonic(), self.at.step
        if trainer.is_global_zero:
            prune = partial(self._prune, dict(self.scores))
            prune() if self.background is None else self.background.do(prune)

    def _settle(self) -> None:
        """Until the last checkpoint is on the disk."""
        if self.background is not None:
            self.background.wait()

    def _prune(self, scores: dict[int, float]) -> None:
        there = checkpoints_in(self.folder)
        best = [path for path in there if step_of(path) in scores]
        best.sort(key=lambda path: self._rank(step_of(path)))
        for path in set(there[:-RECENT]) - set(best[: self.config.keep]):
            remove(path)

    def _rank(self, step: int) -> tuple[float, int]:
        """Lower is better; the earlier of two equals; nan is the worst."""
        score = self.scores[step]
        return (score if math.isfinite(score) else math.inf, step)

    def stop_listening(self) -> None:
        """From now on a signal ends the process at once, as before the training."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _listen(self, trainer: L.Trainer) -> None:
        if trainer.state.fn == "fit":  # before and after there is nothing to save
            for number in HEARD:
                self.handlers[number] = signal.signal(
                    number, lambda number, _: self._on_signal(number, trainer)
                )

    def _on_signal(self, number: int, trainer: L.Trainer) -> None:
        # nothing but a note: the step in progress must end, and the other ranks must agree
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.heard_in = number, trainer.global_step


class WholeOrNot(TorchCheckpointIO):
    """Writes a checkpoint under another name, and renames it once it is on the disk: whatever
    kills the process, a file with a checkpoint's name is whole.

    Args:
        background: writes while training goes on.
    """

    def __init__(self, background: Background | None = None) -> None:
        self.background = background

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if self.background is None:
            self._write(checkpoint, Path(path))
        else:
            self.background.do(partial(self._write, copied(checkpoint), Path(path)))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f"*{TEMPORARY}"):
            remove(abandoned)
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception:
            temporary.unlink(missing_ok=True)  # what a full disk needs most
            raise
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Of one process, or of many, whose folder is put together."""
        if Path(path).is_dir():
            return load_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def checkpoints_in(folder: Path) -> list[Path]:
    """Files and folders, the oldest first."""
    there = [p for p in folder.glob("step-*") if p.suffix == SUFFIX or (p / META).is_file()]
    return sorted((p for p in there if p.suffix != TEMPORARY), key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def set_position(fit_loop: dict[str, Any], at: Position, validated: bool) -> None:
    """Make Lightning's progress say `at`, the end of a step, whenever it was taken.

    Lightning then goes on with the next batch, after the validation if one was due there and had
    not ended; its own records would depend on the hook in which they were taken, and restart in
    the middle of a window.
    """
    counters = ("ready", "started", "processed", "completed")
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(counters, at.batch)
    batches["total"] = dict.fromkeys(counters, at.total)
    batches["is_last_batch"] = at.ends_epoch
    for counts in fit_loop["epoch_progress"].values():
        counts |= {"ready": at.epoch + 1, "started": at.epoch + 1}
        counts |= {"processed": at.epoch, "completed": at.epoch}
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["current"] = dict.fromkeys(counters, 0)
    validation["total"] = dict.fromkeys(counters, 0)
    if not validated:  # begun and not ended, as Lightning sees it: it starts anew
        validation["total"] |= {"ready": 1, "started": 1}
    # metrics of step N are logged as N - 1, those of the validation behind it too
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = at.step - (not validated)


def packed(state: Mamba2State) -> dict[str, Any]:
    """A state as a checkpoint holds it: tensors on the host, in lists."""
    layers = [[layer.conv.cpu(), layer.ssm.cpu()] for layer in state.layers]
    return {"layers": layers, "seq_idx": state.seq_idx.cpu()}


def unpacked(state: dict[str, Any], device: torch.device) -> Mamba2State:
    layers = [LayerState(conv.to(device), ssm.to(device)) for conv, ssm in state["layers"]]
    return Mamba2State(layers, state["seq_idx"].to(device))


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of the generators that a step draws from, for dropout: of the CPU, and of a GPU in use."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
