"""What the tests of safety share: commands in forked children, whose death by a signal is seen."""

import importlib
import json
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize

TRAIN = [
    "model.source=base",
    "data=local",
    "data.source=rows.jsonl",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.validation_fraction=0.23",
    "adapter.r=4",
    "trainer.max_epochs=null",
    "trainer.max_steps=4",
    "trainer.validate_every=2",
    "trainer.log_every=1",
    "trainer.progress_bar=false",
    "callbacks.samples.prompts=[Love]",
    "callbacks.samples.max_new_tokens=2",
    "logger=csv",
]


class Died(Exception):
    """The child was ended by a signal, or did not end in time."""


def forked(work: Callable[[], Any], timeout: float = 120) -> Any:
    """What `work` returns in a forked child; a crash of its interpreter is a `Died` here."""
    with tempfile.NamedTemporaryFile() as answer:
        pid = os.fork()
        if pid == 0:
            try:
                result = (True, work())
            except BaseException:
                result = (False, traceback.format_exc())
            with open(answer.name, "wb") as file:
                pickle.dump(result, file)
            os._exit(0)
        until = time.monotonic() + timeout
        while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Died(f"no end after {timeout} s")
            time.sleep(0.005)
        if os.WIFSIGNALED(found[1]):
            raise Died(f"ended by {signal.Signals(os.WTERMSIG(found[1])).name}")
        with open(answer.name, "rb") as file:
            good, value = pickle.load(file)
    assert good, value
    return value


def start(folder: Path, command: str, *arguments: str, before: Callable[[], Any] | None = None):
    """Begin a command of ours in a forked child; returns its process id and what it says, a file.

    Args:
        before: done in the child first, as a fault to put into it.
    """
    said = Path(tempfile.mkstemp(suffix=".said")[1])
    importlib.import_module(f"mamba2_train.commands.{command}")  # once, in the parent
    pid = os.fork()
    if pid:
        return pid, said
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if before is not None:
            before()
        sys.argv = [f"mamba2-{command}", *(TRAIN if command == "train" else []), *arguments]
        try:
            sys.modules[f"mamba2_train.commands.{command}"].main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def finish(pid: int, said: Path, timeout: float = 120) -> tuple[int, str]:
    """Exit code, negative of a signal, and all that was said."""
    until = time.monotonic() + timeout
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Died(f"no end after {timeout} s: {said.read_text()}")
        time.sleep(0.01)
    text = said.read_text(errors="replace")
    said.unlink()
    return os.waitstatus_to_exitcode(found[1]), text


def run(folder: Path, command: str, *arguments: str, **how: Any) -> tuple[int, str]:
    return finish(*start(folder, command, *arguments, **how))


def one_line(said: str) -> str:
    """The error that a command ended with, which is one line and no traceback."""
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    return errors[0]


@pytest.fixture(scope="session")
def safe() -> Any:
    """This module: the tests import nothing from one another."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, `base`, and some rows of unequal length, `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("safety")
    shape = Mamba2Config(d_model=16, n_layers=2, vocab_size=4096, d_state=8, headdim=8)
    save_pretrained(initialize(Mamba2LM(shape), seed=1), folder / "base")
    save_tokenizer(load_tokenizer(FOLDER / "tiny_base"), folder / "base")
    rows = [{"text": " ".join(str(i * j) for j in range(3 + i % 5))} for i in range(54)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def finished(folder: Path) -> Path:
    """The folder of a run that came to its end."""
    base = f"model.source={folder / 'base'}"
    code, said = run(folder, "train", "run_dir=finished", "adapter.train=[D,norm]", base)
    assert code == 0, said
    return folder / "finished"


@pytest.fixture(scope="session")
def sharded(folder: Path) -> Path:
    """The folder of a run whose checkpoints are folders."""
    base = f"model.source={folder / 'base'}"
    where = ("run_dir=sharded", "strategy=fsdp", "strategy.devices=1")
    code, said = run(folder, "train", *where, base)
    assert code == 0, said
    return folder / "sharded"
