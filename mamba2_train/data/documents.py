"""Rows become documents: token ids, and which of them are to be learned."""

import hashlib
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba2_train.data.config import DataConfig
from mamba2_train.data.encoding import encode
from mamba2_train.data.formats import segments
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000  # tokenized by one call, which uses every core


@dataclass(frozen=True)
class Documents:
    """Sequences of at most seq_len tokens, end to end in flat arrays.

    `tokens` (all,) int32; `learned` (all,) bool; document i is [bounds[i], bounds[i + 1]).
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    bounds: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.bounds)


def build_documents(rows: list[Row], tokenizer: Any, config: DataConfig) -> Documents:
    """Tokenize `rows`, end each with eos, and make what is longer than `seq_len` fit.

    `config` names its format and columns (see `formats.detect`). Rows that leave nothing to learn
    are dropped; one log line tells how many, and how many were too long.
    """
    tokens: list[NDArray[np.int32]] = []
    learned: list[NDArray[np.bool_]] = []
    n_kept = n_dropped = n_long = 0
    for at in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[at : at + ROWS_AT_ONCE]
        for row, (ids, learn) in zip(some, encode(some, tokenizer, config), strict=True):
            n_long += len(ids) > config.seq_len
            pieces = [
                (ids[start:stop], learn[start:stop])
                for start, stop in pairwise(_cuts(len(ids), row, config))
                # nothing before a document's first token predicts it
                if learn[start + 1 : stop].any()
            ]
            tokens += [piece for piece, _ in pieces]
            learned += [mask for _, mask in pieces]
            n_kept += bool(pieces)
            n_dropped += not pieces
    if not n_kept:
        raise UserError(
            f"{rows[0].file}: none of its {len(rows)} rows leaves anything to learn; check that "
            f"{_learned_column(config)!r} is the right column and not empty"
        )
    if n_dropped:
        logger.warning("dropped %d of %d rows: nothing to learn in them", n_dropped, len(rows))
    if n_long:
        what = {"split": "split", "truncate": "cut off"}[config.long_documents]
        logger.info("%d of %d rows exceed %d tokens: %s", n_long, len(rows), config.seq_len, what)
    flat = np.concatenate(tokens)
    return Documents(
        flat,
        np.concatenate(learned),
        np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
        counts={"documents": n_kept, "tokens": len(flat), "dropped": n_dropped, "long": n_long},
    )


def hold_out(rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Two parts of `rows`, the second one with `validation_fraction` of them, at least one.

    Chosen by a hash of the text: it depends neither on the seed nor on the order of the rows, and
    equal texts are on the same side (but for those at the very boundary).
    """
    found = [segments(row, config) for row in rows]
    usable = [i for i, parts in enumerate(found) if parts]
    if len(usable) < 2:
        raise UserError(
            f"{rows[0].file} has {len(usable)} rows with anything to learn, too few to hold one "
            f"out for validation: add rows or set data.validation_source"
        )
    wanted = round(config.validation_fraction * len(usable))
    n_held_out = min(max(1, wanted), len(usable) - 1)
    key = {i: hashlib.sha256(repr(found[i]).encode()).digest() for i in usable}
    held_out = set(sorted(usable, key=lambda i: key[i])[:n_held_out])
    return (
        [row for i, row in enumerate(rows) if i not in held_out],
        [row for i, row in enumerate(rows) if i in held_out],
    )


def _cuts(length: int, row: Row, config: DataConfig) -> list[int]:
    """Where a document of `length` tokens begins, is cut, and ends."""
    if length <= config.seq_len or config.packing == "wrapped":  # which makes its own cuts
        return [0, length]
    if config.long_documents == "error":
        raise UserError(
            f"{row.place} has {length} tokens and data.seq_len is {config.seq_len}: raise it, "
            "shorten the text, or set data.long_documents to split or truncate"
        )
    if config.long_documents == "truncate":
        return [0, config.seq_len]
    return [*range(0, length, config.seq_len), length]


def _learned_column(config: DataConfig) -> str | None:
    return config.text_column if config.format == "text" else config.completion_column
