"""Texts that break readers: each arrives as Python's own json and csv wrote it, or its fault is
named with file and line."""

import csv
import gzip
import io
import json
import os
import random
import time

import pytest

from mamba2_train.data.config import DataConfig
from mamba2_train.data.sources import load_rows
from mamba2_train.errors import UserError

TEXTS = {
    "nul": "a\0b",
    "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    "right to left": "\u202eabc\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "combining": "e" + "\u0301" * 200 + " Z" + "\u0336" * 50,
    "not normalized": "\ufb01 \u212b \u1e9b\u0323 \ud55c\uae00 \u1112\u1161\u11ab",
    "a byte order mark inside": "a\ufeffb",
    "beyond the first plane": "\U0001f469\u200d\U0001f680 \U00020000 \U0010ffff",
    "noncharacters": "\ufffe\uffff\ufdd0\ufffd",
    "control": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "carriage return": "a\rb\r\nc",
    "white space only": " \t\u00a0\u3000",
}


def texts(path, **settings):
    rows, _ = load_rows(DataConfig(source=str(path), **settings))
    return [row.values["text"] for row in rows]


def fault(path, **settings):
    with pytest.raises(UserError) as error:
        texts(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_text_arrives_from_json(tmp_path, escaped, mark):
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in TEXTS.values()]
    for name, joined in (("rows.jsonl", "\n".join(lines)), ("rows.json", f"[{','.join(lines)}]")):
        (tmp_path / name).write_bytes(mark + joined.encode())
        assert texts(tmp_path / name) == list(TEXTS.values())
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(mark + "\r\n".join(lines).encode()))
    assert texts(packed) == list(TEXTS.values())


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_every_text_arrives_from_csv(tmp_path, kind):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([["text"], *([text] for text in TEXTS.values())])
    (tmp_path / f"rows.{kind}").write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    assert texts(tmp_path / f"rows.{kind}") == list(TEXTS.values())


def test_every_text_arrives_from_a_text_file(tmp_path):
    for i, text in enumerate(TEXTS.values()):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
    wanted = [text.replace("\r\n", "\n").replace("\r", "\n") for text in TEXTS.values()]
    assert texts(tmp_path) == wanted
    (tmp_path / "lines.txt").write_bytes("a\u2028b\nc\0d\n\n\x85e\n".encode())
    assert texts(tmp_path / "lines.txt", text_unit="line") == ["a\u2028b", "c\0d", "\x85e"]


def test_every_text_becomes_tokens(folder, tmp_path, safe):
    """And a run learns from them."""
    many = "".join(
        json.dumps({"text": f"{t} {i}"}) + "\n" for i in range(3) for t in TEXTS.values()
    )
    (tmp_path / "rows.jsonl").write_text(many)
    source = (f"data.source={tmp_path / 'rows.jsonl'}", "run_dir=odd", "trainer.max_steps=1")
    code, said = safe.run(folder, "train", *source)
    assert code == 0, said


def test_a_line_of_ten_megabytes(tmp_path):
    long = "".join(random.Random(0).choices("ab \u00e9\u4e2d", k=7_000_000))
    assert len(long.encode()) > 10_000_000
    rows = [{"text": "first"}, {"text": long}, {"text": "last"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["text"], ["first"], [long], ["last"]])
    (tmp_path / "rows.csv").write_bytes(out.getvalue().encode())
    (tmp_path / "rows.txt").write_text(f"first\n{long}\nlast\n")
    started = time.process_time()
    wanted = ["first", long, "last"]
    assert texts(tmp_path / "rows.jsonl") == wanted
    assert texts(tmp_path / "rows.csv") == wanted
    assert texts(tmp_path / "rows.txt", text_unit="line") == wanted
    assert time.process_time() - started < 20
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n{"text": "' + long)  # cut off
    said = fault(tmp_path / "rows.jsonl")
    assert "rows.jsonl, line 2 is not JSON" in said
    assert len(said) < 500


WRONG = {
    "utf-16": ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8"),
    "utf-16 without a mark": ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "line 1 is not"),
    "latin-1": ("rows.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
    "latin-1 in csv": ("rows.csv", b"text\ngood\ncaf\xe9\n", "line 3 is not UTF-8"),
    "latin-1 in text": ("rows.txt", b"good\ncaf\xe9\n", "line 2 is not UTF-8"),
    "a surrogate's bytes": ("rows.jsonl", b'{"text": "\xed\xa0\x80"}\n', "line 1 is not UTF-8"),
    "half a pair": ("rows.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2 has '\\ud83d'"),
    "half a pair in a key": ("rows.jsonl", b'{"text": "a", "\\udc00": 1}', "line 1 has '\\udc00'"),
    "overlong": ("rows.jsonl", b'{"text": "\xc0\x80"}\n', "line 1 is not UTF-8"),
    "nul bytes": ("rows.jsonl", b'{"text": "a"}\n\0\0\0\0\n', "line 2 is not JSON"),
    "a bare nul": ("rows.jsonl", b'{"text": "a\0b"}\n', "line 1 is not JSON"),
    "a bare tab": ("rows.jsonl", b'{"text": "a\tb"}\n', "line 1 is not JSON"),
    "deep": ("rows.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 is"),
    "a number of a million digits": ("rows.jsonl", b'{"text": ' + b"9" * 10**6 + b"}", "line 1 is"),
    "never closed": ("rows.csv", b'text\na\n"b\nc\n', "line 3 is not CSV"),
    "empty": ("rows.jsonl", b"", "holds no rows"),
    "blank lines": ("rows.jsonl", b"\n\r\n  \n", "holds no rows"),
    "a mark alone": ("rows.jsonl", b"\xef\xbb\xbf", "holds no rows"),
    "empty csv": ("rows.csv", b"", "holds no rows"),
    "a header alone": ("rows.csv", b"text\n", "holds no rows"),
    "an empty list": ("rows.json", b"[]", "holds no rows"),
    "deep list": ("rows.json", b"[" * 100_000, "rows.json"),
    "no parquet": ("rows.parquet", b"PAR1 and then nothing PAR1", "is not Parquet"),
    "empty parquet": ("rows.parquet", b"", "is not Parquet"),
    "no gzip": ("rows.jsonl.gz", b"\x1f\x8b and then nothing", "cannot be unpacked"),
    "gzip cut off": ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "unpacked"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    said = fault(tmp_path / name)
    assert message in said
    assert str(tmp_path / name) in said
    assert len(said) < 600


def test_rows_that_are_wrong_may_be_left_out(tmp_path):
    """But for them, all others are as they were."""
    lines = [json.dumps({"text": text}).encode() for text in TEXTS.values()]
    bad = [b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"\0", b"[1]", b'{"text": 9' + b"9" * 9999]
    mixed = [x for pair in zip(lines, bad * 3, strict=False) for x in pair]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(mixed))
    assert texts(tmp_path / "rows.jsonl", on_bad_row="skip") == list(TEXTS.values())


def test_what_is_no_file(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    assert "holds no data" in fault(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait for a writer
    assert "pipe.jsonl" in fault(tmp_path / "pipe.jsonl")
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    assert "circle.jsonl" in fault(tmp_path / "circle.jsonl")
    (tmp_path / "nowhere.jsonl").symlink_to("gone")
    assert "does not exist" in fault(tmp_path / "nowhere.jsonl")
