"""The processes of a run: which of them this is, what they agree on before they are connected, who
of them speaks when they fail, where each keeps its log, and how they part."""

import errno
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from mamba2_train.errors import UserError
from mamba2_train.redaction import RedactingFormatter

LOGS = "logs"  # folder of a run
LOCK = "run.lock"  # in a run's folder, held by the process that writes into it
PATIENCE = timedelta(minutes=30)  # with the first rank, which may be reading a large checkpoint

# to the log of this rank alone: what would be said as many times as there are ranks
log_only = logging.getLogger("mamba2_train.log_only")
log_only.propagate = False
log_only.addHandler(logging.NullHandler())
logger = logging.getLogger(__name__)
_held: list[Any] = []  # locks, open as long as the process lives


def rank() -> int:
    """Of this process, before it is connected: torchrun has said it, or Slurm, or Lightning."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def check_launcher() -> None:
    """Raise a UserError if torchrun would restart processes that cannot find one another."""
    env = os.environ
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # its store outlives them, and they would read what the dead ones have written
        raise UserError(
            f"torchrun --max-restarts={restarts} restarts nothing with the store that it shares: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or --max-restarts=0"
        )


def agreed(key: str, decide: Callable[[], str]) -> str:
    """What the first rank decides, on every rank; its UserError is raised by each.

    The processes that torchrun starts agree through a store, those that Lightning starts for ddp
    inherit it.
    """
    env = os.environ
    name = f"MAMBA2_{key.upper()}"
    if name in env:
        return env[name]
    if not _by_torchrun():
        env[name] = decide()
        return env[name]
    if env["RANK"] == "0":
        try:
            _store().set(key, "=" + decide())
        except UserError as error:  # said to each, so that none waits for the others
            _store().set(key, f"!{error}")
    answer: str = _store().get(key).decode()
    if answer[0] == "!":
        raise UserError(answer[1:])
    return answer[1:]


def job_started() -> datetime:
    """When torchrun began, which processes that it restarts have in common; otherwise now."""
    if _by_torchrun():
        try:
            # proc(5): field 22 in ticks since the boot; the second may hold spaces
            stat = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
            boot = next(x for x in Path("/proc/stat").read_text().splitlines() if "btime" in x)
            seconds = int(boot.split()[1]) + int(stat[19]) / os.sysconf("SC_CLK_TCK")
            return datetime.fromtimestamp(seconds)
        except (OSError, StopIteration):  # not Linux
            pass
    return datetime.now()


def own(run_dir: Path) -> None:
    """Let no other job write into this folder as long as this process lives, whatever ends it; of
    several ranks the first holds it.

    Raises:
        UserError: another job does.
    """
    agreed("own", lambda: _locked(run_dir))


def _locked(run_dir: Path) -> str:
    if rank() > 0:  # started by Slurm alone, where each would decide for itself
        return ""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a+")
    try:
        # POSIX's: over NFS too, and forked workers that outlive us do not keep it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            logger.warning("%s cannot be locked (%s): let no other job use it", run_dir, error)
            return ""
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{run_dir} is in use by {owner}: wait for its end, or set another run_dir"
        ) from error
    file.truncate(0)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
    file.flush()
    _held.append(file)
    return ""


class _RankLog(logging.FileHandler):
    """A log that says once that it cannot be written, and lets the run go on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            reason = sys.exc_info()[1]
            print(f"{self.baseFilename} cannot be written: {reason}", file=sys.stderr)


def open_log(run_dir: Path) -> None:
    """From now on what this rank logs and warns of goes to `logs/rank-N.log` too, and the traceback
    of its end."""
    path = run_dir / LOGS / f"rank-{rank()}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RankLog(path)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    for logger in (logging.getLogger(), log_only):
        logger.addHandler(handler)
    log_only.setLevel(logging.INFO)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    host = socket.gethostname()
    log_only.info("rank %d, process %d on %s, restart %s", rank(), os.getpid(), host, restarts)


@cache
def is_first_to_fail() -> bool:
    """Whether this process is to say why: the first that failed knows the cause, the others fail
    because of it, or in the same way."""
    if not _by_torchrun():
        return True
    try:
        return bool(_store().add("failed", 1) == 1)
    except Exception:  # the first rank, which keeps the store, is gone
        return rank() == 0


def forbid_restart() -> None:
    """The fault is one that no restart can mend: torchrun is to give up."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        os.kill(os.getppid(), signal.SIGTERM)


def part() -> None:
    """Close the connections, after success and failure alike."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@cache
def _store() -> Any:
    """torchrun's own store, or one that the first rank keeps where the process group's will be."""
    from torch.distributed import PrefixStore, TCPStore

    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        is_master=not shared and env["RANK"] == "0",
        timeout=PATIENCE,
        wait_for_workers=False,
        multi_tenant=True,  # the process group's is the same one
    )
    return PrefixStore("mamba2_train", host)
