"""A model split over 2 and 4 processes equals the same model in one."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed" / "tensor_parallel.py"
GROUPS = ("8 groups", "2 groups", "1 groups")
both = pytest.mark.parametrize("n", [2, 4], ids="{} ranks".format)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """n -> what each case found on n ranks, all of them in one launch."""

    @cache
    def launched(n: int) -> dict:
        out = tmp_path_factory.mktemp("tensor") / "results.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launch, str(SCRIPT), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(out.read_text())

    return launched


def assert_exact(found: dict, *, tolerance: float = 1e-12) -> None:
    assert found["n_gradients"] >= 8
    for what in ("loss", "logits", "gradients"):
        assert found[what] < tolerance, found


@both
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["full", "LoRA", "DoRA"])
def test_loss_logits_and_every_gradient(results, n, kind, groups):
    """In float64; packed, padded, biases and norms drawn, 81 tokens over 2 or 4 ranks."""
    assert_exact(results(n)[f"{kind}, {groups}"])


@pytest.mark.parametrize(
    "name",
    [
        *("untied", "untied LoRA", "dropout", "dropout, DoRA", "one rank", "compiled"),
        *("checkpointing selective", "checkpointing full"),
    ],
)
def test_the_same_of(results, name):
    assert_exact(results(2)[name])


@both
def test_weights_are_read_slice_by_slice(results, n):
    """Into a model on the meta device, each rank what it keeps."""
    assert_exact(results(n)["from slices"])


@both
def test_nf4(results, n):
    """The dequantized weights are equal to the bit (in the script), the sums over ranks rounded."""
    assert_exact(results(n)["nf4"], tolerance=1e-5)


@pytest.mark.parametrize("name", ["fp4", "int8", "block by block"])
def test_quantized(results, name):
    assert_exact(results(2)[name], tolerance=1e-5)


@both
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("steps, full, 2 groups", 1e-5),
        ("steps, LoRA, 1 groups", 1e-5),
        ("steps, float64, LoRA, 2 groups", 1e-12),
    ],
)
def test_six_steps_of_adamw(results, n, name, tolerance):
    found = results(n)[name]
    assert found["losses"] < tolerance
    assert found["weights"] < tolerance, found


@both
@pytest.mark.parametrize("groups", GROUPS)
def test_generation(results, n, groups):
    found = results(n)[f"cached, {groups}"]
    assert found["logits"] < 1e-12
    assert found["tokens"] == 0


@both
@pytest.mark.parametrize("groups", GROUPS)
def test_one_collective_each_way_in_a_layer(results, n, groups):
    """Fewer groups than ranks: the norm's sums too, and the gradients of B's and C's rows in
    in_proj, in the convolution and in its bias."""
    shared = int(groups[0]) < n
    expected = {"forward": 1 + shared, "backward": 1 + 4 * shared}
    assert results(n)[f"collectives, {groups}"] == expected


def test_two_dimensions(results):
    """FSDP2 over the data dimension: weights after a step, other rows on each data rank."""
    found = results(4)["FSDP2"]
    assert found["full"] < 1e-12
    assert found["LoRA"] < 1e-12
    assert found["nf4"] < 1e-5


def test_one_rank_has_the_same_parameters(results):
    found = results(2)["one rank"]
    assert found["same"]
    assert found["full"] < 1e-12
    assert found["nf4"] < 1e-5


def test_the_audit_of_gradients_knows_the_pieces(results):
    message = results(2)["from slices"]["silent"]
    assert "such as backbone.layers.1.mixer.out_proj.lora_B.default.weight:" in message


def test_no_more_logits_than_a_chunk_of_rows(results):
    found = results(2)["largest logits"]
    assert found["rows"] == found["chunk"]


@both
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("heads", "cannot share 1 heads in 1 groups evenly; choose a number of 1"),
        ("groups", "cannot share 24 heads in 3 groups evenly; choose a number of 1, 3, 6, 12, 24"),
        ("vocabulary", "some would have none; choose fewer"),
        ("blocks", "choose a number of 1, or quantization=int8"),
    ],
)
def test_refused(results, n, name, expected):
    assert expected in results(n)["refusals"][name]


@both
@pytest.mark.parametrize(
    "control", ["naive columns", "no gradient sum of B and C", "no sum in the norm"]
)
def test_the_check_can_fail(results, n, control):
    assert results(n)[f"control: {control}"]["gradients"] > 1e-2
