"""A model split over 2 and 4 processes equals the same model in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed" / "tensor_parallel.py"
GROUPS = ("8 groups", "2 groups", "1 groups")


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def results(request, tmp_path_factory):
    """What each case found, all of them in one launch."""
    out = tmp_path_factory.mktemp("tensor") / "results.json"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(SCRIPT), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text()) | {"n": request.param}


def case(results, name):
    if name not in results:
        pytest.skip(f"not with {results['n']} ranks")
    return results[name]


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}, {groups}" for kind in ("full", "LoRA", "DoRA") for groups in GROUPS),
        *("untied", "untied LoRA", "dropout", "dropout, DoRA", "from slices", "one rank"),
        *("checkpointing selective", "checkpointing full", "compiled"),
    ],
)
def test_loss_logits_and_gradients(results, name):
    """In float64; packed, padded, biases and norms drawn, 81 tokens over 2 or 4 ranks."""
    found = case(results, name)
    assert found["n_gradients"] >= 8
    for what in ("loss", "logits", "gradients"):
        assert found[what] < 1e-12, found


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "block by block"])
def test_quantized(results, name):
    """The dequantized weights are equal to the bit (in the script), the sums over ranks rounded."""
    found = case(results, name)
    assert found["n_gradients"] > 0
    for what in ("loss", "logits", "gradients"):
        assert found[what] < 1e-5, found


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("steps, full, 2 groups", 1e-5),
        ("steps, LoRA, 1 groups", 1e-5),
        ("steps, float64, LoRA, 2 groups", 1e-12),
    ],
)
def test_six_steps_of_adamw(results, name, tolerance):
    found = case(results, name)
    assert found["losses"] < tolerance
    assert found["weights"] < tolerance, found


@pytest.mark.parametrize("groups", GROUPS)
def test_generation(results, groups):
    found = case(results, f"cached, {groups}")
    assert found["logits"] < 1e-12
    assert found["tokens"] == 0


def test_one_collective_each_way_in_a_layer(results):
    """Fewer groups than ranks: the norm's sums too, and the gradients of B's and C's rows in
    in_proj, in the convolution and in its bias."""
    for groups in GROUPS:
        shared = int(groups[0]) < results["n"]
        expected = {"forward": 1 + shared, "backward": 1 + 4 * shared}
        assert case(results, f"collectives, {groups}") == expected


def test_two_dimensions(results):
    """FSDP2 over the data dimension: weights after a step, other rows on each data rank."""
    found = case(results, "FSDP2")
    assert found["full"] < 1e-12
    assert found["LoRA"] < 1e-12


def test_one_rank_has_the_same_parameters(results):
    found = case(results, "one rank")
    assert found["same"]
    assert found["full"] < 1e-12


def test_the_audit_of_gradients_knows_the_pieces(results):
    message = case(results, "from slices")["silent"]
    assert "such as backbone.layers.1.mixer.out_proj.lora_B.default.weight:" in message


def test_no_more_logits_than_a_chunk_of_rows(results):
    found = case(results, "largest logits")
    assert found["rows"] == found["chunk"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("heads", "cannot share 1 heads in 1 groups evenly; choose a number of 1"),
        ("groups", "cannot share 24 heads in 3 groups evenly; choose a number of 1, 3, 6, 12, 24"),
        ("vocabulary", "some would have none; choose fewer ranks"),
        ("blocks", "of a row's 64; choose a number of ranks that leaves a multiple of 64"),
    ],
)
def test_refused(results, name, expected):
    assert expected in case(results, "refusals")[name]


@pytest.mark.parametrize(
    "control", ["naive columns", "no gradient sum of B and C", "no sum in the norm"]
)
def test_the_check_can_fail(results, control):
    assert case(results, f"control: {control}")["gradients"] > 1e-2
