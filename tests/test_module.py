"""A token weighs the same whichever micro-batch or rank holds it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed" / "token_mean.py"


def run(out: Path, *options: str, ranks: int = 1) -> dict:
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        options = (*options, "--devices", str(ranks))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, str(SCRIPT), str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory):
    """Truth: all tokens of a step in one batch on one process."""
    return run(tmp_path_factory.mktemp("truth") / "one.pt")


def assert_equal_runs(a: dict, b: dict) -> None:
    for name, weight in a["weights"].items():
        torch.testing.assert_close(b["weights"][name], weight, rtol=1e-9, atol=1e-11)
    for name in ("train/loss", "train/grad_norm"):
        torch.testing.assert_close(b["metrics"][name], a["metrics"][name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("accumulate", ["2", "4"])
def test_accumulation_equals_one_large_batch(one_batch, tmp_path, accumulate):
    assert_equal_runs(one_batch, run(tmp_path / "run.pt", "--accumulate", accumulate))


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_ranks_equal_one(one_batch, tmp_path, accumulate):
    assert_equal_runs(one_batch, run(tmp_path / "run.pt", "--accumulate", accumulate, ranks=2))


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_ranks_in_segments_equal_one_in_one_pass(one_batch, tmp_path, accumulate):
    """24 positions in four segments, whose gradients are exchanged with the last of them."""
    options = "--accumulate", accumulate, "--segment-len", "7"
    segmented = run(tmp_path / "run.pt", *options, ranks=2)
    assert_equal_runs(one_batch, segmented)
    assert segmented["exchanges"] == 3  # one for each step of the optimizer


def test_clipping_sees_the_mean_gradient(tmp_path):
    # below the norm of each step's gradient, so that it must bite
    clipped = run(tmp_path / "a.pt", "--clip", "0.05")
    assert_equal_runs(clipped, run(tmp_path / "b.pt", "--clip", "0.05", "--accumulate", "4"))
    assert clipped["metrics"]["train/grad_norm"] > 0.05


def test_the_check_can_fail(one_batch, tmp_path):
    """Two of four batches only: other weights."""
    other = run(tmp_path / "run.pt", "--clip", "0.05")
    with pytest.raises(AssertionError):
        assert_equal_runs(one_batch, other)
