"""A step whose loss or gradient is not finite leaves no trace in weights and optimizer, and its
batch can be run again.

The truth is a run in which the poisoned row, whose token has an embedding that is not finite, does
not exist, and for the batch the plain model.
"""

import lightning as L
import pytest
import torch

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.nonfinite import NonFinite
from mamba2_train.saving import Checkpoints
from mamba2_train.schema import (
    AdafactorConfig,
    AdamWConfig,
    MuonConfig,
    SavingConfig,
    SchedulerConfig,
)

POISON = 63  # a token
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
OPTIMIZERS = [
    AdamWConfig(kind="adamw", **ADAMW),
    AdamWConfig(kind="adamw_8bit", **ADAMW),
    AdafactorConfig(kind="adafactor", lr=1e-2, clip_threshold=1.0, weight_decay=0.1),
    MuonConfig(kind="muon", momentum=0.9, **ADAMW),
]


class Data(L.LightningDataModule):
    """One row of 12 tokens to a micro-batch; those in `poisoned` hold the token."""

    position = (0, 0)

    def __init__(self, n, poisoned=()):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, POISON, (n, 12), generator=generator)
        for i in poisoned:
            self.rows[i, 5] = POISON

    def train_dataloader(self):
        batches = [
            {"input_ids": r[None], "labels": r[None], "seq_idx": torch.zeros(1, 12).int()}
            for r in self.rows
        ]
        return torch.utils.data.DataLoader(batches, batch_size=None)


class Trace(L.Callback):
    """What is trained and the optimizer's state, at the end of each micro-batch."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        (optimizer,) = trainer.optimizers
        moments = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for s in optimizer.state.values()
        ]
        weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        self.steps.append((weights, moments))


def poisoned_model(value=float("inf")):
    """Only the embedding of one token is not finite, and it is not trained."""
    shape = Mamba2Config(
        d_model=16, n_layers=1, vocab_size=64, d_state=8, headdim=8, tie_embeddings=False
    )
    model = initialize(Mamba2LM(shape), seed=0)
    model.backbone.embeddings.weight.requires_grad_(False)[POISON] = value
    return model


def train(
    folder, data, optimizer=OPTIMIZERS[0], *, model=None, accumulate=1, steps=100, **settings
):
    model = model or poisoned_model()
    settings = {"policy": "skip", "max_skipped": 3} | settings
    saver = Checkpoints(folder / "checkpoints", SavingConfig(keep=2), seed=0, csv_rows=lambda: 0)
    nonfinite = NonFinite(**settings, saver=saver, run_dir=folder)
    constant = SchedulerConfig(kind="constant", warmup_fraction=0.0, min_lr_fraction=1.0)
    module = Mamba2Module(
        poisoned_model(), optimizer, constant, total_steps=100, nonfinite=nonfinite
    )
    trace = Trace()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[trace, nonfinite, saver],
    )
    try:
        trainer.fit(module, datamodule=data)
    finally:
        saver.stop_listening()
    return trace.steps, nonfinite


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
def test_a_skipped_step_leaves_no_trace(tmp_path, optimizer):
    """And the run ends where it ends without the row."""
    steps, nonfinite = train(tmp_path / "a", Data(5, poisoned=[2]), optimizer)
    assert nonfinite.skipped == 1
    assert same(steps[2], steps[1])
    assert not same(steps[3], steps[2])
    without = Data(5)
    without.rows = without.rows[[0, 1, 3, 4]]
    others, _ = train(tmp_path / "b", without, optimizer)
    assert same(steps[4], others[3])
    assert all(w.isfinite().all() for w in steps[-1][0].values())


def test_the_comparison_sees_a_step_that_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(NonFinite, "refuses", lambda self, *_: False)
    steps, _ = train(tmp_path, Data(5, poisoned=[2]))
    assert not same(steps[2], steps[1])


def test_a_gradient_that_overflows_is_left_out_too(tmp_path, monkeypatch):
    """The loss is finite, and the norm of the gradient is not: 1e30 squared."""

    def overflow(module):
        if module.global_step == 1:
            module.model.lm_head.weight.grad.fill_(1e30)

    monkeypatch.setattr(Mamba2Module, "on_after_backward", overflow)
    steps, nonfinite = train(tmp_path, Data(3))
    assert nonfinite.skipped == 1
    assert same(steps[1], steps[0])
    assert (tmp_path / "nonfinite" / "step-00000002-rank-0.pt").is_file()


def test_the_whole_window_is_left_out_and_its_batches_can_be_run_again(tmp_path):
    steps, _ = train(tmp_path, Data(6, poisoned=[3]), accumulate=2)
    assert same(steps[3], steps[1])
    (path,) = (tmp_path / "nonfinite").iterdir()
    assert path.name == "step-00000002-rank-0.pt"
    saved = torch.load(path, weights_only=True)
    assert (saved["step"], saved["rank"], len(saved["batches"])) == (2, 0, 2)
    torch.set_rng_state(saved["rng"]["cpu"])
    model = poisoned_model()
    weights = {name.removeprefix("model."): weight for name, weight in steps[1][0].items()}
    model.load_state_dict(weights, strict=False)
    losses = [
        model(b["input_ids"], labels=b["labels"], seq_idx=b["seq_idx"], reduction="sum").loss.item()
        for b in saved["batches"]
    ]
    assert losses[0] == saved["losses"][0]
    assert not torch.tensor(losses[1]).isfinite()
    assert str(losses[1]) == str(saved["losses"][1])


def test_it_stops_with_the_weights_of_the_step_before(tmp_path):
    with pytest.raises(UserError) as error:
        train(tmp_path, Data(5, poisoned=[2]), policy="stop")
    assert "in step 3 the loss is nan" in str(error.value)
    assert "step-00000003-rank-0.pt has the batch" in str(error.value)
    assert "trainer.on_nan=skip" in str(error.value)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-00000002.ckpt"
    steps, _ = train(tmp_path / "two", Data(2))
    assert same(dict(torch.load(saved, weights_only=True)["state_dict"]), steps[1][0])


def test_it_skips_at_most_so_many(tmp_path):
    with pytest.raises(
        UserError, match=r"1 steps have been skipped, and in step 5 .*max_skipped=1"
    ):
        train(tmp_path, Data(6, poisoned=[1, 4]), max_skipped=1)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 2
    # the count goes on with the run
    saved = torch.load(tmp_path / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    assert {"skipped": 1} in saved["callbacks"].values()
