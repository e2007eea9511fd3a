import math

import numpy as np
import pytest
import torch

from mamba2_train.data.documents import Documents
from mamba2_train.data.packing import (
    EMPTY,
    IGNORED,
    MIN_PIECE,
    PADDING,
    Collator,
    RowDataset,
    arrange,
    pack,
)


def documents(lengths, seed=0):
    """Documents whose tokens are all different, about two thirds of them learned."""
    total = int(np.sum(lengths))
    learned = np.random.default_rng(seed).random(total) < 0.66
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return Documents(np.arange(total, dtype=np.int32), learned, bounds)


LENGTHS = {
    "uniform": lambda rng, seq_len: rng.integers(1, seq_len + 1, 400),
    "short": lambda rng, seq_len: rng.integers(1, max(2, seq_len // 8), 1500),
    "full": lambda rng, seq_len: np.full(20, seq_len),
    "ones": lambda rng, seq_len: np.ones(3 * seq_len + 1, dtype=int),
    "one": lambda rng, seq_len: np.array([seq_len // 2 + 1]),
}


@pytest.mark.parametrize("seq_len", [2, 17, 128])
@pytest.mark.parametrize("kind", LENGTHS)
def test_every_token_is_in_one_row_and_in_order(kind, seq_len):
    lengths = LENGTHS[kind](np.random.default_rng(seq_len), seq_len)
    docs = documents(lengths)
    rows = pack(docs.lengths, seq_len)
    data = RowDataset(docs, rows)

    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    seen = []
    for row, members in zip(data, rows, strict=True):
        n = len(row["input_ids"])
        assert 0 < n <= seq_len
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert row["seq_idx"].dtype == torch.int32
        # tokens are numbered, so a document is whole and in order when it is its range
        for k, i in enumerate(members):
            part = row["input_ids"][row["seq_idx"] == k]
            assert part.tolist() == list(range(docs.bounds[i], docs.bounds[i + 1]))
        assert (row["seq_idx"].diff() >= 0).all()
        assert row["seq_idx"].max() == len(members) - 1
        expected = torch.where(
            torch.from_numpy(docs.learned[row["input_ids"].numpy()]), row["input_ids"], IGNORED
        )
        assert torch.equal(row["labels"], expected)
        seen += row["input_ids"].tolist()
    assert sorted(seen) == list(range(len(docs.tokens)))


@pytest.mark.parametrize("seed", range(5))
def test_many_short_documents_leave_almost_no_room(seed):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(3.4, 0.7, 5000).astype(int) + 2, 256)
    rows = pack(lengths, 256)
    assert lengths.sum() / (len(rows) * 256) >= 0.97


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_within_best_fits_bound_of_the_fewest(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, rng.integers(1, 200))
    fewest = math.ceil(lengths.sum() / 64)
    # 11/9 of the optimum plus 6/9; what cannot share a row needs one of its own
    fewest = max(fewest, int((lengths > 32).sum()))
    assert len(pack(lengths, 64)) <= 11 / 9 * fewest + 2


def test_a_fit_is_the_tightest_one():
    # 6 and 5 leave 4 and 5; the 4 belongs to the 6, so that the 5 still has a place
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_too_long_for_a_row_is_an_internal_error():
    with pytest.raises(AssertionError, match="9 tokens do not fit into 8"):
        pack([9], 8)


def pieces(data, docs):
    """Of each document: what the rows hold of it, as (start, stop), in order; checks each row."""
    found = {i: [] for i in range(len(docs))}
    for row in data:
        ids = row["input_ids"].numpy()
        for k in range(row["seq_idx"].max() + 1):
            part = ids[row["seq_idx"].numpy() == k]
            assert (np.diff(part) == 1).all()  # tokens are numbered
            i = int(np.searchsorted(docs.bounds, part[0], side="right")) - 1
            assert part[-1] < docs.bounds[i + 1], "two documents share a seq_idx"
            found[i].append((int(part[0]), int(part[-1]) + 1))
        learned = docs.learned[ids]
        assert torch.equal(row["labels"], row["input_ids"].where(torch.from_numpy(learned), -100))
    return {i: sorted(parts) for i, parts in found.items()}


@pytest.mark.parametrize("seq_len", [2, 17, 128])
@pytest.mark.parametrize("packing", ["split", "wrapped"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_cut_documents_are_whole_together(kind, packing, seq_len):
    docs = documents(LENGTHS[kind](np.random.default_rng(seq_len), seq_len))
    data = arrange(docs, seq_len, packing)
    total = len(docs.tokens)
    for i, parts in pieces(data, docs).items():
        edges = [parts[0][0], *(stop for _, stop in parts)]
        assert edges == [docs.bounds[i], *(start for start, _ in parts[1:]), docs.bounds[i + 1]]
        if packing == "split" and len(parts) > 1:
            assert min(stop - start for start, stop in parts) >= MIN_PIECE
    widths = [len(row["input_ids"]) for row in data]
    assert max(widths) <= seq_len
    assert widths == data.lengths.tolist()
    if packing == "wrapped":
        assert widths[:-1] == [seq_len] * (total // seq_len - (total % seq_len == 0))
        assert [int(t) for row in data for t in row["input_ids"]] == list(range(total))
    else:
        assert len(data) <= len(pack(docs.lengths, seq_len))


@pytest.mark.parametrize("seed", range(5))
def test_splitting_fills_rows_that_whole_documents_cannot(seed):
    # two of these never share a row, so packed whole they fill little more than a half
    lengths = np.random.default_rng(seed).integers(70, 90, 500)
    whole = pack(lengths, 128)
    assert lengths.sum() / (len(whole) * 128) < 0.7
    docs = documents(lengths)
    data = arrange(docs, 128, "split")
    assert lengths.sum() / (len(data) * 128) > 0.99
    # only the documents of the rows that were taken apart are cut
    n_cut = sum(len(parts) > 1 for parts in pieces(data, docs).values())
    assert n_cut <= len(whole) - math.ceil(lengths.sum() / 128)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seq_len", [None, 12])
def test_padding(side, seq_len):
    docs = documents([3, 4, 2])
    data = RowDataset(docs, [[0, 1], [2]])
    batch = Collator(pad_id=99, padding_side=side, seq_len=seq_len)([data[0], data[1], data[EMPTY]])
    width = seq_len or 7
    for name, fill in {"input_ids": 99, "labels": IGNORED, "seq_idx": PADDING}.items():
        assert batch[name].shape == (3, width)
        for r, n in enumerate([7, 2, 0]):
            filled = slice(0, n) if side == "right" else slice(width - n, width)
            rest = slice(n, width) if side == "right" else slice(0, width - n)
            if n:
                assert torch.equal(batch[name][r, filled], data[r][name])
            assert (batch[name][r, rest] == fill).all()
    assert batch["seq_idx"].dtype == torch.int32
    assert batch["labels"].dtype == torch.int64


def test_rows_of_nothing_still_make_a_batch():
    data = RowDataset(documents([3]), [[0]])
    batch = Collator(pad_id=0, padding_side="right", seq_len=None)([data[EMPTY]])
    assert (batch["seq_idx"] == PADDING).all()
    assert batch["input_ids"].shape == (1, 1)
