"""Data larger than memory: tokenized and packed block by block, when a loader's worker asks.

A block is a fixed stretch of the source, so what it becomes depends on nothing else, and the order
of training is the order of the blocks: a function of the seed and the epoch, whoever builds them.
"""

import logging
import os
from typing import Any

import numpy as np
import torch

from mamba2_train.data.cache import digest
from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import (
    Documents,
    documents_of,
    load_held_out_documents,
    load_parts,
)
from mamba2_train.data.mixing import Mixture
from mamba2_train.data.packing import Batch, arrange
from mamba2_train.errors import UserError

logger = logging.getLogger(__name__)


class Block(list[Batch]):
    """Rows that go from a worker to the run by value: torch would open a file for every tensor, of
    which there are more than a process may have."""

    def __reduce__(self) -> Any:
        names = list(self[0]) if self else []
        lengths = [len(row[name]) for row in self for name in names[:1]]
        return _block, (lengths, {n: torch.cat([row[n] for row in self]).numpy() for n in names})


def _block(lengths: list[int], arrays: dict[str, Any]) -> Block:
    parts = {name: torch.from_numpy(a).split(lengths) for name, a in arrays.items()}
    return Block({name: parts[name][i] for name in parts} for i in range(len(lengths)))


class BlockDataset(torch.utils.data.Dataset[list[Batch]]):
    """Item i is block i as its packed rows, `input_ids`, `labels` and `seq_idx` of their own
    length (see RowDataset), in an order that the seed and i decide."""

    def __init__(self, mixture: Mixture, tokenizer: Any, config: DataConfig, seed: int) -> None:
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        return len(self.mixture)

    @property
    def counts(self) -> dict[str, int | float]:
        """What is known before all of it has been read: source_rows, skipped, blocks."""
        mixture = self.mixture
        return {
            "source_rows": mixture.n_rows,
            "skipped": mixture.skipped,
            "blocks": len(mixture),
        }

    def fingerprint(self) -> str:
        """Of the files as they are, and of what the settings make of the first block."""
        first = [tensor.numpy().data for row in self[0] for tensor in row.values()]
        return digest(str(len(self)), self.mixture.content(), *first)

    def __getitem__(self, index: int) -> Block:
        if torch.utils.data.get_worker_info() is not None:
            # the workers share the cores, and a forked tokenizer that had threads says so at length
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        faults: list[str] = []
        documents = documents_of(self.mixture.block(index), self.tokenizer, faults)
        if n := documents.counts["skipped"]:
            logger.warning("skipped %d rows of block %d; the first: %s", n, index, faults[0])
        config = self.config
        packed = arrange(documents, config.seq_len, config.packing, config.together)
        order = np.arange(len(packed))
        if self.config.shuffle:  # packing sorts by length
            order = np.random.default_rng([self.seed, index]).permutation(len(packed))
        return Block(packed[i] for i in order.tolist())


def open_stream(config: DataConfig, tokenizer: Any, seed: int) -> tuple[BlockDataset, Documents]:
    """Blocks to train on, and the held-out documents."""
    mixture, held_out = load_parts(config, config.block_rows)
    if not held_out:
        raise UserError(
            f"{config.title} has no rows to validate on, and streamed data are not read ahead to "
            "hold some out: set data.validation_source, or data.split='train[1000:]' "
            "data.validation_split='train[:1000]'"
        )
    return BlockDataset(mixture, tokenizer, config, seed), load_held_out_documents(
        held_out, config, tokenizer
    )
