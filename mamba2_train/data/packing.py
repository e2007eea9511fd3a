"""Rows of a batch: which documents share one, and what it looks like to the model.

    bfd      best fit decreasing: documents from the longest to the shortest, each into the fullest
             row that still has room for it (Johnson et al. 1974, at most 11/9 of the fewest rows
             possible); documents stay whole
    split    bfd, then the emptiest rows are taken apart and their documents cut into the room that
             the others have left
    wrapped  the documents end to end, cut every seq_len tokens; only the last row has padding
    none     one document to a row
    continued  the documents end to end, in as many lanes as a batch of all ranks has rows; each row
             goes on in its lane where that of the batch before stopped

`seq_idx` keeps the documents of a row apart. A piece of a cut document is a document of its own:
it starts from a fresh state, and nothing predicts its first token. Not so when `continued`: there
`seq_idx` is a document's number in the epoch, by which a model that carries its state knows that it
goes on, and `shift_labels` has for a row's last token the one that the next row begins with.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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


def arrange(documents: Documents, seq_len: int, packing: str, together: int = 1) -> "RowDataset":
    """`documents`, none of which need fit `seq_len` when `wrapped`, as rows of that length.

    Args:
        together: so many that follow each other share a row, side by side, and fit it: 2 of a
            preference pair, so that documents 2k and 2k + 1 of every row are a pair. For bfd and
            none.
    """
    if together > 1:
        assert packing in ("bfd", "none"), packing
        units = documents.lengths.reshape(-1, together).sum(1)
        rows = pack(units, seq_len) if packing == "bfd" else [[i] for i in range(len(units))]
        members = [[u * together + i for u in row for i in range(together)] for row in rows]
        return RowDataset(documents, members, together)
    if packing == "wrapped":
        return _wrapped(documents, seq_len)
    if packing == "none":
        return RowDataset(documents, [[i] for i in range(len(documents))])
    if packing == "continued":
        return LaneDataset(documents, seq_len)
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

    def __init__(self, documents: Documents, rows: list[list[int]], together: int = 1) -> None:
        self.documents = documents
        self.rows = rows
        self.together = together

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Real tokens of each row."""
        documents = self.documents.lengths
        return np.array([documents[members].sum() for members in self.rows], dtype=np.int64)

    @property
    def counts(self) -> dict[str, int | float]:
        """Of the documents (or pairs), and how many rows they make."""
        per_row = round(len(self.documents) / self.together / len(self), 2)
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


class Span(NamedTuple):
    """Tokens `start` to `stop` of an epoch, whose documents stand in the order that `seed` draws;
    None: in their own."""

    seed: tuple[int, ...] | None
    start: int
    stop: int


class LaneDataset(RowDataset):
    """Item `Span` as `input_ids`, `shift_labels`, `seq_idx` of its own length."""

    def __init__(self, documents: Documents, seq_len: int) -> None:
        super().__init__(documents, [])
        self.seq_len = seq_len
        self._order: tuple[Any, ...] = ()

    def __len__(self) -> int:
        """Rows, if there were one lane."""
        return -(-len(self.documents.tokens) // self.seq_len)

    @property
    def lengths(self) -> NDArray[np.int64]:
        n = len(self.documents.tokens)
        return np.minimum(self.seq_len, n - np.arange(0, n, self.seq_len))

    def __getitem__(self, span: Span) -> Batch:  # type: ignore[override]
        moved, bounds = self._ordered(span.seed)
        d, n = self.documents, span.stop - span.start
        # one more than the row: the label of its last
        positions = np.arange(span.start, min(span.stop + 1, len(d.tokens)))
        numbers = np.searchsorted(bounds, positions, side="right") - 1
        kept = positions + moved[numbers]
        tokens = d.tokens[kept].astype(np.int64)
        labels = np.full(n, IGNORED, dtype=np.int64)
        predicted = (numbers[1:] == numbers[:-1]) & d.learned[kept[1:]]
        labels[: len(predicted)][predicted] = tokens[1:][predicted]
        return {
            "input_ids": torch.from_numpy(tokens[:n]),
            "shift_labels": torch.from_numpy(labels),
            "seq_idx": torch.from_numpy(numbers[:n].astype(np.int32)),
        }

    def _ordered(self, seed: tuple[int, ...] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the documents in an epoch's order: how far each is kept from where it stands in the
        epoch, and where it begins there."""
        if not self._order or self._order[0] != seed:
            d, order = self.documents, np.arange(len(self.documents))
            if seed is not None:
                order = np.random.default_rng(list(seed)).permutation(order)
            bounds = np.append(0, np.cumsum(d.lengths[order]))
            self._order = seed, d.bounds[order] - bounds[:-1], bounds
        return self._order[1:]


class Collator:
    """Pads rows to one width: `seq_len`, or the longest of the batch when that is None."""

    def __init__(self, pad_id: int, padding_side: str, seq_len: int | None) -> None:
        self.fill = {
            "input_ids": pad_id,
            "labels": IGNORED,
            "shift_labels": IGNORED,
            "seq_idx": PADDING,
        }
        self.padding_side = padding_side
        self.seq_len = seq_len

    def __call__(self, rows: list[Batch]) -> Batch:
        width = self.seq_len or max(1, *(len(row["input_ids"]) for row in rows))
        batch = {}
        for name in rows[0]:
            out = rows[0][name].new_full((len(rows), width), self.fill[name])
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
