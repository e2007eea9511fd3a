"""What a training step costs, counted: operations, products, bytes, and waits for the device.

No time is measured. A figure that rises here is a cost that every user pays at each step; a limit is
raised only by whoever can say what it buys.
"""

from collections import Counter

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mamba2_train.adapters import add_lora
from mamba2_train.memory import LiveMemory
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.nonfinite import NonFinite
from mamba2_train.schema import AdamWConfig, SchedulerConfig

TOKENS, LAYERS = 96, 3
CONFIG = Mamba2Config(
    d_model=64, n_layers=LAYERS, vocab_size=128, d_state=16, headdim=32, chunk_size=32
)
TARGETS = ["embeddings", "in_proj", "out_proj"]
# the host waits for a GPU: it asks for a value, or for a shape that depends on values
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.rpartition("::")[2]] += 1
        if func is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            self.seen["nonzero"] += len(masks)
        return func(*args, **(kwargs or {}))


def model_of(kind):
    model = initialize(Mamba2LM(CONFIG))
    if kind == "lora":
        add_lora(model, TARGETS, r=4, alpha=4)
    return model


def batch_of():
    ids = torch.arange(TOKENS)[None] % CONFIG.vocab_size
    labels = ids.masked_fill(ids % 3 == 0, -100)
    return {"input_ids": ids, "labels": labels, "seq_idx": torch.zeros_like(ids).int()}


class NoSaver:
    control = None


def operations(kind, tmp_path, n_steps):
    """Of a run of `mamba2-train`'s module, with what watches over its steps."""
    optimizer = AdamWConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    scheduler = SchedulerConfig(
        kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0, decay_fraction=0.2
    )
    nonfinite = NonFinite("stop", 0, NoSaver(), tmp_path)
    module = Mamba2Module(model_of(kind), optimizer, scheduler, n_steps, nonfinite=nonfinite)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=n_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[nonfinite],
    )
    with Operations() as count:
        trainer.fit(module, torch.utils.data.DataLoader([batch_of()] * n_steps, batch_size=None))
    assert trainer.global_step == n_steps
    return count.seen


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_operations_and_waits(kind, tmp_path):
    few, many = (operations(kind, tmp_path, n) for n in (2, 4))
    step = {name: (n - few[name]) / 2 for name, n in many.items()}
    waits = {name: n for name, n in step.items() if name in WAITS and n}
    print(kind, sum(step.values()), waits)
    print(sorted(step.items(), key=lambda x: -x[1])[:25])
