"""Batches for Lightning: the data set of a run, and the order in which a rank sees its rows.

The batches of a rank are a pure function of (seed, epoch, rank, world), whatever the number of
loader workers, so a position in them is all that a resumed run has to know: the number of batches
of the epoch, or, in data that is streamed in blocks, a block and a row in it.
"""

import itertools
import math
import time
import zlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import build_documents, hold_out
from mamba2_train.data.formats import detect
from mamba2_train.data.packing import EMPTY, Batch, Collator, RowDataset, arrange
from mamba2_train.data.sources import Row, load_rows
from mamba2_train.data.tokenizer import pad_id

GROUP = (
    50  # batches whose rows are sorted by length together; more would make the order less random
)

Blocks = Dataset[list[Batch]]  # item i: the packed rows of the source's i-th block; -1: none


class ShardedSampler(Sampler[int]):
    """Row indices of one rank, a pure function of (seed, epoch, rank, world).

    Every rank gets equally many. Where the rows do not divide, training sees the epoch's first
    ones again, and validation gets empty rows (-1), for each row must be counted exactly once.

    Args:
        lengths: of the rows; given, rows of like length meet in a batch, on all ranks at once.
        batch_size: of one rank; used with `lengths` only.
    """

    def __init__(
        self,
        n_rows: int,
        *,
        seed: int,
        rank: int,
        world: int,
        shuffle: bool,
        repeat: bool,
        lengths: NDArray[np.int64] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.n_rows, self.seed, self.rank, self.world = n_rows, seed, rank, world
        self.shuffle, self.repeat = shuffle, repeat
        self.lengths, self.batch_size = lengths, batch_size
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
        random = np.random.default_rng([self.seed, epoch])
        if self.shuffle:
            order = random.permutation(self.n_rows)
        if self.lengths is not None:
            order = self._grouped(order, random)
        if self.repeat:
            order = np.resize(order, len(self) * self.world)
        else:
            order = np.append(order, np.full(len(self) * self.world - self.n_rows, EMPTY))
        return order[self.rank :: self.world].tolist()

    def _grouped(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Rows sorted by length within some batches at a time, the batches then shuffled.

        A batch of all ranks is a contiguous piece of the order, so they are equally wide."""
        assert self.lengths is not None
        n = self.batch_size * self.world
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(order), n * GROUP):
            some = order[start : start + n * GROUP]
            some = some[np.argsort(-self.lengths[some], kind="stable")]
            batches += np.split(some, range(n, len(some), n))
        # the incomplete one stays last, or it would shift all that follow
        tail = batches.pop() if len(batches[-1]) < n else order[:0]
        if self.shuffle:
            batches = [batches[i] for i in random.permutation(len(batches))]
        return np.concatenate([*batches, tail])


class BatchSampler(Sampler[list[int]]):
    """The rows of each batch; the epoch `start[0]` begins at its batch `start[1]`."""

    def __init__(
        self, sampler: ShardedSampler, batch_size: int, start: tuple[int, int] = (0, 0)
    ) -> None:
        self.sampler = sampler  # Lightning looks for it here, to set the epoch
        self.batch_size = batch_size
        self.start = start

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.sampler.order(self.sampler.epoch)
        skipped = self.start[1] if self.sampler.epoch == self.start[0] else 0
        for i in range(skipped * self.batch_size, len(rows), self.batch_size):
            yield rows[i : i + self.batch_size]


class RowLoader(DataLoader[Batch]):
    """A DataLoader that knows how long it was waited for, in seconds."""

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from _timed(self, super().__iter__())


class BlockLoader:
    """Batches from blocks of rows, in order; the rest of a block begins the next batch.

    For training it never ends: blocks follow one another from epoch to epoch, each epoch in an
    order of its own, and every batch says in `position` which row comes after it: the number of
    the block since the run began, and the row in it. For validation it is one pass.
    """

    waited = 0.0

    def __init__(
        self,
        blocks: Blocks,
        sampler: ShardedSampler,
        collator: Collator,
        *,
        batch_size: int,
        endless: bool,
        start: tuple[int, int] = (0, 0),
        **options: Any,
    ) -> None:
        self.blocks, self.sampler, self.collator = blocks, sampler, collator
        self.batch_size, self.endless, self.start = batch_size, endless, start
        self.options = options  # of the DataLoader that reads the blocks

    def __iter__(self) -> Iterator[Batch]:
        yield from _timed(self, self._batches())

    def _batches(self) -> Iterator[Batch]:
        number, skipped = self.start
        indices: Any = self._indices(number)
        loader = DataLoader(self.blocks, batch_size=None, sampler=indices, **self.options)
        rows: list[Batch] = []
        n_empty = 0
        for number, block in enumerate(loader, number):  # noqa: B020  the same count, continued
            n_empty = 0 if block else n_empty + 1
            assert not self.endless or n_empty <= len(self.sampler), "no block has a row"
            for i, row in enumerate(block[skipped:], skipped + 1):
                rows.append(row)
                if len(rows) == self.batch_size:
                    yield self._batch(rows, (number, i))
                    rows = []
            skipped = 0
        if rows:
            yield self._batch(rows, (number + 1, 0))

    def _indices(self, first: int) -> Iterator[int]:
        start, skipped = divmod(first, len(self.sampler))
        for epoch in itertools.count(start) if self.endless else [start]:
            yield from self.sampler.order(epoch)[skipped:]
            skipped = 0

    def _batch(self, rows: list[Batch], position: tuple[int, int]) -> Batch:
        batch = self.collator(rows)
        return batch | {"position": torch.tensor(position)} if self.endless else batch


class TextDataModule(L.LightningDataModule):
    """Training and held-out batches of a run.

    A batch is a dict of `input_ids` and `labels` (batch, seq_len) int64 and `seq_idx` (batch,
    seq_len) int32: labels are the input ids or -100 where nothing is learned, not shifted;
    seq_idx numbers a row's documents from 0 and is -1 at padding.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.train_data: RowDataset | Blocks | None = None
        self.val_data: RowDataset | Blocks | None = None
        self.position = (0, 0)  # in streamed data: of the row after the batch in training

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and pack, once; raises UserError for whatever is wrong with the data."""
        if self.train_data is not None:
            return
        train, held_out = load_rows(self.config)
        config = detect(train, self.config)
        if held_out is None:
            train, held_out = hold_out(train, config)
        self.val_data = self._rows(held_out, detect(held_out, config))
        self.train_data = self._rows(train, config)

    @property
    def streamed(self) -> bool:
        """Whether the number of training rows is unknown before all of them have been read."""
        return not isinstance(self.train_data, RowDataset)

    def train_dataloader(self) -> RowLoader | BlockLoader:
        """From where the run stands: the trainer's epoch and batch, or `position`."""
        assert self.train_data is not None, "setup() comes first"
        if isinstance(self.train_data, RowDataset):
            t = self.trainer
            start = (t.current_epoch, t.fit_loop.batch_idx + 1) if t else (0, 0)
        else:
            start = self.position
        return self._loader(self.train_data, training=True, start=start)

    def val_dataloader(self) -> RowLoader | BlockLoader:
        assert self.val_data is not None, "setup() comes first"
        return self._loader(self.val_data, training=False)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch is about to be trained on: what follows it is where the run stands."""
        if "position" not in batch:
            return batch
        block, row = batch["position"].tolist()
        self.position = (block, row)
        return {name: value for name, value in batch.items() if name != "position"}

    def batches_per_epoch(self) -> int | None:
        """Of one rank; None for streamed data."""
        if not isinstance(self.train_data, RowDataset):
            return None
        return len(BatchSampler(self._sampler(self.train_data, True), self.config.batch_size))

    def counts(self) -> dict[str, int | float]:
        """`train_` and `val_` with documents, tokens, dropped and long (rows of the source), rows
        (of the batches), documents_per_row, and packing_efficiency: real tokens over slots."""
        assert self.train_data is not None, "setup() comes first"
        found: dict[str, int | float] = {}
        for part, data in (("train", self.train_data), ("val", self.val_data)):
            if isinstance(data, RowDataset):
                documents = data.documents
                found |= {f"{part}_{name}": count for name, count in documents.counts.items()} | {
                    f"{part}_rows": len(data),
                    f"{part}_documents_per_row": round(len(documents) / len(data), 2),
                    f"{part}_packing_efficiency": round(self._efficiency(data, part), 4),
                }
        return found

    def fingerprint(self) -> int:
        """Checksum of every token, what is learned of it, and where documents end.

        Of streamed data: of their first and their last block, and of the number of blocks."""
        checksum = 0
        for data in (self.train_data, self.val_data):
            if isinstance(data, RowDataset):
                d = data.documents
                parts: Any = (d.tokens, d.learned, d.bounds)
            else:
                n: int = len(data)  # type: ignore[arg-type]
                rows = [row for i in sorted({0, n - 1}) for row in data[i]]  # type: ignore[index]
                parts = [np.array(n), *(t.numpy() for row in rows for t in row.values())]
            for part in parts:
                checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
        return checksum

    def _rows(self, rows: list[Row], config: DataConfig) -> RowDataset:
        documents = build_documents(rows, self.tokenizer, config)
        return arrange(documents, config.seq_len, config.packing)

    def _efficiency(self, data: RowDataset, part: str) -> float:
        lengths = data.lengths
        if self.config.packing != "none":
            return float(lengths.sum() / (len(lengths) * self.config.seq_len))
        # as wide as the longest of a batch, and every rank's batch as its first rank's, nearly
        sampler = self._sampler(data, part == "train")
        batches = [lengths[b] for b in BatchSampler(sampler, self.config.batch_size)]
        return sum(int(b.sum()) for b in batches) / sum(len(b) * int(b.max()) for b in batches)

    def _sampler(self, data: RowDataset | Blocks, training: bool) -> ShardedSampler:
        # a strategy with tensor parallelism counts its data-parallel ranks here
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        grouped = training and self.config.length_grouped and isinstance(data, RowDataset)
        return ShardedSampler(
            len(data),  # type: ignore[arg-type]  # blocks have a length too
            seed=self.seed,
            rank=ranks.get("rank", 0),
            world=ranks.get("num_replicas", 1),
            shuffle=training and self.config.shuffle,
            repeat=training,
            lengths=data.lengths if grouped else None,  # type: ignore[union-attr]
            batch_size=self.config.batch_size,
        )

    def _loader(
        self, data: RowDataset | Blocks, *, training: bool, start: tuple[int, int] = (0, 0)
    ) -> RowLoader | BlockLoader:
        config = self.config
        sampler = self._sampler(data, training)
        collator = Collator(
            pad_id(self.tokenizer),
            config.padding_side,
            config.seq_len if config.packing != "none" else None,
        )
        options: dict[str, Any] = {
            "num_workers": config.num_workers,
            "pin_memory": torch.cuda.is_available(),
            # a loader without one draws from the generator that dropout draws from
            "generator": torch.Generator().manual_seed(self.seed),
        }
        if not isinstance(data, RowDataset):
            return BlockLoader(
                data,
                sampler,
                collator,
                batch_size=config.batch_size,
                endless=training,
                start=start,
                **options,
            )
        return RowLoader(
            data,
            batch_sampler=BatchSampler(sampler, config.batch_size, start),
            collate_fn=collator,
            persistent_workers=config.num_workers > 0,
            **options,
        )


def _timed(loader: RowLoader | BlockLoader, batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        loader.waited += time.perf_counter() - started
        if batch is None:
            return
        yield batch
