"""Rows of a batch: which documents share one, and what it looks like to the model.

    bfd      best fit decreasing: documents from the longest to the shortest, each into the fullest
             row that still has room for it (Johnson et al. 1974, at most 11/9 of the fewest rows
             possible); documents stay whole
    split    bfd, then the emptiest rows are taken apart and their documents cut into the room that
             the others have left
    wrapped  the documents end to end, cut every seq_len tokens; only the last row has padding
    none     one document to a row

`seq_idx` keeps the documents of a row apart. A piece of a cut document is a document of its own:
it starts from a fresh state, and nothing predicts its first token.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba2_train.data.cache import digest
from mamba2_train.data.documents import Documents

IGNORED = -100
PADDING = -1  # in seq_idx
EMPTY = -1  # index of a row without documents, which evens out the ranks
MIN_PIECE = 8  # tokens; a shorter piece costs more predictions than the room is worth

Batch = dict[str, Tensor]


def arrange(documents: Documents, seq_len: int, packing: str) -> "RowDataset":
    """`documents`, none of which need fit `seq_len` when `wrapped`, as rows of that length."""
    if packing == "wrapped":
        return _wrapped(documents, seq_len)
    if packing == "none":
        return RowDataset(documents, [[i] for i in range(len(documents))])
    rows = pack(documents.lengths, seq_len)
    return _filled(documents, rows, seq_len) if packing == "split" else RowDataset(documents, rows)


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


class RowDataset(torch.utils.data.Dataset[Batch]):
    """Row i as `input_ids`, `labels`, `seq_idx` of its own length; row -1 has length 0."""

    def __init__(self, documents: Documents, rows: list[list[int]]) -> None:
        self.documents = documents
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Real tokens of each row."""
        documents = self.documents.lengths
        return np.array([documents[members].sum() for members in self.rows], dtype=np.int64)

    @property
    def counts(self) -> dict[str, int | float]:
        """Of the documents, and how many rows they make."""
        per_row = round(len(self.documents) / len(self), 2)
        return {**self.documents.counts, "rows": len(self), "documents_per_row": per_row}

    def fingerprint(self) -> str:
        """Of every token, what is learned of it, and where documents end."""
        d = self.documents
        return digest(*(np.ascontiguousarray(a).data for a in (d.tokens, d.learned, d.bounds)))

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


def _wrapped(documents: Documents, seq_len: int) -> RowDataset:
    bounds = np.union1d(documents.bounds, np.arange(0, len(documents.tokens), seq_len))
    row_of = bounds[:-1] // seq_len
    rows = np.split(np.arange(len(row_of)), np.flatnonzero(np.diff(row_of)) + 1)
    # of no documents, as in a block where nothing is learned, numpy makes one empty row
    return RowDataset(replace(documents, bounds=bounds), [r.tolist() for r in rows if len(r)])


def _filled(documents: Documents, rows: list[list[int]], seq_len: int) -> RowDataset:
    """The fewest rows, or nearly: what exceeds them is cut into the room of the fullest."""
    lengths = documents.lengths
    fewest = -(-len(documents.tokens) // seq_len)
    fullest_first = sorted(rows, key=lambda row: -int(lengths[row].sum()))
    # spans of tokens, for a piece has no index yet
    spans = [
        [(int(documents.bounds[i]), int(documents.bounds[i + 1])) for i in row]
        for row in fullest_first
    ]
    spans, apart = spans[:fewest], spans[fewest:]
    rooms = [(seq_len - sum(b - a for a, b in row), r) for r, row in enumerate(spans)]
    rooms = [(-room, r) for room, r in rooms if room >= MIN_PIECE]  # heapq takes the smallest
    heapq.heapify(rooms)
    left: list[tuple[int, int]] = []
    for start, stop in sorted((s for row in apart for s in row), key=lambda s: s[0] - s[1]):
        while start < stop and rooms:
            room, r = -rooms[0][0], rooms[0][1]
            taken = min(room, stop - start)
            if 0 < stop - start - taken < MIN_PIECE:
                taken = stop - start - MIN_PIECE
            if taken < MIN_PIECE and taken < stop - start:
                break
            heapq.heappop(rooms)
            spans[r].append((start, start + taken))
            start += taken
            if room - taken >= MIN_PIECE:
                heapq.heappush(rooms, (taken - room, r))
        if start < stop:
            left.append((start, stop))
    spans += [[left[i] for i in row] for row in pack([b - a for a, b in left], seq_len)]
    bounds = np.array(sorted({edge for row in spans for span in row for edge in span} | {0}))
    index = {int(start): i for i, start in enumerate(bounds)}
    return RowDataset(
        replace(documents, bounds=bounds), [[index[start] for start, _ in row] for row in spans]
    )


def _joined(parts: list[NDArray[np.generic]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)
