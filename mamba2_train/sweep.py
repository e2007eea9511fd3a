"""A sweep: `mamba2-train -m KEY=A,B`, with a process and a run folder for each of its jobs.

Hydra's sweeper says which jobs there are and its launcher where each begins. What they begin is
`run_job`, which trains in a process of its own: no seed, logger or CUDA memory of one job is left
for the next, and one that fails, whichever way, takes no other with it.

    multirun/NAME/STAMP/0, 1, ...   run folders; job.json in each says what was asked of it
    multirun/NAME/STAMP/report.html the jobs side by side
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mamba2_train.comparison import compare
from mamba2_train.errors import UserError
from mamba2_train.tracking import write_json

JOB = "job.json"  # in the run folder of each
console = Console(highlight=False)


class JobFailed(Exception):
    """Of one job; the sweep goes on, and names it at its end."""


class Job(NamedTuple):
    """What became of one job."""

    number: int
    folder: Path
    overrides: list[str]
    status: str  # finished | interrupted | failed
    error: str  # of a failed one
    loss: float  # final val/loss; nan where there is none


class Sweep(Callback):
    """Hydra's callback, which learns before the first job where a sweep is kept."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Sweep.folder = Path(config.hydra.sweep.dir)


def check(arguments: list[str]) -> None:
    """Raise a UserError if this command line cannot be a sweep."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "a sweep under torchrun would be run by each of its processes: start it without, and "
            "set strategy=ddp strategy.devices=N for the jobs"
        )
    given = [argument for argument in arguments if argument.startswith("run_dir=")]
    if given:
        raise UserError(
            f"{given[0]} is one folder, and each job of a sweep has its own: set "
            "hydra.sweep.dir=FOLDER, in which they are numbered"
        )


def run_job() -> float:
    """Train as Hydra's current job asks, in a process of its own.

    Under resume=auto a job that has finished is left as it is.

    Returns:
        The final val/loss; nan of a job that failed.

    Raises:
        JobFailed: it failed, and the sweeper wants to know; what it said is on the terminal and in
            its folder's logs.
    """
    hydra = HydraConfig.get()
    folder = _folder(hydra)
    overrides = list(hydra.overrides.task)
    console.rule(f"job {hydra.job.num}  {escape(' '.join(overrides))}", align="left")
    if "resume=auto" in overrides and (folder / JOB).is_file():
        before = _read(folder)
        if before.status == "finished" and before.overrides == overrides:
            console.print(f"finished before, with val/loss {before.loss:.4f}")
            return before.loss
    write_json(folder / JOB, {"job": hydra.job.num, "overrides": overrides})
    code = _wait_for(_command(hydra, [*overrides, f"run_dir={folder}"]))
    if code:
        ended = f"exit code {code}" if code > 0 else f"stopped by {signal.Signals(-code).name}"
        return failed_job(f"{ended}{_last_line(folder / 'logs' / 'rank-0.log')}")
    return _read(folder).loss


def failed_job(error: str) -> float:
    """Note why Hydra's current job made no run. Hydra's own sweeper wants no figure and gets none;
    others learn of it by the exception.

    Raises:
        JobFailed: another sweeper than Hydra's own is at work.
    """
    hydra = HydraConfig.get()
    record = {"job": hydra.job.num, "overrides": list(hydra.overrides.task), "error": error}
    write_json(_folder(hydra) / JOB, record)
    if not hydra.sweeper._target_.endswith(".BasicSweeper"):
        raise JobFailed(error)
    return math.nan


def _folder(hydra: Any) -> Path:
    return Path(os.path.relpath(hydra.runtime.output_dir))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def _command(hydra: Any, overrides: list[str]) -> list[str]:
    """The job by itself. A launcher may have brought us to another process or machine, so Hydra
    says which configs were meant, not our own command line."""
    command = [sys.executable, "-m", "mamba2_train", "--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            command += ["--config-dir", source.path]
    searched = [o for o in hydra.overrides.hydra if o.lstrip("+~").startswith("hydra.searchpath")]
    return [*command, *searched, *overrides]


def _wait_for(command: list[str]) -> int:
    def leave(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has told it as well: it writes what was learned
        process.wait()
        raise
    except SystemExit:
        process.terminate()  # it saves, and resume=auto goes on
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def concluded() -> Iterator[None]:
    """Run what may be a sweep; at the end of one, set its jobs side by side.

    Raises:
        UserError: some of its jobs failed; it says which.
    """
    interrupted = False
    try:
        yield
    except JobFailed:  # by then the sweeper has run all that it is going to
        pass
    except KeyboardInterrupt:
        if Sweep.folder is None:
            raise
        interrupted = True
    if Sweep.folder is not None and (jobs := read_jobs(Sweep.folder)):
        conclude(Sweep.folder, jobs)
    if interrupted:
        sys.exit(128 + signal.SIGINT)


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of the sweep in `folder` that have begun, in their order."""
    jobs = [_read(path.parent) for path in folder.glob(f"*/{JOB}")]
    return sorted(jobs, key=lambda job: job.number)


def _read(folder: Path) -> Job:
    asked = json.loads((folder / JOB).read_text())
    result: dict[str, Any] = {}
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
    error = asked.get("error", "" if result else "did not end")
    return Job(
        number=asked["job"],
        folder=folder,
        overrides=asked["overrides"],
        status="failed" if error else result["status"],
        error=error,
        loss=math.nan if error else result["final"]["val/loss"],
    )


def conclude(folder: Path, jobs: list[Job]) -> None:
    """Print the jobs and the best, by held-out loss, and write `folder/report.html`.

    Raises:
        UserError: some of them failed.
    """
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    changes = {j.number: " ".join(o for o in j.overrides if o not in common) for j in jobs}
    table = Table("job", "settings", "val/loss", "perplexity", "status", box=None)
    for job in jobs:
        figures = (f"{job.loss:.4f}", f"{math.exp(job.loss):.2f}") if not job.error else ("", "")
        table.add_row(str(job.number), escape(changes[job.number]), *figures, job.status)
    console.rule("the sweep", align="left")
    console.print(table)
    trained = [job for job in jobs if not job.error]
    if trained:
        best = min(trained, key=lambda job: (math.isnan(job.loss), job.loss))
        console.print(f"{'best':10}{best.folder}  {escape(changes[best.number])}", soft_wrap=True)
        page = compare([job.folder for job in trained], folder / "report.html")
        console.print(f"{'report':10}{page}", soft_wrap=True)
    failed = [f"{job.number} ({changes[job.number]}): {job.error}" for job in jobs if job.error]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}")
