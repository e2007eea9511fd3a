"""What a training step costs, counted: operations, products, bytes, and waits for the device.

No time is measured. A figure that rises here is a cost that every user pays at each step; a limit
is raised only by whoever can say what it buys.
"""

from collections import Counter

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mamba2_train.adapters import add_lora
from mamba2_train.callbacks import ProgressBar, Throughput
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
VIEWS = {"view", "t", "detach", "_unsafe_view", "squeeze", "unsqueeze", "split_with_sizes", "split"}
VIEWS |= {"slice", "select", "permute", "expand", "transpose", "as_strided", "alias", "unbind"}
VIEWS |= {"_record_function_enter_new", "_record_function_exit"}
# operations of a step of three layers that compute something; each of our own counts as one
LAUNCHES = {"lora": 193, "full": 142}
PEAK = {"lora": 1_421_448, "full": 1_475_512}  # bytes above the weights


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
    """Of a run of `mamba2-train`'s module with what watches over its steps, none of them logged."""
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
        log_every_n_steps=50,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Throughput(), ProgressBar(), nonfinite],
    )
    with Operations() as count:
        trainer.fit(module, torch.utils.data.DataLoader([batch_of()] * n_steps, batch_size=None))
    assert trainer.global_step == n_steps
    return count.seen


@pytest.fixture(scope="module", params=["lora", "full"])
def step(request, tmp_path_factory):
    """(kind, operations of one step behind the second)."""
    folder = tmp_path_factory.mktemp("run")
    few, many = (operations(request.param, folder, n) for n in (3, 5))
    return request.param, {name: (n - few[name]) / 2 for name, n in many.items()}


def test_a_step_waits_for_the_device_twice(step):
    """To drop the rows without a label, and to see that loss and gradient are numbers."""
    waits = {name: n for name, n in step[1].items() if name in WAITS and n}
    assert waits == {"nonzero": 1, "_local_scalar_dense": 1}


def test_a_step_launches_no_more_than_it_did(step):
    kind, counts = step
    print(kind, sum(n for name, n in counts.items() if name not in VIEWS))
    launches = sum(n for name, n in counts.items() if name not in VIEWS)
    assert launches <= LAUNCHES[kind], sorted(counts.items(), key=lambda x: -x[1])


def step_once(model):
    batch = batch_of()
    loss = model(batch["input_ids"], labels=batch["labels"], reduction="sum").loss
    loss.backward()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_matrix_products_are_those_of_the_mathematics(kind):
    """Of the blocks, counted by torch, and by hand: forward, gradient of the input, and of each
    matrix that is trained; nothing twice."""
    model = model_of(kind)
    with FlopCounterMode(display=False) as counter:
        hidden, _ = model.backbone(batch_of()["input_ids"], None, None, None, False)
        hidden.sum().backward()
    c = CONFIG
    plain = LAYERS * c.d_model * (c.d_in_proj + c.d_inner)
    expected = 2 * TOKENS * plain * (3 if kind == "full" else 2)
    if kind == "lora":
        r = 4
        a = LAYERS * r * (c.d_model + c.d_inner)
        b = LAYERS * r * (c.d_in_proj + c.d_model)
        embeddings = r * c.d_model
        expected += 2 * TOKENS * 3 * (a + b) + 2 * TOKENS * 3 * embeddings
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_peak_memory_of_a_step(kind):
    """Every storage, within our operations too."""
    model = model_of(kind)
    with LiveMemory() as count:
        count.add(*model.parameters())
        before = count.live
        step_once(model)
        assert count.peak - before <= PEAK[kind]
