import logging
import re

import numpy as np
import pytest

from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import build_documents, load_documents
from mamba2_train.data.formats import detect
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError


def rows_of(*values):
    return [Row(v, "rows.jsonl", i) for i, v in enumerate(values, 1)]


def build(rows, tokenizer, **settings):
    config = detect(rows, DataConfig(source="rows.jsonl", **settings))
    return build_documents(rows, tokenizer, config)


def parts(docs):
    return [
        (docs.tokens[a:b].tolist(), docs.learned[a:b].tolist())
        for a, b in zip(docs.bounds[:-1], docs.bounds[1:], strict=True)
    ]


def test_text_is_learned_whole_and_ends_with_eos(tokenizer):
    docs = build(rows_of({"text": "Love is blind."}), tokenizer)
    ids = [*tokenizer.encode("Love is blind."), tokenizer.eos_token_id]
    assert parts(docs) == [(ids, [True] * len(ids))]


def test_eos_is_appended_only_where_it_is_absent_and_wanted(tokenizer):
    eos = tokenizer.eos_token_id
    (once,) = parts(build(rows_of({"text": "So so.<|endoftext|>"}), tokenizer))
    assert once[0].count(eos) == 1
    (never,) = parts(build(rows_of({"text": "So so."}), tokenizer, append_eos=False))
    assert eos not in never[0]


@pytest.mark.parametrize(("loss_on", "prompt_learned"), [("completion", False), ("all", True)])
def test_prompts_are_masked(tokenizer, loss_on, prompt_learned):
    row = {"prompt": "Define hope.", "completion": " Desire and expectation."}
    docs = build(rows_of(row), tokenizer, loss_on=loss_on)
    prompt, completion = (tokenizer.encode(row[k]) for k in ("prompt", "completion"))
    completion.append(tokenizer.eos_token_id)
    expected = [prompt_learned] * len(prompt) + [True] * len(completion)
    assert parts(docs) == [(prompt + completion, expected)]


def test_prompt_is_tokenized_as_when_the_model_is_used(tokenizer):
    # together, "to" + "day" would be one token, which a prompt of "to" never leads to
    docs = build(rows_of({"prompt": "to", "completion": "day"}), tokenizer)
    n = len(tokenizer.encode("to"))
    assert docs.tokens[:n].tolist() == tokenizer.encode("to")


def test_split_keeps_every_token_in_order(tokenizer):
    text = "The quality of mercy is not strain'd. " * 30
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    docs = build(rows_of({"text": text}, {"text": "Short."}), tokenizer, seq_len=16)
    pieces = parts(docs)[:-1]
    assert [t for piece, _ in pieces for t in piece] == ids
    assert all(len(piece) == 16 for piece, _ in pieces[:-1])
    assert docs.lengths.max() <= 16
    assert docs.counts == {
        "documents": 2,
        "tokens": len(docs.tokens),
        "dropped": 0,
        "skipped": 0,
        "long": 1,
    }


def test_truncate_keeps_the_beginning(tokenizer):
    text = "The quality of mercy is not strain'd. " * 30
    docs = build(rows_of({"text": text}), tokenizer, seq_len=16, long_documents="truncate")
    assert parts(docs) == [(tokenizer.encode(text)[:16], [True] * 16)]


def test_pieces_of_a_prompt_alone_are_left_out(tokenizer):
    prompt, completion = "word " * 40, " end"
    docs = build(rows_of({"prompt": prompt, "completion": completion}), tokenizer, seq_len=16)
    assert len(docs) < (len(tokenizer.encode(prompt)) + 2) / 16
    assert docs.learned[docs.bounds[-2] : docs.bounds[-1]].any()


def test_rows_without_anything_to_learn_are_dropped_and_told(tokenizer, caplog):
    rows = rows_of({"text": "Kept."}, {"text": " \n"}, {"text": None}, {"other": 1})
    with caplog.at_level(logging.INFO, "mamba2_train"):
        docs = build(rows, tokenizer)
    assert len(docs) == 1
    assert docs.counts["dropped"] == 3
    assert caplog.messages == ["dropped 3 of 4 rows: nothing to learn in them"]


def test_prompts_without_completion_or_too_long_to_reach_it_are_dropped(tokenizer):
    rows = rows_of(
        {"prompt": "Hope?", "completion": " Yes."},
        {"prompt": "Hope?", "completion": ""},
        {"prompt": "word " * 40, "completion": " cut away"},
    )
    docs = build(rows, tokenizer, seq_len=16, long_documents="truncate")
    assert docs.counts == {
        "documents": 1,
        "tokens": len(docs.tokens),
        "dropped": 2,
        "skipped": 0,
        "long": 1,
    }


def test_more_rows_than_are_tokenized_at_once(tokenizer, monkeypatch):
    rows = rows_of(*({"prompt": f"{i}?", "completion": f" {i}!"} for i in range(25)))
    whole = parts(build(rows, tokenizer))
    monkeypatch.setattr("mamba2_train.data.documents.ROWS_AT_ONCE", 7)
    assert parts(build(rows, tokenizer)) == whole


@pytest.mark.parametrize(
    ("columns", "settings", "found"),
    [
        ({"quote": "q", "author": "a"}, {}, {"format": "text", "text_column": "quote"}),
        ({"text": "t", "content": "c"}, {}, {"format": "text", "text_column": "text"}),
        ({"line": "only", "n": 3}, {}, {"format": "text", "text_column": "line"}),
        ({"a": "x", "b": "y"}, {"text_column": "b"}, {"format": "text", "text_column": "b"}),
        (
            {"prompt": "p", "completion": "c", "text": "t"},
            {},
            {"format": "prompt_completion", "prompt_column": "prompt"},
        ),
        ({"prompt": "p", "completion": "c"}, {"format": "text", "text_column": "prompt"}, {}),
        (
            {"q": "p", "a": "c"},
            {"prompt_column": "q", "completion_column": "a"},
            {"format": "prompt_completion", "completion_column": "a"},
        ),
    ],
)
def test_columns_are_recognized(columns, settings, found):
    config = detect(rows_of(columns), DataConfig(source="x", **settings))
    assert found.items() <= config.model_dump().items()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"text": "a"}],
            {"text_column": "txt"},
            "rows.jsonl has no column 'txt'. Did you mean 'text'? Set data.text_column to one of: "
            "text",
        ),
        (
            [{"prompt": "a", "answer": "b"}],
            {"format": "prompt_completion"},
            "rows.jsonl has no column 'completion'. Set data.completion_column to one of: "
            "prompt, answer",
        ),
        (
            [{"a": "x", "b": "y"}],
            {},
            "rows.jsonl has several columns of strings (a, b): set data.text_column to the one to "
            "learn, or data.prompt_column and data.completion_column",
        ),
        ([{"n": 1}], {}, "rows.jsonl has no column of strings, only n: add one called text"),
        (
            [{"text": "a"}, {"text": 12}],
            {},
            "rows.jsonl, line 2: column 'text' holds 12 (int); make it a string",
        ),
        (
            [{"prompt": [{"role": "user"}], "completion": "c"}],
            {},
            "rows.jsonl, line 1: column 'prompt' holds messages and 'completion' 'c' (str); make "
            "both strings or both lists of messages",
        ),
        (
            [{"text": ""}, {"text": " "}],
            {},
            "rows.jsonl: none of its 2 rows leaves anything to learn; check that 'text' is the "
            "right column and not empty",
        ),
        (
            [{"text": "ok"}, {"text": "a b c d e f g h"}],
            {"seq_len": 4, "long_documents": "error"},
            "rows.jsonl, line 2 has 9 tokens and data.seq_len is 4: raise it, shorten the text, or "
            "set data.long_documents to split or truncate",
        ),
    ],
)
def test_what_cannot_be_learned_is_told(tokenizer, rows, settings, message):
    with pytest.raises(UserError) as caught:
        build(rows_of(*rows), tokenizer, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "a", "prompt_column": "b"}, "set either text_column, or prompt_column"),
        ({"format": "text", "prompt_column": "b"}, "remove prompt_column, completion_column"),
        ({"validation_fraction": 1.0}, "less than 1"),
        ({"seq_len": 1}, "greater than or equal to 2"),
        ({"seqlen": 128}, "Extra inputs are not permitted"),
        ({"format": "chat"}, "Input should be 'auto', 'text', 'prompt_completion', 'm"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(source="x", **settings)


def test_few_characters_at_once_change_nothing(tokenizer, monkeypatch):
    rows = rows_of(*({"text": f"{i} " * i} for i in range(25)), {"text": [1]})[:-1]
    whole = parts(build(rows, tokenizer))
    monkeypatch.setattr("mamba2_train.data.documents.CHARACTERS_AT_ONCE", 30)
    assert parts(build(rows, tokenizer)) == whole


def test_held_out_rows_depend_on_their_text_alone(tokenizer, jsonl):
    """Same texts, whatever their order and whatever else is in their rows."""
    texts = [f"text {i % 90}" for i in range(100)]

    def held_out(order, name):
        path = jsonl(({"text": texts[i], "n": n} for n, i in enumerate(order)), name)
        config = DataConfig(source=path, validation_fraction=0.1)
        return [
            {tokenizer.decode(tokens) for tokens, _ in parts(docs)}
            for docs in load_documents(config, tokenizer)
        ]

    train, val = held_out(range(100), "a.jsonl")
    assert len(val) == 9  # of 90 different ones
    assert len(train) == 81
    assert not train & val
    assert held_out(np.random.default_rng(0).permutation(100), "b.jsonl") == [train, val]


def test_every_document_is_on_one_side(tokenizer, jsonl):
    """Long ones too, whose pieces stay together."""
    texts = [f"text {i} " * (1 + i % 7) for i in range(60)]
    config = DataConfig(
        source=jsonl({"text": t} for t in texts), seq_len=8, validation_fraction=0.3
    )
    sides = load_documents(config, tokenizer)
    whole = ["".join(tokenizer.decode(docs.tokens)) for docs in sides]
    for i in range(60):
        assert sum(f"text {i} " in side for side in whole) == 1
    assert sides[1].counts["documents"] == 18
    n_long = sum(len(tokenizer.encode(t)) + 1 > 8 for t in texts)
    assert sides[0].counts["long"] + sides[1].counts["long"] == n_long
    for docs in sides:
        assert docs.lengths.max() <= 8
        assert docs.counts["tokens"] == len(docs.tokens) == docs.bounds[-1]


def test_one_row_cannot_be_held_out(tokenizer, jsonl):
    path = jsonl([{"text": "one"}, {"text": ""}, {"text": "one"}])
    with pytest.raises(UserError, match="1 different rows with anything to learn, too few"):
        load_documents(DataConfig(source=path), tokenizer)
