"""mamba2-export: what it writes, in stock transformers and read back; and what it refuses."""

import io
import json
import resource
import shutil
import signal
import sys

import pytest
import torch
import transformers
import yaml

from mamba2_train.adapters import add_lora, save_adapter
from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import export as command
from mamba2_train.commands import generate as generate_command
from mamba2_train.commands.generate import load_checkpoint
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.generation import generate

BASE = FOLDER / "tiny_base"
RESULT = {
    "name": "mine",
    "command": "mamba2-train name=mine",
    "steps": 1200,
    "model": {"source": "state-spaces/mamba2-130m", "parameters": 3_000_000, "trainable": 20_000},
    "data": {"train_documents": 1098},
    "final": {"val/loss": 4.5, "val/perplexity": 90.0171},
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*overrides, main=command.main):
        monkeypatch.setattr(sys, "argv", ["mamba2-export", *overrides])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def make_adapter(folder, seed=0, targets=("in_proj", "out_proj", "embeddings"), size=0.05):
    """An adapter that is not the identity, on the embedded base."""
    handle = add_lora(load_pretrained(BASE), list(targets), r=2, alpha=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in handle.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))
    save_adapter(handle, folder, base="embedded")
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_tokenizer(tokenizer, folder)


@pytest.fixture
def trained(tmp_path):
    """A run's folder with an adapter."""
    make_adapter(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "run" / "config.yaml").write_text("seed: 7\n")
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_transformers_generates_the_same_tokens(run, trained, tmp_path):
    """pipeline and generate of stock transformers, greedy, against ours with the adapter."""
    code, out, err = run("checkpoint=run", "out=merged", "dtype=float32")
    assert code == 0, err
    assert "read back, same logits" in out
    model, tokenizer, _ = load_checkpoint("run", dtype=torch.float32)
    prompt = "It is a truth"
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = generate(model, ids, max_new_tokens=24, eos_token_id=tokenizer.eos_token_id)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("merged")
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24)
    assert torch.equal(found, expected)
    pipe = transformers.pipeline("text-generation", model="merged", device="cpu")
    (text,) = pipe(prompt, max_new_tokens=24, do_sample=False)
    assert text["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert pipe.tokenizer.chat_template == tokenizer.chat_template
    settings = transformers.GenerationConfig.from_pretrained("merged")
    assert settings.eos_token_id == tokenizer.eos_token_id
    assert settings.pad_token_id is not None


def test_the_card_says_what_was_trained(run, trained, tmp_path):
    assert run("checkpoint=run/adapter", "out=merged")[0] == 0
    _, head, text = (tmp_path / "merged" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == ["state-spaces/mamba2-130m"]
    assert yaml.safe_load(head)["library_name"] == "transformers"
    for said in ("`mamba2-train name=mine`", "1,200", "1,098", "val/loss | 4.5", "seed: 7"):
        assert said in text


def test_shards_dtype_and_state_spaces(run, trained, tmp_path):
    logits = command.probed(load_checkpoint("run")[0])
    assert run("checkpoint=run", "out=hf", "max_shard_size=2MB")[0] == 0
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 2_100_000 for shard in shards)
    assert run("checkpoint=run", "out=ss", "layout=state-spaces", "dtype=float32")[0] == 0
    assert {"config.json", "pytorch_model.bin"} <= set(names(tmp_path / "ss"))
    assert "generation_config.json" not in names(tmp_path / "ss")
    for folder in ("hf", "ss"):  # rounded to bfloat16 once more by the first
        found = command.probed(load_pretrained(folder, dtype=torch.float32))
        assert (found - logits).abs().max() < 0.05 * logits.abs().max()
    exact = command.probed(load_checkpoint("run", dtype=torch.float32)[0])
    found = command.probed(load_pretrained("ss"))
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert load_pretrained("ss").lm_head.weight.dtype == torch.float32


def test_an_adapter_as_it_is(run, trained, tmp_path):
    before = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    code, _, err = run("checkpoint=run", "out=alone", "merge=false")
    assert code == 0, err
    assert (tmp_path / "alone" / "adapter_model.safetensors").read_bytes() == before
    assert "model.safetensors" not in names(tmp_path / "alone")
    assert torch.equal(
        command.probed(load_checkpoint("alone")[0]), command.probed(load_checkpoint("run")[0])
    )


def test_a_folder_that_is_not_empty_is_refused_without_force(run, trained, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.md").write_text("mine")
    (tmp_path / "taken" / "tokenizer.json").write_text("old")
    code, _, err = run("checkpoint=run", "out=taken")
    assert code == 1
    assert "out=taken is not empty" in err
    assert names(tmp_path / "taken") == ["notes.md", "tokenizer.json"]
    assert run("checkpoint=run", "out=taken", "force=true")[0] == 0
    assert (tmp_path / "taken" / "notes.md").read_text() == "mine"
    assert (tmp_path / "taken" / "tokenizer.json").read_text() != "old"
    load_pretrained("taken")
    (tmp_path / "empty").mkdir()
    assert run("checkpoint=run", "out=empty")[0] == 0


@pytest.mark.parametrize("kind", ["new", "existing"])
def test_a_full_disk_leaves_nothing_half_written(run, trained, tmp_path, kind):
    shutil.rmtree(tmp_path / "FOLDER", ignore_errors=True)
    if kind == "existing":
        (tmp_path / "FOLDER").mkdir()
        (tmp_path / "FOLDER" / "config.json").write_text("{}")
    before = names(tmp_path)
    # the kernel refuses to write past this size, with an error as a full disk's: the weights fit
    # not at all, or only the tokenizer does not
    largest = max(path.stat().st_size for path in (trained / "adapter").glob("token*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (50_000, largest - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            shards = "max_shard_size=50KB" if size > 50_000 else "max_shard_size=5GB"
            code, _, err = run("checkpoint=run", "out=FOLDER", "force=true", shards)
            assert code == 1, err
            assert len([line for line in err.splitlines() if line.strip()]) == 1, err
            assert "untouched" in err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == before
    if kind == "existing":
        assert names(tmp_path / "FOLDER") == ["config.json"]


def test_what_reads_back_differently_is_not_kept(run, trained, tmp_path, monkeypatch):
    def damaged(folder):
        model = load_pretrained(folder)
        with torch.no_grad():
            model.backbone.layers[3].mixer.D += 0.1
        return model

    monkeypatch.setattr(command, "load_pretrained", damaged)
    code, _, err = run("checkpoint=run", "out=FOLDER")
    assert code == 1
    assert "gives other logits" in err
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge=false", "dtype=float32"], "merge=false copies one adapter"),
        (["merge=false", "checkpoint=embedded"], "is no adapter: set merge=true"),
        (["max_shard_size=big"], "max_shard_size"),
        (["layout=mistral"], "layout"),
        (["out=run/adapter", "force=true"], "is what the model is made from"),
    ],
)
def test_a_fault_is_one_line(run, trained, tmp_path, overrides, message):
    code, _, err = run("checkpoint=run", "out=FOLDER", *overrides)
    assert code == 1
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
    assert names(tmp_path) == ["run"]


def test_an_adapter_of_another_base_is_refused_with_its_dimensions(run, trained, tmp_path):
    from mamba2_train.checkpoint import save_pretrained
    from mamba2_train.model import Mamba2Config, Mamba2LM, initialize

    other = Mamba2Config(d_model=64, n_layers=8, vocab_size=4096, d_state=16, headdim=16)
    save_pretrained(initialize(Mamba2LM(other)), tmp_path / "other")
    file = trained / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}
    file.write_text(json.dumps(settings))
    code, _, err = run("checkpoint=run", "out=FOLDER")
    assert code == 1
    assert "was it trained on another base?" in err
    assert "192" in err
    assert "64" in err


def test_generation_with_adapters_merged_or_switched(run, tmp_path):
    make_adapter(tmp_path / "small")
    for i in (0, 1):
        make_adapter(tmp_path / f"a{i}", seed=i, targets=["in_proj", "out_proj"], size=0.3)
    texts = {}
    for merge in ("true", "false"):
        code, out, err = run(
            "checkpoint=small", "prompt=Love is", "temperature=0", "max_new_tokens=12",
            f"merge={merge}", main=generate_command.main,
        )  # fmt: skip
        assert code == 0, err
        texts[merge] = out
    assert texts["true"] == texts["false"]
    ids = torch.tensor([[5, 6, 7]])

    def tokens(model):
        return generate(model, ids, max_new_tokens=12)

    alone = [tokens(load_checkpoint(f"a{i}", dtype=torch.float32)[0]) for i in (0, 1)]
    base = tokens(load_pretrained(BASE, dtype=torch.float32))
    assert not torch.equal(*alone)
    model, _, peft_model = load_checkpoint(["a0", "a1"], dtype=torch.float32)
    for name, expected in (("default", alone[0]), ("adapter_1", alone[1]), ("default", alone[0])):
        peft_model.base_model.set_adapter(name)
        assert torch.equal(tokens(model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(tokens(model), base)
