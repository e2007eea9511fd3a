"""Batches for Lightning: the data set of a run, and the order in which a rank sees its rows."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mamba2_train.data.chat import set_template
from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import load_documents
from mamba2_train.data.packing import EMPTY, Batch, Collator, RowDataset, arrange
from mamba2_train.data.streaming import BlockDataset, open_stream
from mamba2_train.data.tokenizer import pad_id


class ShardedSampler(Sampler[int]):
    """Row indices of one rank, a pure function of (seed, epoch, rank, world).

    Every rank gets equally many. Where the rows do not divide, training sees the epoch's first
    ones again, and validation gets empty rows (-1), for each row must be counted exactly once.
    """

    def __init__(
        self, n_rows: int, *, seed: int, rank: int, world: int, shuffle: bool, repeat: bool
    ) -> None:
        self.n_rows, self.seed, self.rank, self.world = n_rows, seed, rank, world
        self.shuffle, self.repeat = shuffle, repeat
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.n_rows / self.world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """This rank's rows of an epoch, in order."""
        order = np.arange(self.n_rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
        if self.repeat:
            order = np.resize(order, len(self) * self.world)
        else:
            order = np.append(order, np.full(len(self) * self.world - self.n_rows, EMPTY))
        return order[self.rank :: self.world].tolist()


class TextDataModule(L.LightningDataModule):
    """Training and held-out batches of a run.

    A batch is a dict of `input_ids` and `labels` (batch, seq_len) int64 and `seq_idx` (batch,
    seq_len) int32: labels are the input ids or -100 where nothing is learned, not shifted;
    seq_idx numbers a row's documents from 0 and is -1 at padding.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        set_template(tokenizer, config.chat_template)
        self.tokenizer = tokenizer
        self.seed = seed
        self.train_data: RowDataset | BlockDataset | None = None
        self.val_data: RowDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and pack, once; raises UserError for whatever is wrong with the data."""
        if self.train_data is not None:
            return
        config = self.config
        if config.streaming:
            self.train_data, held_out = open_stream(config, self.tokenizer, self.seed)
        else:
            train, held_out = load_documents(config, self.tokenizer)
            self.train_data = arrange(train, config.seq_len, config.packing)
        self.val_data = arrange(held_out, config.seq_len, config.packing)

    def train_dataloader(self) -> DataLoader[Batch]:
        assert isinstance(self.train_data, RowDataset), "setup() comes first"
        return self._loader(self.train_data, shuffle=self.config.shuffle, repeat=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        assert self.val_data is not None, "setup() comes first"
        return self._loader(self.val_data, shuffle=False, repeat=False)

    def counts(self) -> dict[str, int]:
        """`train_` and `val_` with documents, tokens, dropped, skipped and long (rows of the
        source), and rows (of the batches); of streamed data, source_rows, skipped and blocks."""
        assert self.train_data is not None, "setup() comes first"
        assert self.val_data is not None
        found: dict[str, int] = {}
        for part, data in (("train", self.train_data), ("val", self.val_data)):
            if isinstance(data, RowDataset):
                counts = {**data.documents.counts, "rows": len(data)}
            else:
                counts = data.counts
            found |= {f"{part}_{name}": count for name, count in counts.items()}
        return found

    def _loader(self, data: RowDataset, *, shuffle: bool, repeat: bool) -> DataLoader[Batch]:
        # a strategy with tensor parallelism counts its data-parallel ranks here
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = ShardedSampler(
            len(data),
            seed=self.seed,
            rank=ranks.get("rank", 0),
            world=ranks.get("num_replicas", 1),
            shuffle=shuffle,
            repeat=repeat,
        )
        config = self.config
        return DataLoader(
            data,
            batch_size=config.batch_size,
            sampler=sampler,
            collate_fn=Collator(
                pad_id(self.tokenizer),
                config.padding_side,
                config.seq_len if config.packing == "bfd" else None,
            ),
            num_workers=config.num_workers,
            persistent_workers=config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
