"""What mamba2-doctor finds, on a machine that is well and on ones that are not."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mamba2_train import doctor
from mamba2_train.doctor import answers, examine


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Findings by what they are about, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(doctor, "stored_key", lambda url: None)

    def find(run_dir: Path = tmp_path):
        by_what = {}
        for finding in examine(run_dir, 0.2):
            by_what.setdefault(finding.what, []).append(finding)
        return by_what

    return find


def test_a_machine_that_is_well(found):
    findings = found()
    assert not [f for fs in findings.values() for f in fs if f.level == "problem"]
    assert f"torch {torch.__version__}" in f"torch {findings['torch'][0].found}"
    assert "offline" in findings["wandb"][0].found
    assert len(findings["disk"]) >= 4


def test_packages_out_of_range_or_missing_are_named_with_the_cure(found, monkeypatch):
    """As pip would see it: our own metadata against what importlib says is installed."""
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            return "0.20.0"
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    faults = {f.found: f.cure for f in found()["packages"] if f.level == "problem"}
    (peft,) = (text for text in faults if text.startswith("peft 0.20.0, and "))
    assert faults[peft] == f"pip install 'peft{peft.split('and ')[1].split(' is')[0]}'"
    assert faults["rich is missing"] == "pip install 'rich>=14'"


def test_a_scan_that_is_wrong_is_a_problem(found, monkeypatch):
    monkeypatch.setattr(doctor, "_scan_error", lambda device, backend: 2e-3)
    (finding,) = found()["ops"]
    assert finding.level == "problem"
    assert "2e-03" in finding.found


def test_a_folder_that_cannot_be_written(found, tmp_path):
    """A file is where the folder should be: root may write anywhere else."""
    (tmp_path / "file").touch()
    faults = [f for f in found(tmp_path / "file" / "runs")["disk"] if f.level == "problem"]
    assert len(faults) == 1
    assert "cannot be written" in faults[0].found
    assert "run_dir" in faults[0].cure


def test_a_full_disk(found, monkeypatch):
    usage = doctor.shutil.disk_usage("/")._replace(free=5e8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert {f.level for f in found()["disk"]} == {"problem"}


def test_a_driver_beside_a_torch_for_cpus(found, monkeypatch):
    if torch.version.cuda:
        pytest.skip("this torch is built for CUDA")
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    (finding,) = found()["torch"]
    assert finding.level == "problem"
    assert "CUDA build" in finding.cure


def test_a_check_that_fails_is_a_finding_and_not_the_end(found, monkeypatch):
    def fail(*_):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "bitsandbytes", fail)
    findings = found()
    assert findings["bitsandbytes"][0].level == "problem"
    assert "libcudart" in findings["bitsandbytes"][0].found
    assert findings["wandb"]


def test_a_server_that_says_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        assert not answers(url, 0.5)
        assert time.monotonic() - started < 3
    assert not answers(url, 0.5)  # nobody listens any more


def test_the_command_counts_and_exits(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [Path(sys.executable).parent / "mamba2-doctor", "json=true", "run_dir=file/runs"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = json.loads(done.stdout)
    assert said["count"]["problem"] == 1, said
    assert done.returncode == 1
    assert {f["what"] for f in said["findings"]} >= {"python", "packages", "torch", "disk"}
