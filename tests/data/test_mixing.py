"""Shares of a mixture, its end, and that each source keeps its own format."""

import numpy as np
import pytest

from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import load_documents, load_parts
from mamba2_train.data.mixing import Mixture, Part
from mamba2_train.data.sources import load_rows


def part(jsonl, name, n) -> Part:
    config = DataConfig(source=jsonl([{"text": f"{name} {i}"} for i in range(n)], f"{name}.jsonl"))
    return Part(load_rows(config)[0], config)


def blocks(mixture) -> list[list[str]]:
    return [
        [row.values["text"] for rows, _ in mixture.block(i) for row in rows]
        for i in range(len(mixture))
    ]


@pytest.mark.parametrize(
    ("sizes", "weights", "until", "counts"),
    [
        ((700, 300), (0.7, 0.3), "first_exhausted", (700, 300)),
        ((1000, 50), (0.9, 0.1), "first_exhausted", (450, 50)),
        ((1000, 50), (0.9, 0.1), "all_exhausted", (1000, 111)),
        ((10, 20, 30), (1, 1, 1), "first_exhausted", (10, 10, 10)),
        ((10, 20, 30), (1, 1, 1), "all_exhausted", (30, 30, 30)),
        ((100, 100), (3, 1), "first_exhausted", (100, 33)),
    ],
)
def test_an_epoch_has_the_shares_and_ends_when_it_was_asked_to(
    jsonl, sizes, weights, until, counts
):
    parts = [part(jsonl, f"s{k}", n) for k, n in enumerate(sizes)]
    mixture = Mixture(parts, weights, until, block_rows=64)
    found = [text for block in blocks(mixture) for text in block]
    for k, (n, count) in enumerate(zip(sizes, counts, strict=True)):
        mine = [text for text in found if text.startswith(f"s{k} ")]
        # in order, and from the beginning again
        assert mine == [f"s{k} {i % n}" for i in range(count)]
    assert len(found) == sum(counts) == mixture.n_rows


def test_every_block_has_the_shares(jsonl):
    parts = [part(jsonl, "a", 1000), part(jsonl, "b", 1000)]
    mixture = Mixture(parts, (0.8, 0.2), "first_exhausted", block_rows=50)
    found = blocks(mixture)
    assert len(found) == 25
    for block in found:
        assert len(block) == 50
        assert sum(text.startswith("a") for text in block) == 40


def test_shares_are_those_of_interleave_datasets(jsonl):
    """Its draws come to what ours are exactly."""
    import datasets

    a, b = (datasets.Dataset.from_list([{"from": x}] * 3000) for x in "ab")
    theirs = datasets.interleave_datasets([a, b], probabilities=[0.75, 0.25], seed=0)
    parts = [part(jsonl, "a", 3000), part(jsonl, "b", 3000)]
    ours = Mixture(parts, (0.75, 0.25), "first_exhausted", 1000)
    assert ours.counts == [3000, 1000]
    assert theirs["from"][:].count("a") == 3000
    assert abs(theirs["from"][:].count("b") - 1000) < 4 * np.sqrt(1000 / 0.75)


def test_each_source_has_its_own_format_and_splits(jsonl, tokenizer):
    texts = jsonl([{"body": f"Text {i}.", "title": "t"} for i in range(40)], "texts.jsonl")
    pairs = jsonl(
        [{"prompt": f"Ask {i}?", "completion": f" Answer {i}."} for i in range(40)], "pairs.jsonl"
    )
    held_out = jsonl([{"text": "Held out."}], "test.jsonl")
    config = DataConfig(
        sources=[
            {"source": texts, "weight": 3, "text_column": "body", "split": "train[:30]"},
            {"source": pairs, "weight": 1, "append_eos": False},
        ],
        validation_source=held_out,
    )
    train, val = load_documents(config, tokenizer)
    assert tokenizer.decode(val.tokens) == "Held out.<|endoftext|>"
    assert train.counts["documents"] == 40
    decoded = tokenizer.decode(train.tokens)
    assert all((f"Text {i}.<|endoftext|>" in decoded) == (i < 30) for i in range(40))
    learned = tokenizer.decode(train.tokens[train.learned])
    assert all((f" Answer {i}." in learned) == (i < 10) for i in range(40))
    assert "Ask" in decoded
    assert "Ask" not in learned
    assert "t<|endoftext|>" not in decoded


def test_sources_with_splits_give_the_held_out_rows(jsonl, tokenizer):
    a = jsonl(
        [{"text": f"a {i}", "split": "test" if i < 3 else "train"} for i in range(9)], "a.jsonl"
    )
    b = jsonl([{"text": f"b {i}"} for i in range(6)], "b.jsonl")
    mixture, held_out = load_parts(DataConfig(sources=[{"source": a}, {"source": b}]), 100)
    assert [row.values["text"] for part in held_out for row in part.rows] == ["a 0", "a 1", "a 2"]
    assert mixture.counts == [6, 6]


def test_one_validation_source_stands_for_the_splits_of_all(jsonl):
    rows = [{"text": f"a {i}", "split": "test" if i < 3 else "train"} for i in range(9)]
    a, b = jsonl(rows, "a.jsonl"), jsonl(rows, "b.jsonl")
    held_out = jsonl([{"text": "held out"}], "c.jsonl")
    config = DataConfig(sources=[{"source": a}, {"source": b}], validation_source=held_out)
    mixture, parts = load_parts(config, 100)
    assert [row.values["text"] for part in parts for row in part.rows] == ["held out"]
    assert mixture.counts == [6, 6]


def test_repeated_texts_are_on_one_side(jsonl, tokenizer):
    small = jsonl([{"text": f"small {i}"} for i in range(5)], "small.jsonl")
    large = jsonl([{"text": f"large {i}"} for i in range(50)], "large.jsonl")
    config = DataConfig(
        sources=[{"source": small}, {"source": large}],
        mix_until="all_exhausted",
        validation_fraction=0.4,
    )
    train, val = (tokenizer.decode(d.tokens) for d in load_documents(config, tokenizer))
    for i in range(5):
        text = f"small {i}<|endoftext|>"
        assert sorted((train.count(text), val.count(text))) == [0, 10]
    assert "small" in val


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "source is None and sources is not: set source to a file"),
        ({"source": "a", "sources": [{"source": "b"}]}, "source is 'a' and sources is set"),
        ({"sources": []}, "source is None and sources is not"),
        ({"sources": [{"source": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"source": "a", "txt_column": "b"}]}, "sources: txt_column: Extra inputs"),
        (
            {"sources": [{"source": "a"}, {"source": "b", "seq_len": 3}]},
            r"sources.1.seq_len: is one for all sources: set data.seq_len",
        ),
    ],
)
def test_mixtures_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
