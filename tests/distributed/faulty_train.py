"""The installed `mamba2-train`, with a fault put into it: run by tests/test_resume.py
and tests/test_faults.py.

    python faulty_train.py FAULT COMMAND ARGUMENTS...

FAULT is PLACE:N, where the process kills itself with SIGKILL when it comes to PLACE for the N-th
time, or PLACE:N:SIGNAL to be sent that signal there, or PLACE:N:HANG to stay there, or PLACE:N:FAIL
or PLACE:N:BUG to raise a UserError or a ValueError; or `none`. Of several ranks the first does so,
or the one in FAULT@RANK, or FAULT@agent gives the signal to torchrun; what torchrun has restarted
does not. `FAULT+forget_rng` and `FAULT+forget_position` break the restoring of those, `FAULT+slow`
makes a batch take 0.3 s, and `FAULT+poison` gives the last entry of the vocabulary an embedding
that is infinite, which no file may hold.

    python faulty_train.py serve

does so for each request on standard input, in a new process forked from one that has imported
everything: most of a short run is imports. A request for several ranks gets as many processes, with
the environment that torchrun gives to its own; when one fails, the others are ended.
"""

import functools
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from mamba2_train import saving
from mamba2_train.data import loaders
from mamba2_train.errors import UserError
from mamba2_train.module import Mamba2Module
from mamba2_train.parallel import checkpoint as sharded

GRACE = 10.0  # seconds for the other ranks, when one has failed
LIMIT = 140.0  # seconds for all of them


def strike_before(owner, name, countdown, strike):
    """Replace `owner.name` by one that does `strike` at its call number `countdown`."""
    original = getattr(owner, name)

    def struck(*args, **kwargs):
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            strike()
        return original(*args, **kwargs)

    setattr(owner, name, struck)


class HalfWritten:
    """A file that goes on strike in the middle of what torch writes into it."""

    def __init__(self, file, n_bytes):
        self.file, self.left = file, n_bytes

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def tear_save(n):
    """Die in the N-th save, when a part of it has been written."""
    original = torch.save

    def torn(value, file, **options):
        nonlocal n
        # torch saves tensors in this way too when ranks exchange them
        if str(getattr(file, "name", "")).endswith(saving.TEMPORARY):
            n -= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            file = HalfWritten(file, 20_000) if n == 0 else file
        original(value, file, **options)

    saving.torch.save = torn


def strike(name, who):
    """What happens, in the process that it happens in."""
    mine = os.environ.get("RANK", "0") == ("0" if who == "agent" else who)
    if not mine or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if name == "HANG":
        time.sleep(600)
    if name == "FAIL":
        raise UserError(f"a fault of rank {who}")
    if name == "BUG":
        raise ValueError(f"a bug of rank {who}")
    target = os.getppid() if who == "agent" else os.getpid()
    os.kill(target, getattr(signal, name))


def poison(module, original=Mamba2Module.on_fit_start):
    original(module)
    with torch.no_grad():
        module.model.backbone.embeddings.weight[-1] = torch.inf


def slow(module, batch, batch_idx, original=Mamba2Module.training_step):
    time.sleep(0.3)
    return original(module, batch, batch_idx)


def main():
    fault, *options = sys.argv[1].split("+")
    if "poison" in options:
        Mamba2Module.on_fit_start = poison
    if "slow" in options:
        Mamba2Module.training_step = slow
    if "forget_rng" in options:
        saving.set_rng_state = lambda *_: None
    if "forget_position" in options:
        loaders.BatchSampler.__init__.__defaults__ = ((0, 0),)
        original = loaders.BatchSampler.__init__
        loaders.BatchSampler.__init__ = lambda self, s, n, start=None: original(self, s, n)
    if fault != "none":
        fault, _, who = fault.partition("@")
        place, n, *name = fault.split(":")
        if place == "save":
            tear_save(int(n))
        else:
            owner, method = {
                "batch": (Mamba2Module, "training_step"),
                "backward": (Mamba2Module, "backward"),
                "update": (Mamba2Module, "on_before_optimizer_step"),
                "updated": (Mamba2Module, "lr_scheduler_step"),
                "validation": (Mamba2Module, "validation_step"),
                "saving": (saving.WholeOrNot, "save_checkpoint"),
                "rename": (saving.os, "fsync"),
                "prune": (saving.Path, "unlink"),
                # of a folder: this rank's file, all checksums, and before and after it is renamed
                "shard": (dcp.FileSystemWriter, "write_data"),
                "sums": (sharded, "_checksums"),
                "sync": (sharded, "_sync"),
            }[place]
            act = functools.partial(strike, name[0] if name else "SIGKILL", who or "0")
            strike_before(owner, method, int(n), act)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve():
    import mamba2_train.commands.train  # noqa: F401  what takes seconds

    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            environments = _torchruns(request.get("ranks", 1))
            children = {}
            for rank, environment in enumerate(environments):
                child = os.fork()
                if child == 0:
                    os.environ.update(environment)
                    os.chdir(request["folder"])
                    for number, name in enumerate(("out", "err"), 1):
                        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
                        os.dup2(os.open(request[name], flags), number)
                    sys.argv = [__file__, *request["arguments"]]
                    return main()
                children[child] = rank
            code = _ended(children)
            temporary = Path(request["done"] + ".tmp")
            temporary.write_text(str(code))
            temporary.rename(request["done"])
            os._exit(0)
    return None


def _torchruns(n):
    """What torchrun tells each of `n` ranks; one alone is started without it."""
    if n == 1:
        return [{}]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    everyone = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "served",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    return [everyone | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(n)]


def _ended(children):
    """The exit code of the first that failed, or 0, when all have ended."""
    code, until = 0, time.monotonic() + LIMIT
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done in children:
            del children[done]
            if status and not code:
                code, until = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE
        elif time.monotonic() > until:
            for child in children:
                os.kill(child, signal.SIGKILL)
            until = float("inf")
        else:
            time.sleep(0.02)
    return code


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else main()
