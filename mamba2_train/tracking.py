"""The one folder that a run owns: its name, its metrics, and on what it was computed."""

import contextlib
import csv
import functools
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, Logger

from mamba2_train.errors import UserError
from mamba2_train.processes import agreed, job_started

CSV_FOLDER = "csv"


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


def read_points(run_dir: Path) -> list[dict[str, float]]:
    """The rows of the folder's metrics, `step` among them."""
    path = run_dir / CSV_FOLDER / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(file)]


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
    """Versions, hardware and the state of the code, for whoever must repeat the run."""
    packages = ("mamba2-train", "torch", "triton", "lightning", "transformers", "peft", "datasets")
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # Triton is Linux-only
            found[name] = version(name)
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
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
