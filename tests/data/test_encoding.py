"""Tokens of strings and of rows that are tokens already."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from mamba2_train.data.config import DataConfig
from mamba2_train.data.encoding import encode
from mamba2_train.data.formats import detect
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError


def encoded(tokenizer, values, **settings):
    rows = [Row(values, "rows.jsonl", 3)]
    (example,) = encode(rows, tokenizer, detect(rows, DataConfig(source="x", **settings)))
    return example


@pytest.fixture(scope="module")
def sentencepiece():
    """As SentencePiece's tokenizers do, it puts a space before every text, and bos before that."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [*"Yestoday", "es", "Yes", "to", "day", "▁to", "▁Yes", "▁day"]
    merges = [("e", "s"), ("Y", "es"), ("t", "o"), ("a", "y"), ("d", "ay")]
    merges += [("▁", "to"), ("▁", "Yes"), ("▁", "day")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "ay"]))}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("completion", "pieces"),
    [
        ("day", ["day"]),
        (" Yes", ["▁Yes"]),
        ("  Yes", ["▁", "▁Yes"]),
        ("\nto", ["<0x0A>", "to"]),
        ("é", ["<0xC3>", "<0xA9>"]),
    ],
)
def test_a_completion_gets_no_space_that_its_row_does_not_have(sentencepiece, completion, pieces):
    example = encoded(sentencepiece, {"prompt": "Yes to", "completion": completion})
    shown = sentencepiece.convert_ids_to_tokens(example.tokens)
    assert shown == ["<s>", "▁Yes", "▁to", *pieces, "</s>"]
    assert example.learned.sum() == len(pieces) + 1
    text = sentencepiece.decode(example.tokens, skip_special_tokens=True)
    assert text == "Yes to" + completion


def test_byte_level_tokenizers_continue_without_more_ado(tokenizer):
    example = encoded(tokenizer, {"prompt": "to", "completion": "day"})
    eos = tokenizer.eos_token_id
    assert example.tokens.tolist() == [*tokenizer.encode("to"), *tokenizer.encode("day"), eos]


def test_tokens_are_taken_as_they_are(tokenizer):
    example = encoded(tokenizer, {"input_ids": [5, 6, 4095], "labels": [-100, 6, 4095]})
    assert example.tokens.tolist() == [5, 6, 4095]  # no eos behind them
    assert example.learned.tolist() == [False, True, True]
    assert (example.tokens.dtype, example.learned.dtype) == (np.int32, bool)


@pytest.mark.parametrize("wrong", [4096, -1, 2**40])
def test_ids_outside_the_vocabulary_are_told(tokenizer, wrong):
    with pytest.raises(UserError) as caught:
        encoded(tokenizer, {"input_ids": [1, wrong, 2]})
    assert str(caught.value) == (
        f"rows.jsonl, line 3: column 'input_ids' has the id {wrong}, and the tokenizer's go from 0 "
        "to 4095; set model.tokenizer to the one that made them"
    )
    assert encoded(tokenizer, {"input_ids": [wrong]}, on_bad_row="skip").fault is not None


def test_ids_may_have_gaps(tokenizer):
    import copy

    gappy = copy.deepcopy(tokenizer)
    most = max(gappy.get_vocab().values())
    assert len(gappy) == most + 1
    backend = gappy.backend_tokenizer
    vocab = {t: i for t, i in backend.get_vocab().items() if i != 2000}
    gappy._tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    assert len(gappy) < most + 1
    assert encoded(gappy, {"input_ids": [most, most]}).tokens.tolist() == [most, most]
