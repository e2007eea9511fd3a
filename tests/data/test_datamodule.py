import numpy as np
import pytest
import torch

from mamba2_train.data.config import DataConfig
from mamba2_train.data.datamodule import ShardedSampler, TextDataModule
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
@pytest.mark.parametrize("packing", ["bfd", "none"])
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
            assert ids.shape[1] == 256 if packing == "bfd" else not padding.all(0).any()
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
    if packing == "bfd":
        assert counts["train_tokens"] / (counts["train_rows"] * 256) > 0.97


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


def test_workers_change_nothing(tokenizer):
    plain = list(module(tokenizer).train_dataloader())
    worked = list(module(tokenizer, num_workers=1).train_dataloader())
    for a, b in zip(plain, worked, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_epochs_differ_and_come_again(tokenizer):
    loader = module(tokenizer).train_dataloader()

    def epoch(n):
        loader.sampler.set_epoch(n)
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
