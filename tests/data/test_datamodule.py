import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mamba2_train.data.config import DataConfig
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.loaders import BatchSampler, ShardedSampler
from mamba2_train.data.packing import EMPTY, IGNORED, PADDING


def samplers(n_rows, world, **options):
    settings = {"seed": 3, "shuffle": True, "repeat": True} | options
    return [ShardedSampler(n_rows, rank=r, world=world, **settings) for r in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [1, 5, 24, 101])
@pytest.mark.parametrize("shuffle", [True, False])
def test_training_ranks_cover_all_rows_and_are_as_long(n_rows, world, shuffle):
    ranks = [s.order(0) for s in samplers(n_rows, world, shuffle=shuffle)]
    assert {len(rank) for rank in ranks} == {-(-n_rows // world)}
    # read across the ranks it is one epoch, and then its beginning again
    across = [i for step in zip(*ranks, strict=True) for i in step]
    assert sorted(across[:n_rows]) == list(range(n_rows))
    assert across[n_rows:] == np.resize(across[:n_rows], len(across))[n_rows:].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [1, 5, 24, 101])
def test_validation_ranks_count_every_row_once(n_rows, world):
    ranks = [s.order(0) for s in samplers(n_rows, world, shuffle=False, repeat=False)]
    assert {len(rank) for rank in ranks} == {-(-n_rows // world)}
    counted = [i for rank in ranks for i in rank if i != EMPTY]
    assert sorted(counted) == list(range(n_rows))


def test_order_is_a_function_of_seed_and_epoch():
    (a,), (b,) = samplers(50, 1), samplers(50, 1)
    assert a.order(4) == b.order(4)
    assert a.order(4) != a.order(5)
    (other,) = samplers(50, 1, seed=4)
    assert a.order(4) != other.order(4)
    # the epoch is all it remembers
    list(a)
    a.set_epoch(4)
    assert list(a) == b.order(4)
    # pinned: a resumed run must find the order it left
    assert samplers(8, 1)[0].order(1) == [2, 1, 4, 0, 5, 7, 6, 3]


def module(tokenizer, source="embedded:quotes", **settings):
    data = TextDataModule(
        DataConfig(source=source, **({"seq_len": 256} | settings)), tokenizer, seed=0
    )
    data.setup()
    return data


def learned_tokens(loader):
    """Ids at the positions that carry a label, whatever batch they are in."""
    return sorted(
        t for batch in loader for t in batch["input_ids"][batch["labels"] != IGNORED].tolist()
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packing", ["bfd", "split", "wrapped", "none"])
def test_batches_of_the_quotes(tokenizer, packing, side):
    data = module(tokenizer, packing=packing, padding_side=side, batch_size=4)
    counts = data.counts()
    for part, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        n_tokens = n_documents = n_rows = 0
        for batch in loader:
            ids, labels, seq_idx = batch["input_ids"], batch["labels"], batch["seq_idx"]
            assert (ids.dtype, labels.dtype) == (torch.int64, torch.int64)
            assert seq_idx.dtype == torch.int32
            assert ids.shape == labels.shape == seq_idx.shape
            padding = seq_idx == PADDING
            # packed rows are always as wide, others as wide as the longest of them
            assert ids.shape[1] == 256 if packing != "none" else not padding.all(0).any()
            assert (ids[padding] == tokenizer.pad_token_id).all()
            assert (labels[padding] == IGNORED).all()
            assert torch.equal(labels[~padding], ids[~padding])  # text is learned whole
            assert not padding[:, 0 if side == "right" else -1].any()
            n_tokens += int((~padding).sum())
            n_documents += int((ids == tokenizer.eos_token_id).sum())
            n_rows += len(ids)
        assert counts[f"{part}_tokens"] == n_tokens
        assert counts[f"{part}_documents"] == n_documents
        assert counts[f"{part}_rows"] == n_rows
    if packing != "none":
        filled = counts["train_tokens"] / (counts["train_rows"] * 256)
        assert filled > {"bfd": 0.97, "split": 0.99, "wrapped": 0.994}[packing]
        assert counts["train_packing_efficiency"] == round(filled, 4)


def test_counts_of_the_quotes(tokenizer):
    counts = module(tokenizer).counts()
    assert counts["train_documents"] + counts["val_documents"] == 1237
    assert 40_000 < counts["train_tokens"] < 60_000
    assert counts["train_dropped"] == counts["train_long"] == 0


def test_packed_and_unpacked_hold_the_same_tokens(tokenizer):
    packed = module(tokenizer, packing="bfd")
    separate = module(tokenizer, packing="none", shuffle=False)
    assert learned_tokens(packed.train_dataloader()) == learned_tokens(separate.train_dataloader())


def test_lightning_says_which_rank_this_is(tokenizer):
    class Trainer:
        distributed_sampler_kwargs = None
        current_epoch = 0
        fit_loop = SimpleNamespace(batch_idx=-1)

    def tokens(part, rank, world):
        Trainer.distributed_sampler_kwargs = {"rank": rank, "num_replicas": world}
        data.trainer = Trainer()
        loader = getattr(data, f"{part}_dataloader")()
        return learned_tokens(loader), len(loader)

    data = module(tokenizer, batch_size=3)
    for part in ("train", "val"):
        whole, _ = tokens(part, 0, 1)
        shares, n_batches = zip(*(tokens(part, rank, 7) for rank in range(7)), strict=True)
        assert len(set(n_batches)) == 1
        if part == "val":
            assert sorted(t for share in shares for t in share) == whole


def same_batches(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("packing", ["split", "none"])
def test_workers_change_nothing(tokenizer, packing):
    grouped = packing == "none"
    settings = {"limit_rows": 200, "packing": packing, "length_grouped": grouped}
    plain = list(module(tokenizer, **settings).train_dataloader())
    for n in (1, 4):
        worked = list(module(tokenizer, num_workers=n, **settings).train_dataloader())
        assert same_batches(worked, plain)


def test_a_loader_draws_nothing_from_the_generator_of_dropout(tokenizer):
    before = torch.get_rng_state()
    data = module(tokenizer, limit_rows=30)
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, 1, 5, 13])
def test_an_epoch_goes_on_where_it_stood(n):
    (order,) = samplers(50, 1)
    order.set_epoch(2)
    whole = list(BatchSampler(order, 4))
    assert [len(batch) for batch in whole] == [4] * 12 + [2]
    resumed = BatchSampler(order, 4, start=(2, n))
    assert list(resumed) == whole[n:]
    assert len(resumed) == 13  # Lightning counts from the epoch's beginning
    order.set_epoch(3)
    assert list(resumed) == list(BatchSampler(order, 4))


@pytest.mark.parametrize("shuffle", [True, False])
def test_length_groups_are_equally_wide_on_all_ranks(shuffle):
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    ranks = samplers(1003, 3, shuffle=shuffle, lengths=lengths, batch_size=4)
    epochs = [[list(BatchSampler(rank, 4)) for rank in ranks]]
    for rank in ranks:
        rank.set_epoch(1)
    epochs.append([list(BatchSampler(rank, 4)) for rank in ranks])
    for epoch in epochs:
        rows = [i for rank in epoch for batch in rank for i in batch]
        assert set(rows) == set(range(1003))
        assert len(rows) == 1005  # made equal with the first of them
        for step in list(zip(*epoch, strict=True))[:-1]:
            widths = [lengths[i] for batch in step for i in batch]
            assert max(widths) - min(widths) < 100
    assert (epochs[0] != epochs[1]) == shuffle
    if shuffle:
        # not from long to short: that would be a curriculum
        first = [int(lengths[batch].max()) for batch in epochs[0][0]]
        assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.3


def test_padding_of_length_groups_is_what_is_reported(tokenizer):
    for grouped in (True, False):
        data = module(tokenizer, packing="none", length_grouped=grouped, batch_size=8)
        tokens = slots = 0
        for batch in data.train_dataloader():
            tokens += int((batch["seq_idx"] != PADDING).sum())
            slots += batch["seq_idx"].numel()
        assert data.counts()["train_packing_efficiency"] == round(tokens / slots, 4)
    assert tokens / slots < 0.6  # not grouped


class Blocks(torch.utils.data.Dataset):
    """Rows numbered through, in blocks of 0 to 5."""

    sizes = (3, 1, 0, 5, 2, 2, 0, 4)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        first = sum(self.sizes[:index])
        ids = range(first, first + self.sizes[index])
        row = {"labels": torch.int64, "input_ids": torch.int64, "seq_idx": torch.int32}
        return [{k: torch.full((1,), i, dtype=d) for k, d in row.items()} for i in ids]


def streamed(tokenizer, n_batches, *, start=(0, 0), rank=0, world=1, **settings):
    """Ids of the batches, and their positions."""
    data = TextDataModule(
        DataConfig(source="x", seq_len=2, batch_size=4, **settings), tokenizer, seed=0
    )
    data.train_data = Blocks()
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": world})
    data.position = start
    loader = data.train_dataloader()
    batches = list(itertools.islice(loader, n_batches))
    return [b["input_ids"][:, 0].tolist() for b in batches], [
        tuple(b["position"].tolist()) for b in batches
    ]


def expected_rows(n, rank=0, world=1):
    """The rows of a rank, epoch after epoch, from the order of the blocks alone."""
    order = ShardedSampler(8, seed=0, rank=rank, world=world, shuffle=True, repeat=True)
    blocks = [i for epoch in range(n) for i in order.order(epoch)]
    return [int(row["input_ids"]) for i in blocks for row in Blocks()[i]][:n]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("rank", [0, 2])
def test_blocks_are_one_stream_of_rows(tokenizer, workers, rank):
    ids, _ = streamed(tokenizer, 12, num_workers=workers, rank=rank, world=3)
    assert [i for batch in ids for i in batch] == expected_rows(48, rank, 3)


def test_a_stream_goes_on_behind_any_batch(tokenizer):
    ids, positions = streamed(tokenizer, 14)  # more than three epochs of 17 rows
    for n in range(14):
        rest, later = streamed(tokenizer, 13 - n, start=positions[n], num_workers=n % 2)
        assert rest == ids[n + 1 :]
        assert later == positions[n + 1 :]


def test_the_position_never_reaches_the_model(tokenizer):
    data = TextDataModule(DataConfig(source="x"), tokenizer)
    batch = data.on_before_batch_transfer({"labels": 1, "position": torch.tensor([5, 2])}, 0)
    assert (batch, data.position) == ({"labels": 1}, (5, 2))


def test_epochs_differ_and_come_again(tokenizer):
    loader = module(tokenizer).train_dataloader()

    def epoch(n):
        loader.batch_sampler.sampler.set_epoch(n)
        return torch.cat([batch["input_ids"] for batch in loader])

    first, second = epoch(0), epoch(1)
    assert not torch.equal(first, second)
    assert torch.equal(epoch(0), first)


def test_rows_are_held_out_where_no_split_is(tokenizer, jsonl):
    path = jsonl({"text": f"sentence number {i}"} for i in range(100))
    counts = module(tokenizer, path).counts()
    assert (counts["train_documents"], counts["val_documents"]) == (95, 5)
    counts = module(tokenizer, path, validation_fraction=0.2).counts()
    assert (counts["train_documents"], counts["val_documents"]) == (80, 20)


def test_the_validation_set_has_the_columns_of_the_training_set(tokenizer, jsonl):
    train = jsonl([{"quote": "Learn this."}], "train.jsonl")
    held_out = jsonl([{"quote": "Measure this.", "text": "Not this."}], "held_out.jsonl")
    (batch,) = module(tokenizer, train, validation_source=held_out).val_dataloader()
    learned = batch["labels"][batch["labels"] != IGNORED]
    assert tokenizer.decode(learned) == "Measure this.<|endoftext|>"
