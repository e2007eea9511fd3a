"""Losses of documents against transformers over each one whole, and the command's table."""

import csv
import io
import json
import math
import re
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from mamba2_train.adapters import add_lora, save_adapter
from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import evaluate as command
from mamba2_train.data.config import DataConfig
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.documents import Documents
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.evaluation import score, token_bytes, whole_documents

BASE = FOLDER / "tiny_base"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


def some_documents(lengths, learned=None, seed=0):
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 80, bounds[-1]).astype(np.int32)
    mask = np.ones(bounds[-1], dtype=bool) if learned is None else random.random(len(tokens)) < 0.5
    return Documents(tokens, mask, bounds)


def by_hand(theirs, documents, bytes_of):
    """(loss, correct, bytes, position) of each token that counts, from stock logits."""
    rows = []
    for begin, stop in zip(documents.bounds[:-1], documents.bounds[1:], strict=True):
        ids = torch.from_numpy(documents.tokens[begin:stop].astype(np.int64))
        with torch.no_grad():
            logits = theirs(ids[None]).logits[0]
        for t in range(1, len(ids)):
            if documents.learned[begin + t]:
                loss = F.cross_entropy(logits[t - 1], ids[t]).item()
                rows.append((loss, int(logits[t - 1].argmax() == ids[t]), bytes_of[ids[t]], t))
    return rows


@pytest.mark.parametrize("segment_len", [5, 16, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("learned", [None, "half"])
def test_sums_are_those_of_each_document_whole(
    random_model, small_config, transformers_model, segment_len, batch_tokens, learned
):
    model = random_model(small_config(), seed=2)
    theirs = transformers_model(model.config, model.state_dict()).eval()
    documents = some_documents([3, 41, 1, 16, 17, 2, 33], learned)
    bytes_of = np.arange(80)
    rows = by_hand(theirs, documents, bytes_of)
    counts = []
    found = score(
        model,
        documents,
        bytes_of,
        segment_len=segment_len,
        batch_tokens=batch_tokens,
        on_documents=counts.append,
    )
    assert sum(counts) == found.n_documents == 7
    assert found.n_tokens == len(rows)
    assert found.n_correct == sum(r[1] for r in rows)
    assert found.n_bytes == sum(r[2] for r in rows)
    assert found.loss == pytest.approx(sum(r[0] for r in rows), rel=1e-5)
    values = found.values()
    assert values["perplexity"] == pytest.approx(math.exp(found.loss / len(rows)))
    assert values["bits_per_byte"] == pytest.approx(
        sum(r[0] for r in rows) / math.log(2) / sum(r[2] for r in rows), rel=1e-5
    )
    for b in values["loss_by_position"]:
        inside = [r[0] for r in rows if b["from"] <= r[3] <= b["to"]]
        assert b["tokens"] == len(inside)
        assert b["loss"] == pytest.approx(np.mean(inside), rel=1e-4)
    assert sum(b["tokens"] for b in values["loss_by_position"]) == len(rows)


@pytest.mark.parametrize("text", ["Plain.", "naïve café 日本語 🙂", "  two\n\nlines\t \u00a0"])
def test_tokens_have_the_bytes_of_their_text(tokenizer, text):
    sizes = token_bytes(tokenizer, 4096)
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_bytes_of_sentencepiece_and_added_tokens():
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁the": 1, "é": 2, "<0xF0>": 3, "▁": 4}
    raw = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.add_tokens(AddedToken("    ", normalized=False))
    sizes = token_bytes(tokenizer, 8)
    assert sizes[1:5].tolist() == [4, 2, 1, 1]
    assert sizes[tokenizer.convert_tokens_to_ids("    ")] == 4
    assert sizes[tokenizer.eos_token_id] == 0


def token_lists(documents):
    return [
        documents.tokens[a:b].tolist()
        for a, b in zip(documents.bounds[:-1], documents.bounds[1:], strict=True)
    ]


TEXTS = [f"Row {i}: " + "word " * (3 * i) for i in range(20)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}"
)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_file(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return {"source": str(tmp_path / "a.txt"), "text_unit": "line"}


def folder_of_texts(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    return {"source": str(tmp_path / "texts")}


def table(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["body", "n"], *([text, i] for i, text in enumerate(TEXTS))])
    return {"source": str(tmp_path / "a.csv"), "text_column": "body"}


def parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    return {"source": str(tmp_path / "a.parquet")}


def pairs(tmp_path):
    rows = [{"prompt": text, "completion": f" and {i}."} for i, text in enumerate(TEXTS)]
    return {"source": jsonl(tmp_path / "a.jsonl", rows)}


def alpaca(tmp_path):
    rows = [{"instruction": t, "input": "", "output": str(i)} for i, t in enumerate(TEXTS)]
    return {"source": jsonl(tmp_path / "a.jsonl", rows)}


def conversations(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": f"So {i}"}]}
        for i, t in enumerate(TEXTS)
    ]
    return {
        "source": jsonl(tmp_path / "a.jsonl", rows),
        "chat_template": str(tmp_path / "t.jinja"),
        "loss_on": "assistant",
    }


def token_ids(tmp_path):
    rows = [{"input_ids": [5, *range(10, 12 + 2 * i)], "labels": None} for i in range(20)]
    for i, row in enumerate(rows):
        row["labels"] = [-100, *row["input_ids"][1:]]
        row["input_ids"][0] = i
    return {"source": jsonl(tmp_path / "a.jsonl", rows)}


def mixture(tmp_path):
    half = [{"text": t} for t in TEXTS[:10]]
    other = [{"body": t} for t in TEXTS[10:]]
    return {
        "sources": [
            {"source": jsonl(tmp_path / "a.jsonl", half)},
            {"source": jsonl(tmp_path / "b.jsonl", other), "text_column": "body"},
        ]
    }


KINDS = (text_file, folder_of_texts, table, parquet, pairs, alpaca, conversations, token_ids)


@pytest.mark.parametrize("make", [*KINDS, mixture])
@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_what_training_holds_out_is_measured_whole(tmp_path, make, long_documents):
    """Whatever the rows are: against the documents of a run, which cuts them at n tokens."""
    # a cut off answer leaves a row out, which moves the share that is held out
    n = {alpaca: 90, conversations: 50}.get(make, 16)
    settings = make(tmp_path) | {"validation_fraction": 0.3, "long_documents": long_documents}
    config = DataConfig(**settings, seq_len=n)
    # one of its own: a chat template stays on it
    documents = whole_documents(config, load_tokenizer(BASE), "held_out")
    data = TextDataModule(config, load_tokenizer(BASE))
    data.setup()
    trained = {tuple(t) for t in token_lists(data.train_data.documents)}
    held_out = sorted(token_lists(data.val_data.documents))
    whole = token_lists(documents)
    if long_documents == "truncate":
        assert sorted(ids[:n] for ids in whole) == held_out
        assert not {tuple(ids[:n]) for ids in whole} & trained
    else:
        assert max(map(len, whole)) > n
        cut = [ids[i : i + n] for ids in whole for i in range(0, len(ids), n)]
        # pieces without anything to learn are left out in training
        assert [piece for piece in sorted(cut) if piece in held_out] == held_out
        assert len(whole) == len({tuple(ids) for ids in whole})
    everything = token_lists(whole_documents(config, load_tokenizer(BASE), "all"))
    assert len(everything) == 20
    assert all(ids in everything for ids in whole)


def test_whole_texts_end_with_eos(tokenizer, tmp_path):
    config = DataConfig(**text_file(tmp_path), seq_len=8)
    expected = [[*tokenizer.encode(t), tokenizer.eos_token_id] for t in TEXTS]
    found = token_lists(whole_documents(config, tokenizer, "all"))
    assert [tokenizer.decode(ids).strip() for ids in found] == [
        tokenizer.decode(ids).strip() for ids in expected
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_split_is_what_is_held_out(tokenizer, tmp_path, streaming):
    jsonl(tmp_path / "d" / "train.jsonl", [{"text": t} for t in TEXTS[:15]])
    jsonl(tmp_path / "d" / "validation.jsonl", [{"text": t} for t in TEXTS[15:]])
    config = DataConfig(source=str(tmp_path / "d"), seq_len=8, streaming=streaming)
    expected = [[*tokenizer.encode(t), tokenizer.eos_token_id] for t in TEXTS]
    assert token_lists(whole_documents(config, tokenizer, "held_out")) == expected[15:]
    assert token_lists(whole_documents(config, tokenizer, "all")) == expected


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*overrides):
        monkeypatch.setattr(sys, "argv", ["mamba2-eval", *overrides])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        code = 0
        try:
            command.main()
        except SystemExit as leave:
            code = leave.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def adapter(tmp_path, tokenizer):
    """An adapter that is not the identity, on the embedded base."""
    model = load_pretrained(BASE)
    handle = add_lora(model, ["in_proj", "out_proj"], r=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    save_adapter(handle, tmp_path / "run" / "adapter", base="embedded")
    save_tokenizer(tokenizer, tmp_path / "run" / "adapter")
    return model


def test_an_adapter_beside_its_base(run, adapter, tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times.")
    source = ["data=local", "data.source=t.txt", "part=all"]
    code, out, err = run("checkpoint=run", *source, "out=eval.json", "plot=loss.svg")
    assert code == 0, err
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert list(results) == ["embedded", "run"]
    ids = [*tokenizer.encode((tmp_path / "t.txt").read_text()), tokenizer.eos_token_id]
    for name, model in (("embedded", load_pretrained(BASE)), ("run", adapter)):
        with torch.no_grad():
            # float32: the embedded base is in bfloat16, and so would its loss be
            logits = model(torch.tensor([ids])).logits[0].float()
        loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
        assert results[name]["loss"] == pytest.approx(loss, rel=1e-5)
        n_bytes = len(tokenizer.decode(ids[1:-1]).encode())
        bits = loss * (len(ids) - 1) / math.log(2) / n_bytes
        assert results[name]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert f"{math.exp(loss):.2f}" in out
    assert results["run"]["loss"] != results["embedded"]["loss"]
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_against_null_or_another(run, adapter, tmp_path):
    data = ["data.limit_rows=20", "out=e.json"]

    def names(*overrides):
        code, _, err = run("checkpoint=run", *data, *overrides)
        assert code == 0, err
        return list(json.loads((tmp_path / "e.json").read_text())["results"])

    assert names("against=null") == ["run"]
    assert names(f"against={BASE}") == [str(BASE), "run"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plot=loss.gif"], r"plot=loss\.gif is of no kind"),
        (["plot=loss.svg", "tasks=[a]"], "tasks have no loss by position"),
        (["data=local", "data.source=nowhere.txt"], "nowhere.txt"),
        (["part=some"], "part: .*got 'some'"),
        (["data.limit_rows=20", "out=no/where.json"], "cannot be written"),
        (["data.limit_rows=20", "plot=no/where.svg"], "cannot be written"),
        (["checkpoint=./nowhere"], "nowhere"),
    ],
)
def test_a_fault_is_one_line(run, overrides, message):
    code, _, err = run(*overrides)
    assert code == 1
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert re.search(message, lines[0]), lines[0]


def test_two_processes_measure_like_one(run, adapter, tmp_path, torchrun):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    common = ["checkpoint=run", "data=local", "data.source=t.txt", "data.text_unit=line"]
    common += ["part=all", "batch_tokens=64", "segment_len=32"]
    code, _, err = run(*common, "out=one.json")
    assert code == 0, err
    printed = torchrun("evaluate.py", *common, "strategy=ddp", "out=two.json")
    assert printed.count("perplexity") == 1
    one, two = (
        json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two")
    )
    assert one.keys() == two.keys() == {"embedded", "run"}
    for name, values in one.items():
        bins, others = values.pop("loss_by_position"), two[name].pop("loss_by_position")
        assert values == pytest.approx(two[name], rel=1e-12)
        for mine, theirs in zip(bins, others, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-12)
