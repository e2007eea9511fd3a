"""The installed commands: the main job on a shortened run, and one line for each fault."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from mamba2_train.assets import FOLDER
from mamba2_train.commands.generate import load_checkpoint

BIN = Path(sys.executable).parent
SHORT = [
    "trainer.max_steps=6",
    "trainer.log_every=1",
    "data.limit_rows=60",
    "data.batch_size=4",
    "data.seq_len=64",
    "callbacks.samples.max_new_tokens=5",
]
TINY_BASE = FOLDER / "tiny_base"


def run(name: str, *arguments: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [BIN / name, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        **kwargs,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the main job."""
    folder = tmp_path_factory.mktemp("run")
    done = run("mamba2-train", *SHORT, "run_dir=out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_leaves_all_that_it_promises(finished):
    folder, done = finished
    out = folder / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["steps"] == 6
    assert result["final"]["val/loss"] < result["base"]["val/loss"]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 6
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    for module in ("in_proj", "out_proj", "embeddings"):
        trained = [
            w for k, w in weights.items() if (module in k and "lora_B" in k) or "embedding_B" in k
        ]
        assert trained
        assert all(w.abs().max() > 0 for w in trained)
    assert (out / "adapter" / "tokenizer.json").is_file()
    assert (out / "checkpoints" / "step-00000006.ckpt").is_file()
    assert "<svg" in (out / "report.html").read_text()
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len((out / "samples.jsonl").read_text().splitlines()) == 4
    for shown in ("held-out perplexity", "report.html", "mamba2-generate"):
        assert shown in done.stdout


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(finished):
    folder, _ = finished
    checkpoint = torch.load(
        folder / "out" / "checkpoints" / "step-00000006.ckpt", weights_only=True
    )
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])


def test_the_next_command_it_names_works(finished):
    folder, done = finished
    command = re.search(r"next +(mamba2-generate .*)", done.stdout).group(1)
    arguments = shlex.split(command)[1:]
    text = run("mamba2-generate", *arguments, "max_new_tokens=8", cwd=folder)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("Love is")
    base = run("mamba2-generate", *arguments[1:], "max_new_tokens=8", cwd=folder)
    assert base.stdout.startswith("Love is")
    small = run("mamba2-generate", *arguments, "quantization=nf4", "max_new_tokens=8", cwd=folder)
    assert (small.returncode, small.stderr) == (0, "")
    assert small.stdout.startswith("Love is")


def test_the_merge_command_it_names_gives_transformers_the_same_model(finished):
    """Logits of the folder in transformers = logits of the adapter on its base, both in fp32."""
    folder, done = finished
    (line,) = re.findall(r"merge +(mamba2-export .*?)  \(", done.stdout)
    arguments = shlex.split(line)[1:]
    before = {path: path.read_bytes() for path in (folder / "out" / "adapter").iterdir()}
    merged = run("mamba2-export", *arguments, "dtype=float32", cwd=folder)
    assert merged.returncode == 0, merged.stderr
    assert "peft refuses out_proj" in done.stdout
    ids = torch.randint(0, 4096, (2, 33), generator=torch.Generator().manual_seed(0))
    ours, _, _ = load_checkpoint(str(folder / "out"), dtype=torch.float32)
    stock = transformers.Mamba2ForCausalLM.from_pretrained(folder / "FOLDER")
    with torch.no_grad():
        got, expected = stock(ids).logits, ours(ids).logits
    assert (got - expected).abs().max() / expected.abs().max() < 1e-5
    assert all(path.read_bytes() == bytes_ for path, bytes_ in before.items())
    # the base is what it is made from
    refused = run("mamba2-export", "checkpoint=out", "out=out/adapter", cwd=folder)
    assert refused.returncode == 1
    assert "is what the model is made from" in refused.stderr


def test_training_goes_on_from_a_run(finished):
    folder, _ = finished
    again = run(
        "mamba2-train",
        *SHORT,
        "adapter=continue",
        "adapter.source=out",
        "run_dir=continued",
        "logger=csv",
        cwd=folder,
    )
    assert again.returncode == 0, again.stderr
    first, second = (
        json.loads((folder / name / "result.json").read_text()) for name in ("out", "continued")
    )
    assert second["base"]["val/loss"] == pytest.approx(first["final"]["val/loss"], rel=1e-6)
    assert second["final"]["val/loss"] < first["final"]["val/loss"]
    assert second["model"]["trainable"] == first["model"]["trainable"]


def test_the_same_seed_gives_the_same_bits(finished):
    folder, _ = finished
    again = run("mamba2-train", *SHORT, "run_dir=again", "logger=csv", cwd=folder)
    assert again.returncode == 0, again.stderr
    first, second = (
        load_file(folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("out", "again")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_full_fine_tuning_from_the_users_own_file(tmp_path):
    rows = [{"body": f"Line {i} says that {i} plus {i} is {2 * i}."} for i in range(80)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(
        "mamba2-train",
        *SHORT,
        "data=local",
        "data.source=mine.jsonl",
        "adapter=full",
        "precision=bf16-mixed",
        "model.checkpointing=full",
        "trainer.accumulate=2",
        "logger=csv",
        "run_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    shutil.move(tmp_path / "out" / "model", tmp_path / "elsewhere")
    text = run(
        "mamba2-generate", "checkpoint=elsewhere", "prompt=Line", "max_new_tokens=3", cwd=tmp_path
    )
    assert text.returncode == 0, text.stderr


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    arguments = [a for a in SHORT if "max_steps" not in a]
    process = subprocess.Popen(
        [BIN / "mamba2-train", *arguments, "trainer.max_epochs=500", "logger=csv", "run_dir=out"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "out" / "csv" / "metrics.csv"
    until = time.monotonic() + 120
    while not (metrics.is_file() and "train/loss" in metrics.read_text()):
        assert time.monotonic() < until, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "report.html").is_file()
    # and it can go on
    (saved,) = (tmp_path / "out" / "checkpoints").glob("*.ckpt")
    assert int(saved.stem.removeprefix("step-")) == result["steps"]


def test_torchrun_on_two_ranks(tmp_path):
    """One folder, one voice, every held-out token counted once."""
    launch = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "-m", "mamba2_train"]
    done = subprocess.run(
        [*launch, *SHORT, "strategy=ddp", "logger=csv"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "quotes").iterdir()
    result = json.loads((folder / "result.json").read_text())
    alone = run("mamba2-train", *SHORT, "logger=csv", "run_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    expected = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert result["base"] == pytest.approx(expected["base"], rel=1e-6)
    assert result["final"]["val/loss"] < result["base"]["val/loss"]
    assert done.stdout.count("held-out perplexity") == 1


def _broken(folder: Path) -> None:
    """Inputs with a fault each."""
    (folder / "empty.jsonl").write_text("")
    (folder / "typed.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n' * 5)
    (folder / "malformed.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    long = [{"text": f"{i} words " * 500} for i in range(3)]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    (folder / "quotes.jsonl").write_text('{"text": "a"}\n' * 20)
    shutil.copytree(TINY_BASE, folder / "truncated")
    weights = (folder / "truncated" / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(TINY_BASE, folder / "llama")
    config = json.loads((folder / "llama" / "config.json").read_text())
    (folder / "llama" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    (folder / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "recipe.yaml").write_text("defaults: [train, _self_]\ndata:\n  sorce: x.jsonl\n")


local = ["data=local", "logger=csv"]
FAULTS = {
    "missing file": ([*local, "data.source=quots.jsonl"], r"quots\.jsonl.*quotes\.jsonl"),
    "empty data set": ([*local, "data.source=empty.jsonl"], r"empty\.jsonl"),
    "wrong type": ([*local, "data.source=typed.jsonl"], r"typed\.jsonl.*2.*7"),
    "malformed": ([*local, "data.source=malformed.jsonl"], r"malformed\.jsonl.*2"),
    "too long": (
        [*local, "data.source=long.jsonl", "data.long_documents=error", "data.seq_len=64"],
        r"long\.jsonl.*64.*long_documents",
    ),
    "truncated checkpoint": (["model.source=truncated"], r"model\.safetensors"),
    "another architecture": (["model.source=llama"], r"llama.*only Mamba2 is built"),
    "no such checkpoint": (["model.source=./nowhere"], r"nowhere"),
    "misspelt key": (["data.sorce=x"], r"data\.sorce: unknown key\. Did you mean 'source'"),
    "misspelt key in a recipe": (
        ["--config-dir", ".", "--config-name", "recipe"],
        r"data\.sorce: unknown key\. Did you mean 'source'",
    ),
    "wrong type of a setting": (["trainer.max_steps=abc"], r"trainer\.max_steps.*'abc'"),
    "unknown LoRA target": (
        ["adapter.targets=[x_proj]"],
        r"adapter\.targets: 'x_proj'.*Known: in_proj, out_proj",
    ),
    "a block that does not exist": (["adapter.layers=[7-9]"], r"layer 8 does not exist.*0 to 7"),
    "a pattern for nothing": (
        ["adapter.rank_pattern={out_prj: 4}"],
        r"'out_prj' matches no adapted module.*'out_proj'",
    ),
    "an adapter of another base": (
        ["adapter=continue", "adapter.source=adapter", "model.source=truncated"],
        r"was trained on elsewhere.*model\.source=elsewhere",
    ),
    "unknown choice": (["strategy=fspd"], r"strategy=fspd.*'fsdp'.*Known: auto, ddp"),
    "unknown recipe": (["--config-name", "hf_lora"], r"--config-name hf_lora.*'hf_docs_lora'"),
    "full disk": (["run_dir=full/run"], r"MB free"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the command says to each fault; two at a time, for most of it is start-up."""
    folder = tmp_path_factory.mktemp("faults")
    _broken(folder)
    (folder / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder / "full"], check=True)
    try:
        with ThreadPoolExecutor(2) as pool:
            futures = {
                name: pool.submit(run, "mamba2-train", *arguments, cwd=folder)
                for name, (arguments, _) in FAULTS.items()
            }
            yield folder, {name: future.result() for name, future in futures.items()}
    finally:
        subprocess.run(["umount", folder / "full"], check=True)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_exit_code_1(answers, name):
    _, results = answers
    done = results[name]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert re.search(FAULTS[name][1], lines[0]), lines[0]


def test_nothing_half_written_is_left(answers):
    folder, _ = answers
    left = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".ckpt", ".tmp")]
    assert {p.parent.name for p in left} <= {"truncated", "llama"}
    assert not list(folder.rglob("report.html"))


def test_debug_shows_the_traceback(answers):
    folder, _ = answers
    done = run("mamba2-train", "model.source=llama", "debug=true", cwd=folder)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
