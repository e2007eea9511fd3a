"""What the embedded quotes promise: read by hand, split for good, nothing held out twice."""

import json
import re
from collections import Counter

import pytest

from mamba2_train.assets import FOLDER, build


@pytest.fixture(scope="module")
def quotes():
    lines = (FOLDER / "quotes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_rows_are_clean(quotes):
    assert len(quotes) == 1237
    for row in quotes:
        assert list(row) == ["quote", "author", "tags", "split"]
        quote = row["quote"]
        assert 15 < len(quote) < 800
        assert quote == " ".join(quote.split())
        assert quote.isascii()
        assert not re.search(r"[{}_*`\\]|\[from|\[sic|\(See |Dr\.$|[:]$", quote), quote
        assert not (quote.startswith('"') and quote.endswith('"') and quote.count('"') == 2)


def test_split_is_a_function_of_the_words(quotes):
    assert all(row["split"] == build.split_of(row["quote"]) for row in quotes)
    assert build.split_of("To be, or NOT to be") == build.split_of("to be or not to be!")
    share = Counter(row["split"] for row in quotes)["test"] / len(quotes)
    assert 0.08 < share < 0.13


def test_no_two_quotes_are_near_duplicates(quotes):
    by_shingle = {}
    for i, row in enumerate(quotes):
        for gram in build.shingles(row["quote"], 3):
            by_shingle.setdefault(gram, set()).add(i)
    pairs = {(i, j) for members in by_shingle.values() for i in members for j in members if i < j}
    near = [
        (quotes[i]["quote"], quotes[j]["quote"])
        for i, j in pairs
        if build.overlap(quotes[i]["quote"], quotes[j]["quote"]) >= build.NEAR_DUPLICATE
    ]
    assert near == []


def test_what_was_dropped_is_gone(quotes):
    review = build.tomllib.loads((FOLDER / "quotes_review.toml").read_text())
    dropped = tuple(start for starts in review["drop"].values() for start in starts)
    assert not [row["quote"] for row in quotes if row["quote"].startswith(dropped)]
    assert not [row["quote"] for row in quotes for wrong in review["fix"] if wrong in row["quote"]]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Envy:  Emulation\n   adapted.", "Envy: Emulation adapted."),
        ("air, n.: A substance.", "Air: A substance."),
        ('"Whole quote."', "Whole quote."),
        ('"Two," he said, "parts."', '"Two," he said, "parts."'),
        ("Academy: [from {ACADEME}] A school.", "Academy: A school."),
        ("To _be_ something (See {EPITAPH}.)", "To be something"),
        ("the cannon-\nshot", "the cannon-shot"),
        ("Prison: A place. The poet assures us that --", "Prison: A place."),
        ("A place to dine. Says Dr. Holobom, to wit:", "A place to dine."),
        ("... and so on.", "And so on."),
    ],
)
def test_clean(raw, cleaned):
    assert build.clean(raw) == cleaned


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ("nothing succeeds like excess", "moderation: Nothing succeeds like excess!", 1),
        ("one two three four", "two three four five", 0.5),
        ("one two", "one two three", 0),
    ],
)
def test_overlap_is_of_the_shorter_text(a, b, shared):
    assert build.overlap(a, b) == build.overlap(b, a) == shared


def test_a_missing_tool_or_file_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert build.main(["quotes", "--downloads", str(tmp_path), "--out", str(tmp_path / "q")]) == 1
    assert "apt-get is not installed, so dict-devil cannot be downloaded" in capsys.readouterr().err
    assert build.main(["tokenizer", "--corpus", str(tmp_path)]) == 1
    assert "train.jsonl does not exist: run `build corpus" in capsys.readouterr().err
