"""The data of a run as Lightning wants it: read, tokenized, packed, and given out in batches."""

from typing import Any

import lightning as L
import torch

from mamba2_train.data.cache import digest
from mamba2_train.data.chat import set_template
from mamba2_train.data.config import DataConfig
from mamba2_train.data.documents import load_documents
from mamba2_train.data.loaders import (
    BatchSampler,
    BlockLoader,
    LaneSampler,
    RowLoader,
    ShardedSampler,
    stand_apart,
)
from mamba2_train.data.packing import Batch, Collator, LaneDataset, RowDataset, arrange
from mamba2_train.data.streaming import BlockDataset, open_stream
from mamba2_train.data.tokenizer import pad_id


class TextDataModule(L.LightningDataModule):
    """Training and held-out batches of a run.

    A batch is a dict of `input_ids` and `labels` (batch, seq_len) int64 and `seq_idx` (batch,
    seq_len) int32: labels are the input ids or -100 where nothing is learned, not shifted;
    seq_idx numbers a row's documents from 0 and is -1 at padding. With packing=continued the labels
    are `shift_labels`, each where it is predicted, and seq_idx numbers an epoch's documents. With
    loss_on=pairs documents 2k and 2k + 1 of a row are the chosen and the rejected answer of one
    pair.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        set_template(tokenizer, config.chat_template)
        self.tokenizer = tokenizer
        self.seed = seed
        self.train_data: RowDataset | BlockDataset | None = None
        self.val_data: RowDataset | None = None
        self.position = (0, 0)  # in streamed data: of the row after the batch in training

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and pack, once; raises UserError for whatever is wrong with the data."""
        if self.train_data is not None:
            return
        config = self.config
        if config.streaming:
            self.train_data, held_out = open_stream(config, self.tokenizer, self.seed)
        else:
            train, held_out = load_documents(config, self.tokenizer)
            self.train_data = arrange(train, config.seq_len, config.packing, config.together)
        self.val_data = arrange(held_out, config.seq_len, config.packing, config.together)

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
        """`train_` and `val_` with documents, tokens, dropped, skipped and long (rows of the
        source), rows (of the batches), documents_per_row, and packing_efficiency: real tokens over
        slots. Of streamed training data: source_rows, skipped, blocks."""
        assert self.train_data is not None, "setup() comes first"
        assert self.val_data is not None
        found: dict[str, int | float] = {}
        for part, data in (("train", self.train_data), ("val", self.val_data)):
            counts: dict[str, Any] = data.counts
            if isinstance(data, RowDataset):
                counts = counts | {"packing_efficiency": round(self._efficiency(data, part), 4)}
            found |= {f"{part}_{name}": count for name, count in counts.items()}
        return found

    def fingerprint(self) -> str:
        """Tells these data from others, whatever they are called and wherever they are."""
        assert self.train_data is not None, "setup() comes first"
        assert self.val_data is not None
        return digest(self.train_data.fingerprint(), self.val_data.fingerprint())

    def _efficiency(self, data: RowDataset, part: str) -> float:
        lengths = data.lengths
        if self.config.packing != "none":
            return float(lengths.sum() / (len(lengths) * self.config.seq_len))
        # as wide as the longest of a batch, and every rank's batch as its first rank's, nearly
        sampler = self._sampler(data, part == "train")
        batches = [lengths[b] for b in BatchSampler(sampler, self.config.batch_size)]
        return sum(int(b.sum()) for b in batches) / sum(len(b) * int(b.max()) for b in batches)

    def _sampler(
        self, data: RowDataset | BlockDataset, training: bool
    ) -> ShardedSampler | LaneSampler:
        # a strategy with tensor parallelism counts its data-parallel ranks here
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        if isinstance(data, LaneDataset):
            return LaneSampler(
                len(data.documents.tokens),
                self.config.seq_len,
                seed=self.seed,
                rank=ranks.get("rank", 0),
                world=ranks.get("num_replicas", 1),
                shuffle=training and self.config.shuffle,
                batch_size=self.config.batch_size,
            )
        grouped = training and self.config.length_grouped
        return ShardedSampler(
            len(data),
            seed=self.seed,
            rank=ranks.get("rank", 0),
            world=ranks.get("num_replicas", 1),
            shuffle=training and self.config.shuffle,
            repeat=training,
            lengths=data.lengths if grouped and isinstance(data, RowDataset) else None,
            batch_size=self.config.batch_size,
        )

    def _loader(
        self, data: RowDataset | BlockDataset, *, training: bool, start: tuple[int, int] = (0, 0)
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
            "worker_init_fn": stand_apart,
        }
        if not isinstance(data, RowDataset):
            assert isinstance(sampler, ShardedSampler)
            return BlockLoader(
                data,
                sampler,
                collator,
                batch_size=config.batch_size,
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
