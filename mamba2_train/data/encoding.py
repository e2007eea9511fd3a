"""A row becomes token ids, and which of them are to be learned."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamba2_train.data.chat import encode_chats
from mamba2_train.data.config import DataConfig
from mamba2_train.data.files import BadRow
from mamba2_train.data.formats import Chat, Content, Fault, Ids, Pair, Segment, fault, read
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError


class Encoded(NamedTuple):
    """One document before it is cut to `seq_len`, or why its row is skipped."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    fault: str | None = None


class EncodedPair(NamedTuple):
    """A prompt and two answers to it, each (n,) int32 and ended as a document is."""

    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    fault: str | None = None


def encode(rows: list[Row], tokenizer: Any, config: DataConfig) -> list[Encoded]:
    """Ids and their learned mask for each row; both empty for a row without anything to learn.

    `config` names the format and columns (see `formats.detect`). Raises UserError, with its place,
    for a row that cannot be used, unless `on_bad_row=skip` asks for an empty one with its fault.
    """
    found = [read(row, config) for row in rows]
    for row, content in zip(rows, found, strict=True):
        if isinstance(content, Pair):
            raise UserError(_pairs_need_an_objective(row, config))
    return _encode(rows, found, tokenizer, config)


def encode_pairs(rows: list[Row], tokenizer: Any, config: DataConfig) -> list[EncodedPair]:
    """Preference pairs with the prompt that both answers share; empty arrays and faults as in
    `encode`. Both answers follow the same prompt tokens."""
    config = config.model_copy(update={"loss_on": "completion"})  # so what is masked is the prompt
    pairs = [read(row, config) for row in rows]
    chosen, rejected = (
        _encode(
            rows,
            [getattr(p, side) if isinstance(p, Pair) else p for p in pairs],
            tokenizer,
            config,
        )
        for side in ("chosen", "rejected")
    )
    encoded = []
    for a, b in zip(chosen, rejected, strict=True):
        why = a.fault if a.fault is not None else b.fault
        if why is not None or not a.learned.any() or not b.learned.any():
            a, b = _EMPTY, _EMPTY
        prompt = a.tokens[~a.learned]
        assert np.array_equal(prompt, b.tokens[~b.learned])
        encoded.append(EncodedPair(prompt, a.tokens[a.learned], b.tokens[b.learned], why))
    return encoded


_EMPTY = Encoded(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))


def _encode(
    rows: list[Row], contents: list[Content], tokenizer: Any, config: DataConfig
) -> list[Encoded]:
    texts = iter(_encode_texts([c for c in contents if isinstance(c, list)], tokenizer, config))
    chats = iter(
        encode_chats([c for c in contents if isinstance(c, Chat)], tokenizer, config.loss_on)
    )
    encoded = []
    for row, content in zip(rows, contents, strict=True):
        result: Encoded | BadRow | Fault
        if isinstance(content, list):
            result = next(texts)
        elif isinstance(content, Chat):
            chat = next(chats)
            result = chat if isinstance(chat, BadRow) else _encoded(*chat)
        elif isinstance(content, Ids):
            result = _encode_ids(content, tokenizer)
        else:
            assert isinstance(content, Fault)
            result = content
        if isinstance(result, BadRow):
            result = fault(row, result, config)
        if isinstance(result, Fault):
            result = _EMPTY._replace(fault=result.message)
        encoded.append(result if result.learned.any() else _EMPTY._replace(fault=result.fault))
    return encoded


def _encode_texts(found: list[list[Segment]], tokenizer: Any, config: DataConfig) -> list[Encoded]:
    first = iter(_ids([s[0] for s in found if s], tokenizer, first=True))
    later = iter(_ids([x for s in found for x in s[1:]], tokenizer, first=False))
    eos = tokenizer.eos_token_id
    encoded = []
    for parts in found:
        ids: list[int] = []
        learn: list[bool] = []
        for i, part in enumerate(parts):
            new = next(later if i else first)
            ids += new
            learn += [part.learned] * len(new)
        if ids and config.append_eos and ids[-1] != eos:
            ids.append(eos)
            learn.append(True)
        encoded.append(_encoded(ids, learn))
    return encoded


def _encode_ids(content: Ids, tokenizer: Any) -> Encoded | BadRow:
    lowest, highest = int(content.tokens.min()), int(content.tokens.max())
    # ids may have gaps, so their number is only a lower bound, but it is quick
    if lowest < 0 or highest >= len(tokenizer):
        n_tokens = max(tokenizer.get_vocab().values()) + 1
        if lowest < 0 or highest >= n_tokens:
            wrong = lowest if lowest < 0 else highest
            return BadRow(
                f"column 'input_ids' has the id {wrong}, and the tokenizer's go from 0 to "
                f"{n_tokens - 1}; set model.tokenizer to the one that made them"
            )
    return _encoded(content.tokens, content.learned)


def _encoded(ids: Any, learned: Any) -> Encoded:
    return Encoded(np.array(ids, dtype=np.int32), np.array(learned, dtype=np.bool_))


def _ids(parts: list[Segment], tokenizer: Any, first: bool) -> list[list[int]]:
    """Token ids of segments that begin a document, or that continue one.

    What begins gets what the tokenizer puts in front of every text, such as bos. What continues
    must not: SentencePiece's tokenizers put a space before every text, and a completion would be
    learned with one that its row does not have. Behind a line break they do not.
    """
    texts = [part.text for part in parts]
    if first or not _adds_space(tokenizer):
        return _tokenize(texts, tokenizer, special=first)
    (lead,) = _tokenize(["\n"], tokenizer, special=False)
    behind = _tokenize(["\n" + text for text in texts], tokenizer, special=False)
    return [ids[len(lead) :] for ids in behind]


def _adds_space(tokenizer: Any) -> bool:
    (ids,) = _tokenize(["a"], tokenizer, special=False)
    return tokenizer.convert_ids_to_tokens(ids)[0].startswith(("▁", "Ġ"))


def _tokenize(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _pairs_need_an_objective(row: Row, config: DataConfig) -> str:
    pair = read(row, config)
    assert isinstance(pair, Pair)
    prompt = config.prompt_column or "prompt"
    if isinstance(pair.chosen, Chat):
        separate = isinstance(row.values.get(prompt), list)
        cure = "data.completion_column=chosen" if separate else "data.messages_column=chosen"
    else:
        separate = row.values.get(prompt) is not None
        cure = "data.completion_column=chosen" if separate else "data.text_column=chosen"
    return (
        f"{row.file} holds preference pairs, and this run learns one answer to each prompt: set "
        f"objective=dpo to learn which is preferred, or, to train on `chosen` alone, {cure}"
    )
