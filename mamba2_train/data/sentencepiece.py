"""A SentencePiece BPE model as a fast tokenizer that gives the same ids on every text.

SentencePiece merges, again and again, the two neighbours whose concatenation is the piece of the
highest score, the leftmost pair where several give it. `tokenizers` instead has a ranked list of
pairs. The two agree when the list holds, for each piece, the one pair that SentencePiece merges
last when it is given the piece alone: inside a longer text nothing crosses the edges of a piece
before the piece exists, so the same merges happen in the same order there. transformers' own
conversion lists every pair instead and ranks by id, which splits most texts differently.

What such a list cannot express is refused: unigram models (`tokenizers` adds up scores in float64,
SentencePiece in float32, and near ties fall differently) and normalization tables (`tokenizers`
applies them to one grapheme at a time).
"""

import re
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from mamba2_train.errors import UserError

SPACE = "▁"  # U+2581, which stands for a space inside a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def load_sentencepiece(file: Path, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model file.

    Control symbols, such as Mistral's [INST], are special tokens: recognised inside a text unless
    it is tokenized with `split_special_tokens=True`, which is how SentencePiece itself treats
    them. A text begins with bos where the model has one, as the models trained on them expect.

    Args:
        file: such as tokenizer.model or Mistral's tokenizer.model.v3.
        options: of a tokenizer_config.json, which win: special tokens, chat_template,
            add_bos_token, add_eos_token.

    Raises:
        UserError: no SentencePiece model, or one that cannot be matched exactly.
    """
    model = _read(file)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    _refuse_what_cannot_be_matched(model, file)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    kinds = {piece.piece: piece.type for piece in model.pieces}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = {piece: pair for piece in scores if (pair := _last_merge(piece, scores))}
    _refuse_ties(merges, scores, file)
    user_defined = [piece for piece, kind in kinds.items() if kind == USER_DEFINED]

    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            # among runs of one character, which alone may tie, the one that has grown goes on
            merges=sorted(merges.values(), key=lambda m: (-scores[m[0] + m[1]], -len(m[0]))),
            unk_token=next(piece for piece, kind in kinds.items() if kind == UNKNOWN),
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    )
    tokenizer.normalizer = _normalizer(normalizer.remove_extra_whitespaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *_prefix(normalizer),
            *_user_defined(user_defined, vocab, scores, merges, trainer.byte_fallback, file),
        ]
    )
    strip = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if strip else []),
        ]
    )
    special = [piece for piece, kind in kinds.items() if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    named = {
        name: getattr(trainer, name.replace("token", "piece"))
        for name in ("unk_token", "bos_token", "eos_token", "pad_token")
    }
    named = {name: piece for name, piece in named.items() if piece in special} | options
    add_bos, add_eos = named.pop("add_bos_token", True), named.pop("add_eos_token", False)
    for name, piece in named.items():
        if name.endswith("_token") and piece not in vocab:
            raise UserError(
                f"{name} is {piece!r}, which is no piece of {file}: correct it in the "
                "tokenizer_config.json there"
            )
    bos = named.get("bos_token") if add_bos else None
    eos = named.get("eos_token") if add_eos else None
    tokenizer.post_processor = TemplateProcessing(
        single=[part for part in (bos, "$A", eos) if part],
        special_tokens=[(token, vocab[token]) for token in (bos, eos) if token],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )


def _read(file: Path) -> Any:
    """The file's ModelProto."""
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise UserError(
            f"{file} is no SentencePiece model, or damaged: copy it again (`git lfs pull` where it "
            "came from a repository)"
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not any(piece.type == UNKNOWN for piece in model.pieces):
        raise UserError(
            f"{file} is no complete SentencePiece model ({len(model.pieces)} pieces, none of them "
            "for what is unknown): copy it again"
        )
    return model


def _refuse_what_cannot_be_matched(model: Any, file: Path) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kind = MODEL_TYPES[trainer.model_type]
    refused = {
        f"a {kind} model": kind != "bpe",
        f"the normalization table {normalizer.name!r}": normalizer.precompiled_charsmap,
        "a denormalization table": model.denormalizer_spec.precompiled_charsmap,
        "escape_whitespaces=false": not normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "unused pieces": any(p.type == UNUSED for p in model.pieces),
        "a user-defined symbol with a space, under remove_extra_whitespaces": (
            normalizer.remove_extra_whitespaces
            and any(" " in p.piece for p in model.pieces if p.type == USER_DEFINED)
        ),
    }
    if asked := ", ".join(what for what, found in refused.items() if found):
        raise UserError(
            f"{file} asks for {asked}, which a tokenizer.json cannot do exactly: set "
            "model.tokenizer to a folder with a tokenizer.json, or train the SentencePiece model "
            "as bpe with normalization_rule_name=identity"
        )


def _refuse_ties(merges: dict[str, tuple[str, str]], scores: dict[str, float], file: Path) -> None:
    """Equal scores are decided by position, for which a ranked list has no words.

    Mistral's runs of spaces are the exception: all of one score, and part of nothing else, they
    grow from the left under either rule.
    """
    ties = {score for score, n in Counter(scores[piece] for piece in merges).items() if n > 1}
    tied = {piece for piece in merges if scores[piece] in ties}
    letters = {piece[0] for piece in tied}
    for piece, pair in merges.items():
        runs_only = piece in tied and len(set(piece)) == 1 and len(letters) == 1
        alone = piece not in tied and not tied & set(pair) and not letters >= set(piece)
        if not (runs_only or alone):
            raise UserError(
                f"{file}: the score of {piece!r} or of a part of it is that of another piece, too, "
                "and a tokenizer.json cannot break the tie as SentencePiece does: set "
                "model.tokenizer to a folder with a tokenizer.json"
            )


def _split(text: str, scores: dict[str, float]) -> tuple[list[str], tuple[str, str] | None]:
    """SentencePiece's algorithm on `text`: the symbols it ends with, and the last pair merged."""
    symbols, last = list(text), None
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        known = [i for i, pair in enumerate(pairs) if pair in scores]
        if not known:
            return symbols, last
        at = max(known, key=lambda i: scores[pairs[i]])  # the first of several
        last = symbols[at], symbols[at + 1]
        symbols[at : at + 2] = [pairs[at]]


def _last_merge(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The pair that becomes `piece`; None for a piece that no text is ever split into."""
    symbols, last = _split(piece, scores)
    return last if len(symbols) == 1 else None


def _normalizer(remove_extra_whitespaces: bool) -> normalizers.Normalizer:
    """Spaces (no other white space) become ▁; perhaps only single ones, inside the text."""
    extra = [
        normalizers.Replace(Regex(r"\A +"), ""),
        normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""),
        normalizers.Replace(Regex(" +"), " "),
    ]
    return normalizers.Sequence(
        [*(extra if remove_extra_whitespaces else []), normalizers.Replace(" ", SPACE)]
    )


def _prefix(normalizer: Any) -> list[pre_tokenizers.PreTokenizer]:
    """▁ before a text. Metaspace leaves it out where the text begins with its own character,
    which after the normalizer cannot be a space: so a space goes first and is then replaced.

    Behind a control symbol there is none, for chat templates write that space themselves; but
    where spaces at an edge are removed, every stretch of text needs its own.
    """
    if not normalizer.add_dummy_prefix:
        return []
    where = "always" if normalizer.remove_extra_whitespaces else "first"
    return [
        pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=where, split=False),
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
    ]


def _user_defined(
    symbols: list[str],
    vocab: dict[str, int],
    scores: dict[str, float],
    merges: dict[str, tuple[str, str]],
    byte_fallback: bool,
    file: Path,
) -> list[pre_tokenizers.PreTokenizer]:
    """User-defined symbols are cut out of the text first, the longest where several fit.

    As added tokens they would be cut out before the prefix goes in. Instead the BPE model looks up
    what it is given whole before it merges (`ignore_merges`), which finds them. It would also find
    a stretch of text that reads like <s>, <0x0A> or a piece out of reach of the merges: those are
    cut once more, where SentencePiece cuts them.
    """
    if not symbols:
        return []
    wrong = {p for p in vocab if len(p) > 1} - merges.keys() - set(symbols)
    cuts = []
    for piece in sorted(wrong):
        parts, _ = _split(piece, scores)
        for (left, right), at in zip(pairwise(parts), accumulate(map(len, parts)), strict=False):
            # not between two unknown characters, which become one token
            known = byte_fallback or left in scores or right in scores
            if known and not {piece[:at], piece[at:]} & wrong:
                cuts.append(rf"{re.escape(piece[:at])}(?={re.escape(piece[at:])}\z)")
                break
        else:
            raise UserError(f"{file}: {piece!r} cannot be told from a text that reads like it")
    longest_first = sorted(symbols, key=len, reverse=True)
    patterns = ["|".join(map(re.escape, longest_first)), rf"\A(?:{'|'.join(cuts)})"]
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
