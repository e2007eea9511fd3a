"""`make bench`: no time without the same losses, and both sides do run."""

import json
from dataclasses import replace

import pytest

from mamba2_train.benchmarks import __main__ as command
from mamba2_train.benchmarks import pair, profiles, report
from mamba2_train.benchmarks.workloads import WORKLOADS

W = replace(WORKLOADS["lora-tiny-512"], tolerance=0.01)


def measured(losses, rate=100.0, peak=10**6):
    return pair.Measured(
        seconds=[10 / rate] * 3, cpu=[20 / rate] * 3, tokens=[10] * 3, losses=losses, peaks=[peak]
    )


@pytest.mark.parametrize(
    ("losses", "same"),
    [([5.0, 4.0], True), ([5.0, 4.02], False), ([5.02, 4.0], False), ([5.0, float("nan")], False)],
)
def test_no_time_where_losses_differ(losses, same):
    result = pair.Result(W, measured([5.0, 4.0], 300), measured(losses, 100))
    result.check()
    row = report.table([result])[-1]
    assert ("3.0x" in row) is same
    assert ("no times" in row) is not same


def test_the_loss_of_the_same_documents_counts_where_batches_differ():
    sides = measured([5.0]), measured([1.0])
    for side, loss in zip(sides, (4.0, 4.001), strict=True):
        side.quotes = loss
    result = pair.Result(W, *sides)
    result.check()
    assert result.failure is None
    assert result.difference == pytest.approx(0.001)


def test_a_side_that_ends_is_the_failure(tmp_path, monkeypatch):
    side = pair._Side.__init__

    def broken(self, name, request, log):
        side(self, "does_not_exist", request, log)

    monkeypatch.setattr(pair._Side, "__init__", broken)
    result = pair.run(W, {}, tmp_path, 1)
    assert "does_not_exist" in result.failure
    assert "does_not_exist" in report.table([result])[-1]


def test_the_page(tmp_path):
    good = pair.Result(W, measured([5.0, 4.0], 300, 10**6), measured([5.0, 4.0], 100, 4 * 10**6))
    others = {
        "profiles": {"a": {"ours": {"projections": 1.0}, "peer": {"projections": 3.0}}},
        "lengths": [{"tokens": 1024, "seconds": 1.0, "peak": 5e6, "states": 1e5}],
        "startup": {"first": 7.0, "first_cpu": 6.0, "median": 0.1, "slowest": 0.15, "steps": 40},
        "scan": [{"shape": "tiny", "pass": "forward", "ours": 0.01, "peer": 0.05}],
    }
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(f"old\n{report.KEPT}\n## On a GPU\n")
    report.write(tmp_path, [good], others)
    text = page.read_text()
    assert "**3.0x**" in text
    assert "25%" in text  # of the memory
    assert "1.50 times" in text
    assert "5.0x" in text
    assert "old" not in text
    assert text.endswith(f"{report.KEPT}\n## On a GPU\n")
    for plot in ("speed", "memory", "lengths"):
        assert "<svg" in (tmp_path / report.PLOTS / f"{plot}.svg").read_text()
        assert f"{report.PLOTS}/{plot}.svg" in text
    found = json.loads((tmp_path / report.PLOTS / "results.json").read_text())
    assert found["workloads"][0]["ours"]["losses"] == [5.0, 4.0]


def test_operations_have_their_kind():
    kinds = {"aten::mm": "projections", "aten::bmm": "products in the scan"}
    kinds |= {"aten::copy_": "copies", "aten::mul": "one by one", "aten::sum": "sums"}
    assert {name: profiles.kind(name) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("word", "cure"),
    [("workload=lora-tiny-51", "lora-tiny-512"), ("workloads=a", "workload="), ("out", "out=")],
)
def test_a_misspelt_setting(capsys, word, cure):
    assert command.main([word]) == 1
    assert cure in capsys.readouterr().err


def test_both_sides_train_alike(tmp_path, monkeypatch):
    """The documented recipe on two layers: TRL's losses are ours, step by step."""
    pytest.importorskip("trl", reason="TRL comes with the extra bench")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command.main(["--quick", "workload=lora-tiny-512", f"out={tmp_path}"]) == 0
    found = json.loads((tmp_path / report.PLOTS / "results.json").read_text())["workloads"][0]
    assert found["failure"] is None
    assert len(found["ours"]["losses"]) == len(found["peer"]["losses"]) == 3
    assert len(set(found["ours"]["losses"])) == 3
    assert found["losses_differ_by"] < 1e-4
    assert min(found["ours"]["peaks"] + found["peer"]["peaks"]) > 0
