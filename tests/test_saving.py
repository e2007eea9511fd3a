"""A save that is killed leaves the checkpoint before it, wherever it is killed; one that is written
while training goes on holds what it was asked to hold.

Each place is one at which the save tells the system something: a forked process is killed there.
What several ranks and a whole run make of it is in test_sharded.py and test_resume.py.
"""

import os
import signal
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from mamba2_train import saving
from mamba2_train.background import Background, copied
from mamba2_train.parallel import checkpoint as sharded
from mamba2_train.parallel.checkpoint import is_whole, load_whole, read_meta
from mamba2_train.parallel.shards import boxes
from mamba2_train.resume import is_whole as is_whole_file
from mamba2_train.saving import WholeOrNot, checkpoints_in, step_of

HALF = 700  # bytes of what torch writes into one file: in the middle of the smallest of them
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def of_step(step):
    """A model whose weights say which step they are of."""
    model = nn.Linear(3, 5)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    return model


def checkpoint(model, kind):
    if kind == "folder":
        held = {name: [box for _, box in found] for name, found in boxes(model)}
        return {"state_dict": held, "optimizer_states": [], "said": "before"}
    return {"state_dict": dict(model.named_parameters()), "said": "before"}


def save(folder, step, kind, said="before", again=False):
    made = checkpoint(of_step(step), kind) | {"said": said}
    if kind == "folder":
        sharded.save(made, folder / f"step-{step:08d}", same_tensors=again)
    else:
        WholeOrNot().save_checkpoint(made, folder / f"step-{step:08d}.ckpt")


def a_run(folder, kind, begin=lambda: None):
    """The first checkpoints of a run, then, from `begin` on, one that is saved before and after its
    validation, and the oldest removed."""
    save(folder, 1, kind)
    save(folder, 2, kind)
    begin()
    save(folder, 3, kind)
    save(folder, 3, kind, said="after", again=True)
    sharded.remove(checkpoints_in(folder)[0])


class Countdown:
    """Kills this process at its n-th event."""

    def __init__(self, n):
        self.left, self.seen, self.is_on = n, 0, False

    def begin(self):
        self.is_on = True
        sys.addaudithook(self._hook)
        torch.save, self.write = self._save, torch.save
        os.fsync, self.sync = self._fsync, os.fsync

    def event(self):
        self.seen += 1
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, name, arguments):
        writes = name == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if self.is_on and (writes or name in EVENTS):
            self.event()

    def _fsync(self, descriptor):
        self.event()
        self.sync(descriptor)

    def _save(self, value, file, **options):
        countdown = self

        class Half:
            left = HALF

            def write(self, data):
                self.left -= len(data)
                if self.left < 0 <= self.left + len(data):
                    file.flush()
                    countdown.event()
                return file.write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        self.write(value, Half(), **options)


def killed_at(folder, kind, n):
    """Whether the run came to its n-th event, and was killed there."""
    folder.mkdir()
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")
            countdown = Countdown(n)
            a_run(folder, kind, countdown.begin)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def held(path, kind):
    """(the step that all its weights are of, what was said)"""
    if kind == "folder":
        assert is_whole(path), path
        weights, said = load_whole(path)["state_dict"], read_meta(path)["said"]
    else:
        assert is_whole_file(path), path
        read = torch.load(path, weights_only=True)
        weights, said = read["state_dict"], read["said"]
    (values,) = {tuple(w.unique().tolist()) for w in weights.values()}
    return *map(int, values), said


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_at_every_place_of_a_save(tmp_path, kind):
    outcomes = []
    n = 1
    while killed_at(folder := tmp_path / str(n), kind, n):
        there = checkpoints_in(folder)
        step, said = held(there[-1], kind)
        outcomes.append((step, said))
        assert step == step_of(there[-1])
        for path in there:  # the one before is there until this one is
            assert held(path, kind)[0] == step_of(path)
        save(folder, 4, kind)  # goes on, and clears away what was left
        assert held(checkpoints_in(folder)[-1], kind)[0] == 4
        assert not list(folder.glob(f"*{saving.TEMPORARY}"))
        n += 1
    assert outcomes == sorted(outcomes, key=lambda o: (o[0], o[1] == "after"))
    assert set(outcomes) == {(2, "before"), (3, "before"), (3, "after")}
    assert n > {"folder": 15, "file": 7}[kind]


def test_a_save_that_is_not_whole_is_seen(tmp_path, monkeypatch):
    """The check above can fail."""

    def straight(self, checkpoint, path):
        with path.open("wb") as file:
            torch.save(checkpoint, file)

    monkeypatch.setattr(WholeOrNot, "_write", straight)
    with pytest.raises(AssertionError):
        test_killed_at_every_place_of_a_save(tmp_path, "file")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_save_under_way_holds_its_own_step(tmp_path, monkeypatch, kind):
    """The next step changes the weights in place while it is being written."""
    model, go, began = of_step(1), threading.Event(), threading.Event()
    write = torch.save

    def slow(*args, **kwargs):
        began.set()
        assert go.wait(20)
        write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", slow)
    background = Background()
    made = checkpoint(model, kind)
    path = tmp_path / ("step-00000001" + ".ckpt" * (kind == "file"))
    if kind == "folder":
        made = copied(made)
        background.do(lambda: sharded.save(made, path))
    else:
        WholeOrNot(background).save_checkpoint(made, path)
    assert began.wait(20)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert not checkpoints_in(tmp_path)
    go.set()
    background.wait()
    assert held(path, kind) == (1, "before")


def test_an_error_of_the_thread_is_raised_once_and_stops_what_follows():
    background, done = Background(), []

    def fail():
        raise OSError(28, "No space left on device")

    background.do(lambda: done.append("first"))
    background.do(fail)
    background.do(lambda: done.append("after it"))
    with pytest.raises(OSError, match="No space"):
        background.wait()
    assert done == ["first"]
    background.wait()
    background.do(fail)
    background.do(lambda: None)
    background.waiting[-1].exception()
    with pytest.raises(OSError, match="No space"):
        background.check()
    background.check()


def test_a_copy_keeps_what_is_one():
    tensor = torch.ones(2)
    made = copied({"a": [tensor], "b": {"c": (tensor, 1)}})
    assert made["a"][0] is made["b"]["c"][0]
    assert made["a"][0].data_ptr() != tensor.data_ptr()
