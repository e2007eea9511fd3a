"""Strategies that shard: N ranks come to what one process comes to.

The truth is a loop written out here, in one process: the token mean of a step's batches, torch's
clipping, AdamW. The ranks run tests/distributed/sharded_steps.py under torchrun.
"""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.adapters import add_lora, load_adapter
from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained, save_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.optim import build_optimizer
from mamba2_train.parallel.checkpoint import is_whole, load_whole
from mamba2_train.parallel.dry_run import dry_run
from mamba2_train.parallel.sizes import Sizes, mesh_sizes
from mamba2_train.schema import StrategyConfig, TrainConfig, validated

HERE = Path(__file__).parent / "distributed"
BIN = Path(sys.executable).parent
sys.path.insert(0, str(HERE))
from server import Server  # noqa: E402
from sharded_steps import (  # noqa: E402
    ACCUMULATE,
    CLIP,
    DTYPES,
    OPTIMIZER,
    QUANTIZED,
    STEPS,
    adapt,
    batches,
)

CASES = ["full-float32", "lora-float32", "nf4-float32", "full-float64", "lora-float64"]
BROKEN = ["full-float64-means", "full-float64-unreduced"]
# rows in segments of 7; gradients reduced after each micro-batch; blocks compiled; replicas (DDP)
ALSO = ["full-float64-exact", "lora-float32-exact", "nf4-float32-exact"]
ALSO += ["full-float32-each", "full-float32-compiled"]
REPLICAS = ["full-ddp_float32", "lora-ddp_float32", "nf4-ddp_float32", "int8-ddp_float32-exact"]
ROWS = ["nf4-float32", "full-float64", "lora-float64"]  # each split over two ranks
SPLIT = ["full-float64-exact", "lora-float32-exact"]
NARROW = ["full-float32-mixed", "lora-bfloat16"]


def launch(n, script, *arguments, cwd=None, timeout=240):
    done = subprocess.run(
        [BIN / "torchrun", "--standalone", f"--nproc-per-node={n}", *script, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-12000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_config, random_model):
    folder = tmp_path_factory.mktemp("sharded")
    shape = small_config(n_groups=2, use_bias=True, d_model=64)  # nf4 takes 64 weights at a time
    for name, dtype in DTYPES.items():
        save_pretrained(random_model(shape, dtype=dtype), folder / name)
    large = Mamba2Config(d_model=1024, n_layers=8, vocab_size=4096)
    save_pretrained(initialize(Mamba2LM(large)), folder / "large", max_shard_size="5GB")
    return folder


@pytest.fixture(scope="module")
def sharded(folder):
    """Results by case, of two ranks that see rows of their own; beside them, of two to a row."""
    others = (*ALSO, *REPLICAS, *NARROW, "memory")
    return results(folder, "2x1", *CASES, *BROKEN, *others, "1x1x2", *ROWS)


@pytest.fixture(scope="module", params=["1x2", "2x2"])
def split(folder, request):
    """Results by case, of two ranks that share the heads, and of two times two."""
    others = [*SPLIT, *NARROW] if request.param == "1x2" else []
    return results(folder, request.param, *CASES, *others)


@pytest.fixture(scope="module")
def split_four(folder):
    """Two ranks to a row, twice; and once, with two that share the heads."""
    results(folder, "2x1x2", *ROWS, "1x2x2", *ROWS)


def results(folder, sizes, *cases):
    n_ranks = math.prod(map(int, sizes.split("x")))
    launch(n_ranks, [HERE / "sharded_steps.py"], folder, sizes, *cases, timeout=480)
    files = {case: folder / f"{sizes}-{case}.pt" for case in cases if not case[0].isdigit()}
    return {c: torch.load(f if f.exists() else folder / f"{c}.pt") for c, f in files.items()}


def truth(folder, case, autocast=False):
    """In one process, in one pass, uncompiled."""
    variant, dtype, *_ = case.replace("ddp_", "").split("-")
    kind = variant if variant in QUANTIZED else None
    source = "float64" if dtype == "float64" else "float32"
    model = load_pretrained(folder / source, dtype=DTYPES[dtype], quantization=kind)
    adapt(model, variant)
    model.train()
    optimizer = build_optimizer(model, OPTIMIZER)
    trained = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    trained = {n: p for n, p in trained.items() if p.requires_grad}
    found = {"losses": [], "gradients": {}}
    everything = batches()
    per_step = ACCUMULATE * 2
    for step in range(STEPS):
        total, count = 0.0, 0
        for batch in everything[step * per_step : (step + 1) * per_step]:
            length = int((batch["seq_idx"][0] >= 0).sum())
            ids = batch["input_ids"][:, :length]  # alone, without padding
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(ids).logits[0, :-1].to(DTYPES[source])
            total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            count += length - 1
        optimizer.zero_grad()
        (total / count).backward()
        found["losses"].append((total / count).item())
        if step == 0:
            found["gradients"] = {n: p.grad.clone() for n, p in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
    return found | {"weights": {n: p.detach() for n, p in trained.items()}}


def error(got, expected):
    assert got.keys() == expected.keys()
    return max(
        ((got[n].double() - e.double()).norm() / e.double().norm()).item()
        for n, e in expected.items()
    )


def assert_equal(ours, theirs, case):
    double = "float64" in case
    # the logged loss is float32
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6 if double else 1e-5)
    assert error(ours["gradients"], theirs["gradients"]) < (1e-10 if double else 1e-5)
    assert error(ours["weights"], theirs["weights"]) < (1e-10 if double else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(folder, sharded, case):
    assert_equal(sharded[case], truth(folder, case), case)


@pytest.mark.parametrize("case", [*ALSO, *REPLICAS])
def test_the_same_in_other_ways(folder, sharded, case):
    assert_equal(sharded[case], truth(folder, case), case)


@pytest.mark.parametrize("case", CASES)
def test_split_heads_equal_one_process(folder, split, case):
    assert_equal(split[case], truth(folder, case), case)


@pytest.mark.parametrize("split", ["1x2"], indirect=True)
@pytest.mark.parametrize("case", SPLIT)
def test_split_heads_in_segments(folder, split, case):
    assert_equal(split[case], truth(folder, case), case)


@pytest.mark.parametrize("case", NARROW)
def test_bfloat16_costs_no_more_than_in_one_process(folder, sharded, case):
    assert_narrow(sharded[case], folder, case)


@pytest.mark.parametrize("split", ["1x2"], indirect=True)
@pytest.mark.parametrize("case", NARROW)
def test_bfloat16_of_split_heads(folder, split, case):
    assert_narrow(split[case], folder, case)


def assert_narrow(found, folder, case):
    """Twice what rounding does to one process, beside float32."""
    wide = truth(folder, case.replace("bfloat16", "float32"))
    one = truth(folder, case, autocast=case.endswith("mixed"))
    for what in ("gradients", "weights"):
        price = error(one[what], wide[what])
        assert 1e-4 < error(found[what], wide[what]) < 2 * price, what
    off, price = (math.dist(run["losses"], wide["losses"]) for run in (found, one))
    assert off < 2 * price
    bf16, fp32 = torch.bfloat16, torch.float32
    expected = {"in_proj.weight": bf16, "in_proj": bf16, "A_log": fp32, "stream": fp32}
    dtypes = found["dtypes"]
    assert {key: dtypes[key] for key in expected} == expected
    assert dtypes.get("lora", fp32) == fp32


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("sizes", ["1x1x2", "2x1x2", "1x2x2"])
def test_split_rows_equal_one_process(folder, request, sizes, case):
    """Six steps of accumulation and clipping; some parts are nothing but padding."""
    request.getfixturevalue("sharded" if sizes == "1x1x2" else "split_four")
    assert_equal(torch.load(folder / f"{sizes}-{case}.pt"), truth(folder, case), case)


@pytest.mark.parametrize("case", BROKEN)
def test_the_comparison_sees_a_wrong_reduction(folder, sharded, case):
    assert error(sharded[case]["gradients"], truth(folder, case)["gradients"]) > 1e-2


def test_no_rank_holds_the_whole_model(folder, sharded):
    largest = 4 * 4096 * 1024 * 1.1
    for grown, held in sharded["memory"]:
        assert grown < 1.2 * held + largest, f"{grown / 1e6:.0f} MB for a share of {held / 1e6:.0f}"


# 16 rows: both numbers of ranks see the same in each step, also in an epoch's last
RUN = [
    "model.source=base",
    "data=local",
    "data.source=rows.jsonl",
    "data.packing=none",
    "data.validation_source=held_out.jsonl",
    "data.batch_size=2",
    "adapter.r=3",
    "adapter.train=[conv1d,A_log,norm]",
    "trainer.max_epochs=null",
    "trainer.max_steps=6",
    "trainer.validate_every=3",
    "trainer.log_every=1",
    "trainer.progress_bar=false",
    "callbacks.saving.every_steps=2",
    "callbacks.samples.prompts=[Love]",
    "callbacks.samples.max_new_tokens=3",
    "logger=csv",
]
TWO = ["strategy=fsdp", "trainer.accumulate=2"]
ALONE = ["strategy=single", "trainer.accumulate=4"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """In a folder with a tiny model and rows of unequal length."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = load_tokenizer(FOLDER / "tiny_base")
    shape = Mamba2Config(d_model=16, n_layers=2, vocab_size=4096, d_state=8, headdim=8)
    save_pretrained(initialize(Mamba2LM(shape), seed=1), folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    rows = [{"text": " ".join(str(i * j) for j in range(3 + i % 5))} for i in range(16)]
    for name, some in (("rows", rows), ("held_out", rows[:5])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def runs(server):
    """And a run of six steps on two ranks."""
    train(server, 2, *TWO, "run_dir=two")
    return server.folder


def train(server, n, *arguments):
    return command(server, "mamba2-train", *RUN, *arguments, ranks=n)


def command(server, name, *arguments, ranks=1):
    code, said = server.run(name, *arguments, ranks=ranks)
    assert code == 0, said[-6000:]
    return said


def saved(run, step=6):
    """(weights, optimizer state by name) of a checkpoint, a folder or a file."""
    folder = run / "checkpoints"
    path = folder / f"step-{step:08d}"
    if path.is_dir():
        checkpoint = load_whole(path)
        state = checkpoint["optimizers"][0]["tensors"]
        return checkpoint["state_dict"], {n: t for n, t in state.items() if "optimizer." in n}
    checkpoint = torch.load(path.with_suffix(".ckpt"), weights_only=True)
    return checkpoint["state_dict"], None


def losses(run):
    with (run / "csv" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def watched(run):
    """Rows of what `callbacks.health` logs."""
    with (run / "csv" / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "system/rss_gib" in row]


# strategy, ranks, and the micro-batches with which a step takes eight rows
LAYOUTS = {
    "two": (2, TWO),
    "tensor": (2, ["strategy=tp", "trainer.accumulate=4"]),
    "grid": (4, ["strategy=fsdp_tp", "trainer.accumulate=2"]),
    "alone": (1, ALONE),
}


@pytest.mark.parametrize("layout", ["two", "tensor"])
def test_a_resumed_run_comes_to_the_same_bits(runs, server, layout):
    """Dropout included: each rank's random state is its own."""
    n, how = LAYOUTS[layout]
    if layout != "two":
        train(server, n, *how, f"run_dir={layout}")
    again = f"{layout}_again"
    step_4 = f"resume={layout}/checkpoints/step-00000004"
    train(server, n, *how, f"run_dir={again}", step_4)
    assert_same_bits(runs / again, runs / layout)


def assert_same_bits(ours, theirs):
    for a, b in zip(saved(ours), saved(theirs), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(ours) == losses(theirs)
    both = [(run / "adapter" / "adapter_model.safetensors") for run in (ours, theirs)]
    assert both[0].read_bytes() == both[1].read_bytes()


def test_any_number_of_ranks_goes_on_from_any_other(runs, server):
    """Four ranks, then two that share the heads, then one process, then two that share the rows,
    as one process that did it all. Without dropout: its draws are a rank's own. What is watched
    beside the training is of all ranks, and one speaks of it."""
    plain = [
        "callbacks.health.every_steps=6",
        "adapter.dropout=0",
        "scheduler=constant",
        "scheduler.warmup_fraction=0",
    ]
    train(server, 1, *ALONE, *plain, "run_dir=whole")
    option: list[str] = []
    for last, layout in ((1, "grid"), (2, "tensor"), (4, "alone"), (6, "two")):
        n, how = LAYOUTS[layout]
        ending = [f"trainer.max_steps={last}", f"run_dir=chain_{layout}"]
        train(server, n, *how, *plain, *option, *ending)
        option = [f"resume=chain_{layout}"]
    ours, theirs = (saved(runs / run)[0] for run in ("chain_two", "whole"))
    assert error(ours, theirs) < 1e-6
    path = "checkpoint=chain_grid/checkpoints/step-00000001"
    command(server, "mamba2-export", path, "merge=false", "out=of_grid")
    written = [runs / f / "adapter_model.safetensors" for f in ("of_grid", "chain_grid/adapter")]
    assert written[0].read_bytes() == written[1].read_bytes()
    (two,), (one,) = watched(runs / "chain_two"), watched(runs / "whole")
    norms = [key for key in one if key.startswith(("grad_norm/", "lora_"))]
    assert len(norms) == 6 + 3 + 3 + 3
    for key in norms:
        assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-4), key
    # of other positions: the first batch of each rank
    assert float(two["dt/layer_01_p50"]) == pytest.approx(float(one["dt/layer_01_p50"]), rel=0.1)


def test_what_a_run_leaves(runs):
    """The adapter is the checkpoint's, and loads in a model of one process."""
    steps = sorted(p.name for p in (runs / "two" / "checkpoints").iterdir())
    assert steps == ["step-00000003", "step-00000004", "step-00000006"]  # best, and the newest two
    result = json.loads((runs / "two" / "result.json").read_text())
    model = load_pretrained(runs / "base")
    load_adapter(model, runs / "two" / "adapter")
    weights = {f"model.{n}": p for n, p in model.named_parameters() if "base_layer" not in n}
    step = result.get("best_step", 6)
    for name, value in saved(runs / "two", step)[0].items():
        assert torch.equal(weights[name], value), name
    assert (runs / "two" / "samples.jsonl").read_text().count("Love") == 1


def test_a_damaged_folder_is_seen(runs, tmp_path):
    whole = runs / "two" / "checkpoints" / "step-00000006"
    assert is_whole(whole)
    for name in sorted(p.name for p in whole.iterdir()):
        copy = tmp_path / "step-00000006"
        shutil.copytree(whole, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        assert not is_whole(copy), name
        shutil.rmtree(copy)


def test_a_checkpoint_of_two_ranks_is_exported(runs, server):
    """As an adapter, the one that the run has written at its end; and merged, in either layout."""
    best = json.loads((runs / "two" / "result.json").read_text()).get("best_step", 6)
    path = f"checkpoint=two/checkpoints/step-{best:08d}"
    command(server, "mamba2-export", path, "merge=false", "out=adapter")
    for name in ("adapter_model.safetensors", "trained_in_full.safetensors"):
        assert (runs / "adapter" / name).read_bytes() == (
            runs / "two" / "adapter" / name
        ).read_bytes()
    command(server, "mamba2-export", "checkpoint=two", "out=from_adapter")
    expected = load_pretrained(runs / "from_adapter").state_dict()
    for layout in ("huggingface", "state-spaces"):
        command(server, "mamba2-export", path, f"layout={layout}", f"out={layout}")
        ours = load_pretrained(runs / layout).state_dict()
        assert all(torch.equal(ours[name], w) for name, w in expected.items())


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(runs, server):
    """While it writes its own file, before the last file (whose sums a resumed run takes once too),
    and before the folder has its name; two of the runs train on while a save is written. It comes
    to the bits of a run that wrote each at once."""
    reached = []
    faults = {"shard:2@1": "false", "sums:3": "true", "sync:3": "false", "none": "true"}
    for fault, background in faults.items():
        option = ["resume=auto", f"callbacks.saving.asynchronous={background}"]
        code, said = server.run(
            "mamba2-train", *RUN, *TWO, *option, "run_dir=killed", ranks=2, fault=fault
        )
        assert (code == 0) == (fault == "none"), said[-3000:]
        reached += map(int, re.findall(r"going on after step (\d+)", said))
    assert reached == [2, 3, 4]
    assert_same_bits(runs / "killed", runs / "two")
    names = [
        sorted(p.name for p in (runs / r / "checkpoints").iterdir()) for r in ("killed", "two")
    ]
    assert names[0] == names[1]
    assert is_whole(runs / "killed" / "checkpoints" / "step-00000006")


def test_states_that_are_carried_stay_with_their_ranks(runs, server):
    """Two ranks, each with rows that go on from batch to batch."""
    carried = ["long_context=truncated", "data.packing=continued", "data.seq_len=8"]
    carried += ["callbacks.samples.prompts=[]", "trainer.max_steps=4", *TWO]
    train(server, 2, *carried, "run_dir=carried")
    step_3 = "resume=carried/checkpoints/step-00000003"
    train(server, 2, *carried, "run_dir=carried_again", step_3)
    for a, b in zip(saved(runs / "carried_again", 4), saved(runs / "carried", 4), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    ways = ["strategy=tp", "trainer.accumulate=4", "data.batch_size=2"]
    for n, how in ((1, ["strategy=single", "trainer.accumulate=4"]), (2, ways)):
        code, said = server.run(
            "mamba2-train", *RUN, *carried, *how, step_3, "run_dir=refused", ranks=n
        )
        assert code != 0
        assert "start as many" in said, said[-3000:]


# of a model with 8 heads: strategy, processes of one node, and the cure
MISTAKES = {
    "fsdp_tp data_size=3 tensor_size=2, 4": "data_size=2 strategy.tensor_size=2",
    "fsdp_tp tensor_size=3, 6": "data_size=3 strategy.tensor_size=2",
    "tp, 3": "use strategy=fsdp",
    "fsdp tensor_size=2, 2": "use strategy=fsdp_tp",
    "tp data_size=2, 2": "use strategy=fsdp_tp",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_sizes_that_do_not_fit_are_refused(small_config, mistake):
    settings, n = mistake.split(", ")
    kind, *sizes = settings.split()
    values = {key: int(size) for key, size in (s.split("=") for s in sizes)}
    strategy = StrategyConfig(kind=kind, **values)
    shape = small_config()
    with pytest.raises(UserError, match=re.escape(MISTAKES[mistake])):
        mesh_sizes(strategy, shape, world=int(n), local=int(n))


def test_sizes_are_filled_in(small_config):
    def sizes(world, local, kind, **given):
        return mesh_sizes(StrategyConfig(kind=kind, **given), small_config(), world, local)

    assert sizes(16, 8, "fsdp") == (16, 1, 1)
    assert sizes(8, 8, "tp") == (1, 8, 1)
    assert sizes(16, 8, "fsdp_tp") == (2, 8, 1)
    assert sizes(16, 8, "fsdp_tp", tensor_size=2) == (8, 2, 1)
    assert sizes(16, 8, "fsdp_tp", data_size=4) == (4, 4, 1)


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["optimizer=adamw_8bit"], "use optimizer=adamw"),
        (["optimizer=muon"], "use optimizer=adamw"),
        (["quantization=int8", "precision=bf16"], "quantization=nf4, or strategy=ddp"),
        (["adapter.dora=true"], "strategy=ddp"),
        (["adapter.init=pissa"], "strategy=ddp"),
        (["strategy=ddp", "strategy.tensor_size=2"], "use strategy=fsdp"),
    ],
)
def test_pairs_that_do_not_work_are_refused(overrides, cure):
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", ["strategy=fsdp", *overrides])
    with pytest.raises(UserError, match=cure):
        validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_a_dry_run_of_a_base_in_4_bits(sizes):
    """Half a byte to a weight of the projections, and a scale to each 64 where heads are split."""
    shape = Mamba2Config(d_model=256, n_layers=2, vocab_size=512)
    table, _ = dry_run(
        shape,
        Sizes(*sizes),
        lambda model: add_lora(model, ["in_proj", "out_proj"], r=4, alpha=8),
        dtype=torch.bfloat16,
        quantization="nf4",
        products=None,
        n_rows=1,
        n_tokens=64,
        accumulate=1,
        reduce_each_batch=False,
    )
    rows = zip(*(column.cells for column in table.columns), strict=True)
    codes = [row for row in rows if row[4] == "uint8"]
    assert [row[0].rpartition(".")[0] for row in codes] == [
        "layers.*.mixer.in_proj",
        "layers.*.mixer.out_proj",
    ]
    projections = shape.d_model * (shape.d_in_proj + shape.d_inner)
    held = sum(int(row[2].partition("x")[0]) for row in codes)
    assert held >= projections / 2 / (sizes[0] * sizes[1])
    assert held < 1.15 * projections / 2 / (sizes[0] * sizes[1])  # B and C are whole on each


def test_a_dry_run_tells_what_a_rank_holds(sharded):
    """Without processes or weights: as many bytes as were counted on a rank that had them."""
    table, lines = dry_run(
        Mamba2Config(d_model=1024, n_layers=8, vocab_size=4096),
        Sizes(2, 1),
        lambda model: None,
        dtype=torch.float32,
        quantization=None,
        products=None,
        n_rows=1,
        n_tokens=256,
        accumulate=1,
        reduce_each_batch=False,
    )
    _, held = sharded["memory"][0]
    assert f"weights {held / 1e6:.3g} MB" in lines[1]
    assert table.row_count == 11  # embeddings, norms, and what a block has
    assert not torch.distributed.is_initialized()
