"""Three steps over batches of very unequal token counts; the weights go to the file named.

Run by tests/test_module.py, alone or under torchrun. Batch i of a step is rank i's, or the i-th
micro-batch of one process.
"""

import argparse

import lightning as L
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.schema import AdamWConfig, ExactConfig, SchedulerConfig

STEPS = 3
LENGTHS = (2, 23, 9, 17)  # of the documents of a step: 1, 22, 8 and 16 tokens are predicted


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(STEPS * len(LENGTHS)):
        length = LENGTHS[i % len(LENGTHS)]
        ids = torch.randint(0, 64, (1, 24), generator=generator)
        seq_idx = torch.zeros(1, 24, dtype=torch.int32)
        seq_idx[:, length:] = -1
        labels = ids.masked_fill(seq_idx < 0, -100)
        made.append({"input_ids": ids, "labels": labels, "seq_idx": seq_idx})
    return made


def merged(group: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([b[key] for b in group]) for key in group[0]}


class CountExchanges(L.Callback):
    """How often the ranks have averaged gradients; the model is one bucket."""

    count = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        ddp = trainer.strategy.model
        if isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
            ddp.register_comm_hook(None, self.hook)

    def hook(self, group, bucket):
        self.count += 1
        return allreduce_hook(group, bucket)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--segment-len", type=int, default=None)
    arguments = parser.parse_args()
    model = initialize(
        Mamba2LM(Mamba2Config(d_model=32, n_layers=1, vocab_size=64, d_state=16, headdim=16))
    ).double()
    module = Mamba2Module(
        model,
        AdamWConfig(kind="adamw", lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
        SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0),
        total_steps=STEPS,
        long_context=arguments.segment_len
        and ExactConfig(kind="exact", segment_len=arguments.segment_len),
    )
    exchanges = CountExchanges()
    trainer = L.Trainer(
        callbacks=exchanges,
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        precision="64-true",
        max_steps=STEPS,
        accumulate_grad_batches=arguments.accumulate,
        gradient_clip_val=arguments.clip,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    share = len(LENGTHS) // (arguments.accumulate * arguments.devices)
    everything = batches()
    grouped = [merged(everything[i : i + share]) for i in range(0, len(everything), share)]
    mine = grouped[trainer.global_rank :: arguments.devices]
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
    if trainer.is_global_zero:
        metrics = {k: v.double() for k, v in trainer.callback_metrics.items()}
        made = {"weights": model.state_dict(), "metrics": metrics, "exchanges": exchanges.count}
        torch.save(made, arguments.out)
    trainer.strategy.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
