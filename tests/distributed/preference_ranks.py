"""Three steps of objective=dpo over rows of very unequal numbers of pairs, in float64.

    torchrun --nproc-per-node 2 preference_ranks.py FOLDER STRATEGY...

FOLDER/base holds the checkpoint; the metrics and weights of a strategy go to FOLDER/STRATEGY.pt.
Run by tests/test_preference.py, which calls `run` for one process. Row i of a step is rank i's.
"""

import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from mamba2_train.adapters import add_lora
from mamba2_train.checkpoint import StoredWeights, load_config, load_pretrained
from mamba2_train.parallel.shards import whole_tensors
from mamba2_train.parallel.sizes import Sizes
from mamba2_train.parallel.start import Sharding, sharded_model, stored
from mamba2_train.parallel.strategy import MeshStrategy
from mamba2_train.preference import PreferenceModule
from mamba2_train.schema import AdamWConfig, DpoConfig, SchedulerConfig

STEPS = 3
PAIRS = (1, 4, 2, 1)  # of the rows of a step
SIZES = {"fsdp": Sizes(2, 1), "tp": Sizes(1, 2)}
METRICS = ("loss", "grad_norm", "rewards/margins", "rewards/accuracy", "logps/chosen")


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(STEPS * len(PAIRS)):
        lengths = torch.randint(3, 7, (2 * PAIRS[i % len(PAIRS)],), generator=generator)
        ids = torch.randint(0, 80, (1, 50), generator=generator)
        seq_idx = torch.full((1, 50), -1, dtype=torch.int32)
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        seq_idx[0, : len(numbers)] = numbers.int()
        labels = ids.masked_fill(seq_idx < 0, -100)
        labels[0, 1:][seq_idx.diff(dim=1)[0] != 0] = -100  # a prompt of one token
        made.append({"input_ids": ids, "labels": labels, "seq_idx": seq_idx})
    return made


def adapt(model):
    """LoRA with neither factor at zero."""
    adapter = add_lora(model, ["in_proj", "out_proj", "embeddings"], r=3, alpha=6)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return adapter


class Recorded(PreferenceModule):
    def on_fit_start(self):
        self.metrics = []

    def on_train_batch_end(self, *_):
        if not self.trainer.fit_loop._should_accumulate():
            found = self.trainer.callback_metrics
            self.metrics.append([found[f"train/{name}"].item() for name in METRICS])


def run(folder: Path, kind: str, accumulate: int, devices: int = 1) -> dict:
    """What the first rank has in the end."""
    strategy = MeshStrategy(SIZES[kind]) if kind in SIZES else ("ddp" if devices > 1 else "auto")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision="32-true" if kind in SIZES else "64-true",  # the dtypes are ours
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    base = folder / "base"
    if isinstance(strategy, MeshStrategy):
        model, _ = sharded_model(
            load_config(base),
            stored(StoredWeights(base)),
            adapt,
            Sharding(strategy.start()),
            dtype=torch.float64,
            quantization=None,
        )
    else:
        model = load_pretrained(base, dtype=torch.float64)
        adapt(model)
        model.double()
    module = Recorded(
        model,
        AdamWConfig(kind="adamw", lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
        SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0),
        STEPS,
        objective=DpoConfig(kind="dpo", beta=0.3),
    )
    ranks = {"rank": trainer.global_rank, "num_replicas": devices}
    if isinstance(strategy, MeshStrategy):
        ranks = strategy.distributed_sampler_kwargs
    share = len(PAIRS) // (accumulate * ranks["num_replicas"])
    everything = rows()
    grouped = [everything[i : i + share] for i in range(0, len(everything), share)]
    mine = [
        {key: torch.cat([row[key] for row in some]) for key in some[0]}
        for some in grouped[ranks["rank"] :: ranks["num_replicas"]]
    ]
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
    trained = whole_tensors(model, lambda p: p.detach() if p.requires_grad else None)
    return {"metrics": torch.tensor(module.metrics), "weights": dict(trained)}


def main() -> None:
    folder = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        found = run(folder, kind, 2, devices=2)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
