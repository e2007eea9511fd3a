"""Every recipe fits the GPU that recipes/README.md promises, and trains a shrunken model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.commands.plan import known_shape
from mamba2_train.commands.train import adapt, check_adapter
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.plan import GB, Plan
from mamba2_train.schema import PlanConfig, validated

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
# recipe -> what, hardware, memory, time and result
TABLE = {
    cells[0].strip("`"): cells[1:]
    for line in (ROOT / "recipes" / "README.md").read_text().splitlines()
    if line.startswith("| `") and len(cells := re.split(r" *\| *", line.strip("| "))) == 5
}
GPUS = r"(?:(\d+) x )?(\d+) GB"
SHRUNKEN = [
    "logger=csv",
    "data.seq_len=64",
    "data.batch_size=2",
    "data.num_workers=0",
    "trainer.max_epochs=null",
    "trainer.max_steps=2",
    "trainer.accumulate=2",
    "trainer.validate_every=2",
    "trainer.log_every=1",
    "trainer.progress_bar=false",
    "callbacks.samples.max_new_tokens=2",
    "callbacks.samples.prompts=[Love]",
]
# what a recipe's data are like: rows of its format, and what it says of the source's own splits
SAMPLES = {
    "chat_sft": lambda quote, author: {
        "messages": [
            {"role": "user", "content": f"What did {author} say?"},
            {"role": "assistant", "content": quote},
        ]
    },
    "pretrain_code": lambda quote, author: {"content": f'"""{author}"""\nprint("{quote}")\n'},
    **dict.fromkeys(
        ("lora_2_7b", "codestral_lora", "codestral_qlora", "codestral_full"),
        lambda quote, author: {"instruction": f"Quote {author}.", "input": "", "output": quote},
    ),
    **dict.fromkeys(
        ("pretrain_tiny", "novels", "long_context_exact"), lambda quote, author: {"text": quote * 2}
    ),
    **dict.fromkeys(("full_130m", "lora_130m"), lambda quote, author: {"quote": quote}),
}
ELSEWHERE = {
    "pretrain_code": ["data.split='train[8:]'", "data.validation_split='train[:8]'"],
    "long_context_exact": [
        *("data.split=null", "data.validation_split=null"),
        *("long_context.segment_len=24", "data.batch_size=1"),
    ],
}


def planned(name: str) -> PlanConfig:
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        values = OmegaConf.to_container(compose(name), resolve=True)
    return validated(PlanConfig, values)


def test_the_table_is_complete():
    assert sorted(TABLE) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_memory_is_what_the_plan_says(name):
    """Without a weight or a hub; in words where no GPU is promised."""
    _, hardware, memory, _ = TABLE[name]
    config = planned(name)
    shape = known_shape(config)
    check_adapter(config, shape)
    count, size = (re.search(GPUS, hardware) or re.search(GPUS, "24 GB")).groups()
    n = int(count or 1)
    tensor = config.strategy.tensor_size if config.strategy.shards else 2
    plan = Plan(config, shape, adapt, tensor=tensor)
    found = plan.memory(config.strategy.kind if n > 1 else "single", n)
    assert found.fits(float(size))
    assert memory == f"{found.on_gpu / GB:.1f} GB"


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory, small_config, random_model):
    """A model of 2 blocks with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("shrunken")
    model = random_model(small_config(vocab_size=4096))
    save_pretrained(model, folder)
    save_tokenizer(load_tokenizer(str(FOLDER / "tiny_base")), folder)
    return folder


def arguments(name: str, shrunken: Path, folder: Path) -> list[str]:
    given = [*SHRUNKEN, f"run_dir={folder / 'run'}"]
    if planned(name).model.preset is None:
        given += [f"model.source={shrunken}", "model.tokenizer=null"]
    if name in SAMPLES:
        quotes = (FOLDER / "quotes.jsonl").read_text().splitlines()[:40]
        rows = (json.loads(quote) for quote in quotes)
        rows = [SAMPLES[name](row["quote"], row["author"]) for row in rows]
        sample = folder / "sample.jsonl"
        sample.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given += [f"data.source={sample}"]
    else:
        given += ["data.limit_rows=40"]
    if name == "dpo":
        given += ["data.seq_len=160"]  # of two answers
    return given + ELSEWHERE.get(name, [])


def assert_trained(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("finished", 2)
    assert math.isfinite(result["final"]["val/loss"])
    kind = "adapter" if (run / "adapter").is_dir() else "model"
    assert list((run / kind).glob("*.safetensors"))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "codestral_full"])
def test_two_steps(name, shrunken, tmp_path, train):
    train("--config-name", name, *arguments(name, shrunken, tmp_path))
    assert_trained(tmp_path / "run")


@pytest.mark.slow
def test_two_steps_by_two_ranks(shrunken, tmp_path):
    """The recipe of eight GPUs, with the heads split over two processes."""
    given = arguments("codestral_full", shrunken, tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node=2", "-m", "mamba2_train", "--config-name", "codestral_full"]
    done = subprocess.run(
        [*launch, *given, "strategy.data_size=1", "strategy.tensor_size=2"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained(tmp_path / "run")


def test_eight_ranks_are_planned(shrunken, tmp_path, train, capsys):
    given = arguments("codestral_full", shrunken, tmp_path)
    train("--config-name", "codestral_full", *given, "strategy.dry_run=true")
    assert re.search(r"mesh +data 4 x tensor 2", capsys.readouterr().out)
