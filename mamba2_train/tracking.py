"""Where a run's figures go: CSV always, wandb as asked; and the one folder that a run owns."""

import functools
import json
import os
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from mamba2_train.errors import UserError
from mamba2_train.schema import LoggerConfig

CSV_FOLDER = "csv"


def build_loggers(config: LoggerConfig, name: str, run_dir: Path) -> list[Logger]:
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
        wandb = WandbLogger(
            name=f"{name}-{run_dir.name}",
            project=config.project,
            save_dir=run_dir,
            offline=config.wandb == "offline",
            tags=config.tags,
        )
        wandb._wandb_init.pop("anonymous", None)  # Lightning sets it, wandb 0.31 warns of it
        loggers.append(wandb)
    return loggers


@functools.cache
def run_stamp() -> str:
    """Names the run's folder: the time it began, the same on every rank; Slurm's job id there.

    The processes that torchrun starts agree through torchrun's own store.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    env = os.environ
    if "MAMBA2_RUN_STAMP" in env:  # set below, for the processes that Lightning starts for ddp
        return env["MAMBA2_RUN_STAMP"]
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import PrefixStore, TCPStore

        host = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = PrefixStore(f"run_stamp/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", host)
        if env["RANK"] == "0":
            store.set("stamp", now)
        return store.get("stamp").decode()
    env["MAMBA2_RUN_STAMP"] = env.get("SLURM_JOB_ID", now)
    return env["MAMBA2_RUN_STAMP"]


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
