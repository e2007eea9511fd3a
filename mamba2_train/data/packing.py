"""Rows of a batch: which documents share one, and what it looks like to the model.

Best fit decreasing: documents from the longest to the shortest, each into the fullest row that
still has room for it (Johnson et al. 1974, at most 11/9 of the fewest rows possible). Documents
stay whole, and `seq_idx` keeps their states apart.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba2_train.data.documents import Documents

IGNORED = -100
PADDING = -1  # in seq_idx
EMPTY = -1  # index of a row without documents, which evens out the ranks

Batch = dict[str, Tensor]


def pack(lengths: Sequence[int] | NDArray[np.int64], seq_len: int) -> list[list[int]]:
    """Documents of `lengths`, none above `seq_len`, as rows of their indices; O(n log n)."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # its keys, ascending
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        assert length <= seq_len, f"{length} tokens do not fit into {seq_len}"
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, seq_len
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(index)
        room -= length
        if room:
            if room not in with_room:
                with_room[room] = []
                insort(rooms, room)
            with_room[room].append(row)
    return rows


def arrange(documents: Documents, seq_len: int, packing: str) -> "RowDataset":
    """`documents`, none of them longer, as rows of at most `seq_len` tokens."""
    if packing == "bfd":
        return RowDataset(documents, pack(documents.lengths, seq_len))
    return RowDataset(documents, [[i] for i in range(len(documents))])


class RowDataset(torch.utils.data.Dataset[Batch]):
    """Row i as `input_ids`, `labels`, `seq_idx` of its own length; row -1 has length 0."""

    def __init__(self, documents: Documents, rows: list[list[int]]) -> None:
        self.documents = documents
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        members = [] if index == EMPTY else self.rows[index]
        d = self.documents
        spans = [slice(d.bounds[i], d.bounds[i + 1]) for i in members]
        tokens = _joined([d.tokens[span] for span in spans])
        learned = _joined([d.learned[span] for span in spans]).astype(bool)
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(np.where(learned, tokens, IGNORED)),
            "seq_idx": torch.from_numpy(
                np.repeat(np.arange(len(spans)), [s.stop - s.start for s in spans]).astype(np.int32)
            ),
        }


class Collator:
    """Pads rows to one width: `seq_len`, or the longest of the batch when that is None."""

    def __init__(self, pad_id: int, padding_side: str, seq_len: int | None) -> None:
        self.fill = {"input_ids": pad_id, "labels": IGNORED, "seq_idx": PADDING}
        self.padding_side = padding_side
        self.seq_len = seq_len

    def __call__(self, rows: list[Batch]) -> Batch:
        width = self.seq_len or max(1, *(len(row["input_ids"]) for row in rows))
        batch = {}
        for name, fill in self.fill.items():
            out = rows[0][name].new_full((len(rows), width), fill)
            for target, row in zip(out, rows, strict=True):
                start = width - len(row[name]) if self.padding_side == "left" else 0
                target[start : start + len(row[name])] = row[name]
            batch[name] = out
        return batch


def _joined(parts: list[NDArray[np.generic]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)
