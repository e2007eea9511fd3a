"""A sweep: a process and a folder for each job, none of which takes another with it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mamba2_train import sweep
from mamba2_train.commands import train

BIN = Path(sys.executable).parent
SHORT = [
    "trainer.max_steps=3",
    "trainer.log_every=1",
    "trainer.progress_bar=false",
    "data.limit_rows=40",
    "data.seq_len=64",
    "callbacks.samples.prompts=[]",
    "logger=csv",
]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BIN / "mamba2-train", *arguments],
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three jobs, the first of which is refused."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run("-m", *SHORT, "adapter.r=0,2,4", "hydra.sweep.dir=mine", cwd=folder)


def test_a_failed_job_stops_no_other_and_is_named(swept):
    folder, done = swept
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: 1 of 3 jobs failed: 0 (adapter.r=0): adapter.r: ")
    assert not (folder / "mine" / "0" / "result.json").exists()


def test_the_best_job_is_named(swept):
    folder, done = swept
    losses = {
        number: json.loads((folder / "mine" / number / "result.json").read_text())["final"][
            "val/loss"
        ]
        for number in ("1", "2")
    }
    best = min(losses, key=losses.__getitem__)
    rank = {"1": 2, "2": 4}[best]
    assert f"best      mine/{best}  adapter.r={rank}\n" in done.stdout
    assert all(f"{loss:.4f}" in done.stdout for loss in losses.values())


def test_a_job_is_the_run_by_itself(swept):
    """The same bits: nothing of the job before is left."""
    folder, _ = swept
    alone = run(*SHORT, "adapter.r=4", "run_dir=alone", cwd=folder)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = weights(folder / "mine" / "2"), weights(folder / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# What a job does, without the seconds that a model takes: the last argument is its folder.
JOB = """
import json, os, signal, sys, time
folder = sys.argv[-1].removeprefix("run_dir=")
settings = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
log = os.path.join(folder, "logs")
os.makedirs(log, exist_ok=True)
lr = float(settings["optimizer.lr"])
with open("began", "a") as file:
    file.write(f"{os.getpid()} {lr}\\n")
if lr == 2:
    open(os.path.join(log, "rank-0.log"), "w").write("Traceback\\nUserError: no such file\\n\\n")
    sys.exit(1)
if lr == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if lr == 4:
    signal.signal(signal.SIGTERM, lambda *_: (open("saved", "w").close(), sys.exit(143)))
    open("waiting", "w").close()
    time.sleep(60)
result = {"status": "finished", "final": {"val/loss": lr}}
open(os.path.join(folder, "result.json"), "w").write(json.dumps(result))
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Sweep in this process, over jobs that are `JOB`."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = sweep._command
    monkeypatch.setattr(
        sweep, "_command", lambda *a: [sys.executable, str(script), *command(*a)[3:]]
    )
    monkeypatch.setattr(sweep.Sweep, "folder", None)
    monkeypatch.delenv("MAMBA2_RUN_STAMP", raising=False)
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mamba2-train", "-m", *arguments])
        try:
            train.main()
        except SystemExit as end:
            return end.code
        return 0

    return start


def test_jobs_that_fail_by_themselves(quick, tmp_path, capfd):
    """One with an error, one by a signal: both are named with the reason; each is a process."""
    assert quick("optimizer.lr=1,2,3,0.5") == 1
    (folder,) = (tmp_path / "multirun" / "quotes").iterdir()
    out, err = capfd.readouterr()
    assert "2 of 4 jobs failed" in " ".join(err.split())
    assert "1 (optimizer.lr=2): exit code 1: UserError: no such file" in " ".join(err.split())
    assert "2 (optimizer.lr=3): stopped by SIGKILL" in " ".join(err.split())
    assert f"best      {folder.relative_to(tmp_path)}/3  optimizer.lr=0.5\n" in out
    began = [line.split()[0] for line in (tmp_path / "began").read_text().splitlines()]
    assert len({*began, str(os.getpid())}) == 5
    jobs = sweep.read_jobs(folder)
    assert [job.status for job in jobs] == ["finished", "failed", "failed", "finished"]
    assert math.isnan(jobs[1].loss)


def test_a_sweep_goes_on_with_what_has_not_finished(quick, tmp_path):
    line = ["optimizer.lr=1,2", "hydra.sweep.dir=mine", "resume=auto"]
    assert quick(*line) == 1
    assert quick(*line) == 1
    began = [line.split()[1] for line in (tmp_path / "began").read_text().splitlines()]
    assert began == ["1.0", "2.0", "2.0"]


def test_ten_jobs_are_in_order_and_a_recipe_is_passed_on(quick, tmp_path):
    rates = ",".join(str(10 + i) for i in range(11))
    assert quick("--config-name", "hf_docs_lora", f"optimizer.lr={rates}") == 0
    (folder,) = (tmp_path / "multirun" / "hf_docs_lora").iterdir()
    assert [job.loss for job in sweep.read_jobs(folder)] == [10.0 + i for i in range(11)]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["run_dir=here"], {}, "hydra.sweep.dir=FOLDER"),
        (["seed=0,1"], {"TORCHELASTIC_RUN_ID": "none"}, "start it without"),
        (["optimiser.lr=1,2"], {}, "Did you mean 'optimizer'"),
    ],
)
def test_what_can_be_no_sweep_is_refused(
    quick, capsys, monkeypatch, *, arguments, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mamba2_train.commands.is_first_to_fail", lambda: True)
    assert quick(*arguments) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_sigterm_stops_the_job_and_the_sweep(tmp_path):
    """The job hears it, and has the time to save; no further one begins."""
    (tmp_path / "job.py").write_text(JOB)
    parent = f"""
import sys
from mamba2_train import sweep
command = sweep._command
sweep._command = lambda *a: [sys.executable, {str(tmp_path / "job.py")!r}, *command(*a)[3:]]
sys.argv = ["mamba2-train", "-m", "optimizer.lr=4,5"]
from mamba2_train.commands.train import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env=os.environ | ENVIRONMENT
    )
    until = time.monotonic() + 120
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()
    assert len((tmp_path / "began").read_text().splitlines()) == 1


def test_submitit_runs_the_jobs(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = run(
        *("-m", *SHORT, "adapter.r=0,2", "hydra/launcher=submitit_local", "hydra.sweep.dir=mine"),
        cwd=tmp_path,
    )
    assert "1 of 2 jobs failed: 0 (adapter.r=0)" in done.stderr, done.stderr
    assert "best      mine/1  adapter.r=2\n" in done.stdout
    assert "val/loss" in (tmp_path / "mine" / "1" / "result.json").read_text()


def test_optuna_seeks_the_lowest_loss(quick, tmp_path):
    """`JOB`'s loss is its learning rate; trials that fail are passed over, and a second sweep goes
    on with what the first has learned."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    line = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.max_failure_rate=1",
        "hydra.sweeper.storage=sqlite:///trials.db",
        "hydra.sweeper.study_name=mine",
        "optimizer.lr=choice(0.5,1,2)",
        "adapter.r=range(8,16)",
    ]
    jobs = []
    for seed, name in enumerate(("first", "second")):
        code = quick(*line, f"hydra.sweep.dir={name}", f"hydra.sweeper.sampler.seed={seed}")
        found = sweep.read_jobs(tmp_path / name)
        assert len(found) == 6
        assert code == any(job.error for job in found)
        jobs += found
    failed = ["optimizer.lr=2" in job.overrides for job in jobs]
    assert failed == [job.status == "failed" for job in jobs]
    assert 0 < sum(failed) < 12
    best = yaml.safe_load((tmp_path / "second" / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(job.loss for job in jobs if not job.error)
    import optuna

    study = optuna.load_study(study_name="mine", storage="sqlite:///trials.db")
    assert len(study.trials) == 12
