"""Where a run's figures go: CSV always, wandb as asked; and the one folder that a run owns."""

import csv
import functools
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from mamba2_train.errors import UserError
from mamba2_train.processes import agreed, job_started
from mamba2_train.schema import LoggerConfig

CSV_FOLDER = "csv"


def build_loggers(
    config: LoggerConfig, name: str, run_dir: Path, wandb_id: str | None = None
) -> list[Logger]:
    """`wandb_id`: of the wandb run to go on with; offline it becomes another part of that run,
    which `wandb sync --append` puts behind the first."""
    loggers: list[Logger] = [CSVLogger(run_dir, name=None, version=CSV_FOLDER)]
    if config.wandb is not None:
        if config.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
            raise UserError(
                "logger.wandb=online needs a key: set WANDB_API_KEY, or use logger.wandb=offline "
                "and `wandb sync` later"
            )
        # its own banner and console capture would bury the summary
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        resume: Any = {"resume": "allow"} if wandb_id and config.wandb == "online" else {}
        wandb = WandbLogger(
            name=f"{name}-{run_dir.name}",
            project=config.project,
            save_dir=run_dir,
            offline=config.wandb == "offline",
            tags=config.tags,
            id=wandb_id,
            **resume,
        )
        wandb._wandb_init.pop("anonymous", None)  # Lightning sets it, wandb 0.31 warns of it
        loggers.append(wandb)
    return loggers


def wandb_id(loggers: list[Logger]) -> str | None:
    """By which a resumed run adds to the same one."""
    return next((str(x.version) for x in loggers if isinstance(x, WandbLogger)), None)


def continue_metrics(run_dir: Path, logger: Logger, n_rows: int) -> None:
    """Let `logger` go on behind the first `n_rows` rows of the folder's metrics.

    What was logged behind the checkpoint will be logged again. Lightning removes the file that it
    finds, so it is put aside until the new one is written.
    """
    path = run_dir / CSV_FOLDER / "metrics.csv"
    aside = path.with_suffix(".before")
    if path.is_file() and not aside.is_file():
        path.rename(aside)
    if not aside.is_file():
        return
    with aside.open(newline="") as file:
        rows = [
            {key: value for key, value in row.items() if key and value}
            for _, row in zip(range(n_rows), csv.DictReader(file), strict=False)
        ]
    assert isinstance(logger, CSVLogger)
    logger.experiment.metrics.extend(rows)
    logger.save()
    aside.unlink()


def count_rows(run_dir: Path) -> int:
    """Rows of metrics that are on the disk."""
    path = run_dir / CSV_FOLDER / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


@functools.cache
def run_stamp() -> str:
    """Names the run's folder: the time the job began, the same on every rank and in whatever
    torchrun restarts; Slurm's job id there."""
    now = job_started().strftime("%Y-%m-%d_%H-%M-%S")
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return agreed("run_stamp", lambda: now if by_torchrun else os.environ.get("SLURM_JOB_ID", now))


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def check_space(run_dir: Path, needed: int) -> None:
    """Raise a UserError if the disk cannot take `needed` bytes more: before the run, not after."""
    run_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"{run_dir} has {free / 1e6:.0f} MB free and the run writes about "
            f"{needed / 1e6:.0f} MB: free some, lower callbacks.saving.keep, or set run_dir"
        )


def environment() -> dict[str, str]:
    """Versions and the state of the code, for whoever must repeat the run."""
    packages = ("mamba2-train", "torch", "lightning", "transformers", "peft", "datasets")
    found = {name: version(name) for name in packages}
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        found["git"] = commit + (" + changes" if _git("status", "--porcelain") else "")
    return found


def _git(*words: str) -> str:
    try:
        result = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
