"""The order in which a rank sees its rows, and the loaders that bring them.

The batches of a rank are a pure function of (seed, epoch, rank, world), whatever the number of
loader workers, so a position in them is all that a resumed run has to know: the number of batches
of the epoch, or, in data that is streamed in blocks, a block and a row in it.
"""

import itertools
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from mamba2_train.data.packing import EMPTY, Batch, Collator, Span
from mamba2_train.data.streaming import BlockDataset
from mamba2_train.errors import UserError

GROUP = 50  # batches sorted by length together: with more, the order would be less random


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


class LaneSampler(Sampler[Span]):
    """The rows of one rank where an epoch's documents stand end to end in equal lanes, one for each
    row of a batch of all ranks: batch after batch, each lane goes on where it stopped.

    Args:
        n_tokens: of all documents.
        batch_size: lanes of one rank.
        shuffle: the documents stand in another order each epoch.
    """

    def __init__(
        self,
        n_tokens: int,
        seq_len: int,
        *,
        seed: int,
        rank: int,
        world: int,
        shuffle: bool,
        batch_size: int,
    ) -> None:
        self.n_tokens, self.seq_len, self.seed = n_tokens, seq_len, seed
        self.rank, self.world = rank, world
        self.shuffle, self.batch_size = shuffle, batch_size
        self.lane_len = -(-n_tokens // (batch_size * world))
        self.epoch = 0

    def __len__(self) -> int:
        return self.batch_size * -(-self.lane_len // self.seq_len)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.order(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[Span]:
        """This rank's rows of an epoch, in order; lane l of all is of rank l % world."""
        seed = (self.seed, epoch) if self.shuffle else None
        lanes = range(self.rank, self.batch_size * self.world, self.world)

        def span(lane: int, step: int) -> Span:
            end = min((lane + 1) * self.lane_len, self.n_tokens)
            start = min(lane * self.lane_len + step, end)
            return Span(seed, start, min(start + self.seq_len, end))

        steps = range(0, self.lane_len, self.seq_len)
        return [span(lane, step) for step in steps for lane in lanes]


class BatchSampler(Sampler[list[Any]]):
    """The rows of each batch; the epoch `start[0]` begins at its batch `start[1]`."""

    def __init__(
        self,
        sampler: ShardedSampler | LaneSampler,
        batch_size: int,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.sampler = sampler  # Lightning looks for it here, to set the epoch
        self.batch_size = batch_size
        self.start = start

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        rows: list[Any] = self.sampler.order(self.sampler.epoch)
        skipped = self.start[1] if self.sampler.epoch == self.start[0] else 0
        for i in range(skipped * self.batch_size, len(rows), self.batch_size):
            yield rows[i : i + self.batch_size]


class RowLoader(DataLoader[Batch]):
    """A DataLoader that knows how long it was waited for, in seconds."""

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from _timed(self, super().__iter__())


class BlockLoader:
    """Batches from blocks of rows, in order and without end; the rest of a block begins the next
    batch.

    Blocks follow one another from epoch to epoch, each epoch in an order of its own, and every
    batch says in `position` which row comes after it: the number of the block since the run began,
    and the row in it.
    """

    waited = 0.0

    def __init__(
        self,
        blocks: BlockDataset,
        sampler: ShardedSampler,
        collator: Collator,
        *,
        batch_size: int,
        start: tuple[int, int] = (0, 0),
        **options: Any,
    ) -> None:
        self.blocks, self.sampler, self.collator = blocks, sampler, collator
        self.batch_size, self.start = batch_size, start
        self.options = options  # of the DataLoader that reads the blocks

    def __iter__(self) -> Iterator[Batch]:
        yield from _timed(self, self._batches())

    def _batches(self) -> Iterator[Batch]:
        first, skipped = self.start
        indices: Any = self._indices(first)
        loader = DataLoader(self.blocks, batch_size=None, sampler=indices, **self.options)
        rows: list[Batch] = []
        n_empty = 0
        for number, block in enumerate(loader, first):
            n_empty = 0 if block else n_empty + 1
            if n_empty > len(self.sampler):
                raise UserError("none of the streamed rows leaves anything to learn")
            for i, row in enumerate(block[skipped:], skipped + 1):
                rows.append(row)
                if len(rows) == self.batch_size:
                    yield self.collator(rows) | {"position": torch.tensor((number, i))}
                    rows = []
            skipped = 0

    def _indices(self, first: int) -> Iterator[int]:
        start, skipped = divmod(first, len(self.sampler))
        for epoch in itertools.count(start):
            yield from self.sampler.order(epoch)[skipped:]
            skipped = 0


def stand_apart(worker: int) -> None:
    """In a worker: torchrun and a terminal signal whole groups of processes, and the batches of the
    step in which its owner is asked to stop are still needed. It ends with its owner."""
    os.setpgid(0, 0)


def _timed(loader: RowLoader | BlockLoader, batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        loader.waited += time.perf_counter() - started
        if batch is None:
            return
        yield batch
