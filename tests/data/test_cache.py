"""An entry of the cache is whole and of today's content, or it is built."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mamba2_train.data import cache
from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import load_documents
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch):
    """How often documents were made."""
    from mamba2_train.data import documents

    times = []
    real = documents._build
    monkeypatch.setattr(documents, "_build", lambda *args: times.append(1) or real(*args))
    return times


def write(path: Path, texts) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def documents(path, tokenizer, **settings):
    train, val = load_documents(DataConfig(source=path, **settings), tokenizer)
    return [tokenizer.decode(d.tokens) for d in (train, val)]


TEXTS = [f"sentence {i:04}" for i in range(50)]


def test_a_second_run_reads_what_the_first_one_made(tmp_path, tokenizer, built, caplog):
    path = write(tmp_path / "a.jsonl", [*TEXTS, " "])
    first = load_documents(DataConfig(source=path), tokenizer)
    with caplog.at_level(logging.INFO, "mamba2_train"):
        second = load_documents(DataConfig(source=path), tokenizer)
    assert len(built) == 1
    for a, b in zip(first, second, strict=True):
        for name in ("tokens", "learned", "bounds"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == getattr(b, name).dtype
        assert a.counts == b.counts
    assert isinstance(second[0].tokens.base, np.memmap)
    assert "dropped 1 of" in caplog.text  # told each time, not only when it was built


def test_an_edit_within_the_time_stamp_and_size_is_seen(tmp_path, tokenizer, built):
    path = write(tmp_path / "a.jsonl", TEXTS)
    before = os.stat(path)
    documents(path, tokenizer)
    write(tmp_path / "a.jsonl", [t.replace("sentence", "quotation"[:8]) for t in TEXTS])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    assert "sentence" not in "".join(documents(path, tokenizer))
    assert len(built) == 2


def test_data_may_move_and_be_touched(tmp_path, tokenizer, built):
    path = write(tmp_path / "a.jsonl", TEXTS)
    first = documents(path, tokenizer)
    os.utime(path)
    moved = str(tmp_path / "b.jsonl")
    os.rename(path, moved)
    assert documents(moved, tokenizer) == first
    assert len(built) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"seq_len": 4},
        {"append_eos": False},
        {"limit_rows": 20},
        {"split": "train[5:]"},
        {"validation_fraction": 0.5},
        {"long_documents": "truncate"},
    ],
    ids=str,
)
def test_another_setting_makes_other_documents(tmp_path, tokenizer, built, settings):
    path = write(tmp_path / "a.jsonl", TEXTS)
    documents(path, tokenizer)
    documents(path, tokenizer, **settings)
    assert len(built) == 2


def test_what_documents_do_not_depend_on_makes_no_others(tmp_path, tokenizer, built):
    path = write(tmp_path / "a.jsonl", TEXTS)
    documents(path, tokenizer)
    documents(path, tokenizer, batch_size=3, num_workers=1, shuffle=False, padding_side="left")
    assert len(built) == 1


def test_another_tokenizer_of_the_same_name_makes_other_documents(tmp_path, tokenizer, built):
    path = write(tmp_path / "a.jsonl", TEXTS)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    documents(path, load_tokenizer(tmp_path / "tokenizer"))
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    assert content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    documents(path, load_tokenizer(tmp_path / "tokenizer"))
    assert len(built) == 2


def test_a_file_that_settings_name_counts_by_its_content(tmp_path, monkeypatch):
    from mamba2_train.data.documents import _settings

    named = tmp_path / "named"
    named.write_text("one")
    config = DataConfig(source="x", text_column=str(named))
    first = _settings(config)
    named.write_text("two")
    assert _settings(config) != first


def slow_build(counter: Path, started: Path | None = None):
    def build(arrays):
        with counter.open("a") as out:
            out.write("x")
        for i in range(5):
            arrays.append("numbers", np.full(1000, i))
            time.sleep(0.05)
            if started:
                started.touch()
        return {"answer": 42}

    return build


def _in_process(counter: Path, queue) -> None:
    entry = cache.cached("key", slow_build(counter))
    queue.put((entry.facts, int(entry.arrays["numbers"].sum()), entry.folder is not None))


def test_processes_that_start_together_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    counter = tmp_path / "counter"
    processes = [context.Process(target=_in_process, args=(counter, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert found == [({"answer": 42}, 10_000, True)] * 4
    assert counter.read_text() == "x"


def _as_rank(rank: int, counter: Path, queue) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    build = slow_build(counter)

    def by_rank(arrays):
        return build(arrays) | {"rank": rank}

    queue.put(cache.cached("key", by_rank).facts["rank"])


def test_the_first_rank_of_a_node_builds(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_as_rank, args=(rank, tmp_path / "counter", queue))
        for rank in (1, 2, 0)
    ]
    for process in processes:
        process.start()
        time.sleep(0.2)
    assert [queue.get(timeout=30) for _ in processes] == [0, 0, 0]
    for process in processes:
        process.join()


def test_other_ranks_build_where_the_first_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    assert cache.cached("key", slow_build(tmp_path / "counter")).facts == {"answer": 42}


def test_a_kill_while_building_leaves_nothing_that_is_read(tmp_path, folder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    counter, started = tmp_path / "counter", tmp_path / "started"

    def build_and_die() -> None:
        cache.cached("key", slow_build(counter, started))

    process = context.Process(target=build_and_die)
    process.start()
    while not started.exists():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(folder.glob("key.*.tmp"))  # it was in the middle
    assert not (folder / "key").exists()
    _in_process(counter, queue)
    assert queue.get(timeout=30) == ({"answer": 42}, 10_000, True)
    assert counter.read_text() == "xx"
    assert sorted(p.name for p in folder.iterdir()) == ["key", "key.lock"]


def test_a_build_that_fails_leaves_nothing(folder):
    def fails(arrays):
        arrays.append("numbers", np.arange(3))
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.cached("key", fails)
    assert [p.name for p in folder.iterdir()] == ["key.lock"]


@pytest.mark.parametrize("damage", ["cut", "gone", "garbled"])
def test_a_damaged_entry_is_built_anew(tmp_path, folder, damage):
    counter = tmp_path / "counter"
    cache.cached("key", slow_build(counter))
    data = folder / "key" / "numbers.bin"
    if damage == "cut":
        os.truncate(data, 100)
    elif damage == "gone":
        data.unlink()
    else:
        (folder / "key" / cache.FACTS).write_text('{"arr')
    assert cache.cached("key", slow_build(counter)).arrays["numbers"].sum() == 10_000
    assert counter.read_text() == "xx"


def test_everybody_may_read_an_entry(tmp_path, folder):
    old = os.umask(0o022)
    try:
        cache.cached("key", slow_build(tmp_path / "counter"))
    finally:
        os.umask(old)
    assert (folder / "key").stat().st_mode & 0o777 == 0o755
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in (folder / "key").iterdir())


def test_a_full_disk_means_memory_and_one_warning(tmp_path, tokenizer, monkeypatch, caplog):
    path = write(tmp_path / "a.jsonl", TEXTS)
    expected = documents(path, tokenizer)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", small], check=True)
    try:
        monkeypatch.setenv("MAMBA2_CACHE", str(small))
        with caplog.at_level(logging.WARNING, "mamba2_train"):
            assert documents(path, tokenizer) == expected
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.messages[0]
    assert "MAMBA2_CACHE" in caplog.messages[0]


def test_arrays_on_disk_are_those_in_memory(tmp_path):
    def build(arrays):
        for i in range(3):
            arrays.append("a", np.arange(i, dtype=np.int32))
            arrays.append("b", np.ones(1, bool))
            arrays.append("empty", np.zeros(0, np.uint64))
        arrays.append("half", arrays.read("a")[:2].copy())
        arrays.drop("b")
        return {}

    on_disk, in_memory = cache.cached("key", build), cache.in_memory(build)
    assert on_disk.arrays.keys() == in_memory.arrays.keys() == {"a", "empty", "half"}
    for name, values in in_memory.arrays.items():
        assert values.tolist() == on_disk.arrays[name].tolist()
        assert values.dtype == on_disk.arrays[name].dtype
    assert in_memory.arrays["a"].tolist() == [0, 0, 1]


def test_memory_stays_far_below_the_text(tmp_path):
    """Of 20 MB of text, 80 MB of tokens; the tokenizer's own memory is that of one call."""
    with (tmp_path / "long.txt").open("w") as out:
        for i in range(2000):
            out.write(f"{i} {'word ' * 2000}\n")
    script = """
import re, sys, threading, time
import numpy as np
from mamba2_train.assets import FOLDER
from mamba2_train.data import documents
from mamba2_train.data.config import DataConfig
from mamba2_train.data.encoding import Encoded
from mamba2_train.data.tokenizer import load_tokenizer

def encode(rows, tokenizer, config):
    raw = [np.frombuffer(row.values["text"].encode(), np.uint8) for row in rows]
    return [Encoded(r.astype(np.int32), np.ones(len(r), bool)) for r in raw]

def anonymous():  # not the pages of files, which the system takes back
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) / 1024

documents.encode = encode
tokenizer = load_tokenizer(FOLDER / "tiny_base")
config = DataConfig(source=sys.argv[1], text_unit="line", seq_len=1024)
peak = before = anonymous()
worker = threading.Thread(target=documents.load_documents, args=(config, tokenizer))
worker.start()
while worker.is_alive():
    peak = max(peak, anonymous())
    time.sleep(0.005)
print(peak - before)
print(len(documents.load_documents(config, tokenizer)[0].tokens))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "long.txt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown, n_tokens = map(float, done.stdout.split())
    assert n_tokens > 18e6
    assert grown < 30
