import bz2
import csv
import gzip
import logging
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from mamba2_train.data.config import DataConfig
from mamba2_train.data.sources import load_rows, open_source
from mamba2_train.errors import UserError

ROWS = [{"text": f'row {i}, "quoted"\nand ünïcode'} for i in range(3)]


def write(path: Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    else:
        import json

        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = f"[{', '.join(lines)}]" if path.suffix == ".json" else "\n".join(lines) + "\n\n"
        path.write_text(text, encoding="utf-8")
    return str(path)


def texts(rows):
    return [row.values["text"] for row in rows]


def load(source, **settings):
    return load_rows(DataConfig(source=str(source), **settings))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    train, held_out = load(write(tmp_path / f"rows{suffix}", ROWS))
    assert [row.values for row in train] == ROWS
    assert held_out is None


def test_json_may_hold_lines_and_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(load(tmp_path / "a.json")[0]) == ["one", "two"]
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    assert texts(load(tmp_path / "b.txt")[0]) == ["one\n\ntwo\n"]


def test_line_ends_within_a_field_of_csv_are_kept(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text\r\n"one\r\ntwo"\r\n')
    assert texts(load(tmp_path / "a.csv")[0]) == ["one\r\ntwo"]


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "second"}])
    write(tmp_path / "a/x.csv", [{"text": "first"}])
    write(tmp_path / "c.parquet", [{"text": "third"}])
    write(tmp_path / ".hidden/z.jsonl", [{"text": "never"}])
    (tmp_path / "notes.md").write_text("never")
    assert texts(load(tmp_path)[0]) == ["first", "second", "third"]


def test_rows_know_where_they_are_from(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [row.place for row in load(path)[0]] == [f"{path}, line 1", f"{path}, line 3"]
    path = write(tmp_path / "rows.parquet", ROWS)
    assert load(path)[0][-1].place == f"{path}, row 3"


def test_a_split_column_names_the_splits(tmp_path):
    rows = [{"text": name, "split": name} for name in ("train", "test", "validation", "train")]
    path = write(tmp_path / "rows.jsonl", rows)
    train, held_out = load(path)
    assert texts(train) == ["train", "train"]
    assert texts(held_out) == ["validation"]
    assert "split" not in train[0].values
    assert texts(load(path, split="validation", validation_split="test")[1]) == ["test"]
    assert texts(load(path, split="validation")[1]) == ["test"]


def test_a_column_called_split_may_be_about_something_else(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "split": 3}, {"text": "b", "split": 4}])
    train, held_out = load(path)
    assert len(train) == 2
    assert held_out is None


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train/part.csv", "test/part.csv"),
    ],
)
def test_names_of_files_and_folders_name_the_splits(tmp_path, names):
    write(tmp_path / names[0], [{"text": "to train on"}])
    write(tmp_path / names[1], [{"text": "held out"}])
    (tmp_path / "notes.txt").write_text("never")
    train, held_out = load(tmp_path)
    assert texts(train) == ["to train on"]
    assert texts(held_out) == ["held out"]


def test_validation_may_have_a_source_of_its_own(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    other = write(tmp_path / "test.jsonl", [{"text": "held out"}])
    assert texts(load(path, validation_source=other)[1]) == ["held out"]


def test_limit_rows(tmp_path):
    assert len(load(write(tmp_path / "a.jsonl", ROWS), limit_rows=2)[0]) == 2


def test_a_file_rewritten_within_its_time_stamp_is_read_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "old"}])
    before = os.stat(path)
    assert texts(load(path)[0]) == ["old"]
    write(tmp_path / "rows.jsonl", [{"text": "new"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts(load(path)[0]) == ["new"]


def test_the_embedded_quotes_have_their_split():
    train, held_out = load("embedded:quotes")
    assert len(train) > 7 * len(held_out)
    assert len(held_out) > 100


def error(source, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "quotes.jsonl", ROWS)
    missing = tmp_path / "qoutes.jsonl"
    assert error(missing) == f"{missing} does not exist. Did you mean 'quotes.jsonl'?"
    assert error(tmp_path / "zzz.csv") == (
        f"{tmp_path / 'zzz.csv'} does not exist. Give a file or folder that does, or a hub data "
        "set as owner/name"
    )
    assert error(tmp_path / "nowhere/a.csv") == (
        f"{tmp_path / 'nowhere/a.csv'} does not exist. Neither does the folder "
        f"{tmp_path / 'nowhere'}: check data.source"
    )
    assert "the embedded data are embedded:quotes" in error("embedded:jokes")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"text": "cut\n',
            "{path}, line 2 is not JSON (Invalid control character at at column 14): write one "
            "object to a line",
        ),
        (
            "a.json",
            b'[{"text": "fine"},\n oops]',
            "{path}, line 2 is not JSON (Expecting value at column 2): write a list of objects",
        ),
        (
            "a.jsonl",
            b'{"text": "fine"}\n["text"]\n',
            '{path}, line 2 is a list, not an object: write {{"text": "..."}} or '
            '{{"prompt": "...", "completion": "..."}}',
        ),
        ("a.jsonl", b"", "{path} holds no rows: give it some, or name another source"),
        ("a.csv", b"text\n", "{path} holds no rows: give it some, or name another source"),
        ("a.json", b"[]", "{path} holds no rows: give it some, or name another source"),
        (
            "a.csv",
            b"text,n\nfine,1\none, two, three\n",
            "{path}, line 3 has not the 2 fields of the header: put quotes around a field that "
            "holds a separator",
        ),
        (
            "a.csv",
            b'text\nfine\n"never closed\nfine\n',
            "{path}, line 3 is not CSV (unexpected end of data): close its quotes",
        ),
        (
            "a.jsonl",
            '{"text": "café"}'.encode("latin-1"),
            "{path}, line 1 is not UTF-8 (byte 0xe9): convert it, for instance with `iconv -t "
            "utf-8`",
        ),
        (
            "a.parquet",
            b"nothing of the kind",
            "{path} is not Parquet (Parquet magic bytes not found in footer. Either the file is "
            "corrupted or this is not a parquet file.): write it again",
        ),
        (
            "a.docx",
            b"",
            "{path} is of no kind that can be read: give .jsonl, .json, .csv, .tsv, .parquet, .txt,"
            " or a folder",
        ),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert error(path) == expected.format(path=path)


def test_a_folder_without_data_is_told(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b""))
    assert error(tmp_path).startswith(f"{tmp_path} holds no data: put files into it (.jsonl, ")


def test_splits_that_do_not_exist_are_told(tmp_path):
    plain = write(tmp_path / "plain.jsonl", ROWS)
    assert len(load(plain, split="train")[0]) == 3
    assert "has no split 'test', for it has none at all" in error(plain, split="test")
    rows = [{"text": "a", "split": "first"}, {"text": "b", "split": "second"}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert error(path) == (
        f"{path} has the splits first, second and none is called train: set data.split (or, for a "
        "validation_source, data.validation_split) to one of them"
    )
    assert error(path, split="frist") == (
        f"{path} has no split 'frist'. Did you mean 'first'? It has: first, second"
    )
    shared = error(path, split="first", validation_split="first+second[:1]")
    assert (
        "data.split is 'first' and data.validation_split 'first+second[:1]': they share" in shared
    )
    assert "holds no rows in first[1:]" in error(path, split="first[1:]")
    assert "'first[' is no selection of rows" in error(path, split="first[")


def test_the_hub_is_asked_through_datasets(monkeypatch):
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        return {
            split: datasets.Dataset.from_list([{"text": f"{split} {i}"} for i in range(20)])
            for split in ("train", "test")
        }

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    train, held_out = load("someone/quotes:small", split="train[10%:50%]", limit_rows=5)
    assert texts(train) == [f"train {i}" for i in range(2, 7)]
    assert texts(held_out) == [f"test {i}" for i in range(5)]
    assert train[0].place == "someone/quotes:small[train], row 3"
    assert asked == [("someone/quotes", "small")]


def test_a_hub_that_cannot_be_reached_is_told():
    message = error("no-such-owner/no-such-data")
    assert message.startswith("no-such-owner/no-such-data is no file here, and the hub could not")
    assert message.endswith("check the name, the network and HF_TOKEN, or give a local path")


def test_what_is_on_disk_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/quotes/a.jsonl", ROWS)
    assert len(load("data/quotes")[0]) == 3
    assert open_source("data/quotes", DataConfig(source="data/quotes")).names == []
    assert error("data/qoutes") == "data/qoutes does not exist. Did you mean 'quotes'?"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(101)),
        ("train[:10%]", range(10)),
        ("train[:500]", range(101)),
        ("train[10%:20%]", range(10, 20)),
        ("train[-5:]", range(96, 101)),
        ("train[50%:]", range(50, 101)),
        ("train[99%:]+train[:2]", [100, 0, 1]),
    ],
)
def test_split_expressions_mean_what_they_mean_to_datasets(tmp_path, split, expected):
    rows = [{"text": str(i)} for i in range(101)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = texts(load(path, split=split)[0])
    assert found == [str(i) for i in expected]
    theirs = datasets.load_dataset(
        "json", data_files=path, split=split, cache_dir=str(tmp_path / "datasets")
    )
    assert found == theirs["text"][:]


def test_split_expressions_over_named_splits(tmp_path):
    write(tmp_path / "train/b.jsonl", [{"text": f"b{i}"} for i in range(4)])
    write(tmp_path / "train/a.csv", [{"text": f"a{i}"} for i in range(4)])
    write(tmp_path / "test.parquet", [{"text": f"t{i}"} for i in range(4)])
    train, held_out = load(tmp_path, split="train[3:6]+test[:1]", validation_split="test[50%:]")
    assert texts(train) == ["a3", "b0", "b1", "t0"]
    assert texts(held_out) == ["t2", "t3"]
    # test is trained on, so it is not held out by itself
    assert load(tmp_path, split="train+test")[1] is None


def test_splits_of_one_file_may_not_share_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(20)])
    message = error(path, validation_split="train[:10%]")
    assert "they share rows" in message
    assert "train[:95%] and train[95%:]" in message
    train, held_out = load(path, split="train[10%:]", validation_split="train[:10%]")
    assert texts(held_out) == ["0", "1"]
    assert texts(train) == [str(i) for i in range(2, 20)]


def test_any_stretch_of_rows_is_read_by_itself(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(7)])
    write(tmp_path / "b.tsv", [{"text": f"b{i}\n{i}"} for i in range(5)])
    pa.parquet.write_table(
        pa.Table.from_pylist([{"text": f"c{i}"} for i in range(11)]),
        tmp_path / "c.parquet",
        row_group_size=4,
    )
    write(tmp_path / "d.json", [{"text": f"d{i}"} for i in range(3)])
    rows = load(tmp_path)[0]
    whole = texts(rows)
    assert len(rows) == len(whole) == 26
    for start in range(26):
        assert rows[start].values["text"] == whole[start]
        for stop in range(start, 28):
            assert texts(rows[start:stop]) == whole[start:stop]
            assert texts(rows[start:][: stop - start]) == whole[start:stop]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_packed_files_hold_the_same_rows(tmp_path, kind, suffix):
    plain = Path(write(tmp_path / f"rows{kind}", ROWS)).read_bytes()
    packed = tmp_path / f"packed{kind}{suffix}"
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": _zstd}[suffix]
    packed.write_bytes(pack(plain))
    rows = load(packed)[0]
    assert [row.values for row in rows] == ROWS
    assert rows[0].file == str(packed)
    packed.write_bytes(pack(plain)[:-9])
    assert error(packed).startswith(f"{packed} cannot be unpacked (")


def _zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


def test_lines_of_a_text_file_are_rows_when_that_is_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\nthree")
    rows = load(path, text_unit="line")[0]
    assert texts(rows) == ["one", "  two", "three"]
    assert rows[1].place == f"{path}, line 3"


BAD = [
    (
        "a.jsonl",
        b'{"text": "1"}\n{"text": \n{"text": "2"}\n[3]\n{"text": "\xff"}\n'
        b'{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n',
        ["1", "2", "\U0001f600"],
        4,
    ),
    ("a.json", b'[{"text": "1"}, 2, {"text": "\\udead"}, {"text": "4"}]', ["1", "4"], 2),
    ("a.csv", b'text,n\n1,1\n2\n3,3,3\n"4\n4",4\n"5"x,5\n\xe9,6\n7,7\n', ["1", "4\n4", "7"], 4),
    ("a.tsv", b"text\tn\n1\t1\n2\n3\t3\n", ["1", "3"], 1),
]


@pytest.mark.parametrize(("name", "content", "kept", "n_skipped"), BAD)
def test_bad_rows_are_skipped_and_counted_when_that_is_asked(
    tmp_path, caplog, name, content, kept, n_skipped
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError):
        load(path)
    with caplog.at_level(logging.WARNING, "mamba2_train"):
        rows = load(path, on_bad_row="skip")[0]
    assert texts(rows) == kept
    assert rows.skipped == n_skipped
    assert f"skipped {n_skipped} rows that cannot be read; the first: {path}, " in caplog.text


def test_half_a_character_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    assert error(path) == (
        f"{path}, line 2 has '\\ud83d', half of a character: escape both halves or none"
    )


def test_a_quote_that_is_never_closed_is_no_row_to_skip(tmp_path):
    """For the rest of the file is lost in it."""
    path = tmp_path / "a.csv"
    path.write_text('text\nfine\n"never closed\nfine\n')
    assert "line 3 is not CSV" in error(path, on_bad_row="skip")


def test_lines_are_counted_through_quotes_and_blank_ones(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n"one\n\ntwo"\n\nthree\n')
    rows = load(path)[0]
    assert [row.number for row in rows] == [2, 6]


def test_parquet_that_is_cut_is_told(tmp_path):
    path = Path(write(tmp_path / "a.parquet", [{"text": "word " * i} for i in range(2000)]))
    raw = bytearray(path.read_bytes())
    raw[4:2000] = bytes(1996)  # the pages, not the footer
    path.write_bytes(raw)
    with pytest.raises(UserError, match="is not Parquet"):
        list(load(path)[0])
