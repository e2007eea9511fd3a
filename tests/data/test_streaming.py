"""Streamed data are the same data: every row once, the same documents, whoever asks for a block."""

import gzip
import json
import resource

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from mamba2_train.data.config import DataConfig
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.documents import build_documents
from mamba2_train.data.loaders import ShardedSampler
from mamba2_train.data.packing import EMPTY, IGNORED
from mamba2_train.data.streaming import open_stream
from mamba2_train.errors import UserError

N = 103


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path / "cache"))


def write(folder, kind) -> str:
    """Rows 0 to N - 1, with what may confuse an index; the first 3 are to be held out."""
    texts = [f"row {i} says: „{'é' * (i % 5)}“" for i in range(N)]
    path = folder / f"rows{kind}"
    if kind in (".jsonl", ".jsonl.gz"):
        lines = [json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
        raw = b"\xef\xbb\xbf" + "\n\n".join(lines).replace("\n", "\r\n", 7).encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    elif kind == ".csv":
        quoted = [f'"{t}, ""quoted""\r\nand\n\nlong"' for t in texts]
        path.write_bytes(("n,text\r\n" + "".join(f"1,{t}\r\n" for t in quoted)).encode())
    elif kind == ".txt":
        path.write_text("\n\n".join(texts))
    else:
        pa.parquet.write_table(pa.table({"text": texts}), path, row_group_size=17)
    return str(path)


def config_of(source, **settings):
    defaults = {
        "streaming": True,
        "split": "train[3:]",
        "validation_split": "train[:3]",
        "text_unit": "line",
        "block_rows": 8,
        "seq_len": 64,
    }
    return DataConfig(source=source, **(defaults | settings))


def texts_of(rows, tokenizer) -> list[str]:
    """The documents in packed rows, each by itself."""
    found = []
    for row in rows:
        for document in row["seq_idx"].unique():
            ids = row["input_ids"][row["seq_idx"] == document]
            found.append(tokenizer.decode(ids).removesuffix("<|endoftext|>"))
    return found


def number(text) -> int:
    return int(text.split()[1])


KINDS = [".jsonl", ".jsonl.gz", ".csv", ".txt", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_once_per_epoch(tmp_path, tokenizer, kind, world):
    blocks, _ = open_stream(config_of(write(tmp_path, kind)), tokenizer, seed=0)
    assert len(blocks) == 13
    for workers in (0, 2) if kind == ".parquet" and world == 2 else (0,):
        for epoch in (0, 1):
            seen = []
            for rank in range(world):
                sampler = ShardedSampler(
                    len(blocks), seed=0, rank=rank, world=world, shuffle=True, repeat=False
                )
                mine = [index for index in sampler.order(epoch) if index != EMPTY]
                loader = DataLoader(blocks, batch_size=None, sampler=mine, num_workers=workers)
                seen += [text for rows in loader for text in texts_of(rows, tokenizer)]
            assert sorted(map(number, seen)) == list(range(3, N))


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_documents_are_those_that_are_not(tmp_path, tokenizer, kind):
    path = write(tmp_path, kind)
    blocks, held_out = open_stream(config_of(path), tokenizer, seed=0)
    whole = TextDataModule(config_of(path, streaming=False), tokenizer)
    whole.setup()
    streamed = [text for i in range(len(blocks)) for text in texts_of(blocks[i], tokenizer)]
    direct = texts_of([whole.train_data[i] for i in range(len(whole.train_data))], tokenizer)
    assert sorted(streamed) == sorted(direct)
    assert len(set(streamed)) == N - 3
    assert held_out.tokens.tolist() == whole.val_data.documents.tokens.tolist()


def test_a_block_is_the_same_whoever_asks_and_whenever(tmp_path, tokenizer):
    config = config_of(write(tmp_path, ".jsonl"))
    here, _ = open_stream(config, tokenizer, seed=3)
    there, _ = open_stream(config, tokenizer, seed=3)
    backwards = {i: there[i] for i in reversed(range(len(there)))}
    workers = DataLoader(here, batch_size=None, sampler=range(len(here)), num_workers=2)
    for i, rows in enumerate(workers):
        for a, b in ((rows, here[i]), (rows, backwards[i])):
            assert len(a) == len(b) > 1
            assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_a_block_of_many_rows_needs_few_open_files(tokenizer, jsonl):
    path = jsonl({"text": f"row {i}"} for i in range(400))
    blocks, _ = open_stream(config_of(path, packing="none", block_rows=200), tokenizer, seed=0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        loader = DataLoader(blocks, batch_size=None, sampler=range(len(blocks)), num_workers=1)
        seen = [text for rows in list(loader) for text in texts_of(rows, tokenizer)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(map(number, seen)) == list(range(3, 400))


def test_rows_of_a_block_are_shuffled_by_the_seed(tmp_path, tokenizer):
    path = write(tmp_path, ".jsonl")
    orders = []
    for seed, shuffle in ((0, True), (1, True), (0, False)):
        config = config_of(path, block_rows=50, seq_len=32, shuffle=shuffle)
        blocks, _ = open_stream(config, tokenizer, seed)
        orders.append(texts_of(blocks[0], tokenizer))
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_what_is_learned_is_what_build_documents_says(tmp_path, tokenizer, jsonl):
    rows = [{"prompt": f"Ask {i}?", "completion": f" Yes {i}." if i % 4 else ""} for i in range(40)]
    path = jsonl(rows)
    settings = {"split": "train[4:]", "validation_split": "train[:4]", "block_rows": 1000}
    blocks, _ = open_stream(config_of(path, **settings), tokenizer, seed=0)
    (rows_of_block,) = (blocks[i] for i in range(len(blocks)))
    ((rows, config),) = blocks.mixture.block(0)
    expected = build_documents(list(rows), tokenizer, config)
    labels = np.concatenate([row["labels"] for row in rows_of_block])
    assert sorted(labels[labels != IGNORED]) == sorted(expected.tokens[expected.learned])
    assert expected.counts["dropped"] == 9


def test_a_block_without_anything_to_learn_is_empty(tmp_path, tokenizer, jsonl):
    path = jsonl({"text": " " if 10 <= i < 18 else f"row {i}"} for i in range(26))
    blocks, _ = open_stream(
        config_of(path, split="train[2:]", validation_split="train[:2]"), tokenizer, seed=0
    )
    assert [len(blocks[i]) > 0 for i in range(len(blocks))] == [True, False, True]


def test_sources_of_a_mixture_are_streamed(tokenizer, jsonl):
    a = jsonl([{"text": f"row {i}"} for i in range(60)], "a.jsonl")
    b = jsonl([{"text": f"row {1000 + i}"} for i in range(60)], "b.jsonl")
    held_out = jsonl([{"text": "held out"}], "c.jsonl")
    config = DataConfig(
        sources=[{"source": a, "weight": 3}, {"source": b}],
        validation_source=held_out,
        streaming=True,
        block_rows=8,
    )
    blocks, _ = open_stream(config, tokenizer, seed=0)
    for i in range(len(blocks)):
        numbers = [number(text) for text in texts_of(blocks[i], tokenizer)]
        assert sum(n < 1000 for n in numbers) == 6
        assert sum(n >= 1000 for n in numbers) == 2


def test_the_hub_is_streamed_from_its_files(tmp_path, tokenizer, monkeypatch):
    """datasets keeps what it loads on disk, as Arrow, of which any row can be read."""
    path = write(tmp_path, ".jsonl")
    real = datasets.load_dataset

    def load_dataset(name, config):
        return real("json", data_files={"train": path}, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    blocks, _ = open_stream(config_of("someone/rows"), tokenizer, seed=0)
    assert blocks.mixture.parts[0].rows.spans[0].table.data.cache_files
    loader = DataLoader(blocks, batch_size=None, sampler=range(len(blocks)), num_workers=2)
    seen = [number(text) for rows in loader for text in texts_of(rows, tokenizer)]
    assert sorted(seen) == list(range(3, N))


def error(*arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
        open_stream(*arguments, **settings)
    return str(caught.value)


def test_faults_are_told_before_training(tmp_path, tokenizer, jsonl):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' * 5000 + '{"text": cut}\n')
    assert error(config_of(str(path)), tokenizer, 0).startswith(f"{path}, line 5001 is not JSON")
    skipping, _ = open_stream(config_of(str(path), on_bad_row="skip"), tokenizer, 0)
    assert skipping.counts["skipped"] == 1
    assert skipping.counts["source_rows"] == 4997
    plain = jsonl([{"text": f"{i}"} for i in range(9)], "plain.jsonl")
    assert "data.validation_split='train[:1000]'" in error(
        config_of(plain, split=None, validation_split=None), tokenizer, 0
    )
    (tmp_path / "list.json").write_text('[{"text": "a"}]')
    assert "one list of JSON" in error(config_of(str(tmp_path / "list.json")), tokenizer, 0)


def test_a_file_that_changes_while_it_is_used_is_told(tmp_path, tokenizer):
    path = write(tmp_path, ".jsonl")
    blocks, _ = open_stream(config_of(path), tokenizer, seed=0)
    with open(path, "a") as file:
        file.write("\n{}")
    with pytest.raises(UserError, match="changed while it was in use"):
        blocks[0]


def test_the_index_is_kept_by_content(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path, ".jsonl")
    open_stream(config_of(path), tokenizer, seed=0)
    monkeypatch.setattr("mamba2_train.data.files.LineFile._scan", None)  # is not called
    blocks, _ = open_stream(config_of(path), tokenizer, seed=0)
    assert len(blocks) == 13
