"""Step time on clusters: bytes against what processes call, the arithmetic of links by hand, and
layouts that fit and can be typed."""

import functools
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mamba2_train.cluster import Cluster, Layout, Simulator
from mamba2_train.commands.plan import planned_run
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM
from mamba2_train.parallel.sizes import DATA, TENSOR, Sizes, mesh_sizes
from mamba2_train.parallel.tensor_parallel import parallelize
from mamba2_train.parallel.wire import Collective, over_context, traffic
from mamba2_train.plan import GB
from mamba2_train.roofline import GPUS
from mamba2_train.schema import ClusterConfig, StrategyConfig

HERE = Path(__file__).parent / "distributed"
BIN = Path(sys.executable).parent
sys.path.insert(0, str(HERE))
from counted_bytes import ROWS, SEQ_LEN, adapt, small  # noqa: E402

CASES = {
    2: ["2x1-full-1-none", "1x2-full-1-selective", "1x2-lora-2-full", "2x1-mixed-1-none"],
    4: ["2x2-lora-1-full", "4x1-full-1-none", "1x4-full-2-selective", "2x2-mixed-2-none"],
}
SHAPE = Mamba2Config(d_model=256, n_layers=2, vocab_size=4096, d_state=64, headdim=32)
RUN = ["adapter=full", "precision=bf16-mixed", "data.seq_len=512", "data.batch_size=1"]


@pytest.mark.parametrize("n", CASES)
def test_bytes_are_those_that_processes_send(n, tmp_path):
    """Kind, ranks and bytes of every collective of a step, none left out."""
    out = tmp_path / "found.json"
    command = [BIN / "torchrun", "--standalone", f"--nproc-per-node={n}", HERE / "counted_bytes.py"]
    done = subprocess.run(
        [*command, out, *CASES[n]],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case, found in json.loads(out.read_text()).items():
        called = Counter({tuple(key): times for *key, times in found})
        assert predicted(case) == called, case


def predicted(case):
    sizes, variant, groups, mode = case.split("-")
    sizes = Sizes(*map(int, sizes.split("x")))
    config = small(int(groups))
    model = Mamba2LM(config)
    adapt(model, variant)
    if sizes.tensor > 1:
        split(model, sizes.tensor)
    narrow = torch.bfloat16 if variant == "mixed" else None
    sent = traffic(
        model,
        config,
        sizes,
        products=narrow,
        activation=narrow or torch.float32,
        n_tokens=ROWS * SEQ_LEN,
        repeats=mode != "none",
    )
    found = Counter()
    for c, times in sent.step().items():
        found[c.kind, getattr(sizes, c.over), c.nbytes] += times
    return found


def split(model, n):
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  which registers it

    logging.getLogger("torch").setLevel(logging.ERROR)
    dist.init_process_group("fake", rank=0, world_size=n)
    try:
        mesh = init_device_mesh("cpu", (1, n), mesh_dim_names=(DATA, TENSOR))
        parallelize(model, mesh[TENSOR])
    finally:
        dist.destroy_process_group()


@functools.cache
def planned(*overrides):
    """One for all tests: what it has counted, it keeps."""
    return planned_run([*RUN, *overrides], SHAPE)


def simulator(*overrides, **cluster):
    return Simulator(planned(*overrides), ClusterConfig(**cluster))


def test_links_by_hand():
    settings = {"intra_gb_s": 100, "inter_gb_s": 10, "intra_us": 0, "inter_us": 0}
    cluster = Cluster.of(ClusterConfig(gpus=16, node=8, **settings))
    whole = Collective("gather", "data", 16 * 10**9, "forward")
    assert cluster.seconds(whole, 8, 1) == pytest.approx(14 / 100)
    # both nodes: 8 GB come in over 8 links, 15 GB to each GPU inside
    assert cluster.seconds(whole, 16, 1) == pytest.approx(max(15 / 100, 8 / 80))
    # ranks of one node share the heads: one of each node, and a link of its own
    assert cluster.seconds(whole, 2, 8) == pytest.approx(8 / 10)
    assert cluster.seconds(whole._replace(kind="reduce"), 2, 8) == pytest.approx(16 / 10)
    assert cluster.seconds(whole, 1, 1) == 0
    hops = Cluster.of(ClusterConfig(gpus=16, node=8, intra_us=1, inter_us=10))
    assert hops.seconds(whole._replace(nbytes=0), 16, 1) == pytest.approx((14 + 10) * 1e-6)


def test_states_of_a_row_cut_over_ranks():
    """Independent of the row's length: a state of each head each way, its decay once, three
    inputs."""
    found = list(over_context(SHAPE, 4, n_sequences=2, activation=torch.bfloat16))
    states, decays = 2 * 16 * 32 * 64 * 4, 2 * 16 * 4
    halo = 2 * 3 * (512 + 2 * 64) * 2
    sizes = [("context", 4 * (states + decays), "forward"), ("halo", 2 * halo, "forward")]
    sizes += [("context", 4 * states, "backward"), ("halo", 2 * halo, "backward")]
    assert [(c.over, c.nbytes, c.when) for c in found] == sizes
    assert not list(over_context(SHAPE, 1, n_sequences=2, activation=torch.bfloat16))


def test_the_layout_taken_fits_and_can_be_typed():
    found = simulator(gpus=8, tokens=65_536).best()
    assert [e.seconds for e in found] == sorted(e.seconds for e in found)
    for e in found:
        layout = e.layout
        assert e.memory.fits(80)
        assert layout.data * layout.tensor == 8
        assert layout.data * layout.rows * layout.accumulate * 512 == 65_536
        assert sum(e.spent.values()) == e.seconds
        assert min(e.spent.values()) >= 0
        assert e.tokens_per_second == pytest.approx(65_536 / e.seconds)
        if layout.strategy.startswith("fsdp"):
            asked = {
                k.split(".")[1]: int(v) for k, v in layout.flags.items() if k[:9] == "strategy."
            }
            config = StrategyConfig(kind=layout.strategy, **asked)
            assert mesh_sizes(config, SHAPE, 8, 8)[:2] == (layout.data, layout.tensor)
    # the one to take, typed: what plan says of it
    taken = found[0].layout
    plan = planned_run([*RUN, *(f"{k}={v}" for k, v in taken.flags.items())], SHAPE)
    plan.tensor = taken.tensor
    assert plan.memory(taken.strategy, 8) == found[0].memory


def test_small_gpus_repeat_or_shard_more():
    """What does not fit is no layout; the rows of a micro-batch are the most that do."""
    one = simulator(gpus=1, tokens=2048)
    (best,) = one.best()
    assert best.layout.strategy == "single"
    limit = one.memory(best.layout._replace(mode="none", rows=4, accumulate=1)).on_gpu / 0.95 / GB
    one.cluster = one.cluster.__class__(
        **{**one.cluster.__dict__, "gpu": GPUS["h100"]._replace(memory=limit * 0.999)}
    )
    (smaller,) = one.best()
    assert smaller.memory.fits(limit)
    assert smaller.seconds >= best.seconds
    assert smaller.layout.mode != "none" or smaller.layout.rows < 4
    twice = smaller.layout._replace(rows=2 * smaller.layout.rows)
    assert not one.memory(twice).fits(limit * 0.999) or smaller.layout.accumulate == 1


def test_more_gpus_are_faster_and_more_of_the_same_are_not_slower_each():
    """At the same rows to a GPU: compute is the same, only what is sent grows; so a step takes no
    less time, and twice the GPUs do at least as many tokens as before."""
    before = None
    for gpus in (8, 64, 1024):
        s = simulator(gpus=gpus)
        e = s.estimate(Layout("fsdp", gpus, 1, 1, "none", 1, 1))
        if before is not None:
            assert e.seconds >= before.seconds * 0.99  # the update is shared by more
            assert e.tokens_per_second > before.tokens_per_second
            # but for rows that fill up the shards of small matrices, and are copied too
            assert before.spent["blocks"] <= e.spent["blocks"] <= 1.2 * before.spent["blocks"]
        before = e


def test_slower_links_cost_and_nothing_is_faster_than_the_peak():
    layout = Layout("fsdp_tp", 8, 1, 2, "none", 2, 2)
    fast, slow = (simulator(gpus=16, inter_gb_s=speed).estimate(layout) for speed in (50, 1))
    assert slow.spent["weights"] > fast.spent["weights"]
    assert slow.spent["blocks"] == fast.spent["blocks"]
    assert 0 < fast.mfu < 1
    long = simulator("data.seq_len=8192", gpus=16, tokens=2 * 8192)
    cut = long.estimate(Layout("fsdp", 2, 8, 1, "none", 1, 1))
    assert cut.spent["context"] > 0
    assert cut.layout.flags["long_context.ranks"] == "8"
    # a rank has an eighth of the row
    alone = simulator("data.seq_len=1024", gpus=16).memory(Layout("fsdp", 16, 1, 1, "none", 1, 1))
    assert cut.memory == alone


MISTAKES = [
    ({"gpus": 12}, [], "cluster.gpus=12 do not fill nodes of cluster.node=8: choose 8 or 16"),
    ({"gpus": 8, "tokens": 1000}, [], "no rows of data.seq_len=512: choose 512"),
    ({"gpus": 8}, ["long_context=exact"], "leave out long_context=exact"),
]


@pytest.mark.parametrize(("cluster", "overrides", "message"), MISTAKES)
def test_bad_input(cluster, overrides, message):
    with pytest.raises(UserError, match=message):
        simulator(*overrides, **cluster)


def test_what_fits_nowhere_or_has_no_rows():
    with pytest.raises(UserError, match="a multiple of 32768"):
        simulator(gpus=64, tokens=512).best()
    s = simulator(gpus=2, node=2)
    s.cluster = s.cluster.__class__(
        **{**s.cluster.__dict__, "gpu": GPUS["4090"]._replace(memory=0.1)}
    )
    with pytest.raises(UserError, match="no layout of 2 RTX 4090 fits; the smallest is strategy="):
        s.best()
