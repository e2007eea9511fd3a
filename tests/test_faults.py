"""What happens to a run of two ranks when one is killed, hangs, is asked to stop, or fails.

The truth is the same run undisturbed; the others are the installed command under torchrun, with a
fault put into it by distributed/faulty_train.py. What happens to a single process is in
test_resume.py, and to a step that is not finite in test_nonfinite.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.processes import check_launcher
from mamba2_train.watch import late

BIN = Path(sys.executable).parent
FAULTY = Path(__file__).parent / "distributed" / "faulty_train.py"
STEPS = 8
# 5 batches to an epoch of each rank and windows of 2: an epoch has 3 steps
RUN = [
    "model.source=base",
    "data=local",
    "data.source=rows.jsonl",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.num_workers=1",
    "data.validation_fraction=0.23",
    "adapter.dropout=0.3",
    "adapter.r=4",
    "trainer.accumulate=2",
    "trainer.max_epochs=null",
    f"trainer.max_steps={STEPS}",
    "trainer.validate_every=3",
    "trainer.log_every=1",
    "trainer.progress_bar=false",
    "callbacks.saving.every_steps=1",
    "callbacks.samples.prompts=[]",
    "logger=csv",
    "strategy=ddp",
]


def launch(folder, fault, *arguments, restarts=0, share_store=False):
    """torchrun with two ranks of the installed command with a fault in it; returns its exit code
    and what it said. Its own processes are gone afterwards, whatever happens."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    if not share_store:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node=2"]
    torchrun.append(f"--max-restarts={restarts}")
    process = subprocess.Popen(
        [*torchrun, FAULTY, fault, BIN / "mamba2-train", *RUN, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            process.terminate()  # and it ends its workers
            process.wait(timeout=60)
    return process.returncode, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and some rows of unequal length."""
    folder = tmp_path_factory.mktemp("faults")
    shape = Mamba2Config(d_model=16, n_layers=1, vocab_size=4096, d_state=8, headdim=8)
    save_pretrained(initialize(Mamba2LM(shape), seed=1), folder / "base")
    save_tokenizer(load_tokenizer(FOLDER / "tiny_base"), folder / "base")
    rows = [{"text": " ".join(str(i * j) for j in range(3 + i % 5))} for i in range(54)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def truth(folder):
    """Two ranks, undisturbed."""
    code, said = launch(folder, "none", "run_dir=truth")
    assert code == 0, said
    return folder / "truth"


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)


def steps(run: Path) -> list[int]:
    found = sorted((run / "checkpoints").glob("*.ckpt"))
    return [int(path.stem.removeprefix("step-")) for path in found]


def log(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank-{rank}.log").read_text()


def exit_codes(said: str) -> list[int]:
    return [int(code) for code in re.findall(r"^  exitcode  : (-?\d+)", said, re.MULTILINE)]


def assert_same_bits(run: Path, truth: Path) -> None:
    ours, theirs = last(run), last(truth)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert ours[key]
        assert same(ours[key], theirs[key]), key
    a, b = (next(s for s in c["callbacks"].values() if "csv_rows" in s) for c in (ours, theirs))
    for key in ("ranks", "scores", "csv_rows"):
        assert same(a[key], b[key]), key
    results = [json.loads((r / "result.json").read_text()) for r in (run, truth)]
    assert results[0]["final"] == results[1]["final"]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stopped_at(run: Path) -> tuple[list[int], int]:
    """The steps after which the ranks heard the last signal, and that of the checkpoint."""
    lines = [log(run, rank).splitlines()[-1] for rank in range(2)]
    heard = [int(m[1]) for line in lines if (m := re.search(r"heard after step (\d+)", line))]
    saved = {int(re.search(r"saved at step (\d+)", line)[1]) for line in lines}
    assert len(saved) == 1, lines
    return heard, saved.pop()


def check_stop(run: Path, agent: bool, code: int, said: str) -> None:
    """A checkpoint at the end of the step in which the signal came, and an orderly end."""
    heard, saved = stopped_at(run)
    # the ranks may hear torchrun's on two sides of a step; between steps there is none to end
    assert {saved, saved - 1} & set(heard), (heard, saved)
    assert saved == steps(run)[-1]
    assert said.count("resume=auto goes on") == 1
    assert code != 0
    if not agent:  # which says nothing about its workers then
        assert exit_codes(said) == [128 + signal.SIGTERM] * 2, said
    assert "Traceback" not in log(run, 0) + log(run, 1)


def test_whatever_stops_it_it_comes_to_the_same_bits(folder, truth):
    """SIGTERM to a rank and to torchrun; then a rank is killed, and torchrun restarts both."""
    run = folder / "stopped"
    for fault in ("batch:3:SIGTERM@1", "batch:1:SIGTERM@agent+slow"):
        code, said = launch(folder, fault, "run_dir=stopped", "resume=auto")
        check_stop(run, "agent" in fault, code, said)
    before = steps(run)[-1]
    code, said = launch(folder, "batch:4@1", "run_dir=stopped", "resume=auto", restarts=1)
    assert code == 0, said
    first, second = map(int, re.findall(r"going on after step (\d+)", said))
    assert before == first < second < STEPS
    assert "restart 1" in log(run, 1)
    assert_same_bits(run, truth)
    assert [path.name for path in sorted((run / "logs").iterdir())] == ["rank-0.log", "rank-1.log"]
    assert said.count("held-out perplexity") == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sigterm_twenty_times(folder):
    """At another place each time: in the first or second batch of a window, while validating,
    saving or between steps; to either rank or to torchrun."""
    for i in range(20):
        who = ("0", "1", "agent")[i % 3]
        place = ("batch", "backward", "update", "validation", "saving")[i % 5]
        if place == "saving" and who == "1":  # the first rank writes
            place = "updated"
        # the first two validation batches come before the training, when there is nothing to save
        number = {"batch": 2 + i % 4, "validation": 3 + i % 2}.get(place, 1 + i % 3)
        run = folder / f"sigterm-{i}"
        fault = f"{place}:{number}:SIGTERM@{who}+slow"
        code, said = launch(folder, fault, f"run_dir=sigterm-{i}")
        try:
            check_stop(run, who == "agent", code, said)
        except Exception as error:
            raise AssertionError(f"{fault}: {said[-3000:]}") from error


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["save:3", "rename:4", "saving:3", "updated:2@1"])
def test_killed_while_saving_the_checkpoint_before_is_used(folder, truth, fault):
    name = re.sub(r"\W", "_", fault)
    code, said = launch(folder, fault, f"run_dir={name}", "resume=auto", restarts=1)
    assert code == 0, said
    assert "starting afresh" in said
    assert "going on after step" in said
    assert_same_bits(folder / name, truth)
    assert not list((folder / name / "checkpoints").glob("*.tmp"))


def test_a_rank_that_hangs_is_named_with_the_collective(folder):
    code, said = launch(folder, "batch:4:HANG@1", "run_dir=hangs", "strategy.timeout_minutes=0.05")
    assert code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert re.search(r"rank 1 hangs in strike \(faulty_train.py:\d+\): it has not come to ", line)
    assert re.search(r"all_reduce \(number \d+\), in which rank 0 has waited for 0.05 min", line)
    assert exit_codes(said) == [1, 1]
    assert "in strike" in log(folder / "hangs", 1)  # where it hangs
    assert "in strike" not in log(folder / "hangs", 0).partition("hangs in strike")[2]


def test_all_ranks_leave_out_the_step_that_one_of_them_spoils(folder):
    """A row that gives nan, twice in the run: the first time skipped, the second time the end."""
    tokenizer = load_tokenizer(FOLDER / "tiny_base")
    shape = Mamba2Config(
        d_model=16, n_layers=1, vocab_size=4096, d_state=8, headdim=8, tie_embeddings=False
    )
    save_pretrained(initialize(Mamba2LM(shape), seed=1), folder / "untied")
    save_tokenizer(tokenizer, folder / "untied")
    last = tokenizer.decode([4095])
    assert tokenizer.encode(last) == [4095]
    rows = (folder / "rows.jsonl").read_text()
    (folder / "with.jsonl").write_text(rows + json.dumps({"text": last}) + "\n")
    data = ("data.source=with.jsonl", "data.validation_source=rows.jsonl", "data.packing=none")
    code, said = launch(
        folder,
        "none+poison",
        *("model.source=untied", *data, "run_dir=spoilt"),
        *("trainer.on_nan=skip", "trainer.max_skipped=1", "trainer.max_steps=30"),
    )
    run = folder / "spoilt"
    assert code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    first, second = sorted((run / "nonfinite").iterdir())
    rank = int(second.stem[-1])
    step = int(second.stem.split("-")[1])
    assert f"1 steps have been skipped, and in step {step} the loss is nan" in line
    assert f"because of rank {rank};" in line
    saved = torch.load(second, weights_only=True)
    poisoned = [4095 in batch["input_ids"] for batch in saved["batches"]]
    assert [not torch.tensor(loss).isfinite() for loss in saved["losses"]] == poisoned
    assert sum(poisoned) == 1
    assert said.count("skipped, 1 of 1") == 1
    assert "skipped, 1 of 1" in log(run, 0)
    assert "skipped, 1 of 1" in log(run, 1)
    assert steps(run)[-1] == step - 1
    weights = torch.load(run / "checkpoints" / f"step-{step - 1:08d}.ckpt", weights_only=True)
    assert all(w.isfinite().all() for w in weights["state_dict"].values())
    assert int(first.stem.split("-")[1]) < step


def standing(**groups):
    return {"groups": groups, "at": "in f (a.py:1)"}


def test_who_is_late():
    """In a mesh of 2 x 2 rank 3 hangs: 2 waits for it in their group, and 0 and 1 for those two in
    theirs."""
    rows, columns = ([0, 1], [2, 3]), ([0, 2], [1, 3])
    entered = {0: (5, 8), 1: (5, 8), 2: (6, 7), 3: (5, 7)}
    ranks = {
        r: standing(
            row=[rows[r // 2], entered[r][0], "all_reduce"],
            column=[columns[r % 2], entered[r][1], "all_gather"],
        )
        for r in range(4)
    }
    # the groups of a mesh have names of their own on each rank
    named = {
        r: standing(**{f"row{r // 2}": s["groups"]["row"], f"column{r % 2}": s["groups"]["column"]})
        for r, s in ranks.items()
    }
    verdict = late(named)
    assert verdict.startswith("rank 3 hangs in f (a.py:1): it has not come to ")
    assert "rank 2 hangs" not in verdict
    for r in range(4):
        named[r]["groups"] = {k: [m, 7, c] for k, (m, _, c) in named[r]["groups"].items()}
    assert late(named) == ""
    # one that never entered a group's first collective
    named[2]["groups"].pop("row1")
    assert late(named).startswith("rank 2 hangs")


@pytest.mark.parametrize("fault", ["of all ranks", pytest.param("of one", marks=pytest.mark.slow)])
def test_a_fault_is_said_once_and_ends_all_ranks(folder, fault):
    """A fault that no restart can mend is not tried again either."""
    if fault == "of all ranks":
        arguments, fault, what = ["data.sorce=x"], "none", r"error: data\.sorce: unknown key"
    else:
        arguments, fault = ["run_dir=one"], "batch:2:FAIL@1"
        what = "error on rank 1: a fault of rank 1"
    code, said = launch(folder, fault, *arguments, restarts=2)
    assert code != 0
    lines = [line for line in said.splitlines() if line.startswith("error")]
    assert len(lines) == 1, said
    assert re.search(what, lines[0])
    assert said.count("a fault of rank 1") == ("FAIL" in fault)
    if "FAIL" in fault:
        assert "UserError: a fault of rank 1" in log(folder / "one", 1)
        assert "restart 1" not in log(folder / "one", 0)


@pytest.mark.slow
def test_a_bug_shows_its_traceback_once(folder):
    code, said = launch(folder, "batch:2:BUG@1", "run_dir=bug")
    assert code != 0
    assert said.count("ValueError: a bug of rank 1") == 1, said
    assert said.count("in training_step") + said.count("in struck") >= 1
    assert "ValueError: a bug of rank 1" in log(folder / "bug", 1)
    # it fails as a consequence, and that is no news
    assert "Connection closed" not in said


def test_restarts_that_could_not_work_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_launcher()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match=r"restarts=3 .*set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_launcher()


@pytest.mark.slow
def test_the_batch_script_saves_and_queues_itself_again(folder, tmp_path):
    """Slurm's commands stand in: srun runs what follows its options, here on one node, and scontrol
    writes down what it is asked. The time limit sends USR1 to the batch shell."""
    asked = tmp_path / "asked"
    commands = {
        "srun": 'while [[ "$1" == -* ]]; do shift; done; exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {asked}',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "mine", "JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost"}
    environment = os.environ | {f"SLURM_{key}": value for key, value in slurm.items()}
    environment |= {"OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}
    environment["PATH"] = f"{tmp_path}:{BIN}:{environment['PATH']}"
    script = Path(__file__).parent.parent / "recipes" / "slurm.sh"
    run = folder / "runs" / "mine-7"

    def submit(max_steps):
        return subprocess.Popen(
            ["bash", script, *RUN, f"trainer.max_steps={max_steps}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process = submit(100_000)
    until = time.monotonic() + 120
    while not list((run / "checkpoints").glob("*.ckpt")):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert "stopped by SIGTERM" in said
    assert asked.read_text() == "requeue 7\n"
    reached = steps(run)[-1]
    process = submit(reached + 1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"going on after step {reached}," in said
    assert asked.read_text() == "requeue 7\n"


@pytest.mark.slow
def test_our_own_code_costs_little_beside_bare_ddp():
    """In CPU time, which other jobs on the machine touch least."""
    done = subprocess.run(
        [BIN / "torchrun", "--standalone", "--nproc-per-node=2", FAULTY.parent / "overhead.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "200"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))
    assert result["cpu_ratio"] <= 1.05, result
