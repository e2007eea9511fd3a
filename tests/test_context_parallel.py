"""Rows split over ranks: loss and every gradient equal those of whole rows in one process.

The truth scans whole rows by the sequential recurrence, in float64. tests/test_sharded.py has the
steps of training, with FSDP2 and tensor parallelism.
"""

import csv
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.commands.train import choose_strategy
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.parallel.context_parallel import own_part
from mamba2_train.parallel.dry_run import dry_run
from mamba2_train.parallel.sizes import mesh_sizes
from mamba2_train.schema import StrategyConfig, TrainConfig, validated

SCRIPT = Path(__file__).parent / "distributed" / "context_parallel.py"
both = pytest.mark.parametrize("n", [2, 4], ids="{} ranks".format)


def launch(n, *arguments, cwd=None, timeout=280):
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    done = subprocess.run(
        [sys.executable, *(ranks if n > 1 else ()), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """n -> what each of n ranks has found."""

    @cache
    def launched(n):
        out = tmp_path_factory.mktemp("context") / "results.json"
        launch(n, SCRIPT, out)
        return json.loads(out.read_text())

    return launched


@both
def test_loss_and_every_gradient(results, n):
    """Packed, padded at either end, short, empty parts; groups, widths of the convolution,
    checkpointing, LoRA; and rows that are not split, as in generation."""
    for of_rank in results(n):
        assert len(of_rank["equal"]) >= 10
        for case, found in of_rank["equal"].items():
            for what in ("loss", "gradients", "whole"):
                assert found[what] < 1e-12, (case, found)


@both
def test_in_float32_and_nf4(results, n):
    for of_rank in results(n):
        for case, found in of_rank["narrow"].items():
            assert found["loss"] < 1e-5, (case, found)
            assert found["gradients"] < 1e-5, (case, found)


@both
def test_under_autocast(results, n):
    """No further from float64 than twice as far as one process is, whose products are rounded."""
    for of_rank in results(n):
        found = of_rank["autocast"]
        assert 1e-4 < found["ranks"] < 2 * found["one"] < 0.2


@both
@pytest.mark.parametrize("what", ["halo", "halo backward", "state", "documents", "labels"])
def test_the_comparison_sees_what_is_left_out(results, n, what):
    for of_rank in results(n):
        assert of_rank["broken"][what]["gradients"] > 1e-2


@both
def test_traffic_is_independent_of_length(results, n):
    """Of a layer: one gather of states each way, with the decays forward, and one conv tail."""
    for rank, of_rank in enumerate(results(n)):
        short, long = of_rank["traffic"]
        assert short == long
        layers = 2
        forward, backward = long["forward"], long["backward"]
        assert forward["calls"]["allgather_"] == backward["calls"]["allgather_"] == layers
        assert forward["bytes"]["allgather_"] == layers * (long["state"] + long["decay"])
        assert backward["bytes"]["allgather_"] == layers * long["state"]
        # forward to the next rank, backward to the one before
        for found, is_end in ((forward, rank == n - 1), (backward, rank == 0)):
            assert found["bytes"].get("send", 0) == (0 if is_end else layers * long["tail"])
            assert set(found["calls"]) <= {"allgather_", "send"}


def whole_rows(length, rows=2):
    ids = torch.arange(rows * length).view(rows, length)
    seq_idx = torch.zeros(rows, length, dtype=torch.int32)
    return {"input_ids": ids, "labels": ids.clone(), "seq_idx": seq_idx}


def test_parts_are_the_row():
    batch = whole_rows(11)
    batch["seq_idx"][1, 4:] = 1
    parts = [own_part(batch, rank, 3, d_conv=4) for rank in range(3)]
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    assert joined["input_ids"].shape == (2, 12)
    assert torch.equal(joined["input_ids"][:, :11], batch["input_ids"])
    assert (joined["seq_idx"][:, 11:] == -1).all()
    # row 0 predicts all but its first token, row 1 no document's first
    expected = [*range(1, 11), -100, -100], [12, 13, 14, -100, *range(16, 22), -100, -100]
    assert joined["shift_labels"].tolist() == list(expected)
    assert [part["past"].tolist() for part in parts] == [
        [[-1] * 4, [-1] * 4],
        [[0] * 4, [0] * 4],
        [[0] * 4, [1] * 4],
    ]


def test_a_part_is_no_shorter_than_the_tail():
    parts = [own_part(whole_rows(4), rank, 4, d_conv=4) for rank in range(4)]
    assert [part["input_ids"].shape for part in parts] == [(2, 3)] * 4
    assert [(part["seq_idx"] >= 0).sum().item() for part in parts] == [6, 2, 0, 0]


def test_padding_between_tokens_is_refused():
    batch = whole_rows(12)
    batch["seq_idx"][1, :2] = -1
    batch["seq_idx"][1, 9:] = -1
    own_part(batch, 0, 2, d_conv=4)
    batch["seq_idx"][1, 5] = -1
    with pytest.raises(UserError, match=r"row 1 .* before position 6: .*long_context=exact"):
        own_part(batch, 0, 2, d_conv=4)


def test_sizes_are_filled_in(small_config):
    def sizes(world, local, kind, ranks, **given):
        return mesh_sizes(StrategyConfig(kind=kind, **given), small_config(), world, local, ranks)

    assert sizes(8, 8, "fsdp", "auto") == (1, 1, 8)
    assert sizes(8, 8, "fsdp", 2) == (4, 1, 2)
    assert sizes(8, 8, "fsdp", "auto", data_size=2) == (2, 1, 4)
    assert sizes(8, 8, "fsdp_tp", "auto", tensor_size=2) == (1, 2, 4)
    assert sizes(8, 8, "fsdp_tp", 2, tensor_size=2) == (2, 2, 2)
    assert sizes(16, 8, "fsdp_tp", "auto") == (1, 8, 2)
    assert sizes(8, 8, "tp", 4) == (1, 2, 4)
    assert sizes(1, 1, "fsdp", "auto") == (1, 1, 1)


@pytest.mark.parametrize(
    ("world", "kind", "ranks", "given", "cure"),
    [
        (4, "fsdp", 3, {}, "set long_context.ranks=2, or start 6"),
        (
            8,
            "fsdp",
            2,
            {"data_size": 2},
            "each of long_context.ranks=2: set long_context.ranks=4",
        ),
        (
            8,
            "fsdp_tp",
            2,
            {"data_size": 3, "tensor_size": 2},
            "strategy.tensor_size=2, or start 12",
        ),
        (2, "fsdp", 4, {}, "set long_context.ranks=2, or start 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(small_config, world, kind, ranks, given, cure):
    strategy = StrategyConfig(kind=kind, **given)
    with pytest.raises(UserError, match=cure):
        mesh_sizes(strategy, small_config(), world, world, ranks)


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["strategy=ddp"], "strategy=ddp: .*use strategy=fsdp or fsdp_tp, or long_context=exact"),
        ([], "strategy=auto: .*use strategy=fsdp"),
        (["strategy=fsdp", "long_context.ranks=0"], "ranks: .*greater than 0"),
        (["strategy=fsdp", "data.packing=continued"], "use long_context=truncated"),
        (["strategy=fsdp", "+long_context.segment_len=9"], "segment_len: unknown key"),
    ],
)
def test_pairs_that_do_not_work_are_refused(overrides, cure):
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", ["long_context=parallel", *overrides])
    with pytest.raises(UserError, match=cure):
        validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


# rows of documents packed across the cut, 37 positions for two ranks
RUN = [
    "model.source=base",
    "data=local",
    "data.source=rows.jsonl",
    "data.seq_len=37",
    "data.validation_source=held_out.jsonl",
    "data.batch_size=2",
    "adapter.r=3",
    "adapter.train=[conv1d,A_log,norm]",
    "adapter.dropout=0",
    "trainer.max_epochs=null",
    "trainer.max_steps=6",
    "trainer.validate_every=3",
    "trainer.log_every=1",
    "trainer.accumulate=2",
    "trainer.progress_bar=false",
    "callbacks.saving.every_steps=2",
    "callbacks.samples.prompts=[Love]",
    "callbacks.samples.max_new_tokens=3",
    "callbacks.samples.temperature=0",
    "logger=csv",
]
SPLIT = ["strategy=fsdp", "long_context=parallel"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of mamba2-train on two ranks that share each row, and what it said."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = load_tokenizer(FOLDER / "tiny_base")
    shape = Mamba2Config(d_model=16, n_layers=2, vocab_size=4096, d_state=8, headdim=8)
    save_pretrained(initialize(Mamba2LM(shape), seed=1), folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    rows = [{"text": " ".join(str(i * j) for j in range(3 + i % 5))} for i in range(24)]
    for name, some in (("rows", rows), ("held_out", rows[:5])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    said = launch(2, "-m", "mamba2_train", *RUN, *SPLIT, "run_dir=split", cwd=folder)
    return folder, said


def logged(run, key):
    with (run / "csv" / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_a_run_equals_one_process(runs):
    """Six steps in float32: losses, gradients' norms, held-out losses, and the sampled text."""
    folder, said = runs
    assert "rows of data.seq_len=37 are padded to 38" in said
    launch(1, "-m", "mamba2_train", *RUN, "strategy=single", "run_dir=alone", cwd=folder)
    for key, n in (("train/loss", 6), ("train/grad_norm", 6), ("val/loss", 2)):
        ours, theirs = (logged(folder / run, key) for run in ("split", "alone"))
        assert len(ours) >= n
        assert ours == pytest.approx(theirs, rel=1e-5), key
    results = [json.loads((folder / run / "result.json").read_text()) for run in ("split", "alone")]
    for when in ("base", "final"):
        ours, theirs = (result[when]["val/loss"] for result in results)
        assert ours == pytest.approx(theirs, rel=1e-5)
    samples = [(folder / run / "samples.jsonl").read_text() for run in ("split", "alone")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_a_resumed_run_comes_to_the_same_bits(runs):
    folder, _ = runs
    resume = "resume=split/checkpoints/step-00000004"
    launch(2, "-m", "mamba2_train", *RUN, *SPLIT, "run_dir=again", resume, cwd=folder)
    files = [folder / run / "adapter" / "adapter_model.safetensors" for run in ("split", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert logged(folder / "again", "train/loss") == logged(folder / "split", "train/loss")


def test_a_dry_run_tells_of_the_third_dimension():
    """And of what a layer exchanges, here by hand."""
    extend_hydra()
    eight = ["strategy.devices=8", "long_context.ranks=4", "strategy.dry_run=true"]
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", [*SPLIT, *eight])
    config = validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))
    shape = Mamba2Config(d_model=16, n_layers=2, vocab_size=4096, d_state=8, headdim=8)
    sizes = choose_strategy(config, shape)
    assert sizes == (2, 1, 4)
    _, lines = dry_run(
        shape,
        sizes,
        lambda model: None,
        dtype=torch.float32,
        quantization=None,
        products=None,
        n_rows=2,
        n_tokens=74,
        accumulate=2,
        reduce_each_batch=False,
    )
    assert lines[0] == "mesh      data 2 x context 4 x tensor 1"
    # 2 rows, 4 heads of 8 x 8: three ranks' states both ways and decays; the tail both ways
    states = 2 * 4 * (2 * 8 * 8 + 1) * 4 * 3
    tails = 2 * 2 * 3 * (32 + 2 * 8) * 4
    per_step = 2 * 2 * (states + tails)  # layers, micro-batches
    assert f"states {per_step / 1e3:.3g} kB received by a rank" in lines[2]
