"""Disks that are full or read-only, clocks that jump, and two jobs in one folder.

A disk is full for every file that is opened below the run's folder once so many bytes have been
written; the kernel's own limit on the size of a file refuses the writes of libraries too. Truth is
the same run on a disk with room.
"""

import builtins
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from mamba2_train import callbacks, processes, resume
from mamba2_train.errors import UserError
from mamba2_train.processes import LOCK
from mamba2_train.resume import is_whole

RESTART = ("resume=auto",)


class Full:
    """A file on a disk with `room[0]` bytes left."""

    def __init__(self, file, room, number, name):
        self._file, self._room, self._number, self._name = file, room, number, name

    def write(self, data):
        self._room[0] -= len(data)
        if self._room[0] < 0:
            raise OSError(self._number, os.strerror(self._number), self._name)
        return self._file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


def small_disk(run_dir, n_bytes, number=errno.ENOSPC):
    """Makes, in a child, the disk below `run_dir` so small; returns what does."""

    def put():
        room, real = [n_bytes], io.open

        def opened(file, mode="r", *args, **kwargs):
            stream = real(file, mode, *args, **kwargs)
            inside = isinstance(file, str | Path) and str(run_dir) in str(Path(file).absolute())
            return (
                Full(stream, room, number, str(file))
                if inside and set(mode) & set("wax+")
                else stream
            )

        builtins.open = io.open = opened

    return put


def last(run):
    return torch.load(sorted((run / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def written(run):
    """Bytes of the two checkpoints that a run writes, beside all else."""
    return 2 * max(f.stat().st_size for f in run.rglob("*.ckpt"))


@pytest.fixture
def truth(folder, finished):
    return finished


def start_again(folder, safe, truth, name):
    """The run goes on from what is whole, to the same bits."""
    run = folder / name
    for file in (run / "checkpoints").glob("step-*.ckpt"):
        assert is_whole(file), file
    base = f"model.source={folder / 'base'}"
    code, said = safe.run(
        folder, "train", f"run_dir={name}", base, "adapter.train=[D,norm]", *RESTART
    )
    assert code == 0, said
    ours, theirs = last(run), last(truth)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(ours[key], theirs[key]), key
    assert (
        json.loads((run / "result.json").read_text())["final"]
        == (json.loads((truth / "result.json").read_text())["final"])
    )
    shutil.rmtree(run)


@pytest.mark.parametrize(
    "share",
    [0.3, 0.9, *(pytest.param(i / 20, marks=pytest.mark.slow) for i in range(20))],
)
def test_a_full_disk(folder, safe, truth, share):
    name = f"full-{share}"
    fault = small_disk(folder / name, int(share * written(truth)))
    base = f"model.source={folder / 'base'}"
    arguments = (f"run_dir={name}", base, "adapter.train=[D,norm]")
    code, said = safe.run(folder, "train", *arguments, before=fault)
    assert code == 1, said
    assert "disk is full" in safe.one_line(said)
    assert not list((folder / name).rglob("*.ckpt.tmp"))
    start_again(folder, safe, truth, name)


def test_a_file_that_may_not_grow(folder, safe, truth):
    """The kernel refuses, whoever writes: here safetensors, at the end of the run."""
    sizes = {f.name: f.stat().st_size for f in truth.rglob("*") if f.is_file()}
    assert sizes["adapter_model.safetensors"] < sizes["step-00000004.ckpt"]

    def limit():
        from mamba2_train import run

        save = run.save_adapter

        def small(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
            save(*args)

        run.save_adapter = small

    base = f"model.source={folder / 'base'}"
    arguments = ("run_dir=limited", base, "adapter.train=[D,norm]")
    code, said = safe.run(folder, "train", *arguments, before=limit)
    assert code == 1, said
    assert "disk is full" in safe.one_line(said)
    start_again(folder, safe, truth, "limited")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written(folder, safe, number):
    fault = small_disk(folder / "readonly", 0, number)
    code, said = safe.run(folder, "train", "run_dir=readonly", before=fault)
    assert code == 1
    line = safe.one_line(said)
    assert os.strerror(number) in line
    assert "set run_dir elsewhere" in line
    shutil.rmtree(folder / "readonly", ignore_errors=True)


def test_a_run_in_the_place_of_a_file(folder, safe):
    code, said = safe.run(folder, "train", "run_dir=rows.jsonl/x")
    assert code == 1
    assert "Not a directory" in safe.one_line(said)


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    handler = processes._RankLog(tmp_path / "rank-0.log")
    handler.setStream(Gone())
    for _ in range(3):
        handler.emit(processes.logging.makeLogRecord({"msg": "one line"}))
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1
    assert "Traceback" not in said


def test_a_second_job_is_refused_and_a_killed_one_is_not_in_the_way(folder, safe):
    """resume=auto and resume=null alike; the lock of what `kill -9` ended is free at once."""
    base = f"model.source={folder / 'base'}"
    arguments = ("run_dir=mine", base, "trainer.max_steps=100000", "trainer.validate_every=2")
    first, said = safe.start(folder, "train", *arguments)
    until = time.monotonic() + 100
    try:
        while not list((folder / "mine" / "checkpoints").glob("*.ckpt")):
            assert time.monotonic() < until, said.read_text()
            time.sleep(0.05)
        for option in RESTART:
            code, second = safe.run(folder, "train", *arguments, option)
            assert code == 1
            assert f"is in use by process {first} on " in safe.one_line(second)
    finally:
        os.kill(first, signal.SIGKILL)
        safe.finish(first, said)
    code, third = safe.run(folder, "train", *arguments, "trainer.max_steps=1", *RESTART)
    assert "in use" not in third
    shutil.rmtree(folder / "mine")


def test_the_lock_itself(tmp_path, safe, monkeypatch):
    """Between processes that do nothing else; free when its holder is gone."""
    assert processes._locked(tmp_path / "run") == ""

    def other():
        try:
            processes._locked(tmp_path / "run")
        except UserError as error:
            return str(error)
        return "free"

    assert f"process {os.getpid()}" in safe.forked(other)
    processes._held.pop().close()
    assert safe.forked(other) == "free"
    assert (tmp_path / "run" / LOCK).read_text().startswith("process ")


def test_names_are_unique_whatever_the_clock_says(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    names = []
    for _ in range(3):
        path = resume._unused(tmp_path / "2026-01-01_00-00-00")
        path.mkdir()
        names.append(path.name)
    assert names == [f"2026-01-01_00-00-00{n}" for n in ("", "-2", "-3")]
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a requeued job has its old number
    assert resume._unused(tmp_path / names[0]).name == names[0]


def test_a_clock_that_goes_back(folder, safe):
    """Hours back and forth at every look: no rate and no time is negative."""

    def jump():
        rng, real, now = random.Random(0), time.time, datetime.now

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return now(tz) - timedelta(hours=rng.randrange(-50, 50))

        time.time = lambda: real() - 3600 * rng.randrange(-50, 50)
        for module in (processes, safe_train):
            module.datetime = Clock

    from mamba2_train.commands import train as safe_train

    assert callbacks.time.perf_counter  # which no clock sets
    code, said = safe.run(folder, "train", "run_dir=jumps", before=jump)
    assert code == 0, said
    result = json.loads((folder / "jumps" / "result.json").read_text())
    assert result["seconds"] >= 0
    metrics = (folder / "jumps" / "csv" / "metrics.csv").read_text().splitlines()
    columns = metrics[0].split(",")
    for line in metrics[1:]:
        for column, value in zip(columns, line.split(","), strict=True):
            if column.startswith("perf/") and value:
                assert float(value) >= 0, column
    shutil.rmtree(folder / "jumps")
