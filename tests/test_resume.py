"""A run that was killed and goes on in a new process, to the same bits as one that was not.

The truth is a run of 12 steps in one process; the others are its installed command too, with a
fault put into it by distributed/faulty_train.py.
"""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.resume import Resumed, identity, locate
from mamba2_train.schema import TrainConfig, validated
from mamba2_train.tracking import run_stamp

BIN = Path(sys.executable).parent
FAULTY = Path(__file__).parent / "distributed" / "faulty_train.py"
LAST = "checkpoints/step-00000012.ckpt"
# 9 batches to an epoch and windows of 2: an epoch has 5 steps, the last of them on one batch
RUN = [
    "model.source=base",
    "data=local",
    "data.source=rows.jsonl",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.num_workers=2",
    "data.validation_fraction=0.23",
    "adapter.dropout=0.3",
    "adapter.r=4",
    "trainer.accumulate=2",
    "trainer.max_epochs=null",
    "trainer.max_steps=12",
    "trainer.validate_every=0.5",
    "trainer.log_every=1",
    "trainer.progress_bar=false",
    "callbacks.saving.every_steps=1",
    "callbacks.samples.prompts=[Love]",
    "callbacks.samples.max_new_tokens=2",
    "logger=csv",
]
COUNT = itertools.count()


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
ENVIRONMENT |= {"TRACKIO_DIR": "trackio", "WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def server():
    """Starts runs in new processes without their imports' seconds."""
    process = subprocess.Popen(
        [sys.executable, FAULTY, "serve"], stdin=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)


def launch(folder, fault, *arguments, server=None, torchrun=False):
    """The installed command with a fault in it; returns its exit code and what it said."""
    words = [fault, str(BIN / "mamba2-train"), *RUN, *arguments]
    if server is None:
        torch_launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [sys.executable, *(torch_launch if torchrun else []), FAULTY, *words],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=180,
        )
        return done.returncode, done.stdout + done.stderr
    name = folder / f"launch-{next(COUNT)}"
    request = {"folder": str(folder), "arguments": words}
    request |= {key: f"{name}.{key}" for key in ("out", "err", "done")}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    until = time.monotonic() + 120
    while not Path(request["done"]).exists():
        assert time.monotonic() < until, Path(request["err"]).read_text()
        time.sleep(0.02)
    code = int(Path(request["done"]).read_text())
    return code, Path(request["out"]).read_text() + Path(request["err"]).read_text()


def finish(folder, *arguments, fault="none", **how):
    code, said = launch(folder, fault, *arguments, **how)
    assert code == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and some rows of unequal length."""
    folder = tmp_path_factory.mktemp("resume")
    tokenizer = load_tokenizer(FOLDER / "tiny_base")
    shape = Mamba2Config(d_model=16, n_layers=1, vocab_size=4096, d_state=8, headdim=8)
    save_pretrained(initialize(Mamba2LM(shape), seed=1), folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    rows = [{"text": " ".join(str(i * j) for j in range(3 + i % 5))} for i in range(54)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def truth(folder, server):
    """12 steps in one process."""
    finish(folder, "run_dir=truth", server=server)
    rows = json.loads((folder / "truth" / "result.json").read_text())["data"]
    assert (rows["train_rows"], rows["val_rows"]) == (17, 5)  # or the faults strike elsewhere
    return folder / "truth"


def assert_same_bits(run: Path, truth: Path) -> None:
    """Weights, optimizer, schedule, random state, position, scores, and what was logged."""
    ours, theirs = (torch.load(r / LAST, weights_only=True) for r in (run, truth))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert ours[key]
        assert same(ours[key], theirs[key]), key
    a, b = (c["loops"]["fit_loop"] for c in (ours, theirs))
    for key in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"):
        assert same(a[key], b[key]), key
    a, b = state(run), state(truth)
    for key in ("ranks", "scores", "csv_rows"):
        assert same(a[key], b[key]), key
    assert curves(run) == curves(truth)
    results = [json.loads((r / "result.json").read_text()) for r in (run, truth)]
    assert results[0]["final"] == results[1]["final"]
    assert results[0]["base"] == results[1]["base"]
    assert (run / "samples.jsonl").read_text() == (truth / "samples.jsonl").read_text()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def curves(run: Path) -> list[dict[str, str]]:
    """The rows of the metrics without what a clock or the memory says."""
    with (run / "csv" / "metrics.csv").open() as file:
        return [
            {
                k: v
                for k, v in row.items()
                if v and ("packing" in k or k.partition("/")[0] not in ("perf", "system"))
            }
            for row in csv.DictReader(file)
        ]


def check(folder, truth, fault, **how):
    """One fault, and the next start goes on."""
    name = re.sub(r"\W", "_", fault)
    code, said = launch(folder, fault, f"run_dir={name}", **how)
    assert code in (-signal.SIGKILL, 128 + signal.SIGTERM), said
    said = finish(folder, f"run_dir={name}", "resume=auto", **how)
    assert_same_bits(folder / name, truth)
    assert not list((folder / name / "checkpoints").glob("*.tmp"))
    shutil.rmtree(folder / name)


# 22 micro-batches in 12 steps, and two validations of two batches in each epoch
MANY = [
    *(f"batch:{n}" for n in range(1, 23, 3)),
    *(f"backward:{n}" for n in (2, 9, 10, 18)),
    *(f"update:{n}" for n in (1, 5, 6, 10, 12)),
    *(f"updated:{n}" for n in (1, 5, 10)),
    *(f"validation:{n}" for n in (3, 4, 6, 8, 9)),
    *(f"save:{n}" for n in (1, 2, 6, 8, 14)),
    *(f"rename:{n}" for n in (1, 12, 13)),
    *(f"prune:{n}" for n in (1, 4)),
    *(f"saving:{n}" for n in (3, 8)),
    *(f"{place}:SIGTERM" for place in ("batch:4", "batch:9", "validation:5", "update:7")),
]


def test_killed_again_and_again_it_comes_to_the_same_bits(folder, truth, server):
    """In a window's second batch, in an epoch's last step, stopped within a validation, and in
    the middle of the save behind an epoch; each count is of the process that it kills."""
    faults = {"batch:4": 1, "update:4": 4, "validation:4:SIGTERM": 9, "save:3": 10}
    option = []
    for fault, reached in faults.items():
        code, said = launch(folder, fault, "run_dir=killed", *option, server=server)
        if "TERM" in fault:
            assert code == 128 + signal.SIGTERM, said
            assert "resume=auto goes on" in said
            assert not (folder / "killed" / "result.json").exists()
        else:
            assert code == -signal.SIGKILL, said
        option = ["resume=auto"]
        kept = sorted((folder / "killed" / "checkpoints").glob("*.ckpt"))
        assert int(kept[-1].stem.removeprefix("step-")) == reached
    finish(folder, "run_dir=killed", "resume=auto", server=server)
    assert_same_bits(folder / "killed", truth)
    assert not list((folder / "killed" / "checkpoints").glob("*.tmp"))


def test_a_longer_run_has_its_own_learning_rates(folder, server):
    """From the first step that it adds on: what was saved is of the shorter run's schedule."""
    finish(folder, "run_dir=short", "trainer.max_steps=3", server=server)
    finish(folder, "run_dir=short", "trainer.max_steps=7", "resume=auto", server=server)
    finish(folder, "run_dir=long", "trainer.max_steps=7", server=server)
    rates = [
        [row["train/lr"] for row in curves(folder / name) if "train/lr" in row]
        for name in ("short", "long")
    ]
    assert len(rates[0]) == 7
    assert rates[0][3:] == rates[1][3:]


def test_sigusr1_saves_at_the_end_of_the_step(folder, server):
    code, said = launch(folder, "batch:3:SIGUSR1", "run_dir=usr1", server=server)
    assert code == 128 + signal.SIGUSR1, said
    # in the first batch of the second window, which a single process need not end
    assert "stopped by SIGUSR1; saved at step 1" in said
    assert [p.name for p in (folder / "usr1" / "checkpoints").iterdir()] == ["step-00000001.ckpt"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_many_places(folder, truth):
    assert len(MANY) >= 30
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda fault: check(folder, truth, fault), MANY))


@pytest.mark.parametrize("broken", ["forget_rng", "forget_position"])
def test_the_comparison_sees_a_broken_resume(folder, truth, server, broken):
    launch(folder, "batch:8", f"run_dir={broken}", server=server)
    option = (f"run_dir={broken}", "resume=auto")
    finish(folder, *option, fault=f"none+{broken}", server=server)
    with pytest.raises(AssertionError, match="state_dict"):
        assert_same_bits(folder / broken, truth)


STREAM = [
    "data.source=streamed.jsonl",
    "data.split='train[9:]'",
    "data.validation_split='train[:9]'",
    "data.streaming=true",
    "data.block_rows=7",
    "data.on_bad_row=skip",
    "trainer.validate_every=2",
]


@pytest.fixture(scope="module")
def stream(folder):
    """The rows with a block of nothing, a row that cannot be read and one that cannot be used."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[20:20] = ['{"text": " "}'] * 14 + ["{", '{"text": 5}']
    (folder / "streamed.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_a_streamed_run_goes_on_to_the_same_bits(folder, stream, server, packing):
    """Shuffled, by two workers; killed within a block of the second epoch, and in a save."""
    how = (*STREAM, f"data.packing={packing}")
    finish(folder, *how, f"run_dir={packing}", server=server)
    killed = (*how, f"run_dir={packing}_killed")
    for fault, option in (("batch:13", ()), ("save:3", ("resume=auto",))):
        code, said = launch(folder, fault, *killed, *option, server=server)
        assert code == -signal.SIGKILL, said
    # the loader's workers may be others
    finish(folder, *killed, "resume=auto", "data.num_workers=0", server=server)
    assert_same_bits(folder / f"{packing}_killed", folder / packing)
    assert state(folder / packing)["ranks"][0]["block"][0] > 16, (
        "the second epoch was never reached"
    )


def test_a_streamed_file_that_was_edited_is_refused(folder, stream, server):
    copy = (*STREAM, "data.source=copy.jsonl", "run_dir=edited")
    raw = (folder / "streamed.jsonl").read_text()
    (folder / "copy.jsonl").write_text(raw)
    code, said = launch(folder, "batch:4", *copy, server=server)
    assert code == -signal.SIGKILL, said
    lines = raw.splitlines()
    (folder / "copy.jsonl").write_text("\n".join([*lines[:40], lines[41], lines[40], *lines[42:]]))
    code, said = launch(folder, "none", *copy, "resume=auto", server=server)
    assert code == 1
    assert "copy.jsonl is not what it was trained on" in said


LONG = {
    "exact": ("long_context.segment_len=10",),
    # an epoch of about 13 batches; whatever is carried over an epoch's end would show in the bits
    "truncated": ("data.packing=continued", "data.seq_len=16"),
}


@pytest.mark.parametrize("kind", LONG)
def test_long_context_goes_on_to_the_same_bits(folder, server, kind):
    """Killed in a window's second batch, where later states are carried than those of the last
    step, and in a save; under dropout."""
    how = (f"long_context={kind}", *LONG[kind])
    finish(folder, *how, f"run_dir={kind}", server=server)
    killed = (*how, f"run_dir={kind}_killed")
    for fault, option in (("batch:12", ()), ("save:3", ("resume=auto",))):
        code, said = launch(folder, fault, *killed, *option, server=server)
        assert code == -signal.SIGKILL, said
    finish(folder, *killed, "resume=auto", server=server)
    assert_same_bits(folder / f"{kind}_killed", folder / kind)
    carried = state(folder / kind)["ranks"][0]["carried"]
    assert (carried is not None) == (kind == "truncated")


def points_in_wandb(run: Path) -> list[tuple[int, float]]:
    """Of the parts that two processes have written. A file is a LevelDB log: blocks of 32 KiB with
    records behind 7 bytes each, whose last is 1 or 4 where a record ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    points, ids = [], set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        ids.add(path.stem)
        raw, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            left = 32_768 - at % 32_768
            _, n, kind = struct.unpack("<IHB", raw[at : at + 7])
            if left < 7 or not kind:
                at += left
                continue
            whole, at = whole + raw[at + 7 : at + 7 + n], at + 7 + n
            if kind in (1, 4):
                record, whole = Record.FromString(whole), b""
                items = {i.key or "/".join(i.nested_key): i for i in record.history.item}
                if "train/loss" in items:
                    pair = (items[key].value_json for key in ("step", "train/loss"))
                    points.append(tuple(map(json.loads, pair)))
    assert len(ids) == 1  # one run
    return points


def points_in_tensorboard(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    assert "samples/text_summary" in events.Tags()["tensors"]
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def points_in_trackio(run: Path) -> list[tuple[int, float]]:
    (database,) = (run.parent / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        query = "select step, metrics from metrics where run_name like ? order by id"
        rows = connection.execute(query, (f"%{run.name}",)).fetchall()
    read = [(step, json.loads(metrics)) for step, metrics in rows]
    assert any("samples" in metrics for _, metrics in read)
    return [(step, metrics["train/loss"]) for step, metrics in read if "train/loss" in metrics]


def points_in_mlflow(run: Path) -> list[tuple[int, float]]:
    (curve,) = run.glob("mlflow/*/*/metrics/train/loss")  # one run
    assert list(run.glob("mlflow/*/*/artifacts/samples/step-*.json"))
    lines = (line.split() for line in curve.read_text().splitlines())
    return [(int(step), float(value)) for _, value, step in lines]


def test_every_tracker_goes_on_with_its_curve(folder, truth, server):
    """Killed three steps behind its checkpoint, a run takes these again, and each tracker has each
    point once, in order, as the run that was never stopped logged them. Nothing that is logged or
    looked at beside the training changes a bit of it."""
    readers = {"wandb": points_in_wandb}
    readers |= {
        name: reader
        for name, reader in (
            ("tensorboard", points_in_tensorboard),
            ("trackio", points_in_trackio),
            ("mlflow", points_in_mlflow),
        )
        if importlib.util.find_spec(name) is not None
    }
    how = (
        *(f"logger=[{','.join(readers)}]", "run_dir=tracked", "callbacks.health.every_steps=2"),
        *("callbacks.saving.every_steps=4", "trainer.validate_every=4"),
    )
    code, said = launch(folder, "batch:13+slow", *how, server=server)
    assert code == -signal.SIGKILL, said
    newest = max((folder / "tracked" / "checkpoints").glob("*.ckpt"))
    assert newest.stem == "step-00000004"  # and the seventh step is on its way
    finish(folder, *how, "resume=auto", server=server)
    rows = [row for row in curves(truth) if "train/loss" in row]
    expected = [(int(row["step"]), float(row["train/loss"])) for row in rows]
    assert len(expected) == 12
    for name, reader in readers.items():
        points = reader(folder / "tracked")
        assert [step for step, _ in points] == list(range(12)), name
        for (_, ours), (_, theirs) in zip(points, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6), name
    ours = curves(folder / "tracked")
    assert [r["step"] for r in ours if "dt/layer_00_p50" in r] == [str(n) for n in range(1, 12, 2)]
    a, b = (torch.load(run / LAST, weights_only=True) for run in (folder / "tracked", truth))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(a[key], b[key]), key
    assert same(state(folder / "tracked")["ranks"], state(truth)["ranks"])
    steps = (folder / "tracked" / "samples_by_step.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [4, 8, 12]


CHOICES = [
    ("quantization=nf4", "optimizer=adamw_8bit"),
    ("quantization=int8", "optimizer=muon", "precision=bf16"),
    ("quantization=fp4", "optimizer=adafactor"),
    ("quantization=nf4", "optimizer=paged_adamw_8bit", "model.checkpointing=selective"),
]


@pytest.mark.parametrize(
    "choice", [CHOICES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CHOICES[1:])], ids=str
)
def test_quantized_bases_and_other_optimizers(folder, server, choice):
    """Killed in a window's second batch; the base is quantized anew."""
    name = re.sub(r"\W", "_", "".join(choice))
    finish(folder, *choice, f"run_dir={name}", server=server)
    code, said = launch(folder, "batch:12", *choice, f"run_dir={name}_parts", server=server)
    assert code == -signal.SIGKILL, said
    finish(folder, *choice, f"run_dir={name}_parts", "resume=auto", server=server)
    assert_same_bits(folder / f"{name}_parts", folder / name)
    weights = torch.load(folder / name / LAST, weights_only=True)["state_dict"]
    assert all("lora_" in key for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_two_ranks(folder, stream, streamed):
    """The first of two ranks is killed; torchrun ends the other."""
    ddp = ("strategy=ddp", "data.num_workers=1", *(STREAM if streamed else ()))
    whole, killed = f"two_{streamed}", f"two_{streamed}_killed"
    finish(folder, *ddp, f"run_dir={whole}", torchrun=True)
    code, _ = launch(folder, "batch:8", *ddp, f"run_dir={killed}", torchrun=True)
    assert code != 0
    finish(folder, *ddp, f"run_dir={killed}", "resume=auto", torchrun=True)
    assert_same_bits(folder / killed, folder / whole)
    first, second = state(folder / whole)["ranks"]
    assert not torch.equal(first["rng"]["cpu"], second["rng"]["cpu"])
    assert streamed == (first["block"] != [0, 0])


def state(run: Path) -> dict:
    """What our callback keeps in the last checkpoint."""
    callbacks = torch.load(run / LAST, weights_only=True)["callbacks"]
    return next(s for s in callbacks.values() if "csv_rows" in s)


def settings(run: Path, *overrides: str) -> TrainConfig:
    """What the command makes of the arguments of the run in `run`."""
    extend_hydra()
    words = [w for w in RUN if w.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", overrides=[*words, f"run_dir={run}", *overrides])
    return validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


@pytest.fixture
def look_for(monkeypatch):
    """`locate` of a process that has not decided yet."""

    def look(*arguments: Any) -> tuple[TrainConfig, Resumed | None]:
        for name in ("MAMBA2_RESUME", "MAMBA2_RUN_DIR"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
        return locate(settings(*arguments))

    return look


@pytest.fixture
def run(truth, tmp_path):
    """A copy of the finished run, which may be spoilt."""
    shutil.copytree(truth, tmp_path / "run")
    return tmp_path / "run"


def test_settings_that_change_the_numbers_are_refused(run, look_for):
    for change in (
        "seed=1",
        "optimizer.lr=0.1",
        "data.batch_size=3",
        "data.shuffle=false",
        "adapter.dropout=0",
        "trainer.accumulate=1",
        "trainer.clip_norm=null",
        "precision=bf16",
    ):
        with pytest.raises(UserError, match=r"cannot resume .* was .* and is .*resume=null") as e:
            look_for(run, "resume=auto", change)
        if "=" in change and "precision" not in change:
            assert change.partition("=")[0] in str(e.value)


def test_other_settings_are_free(run, look_for, caplog):
    caplog.set_level("INFO", "mamba2_train")
    config, resumed = look_for(
        *(run, "resume=auto", "logger=wandb", "trainer.max_steps=20", "trainer.log_every=3"),
        *("data.source=moved.jsonl", "model.checkpointing=full", "data.num_workers=0"),
    )
    assert resumed.step == 12
    assert config.run_dir == run
    assert "trainer.max_steps was 12 and is 20" in caplog.text


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text"])
def test_a_damaged_checkpoint_is_passed_over(run, look_for, caplog, harm):
    newest = run / LAST
    before, _ = sorted(newest.parent.glob("*.ckpt"))[-2:]
    raw = bytearray(newest.read_bytes())
    if harm == "flip":
        raw[len(raw) // 2] ^= 1  # torch would load it
    spoilt = {"cut": raw[:-100], "flip": raw, "empty": b"", "text": b"not a checkpoint"}[harm]
    newest.write_bytes(spoilt)
    _, resumed = look_for(run, "resume=auto")
    assert resumed.checkpoint == before
    assert f"{LAST.split('/')[1]} is damaged" in caplog.text
    with pytest.raises(UserError, match="damaged"):
        look_for(run, f"resume={newest}")


def test_auto_takes_the_newest_run_of_the_name_or_begins(run, look_for, caplog):
    caplog.set_level("INFO", "mamba2_train")
    stamped = run.parent / run_stamp()
    _, resumed = look_for(stamped, "resume=auto")
    assert resumed.folder == run
    # another name; a newer run of the name that has no checkpoint yet; a folder that was named
    for arguments in ((stamped, "name=other"), (run.parent / "elsewhere",)):
        _, resumed = look_for(*arguments, "resume=auto")
        assert resumed is None
    (run.parent / "later").mkdir()
    (run.parent / "later" / "config.yaml").write_text("name: quotes\n")
    _, resumed = look_for(stamped, "resume=auto")
    assert resumed is None
    assert caplog.text.count("starting afresh") == 3


def test_a_run_is_never_written_over(run, look_for):
    with pytest.raises(UserError, match=r"holds a run, at step 12: resume=auto"):
        look_for(run)
    older = sorted((run / "checkpoints").glob("*.ckpt"))[-2]
    with pytest.raises(UserError, match="holds a later state, step 12"):
        look_for(run, f"resume={older}")
    config, resumed = look_for(run.parent / "branch", f"resume={older}")
    assert (config.run_dir.name, resumed.checkpoint) == ("branch", older)
    _, resumed = look_for(run.parent / "branch", f"resume={run}")
    assert resumed.step == 12
    with pytest.raises(UserError, match="no such file"):
        look_for(run.parent / "branch", "resume=nowhere.ckpt")


def test_other_weights_data_or_ranks_are_refused(run, look_for):
    config, resumed = look_for(run, "resume=auto")
    model = Mamba2LM(Mamba2Config(d_model=16, n_layers=1, vocab_size=64, d_state=8, headdim=8))
    model.requires_grad_(False)
    now = identity(config, model, "7", 2, None)
    resumed = resumed._replace(run=now)
    assert identity(config, model, "7", 2, resumed) == now
    for data, world, message in (("8", 2, r"data\.source"), ("7", 1, "2 ranks and this run has 1")):
        with pytest.raises(UserError, match=message):
            identity(config, model, data, world, resumed)
    with torch.no_grad():
        model.backbone.layers[0].mixer.D[0] += 1
    with pytest.raises(UserError, match=r"model\.source"):
        identity(config, model, "7", 2, resumed)


def test_a_longer_run_goes_on(folder, run, server):
    """It keeps what was measured first, and the curves go on."""
    option = (f"run_dir={run}", "resume=auto", "trainer.max_steps=14")
    said = finish(folder, *option, server=server)
    assert "going on after step 12" in said
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["resumed"]) == (14, 12)
    steps = [row["step"] for row in curves(run) if "train/loss" in row]
    assert steps == [str(n) for n in range(14)]


def test_a_copy_of_the_run_goes_on_elsewhere(folder, truth, server, tmp_path):
    """From an older checkpoint, into another folder: the same bits again."""
    older = sorted((truth / "checkpoints").glob("*.ckpt"))[-2]
    option = (f"run_dir={tmp_path / 'branch'}", f"resume={older}")
    finish(folder, *option, server=server)
    assert_same_bits(tmp_path / "branch", truth)
