"""Six steps under a strategy that shards, by two ranks with unequal numbers of tokens.

    torchrun --nproc-per-node 2 sharded_steps.py FOLDER DATAxTENSOR[xCONTEXT] CASE... [SIZES ...]

FOLDER holds checkpoints `float32` and `float64` and, for `memory`, `large`; the results of a case
go to FOLDER/SIZES-CASE.pt. A case is VARIANT-DTYPE[-OPTION], under DDP where DTYPE begins with
`ddp_`; see `run`. `memory` is a case of its own. Run by tests/test_sharded.py, which takes
`batches` and `adapt` from here too.
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from mamba2_train import module as training
from mamba2_train.adapters import add_lora
from mamba2_train.checkpoint import StoredWeights, load_config, load_pretrained
from mamba2_train.module import Mamba2Module
from mamba2_train.parallel.shards import mesh_of, whole_tensors
from mamba2_train.parallel.sizes import Sizes
from mamba2_train.parallel.start import Sharding, sharded_model, stored
from mamba2_train.parallel.strategy import MeshStrategy
from mamba2_train.schema import AdamWConfig, ExactConfig, SchedulerConfig

STEPS, ACCUMULATE, CLIP = 6, 2, 0.5
LENGTHS = (2, 23, 9, 17, 3, 11)  # tokens of a micro-batch: no two ranks of a step have as many
OPTIMIZER = AdamWConfig(kind="adamw", lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
QUANTIZED = ("nf4", "int8")
SEGMENT_LEN = 7


def batches():
    """Those of a step one after the other: rank by rank of a micro-batch, then of the next."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(STEPS * ACCUMULATE * 2):
        length = LENGTHS[i % len(LENGTHS)]
        ids = torch.randint(0, 80, (1, 24), generator=generator)
        seq_idx = torch.zeros(1, 24, dtype=torch.int32)
        seq_idx[:, length:] = -1
        labels = ids.masked_fill(seq_idx < 0, -100)
        made.append({"input_ids": ids, "labels": labels, "seq_idx": seq_idx})
    return made


def adapt(model, variant):
    """LoRA with neither factor at zero, on all that it can be on; the convolution beside it."""
    if variant == "full":
        return None
    targets = ["in_proj", "out_proj", "embeddings"]
    in_full = ["conv1d", "A_log", "norm"]
    adapter = add_lora(model, targets, r=3, alpha=6, in_full=in_full)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return adapter


def gradient(p):
    return p.grad if p.requires_grad else None


class Recorded(Mamba2Module):
    """Keeps the loss of every step, and the gradients of the first as they are before clipping."""

    def on_fit_start(self):
        self.losses, self.gradients = [], {}
        self.dtypes = seen_dtypes(self.model)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if not self.gradients:
            self.gradients = {n: g.clone() for n, g in whole_tensors(self.model, gradient)}
        self.losses.append(self.trainer.callback_metrics["train/loss"].item())


def seen_dtypes(model):
    """By name, what a block computes with, filled in by its forward passes."""
    seen = {}
    block = model.backbone.layers[0]
    projection = block.mixer.in_proj
    base = getattr(projection, "base_layer", projection)

    def look(module, inputs, output):
        seen["in_proj.weight"] = next(
            p.dtype for name, p in base.named_parameters() if name.startswith("weight")
        )
        seen["in_proj"] = output.dtype
        seen["A_log"] = block.mixer.A_log.dtype
        seen["norm"] = block.norm.weight.dtype
        for name, p in projection.named_parameters():
            if "lora_" in name:
                seen["lora"] = p.dtype

    base.register_forward_hook(look)
    block.register_forward_hook(lambda *call: seen.update(stream=call[-1][0].dtype))
    return seen


class MeanOfMeans(Recorded):
    """Each rank's own mean: a token weighs by how empty its batch is."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / (batch["labels"] != -100).sum()


def build(folder, variant, dtype, strategy, source="float32", products=None):
    if not isinstance(strategy, MeshStrategy):
        kind = variant if variant in QUANTIZED else None
        model = load_pretrained(folder / source, dtype=dtype, quantization=kind)
        return model, adapt(model, variant)
    return sharded_model(
        load_config(folder / source),
        stored(StoredWeights(folder / source)),
        lambda model: adapt(model, variant),
        Sharding(strategy.start(), products=products, context=strategy.context),
        dtype=dtype,
        quantization="nf4" if variant == "nf4" else None,
    )


def run(folder, sizes, case):
    variant, dtype, option = (*case.split("-"), "")[:3]
    strategy = MeshStrategy(sizes, reduce_each_batch=option == "each")
    ddp, dtype = dtype.startswith("ddp_"), dtype.removeprefix("ddp_")
    kind = MeanOfMeans if option == "means" else Recorded
    average = training.average_replicated
    if option == "unreduced":
        training.average_replicated = lambda *_: None
    mixed = option == "mixed"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="ddp" if ddp else strategy,
        precision="bf16-mixed" if mixed else "32-true",  # otherwise the dtypes are ours
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    source = dtype if dtype == "float64" else "float32"
    products = torch.bfloat16 if mixed else None
    model, _ = build(folder, variant, DTYPES[dtype], trainer.strategy, source, products)
    model.set_checkpointing("full" if variant == "lora" else "none")
    if option == "compiled":
        model.compile_blocks(backend="aot_eager")
    module = kind(
        model,
        OPTIMIZER,
        SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0),
        total_steps=STEPS,
        long_context=ExactConfig(kind="exact", segment_len=SEGMENT_LEN)
        if option == "exact"
        else None,
    )
    ranks = {"num_replicas": 2, "rank": int(os.environ["RANK"])}
    ranks = ranks if ddp else strategy.distributed_sampler_kwargs
    share = 2 // ranks["num_replicas"]  # of the two batches that are seen at once
    everything = batches()
    mine = [
        {key: torch.cat([b[key] for b in everything[i : i + share]]) for key in everything[0]}
        for i in range(ranks["rank"] * share, len(everything), 2)
    ]
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
    training.average_replicated = average
    weights = dict(whole_tensors(model, lambda p: p.detach() if p.requires_grad else None))
    found = {"losses": module.losses, "gradients": module.gradients, "weights": weights}
    if dist.get_rank() == 0:
        found["dtypes"] = module.dtypes
        name = "x".join(map(str, sizes if sizes.context > 1 else sizes[:2]))
        torch.save(found, folder / f"{name}-{case}.pt")


def measure(folder):
    """Bytes by which this process grew at most while the large model was built, and its share."""
    strategy = MeshStrategy(Sizes(int(os.environ["WORLD_SIZE"]), 1))
    L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, barebones=True)
    strategy.start()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    model, _ = build(folder, "full", torch.float32, strategy, "large")
    grown = _status("VmHWM") - before
    assert mesh_of(model) is not None
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (grown, held))
    if dist.get_rank() == 0:
        torch.save(found, folder / "memory.pt")


def _status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def main():
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        if case[0].isdigit():
            sizes = Sizes(*map(int, case.split("x")))
        elif case == "memory":
            measure(folder)
        else:
            run(folder, sizes, case)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
