"""The guides say what is so: of ourselves, and of what they compare us with. (What they say can be
typed is test_readme.py's.)"""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mamba2_train.commands import (
    doctor,
    evaluate,
    export,
    extend_hydra,
    generate,
    help,
    plan,
    report,
    train,
)
from mamba2_train.schema import (
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
    TrainConfig,
    validated,
)

ROOT = Path(__file__).parent.parent
COMMANDS = {
    train: ("train", TrainConfig),
    generate: ("generate", GenerateConfig),
    evaluate: ("evaluate", EvaluateConfig),
    export: ("export", ExportConfig),
    plan: ("plan", PlanConfig),
    report: ("report", ReportConfig),
    doctor: ("doctor", DoctorConfig),
}


# --help


@pytest.mark.parametrize("module", COMMANDS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_help_names_each_choice_with_its_line(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    module.main()
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert shown.startswith(module.__doc__.partition("\n")[0])
    name, _ = COMMANDS[module]
    entries = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["defaults"]
    groups = [next(iter(e)) for e in entries if isinstance(e, dict) and "override" not in str(e)]
    for path in (path for group in groups for path in (ROOT / "configs" / group).glob("*.yaml")):
        first = path.read_text().partition("\n")[0]
        assert first.startswith("# "), f"{path}: a choice opens with the line that --help shows"
        assert f" {path.stem} {first.removeprefix('# ')}" in shown


def test_help_gives_settings_with_defaults_and_meaning(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mamba2-train", "-h"])
    train.main()
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "trainer.accumulate=1 micro-batches per optimizer step" in shown
    assert "adapter.targets=[in_proj,out_proj,embeddings] modules to adapt" in shown
    assert all(f" {key}=" in shown for key in help.COMMONEST)
    assert all(path.stem in shown for path in (ROOT / "recipes").glob("*.yaml"))


def test_settings_are_all_that_a_command_composes():
    """Two sources that share nothing: what Hydra composes of the YAML files is what the schema's
    walk finds; but for `kind`, which a choice sets, and mappings, whose keys are the user's."""
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = OmegaConf.to_container(compose("train"), resolve=False)
    keys = {key for key, _ in help._flat(composed) if not key.endswith(".kind")}
    known = {one.key: one for one in help.settings(TrainConfig)}
    groups = {key.rpartition(".")[0] for key in known}  # one that is null has no keys
    assert keys <= set(known) | groups
    assert len(keys) > 80
    assert known["model.source"].types == "text | null"
    assert known["strategy.accelerator"].types == "auto | cpu | cuda"
    assert known["adapter.layers"].types == "list of integer | null"
    assert known["trainer.validate_every"].types == "integer | number"
    assert known["optimizer.momentum"].meaning == "of the matrices"  # of another choice


# docs/migrating.md

MIGRATING = (ROOT / "docs" / "migrating.md").read_text()


def _section(title: str) -> str:
    return MIGRATING.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _said(title: str) -> set[str]:
    """Their settings that a section names: the first column, and the paragraphs below."""
    section = _section(title)
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    below = re.sub(r"^\|.*\n", "", section, flags=re.MULTILINE)
    # in parentheses stands why, with names of ours
    below = re.sub(r"\([^)]*\)", "", below)
    return {*rows, *re.findall(r"`(\w+)`", below)}


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_every_setting_of_training_arguments_is_there():
    assert f"transformers\n{transformers.__version__}" in MIGRATING.replace(" ", "\n")
    assert _said("TrainingArguments") == _fields(transformers.TrainingArguments)


def test_every_setting_of_loras_is_there():
    assert f"peft\n{peft.__version__}" in MIGRATING.replace(" ", "\n")
    assert _said("LoraConfig") - {"create_loraplus_optimizer"} == _fields(peft.LoraConfig)


def test_every_setting_of_sft_is_there():
    trl = pytest.importorskip("trl", reason="TRL comes with the extra bench")
    if f"TRL {trl.__version__}," not in MIGRATING:
        pytest.skip(f"the page is of another version than {trl.__version__}")
    inherited = _fields(transformers.TrainingArguments)
    assert _said("SFTConfig") == _fields(trl.SFTConfig) - inherited


@pytest.fixture(scope="module")
def composed():
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        return compose("train")


@pytest.mark.parametrize("title", ["SFTConfig", "LoraConfig", "TrainingArguments"])
def test_every_setting_of_ours_there_is_valid(title, composed):
    ours = dict.fromkeys(re.findall(r"`([\w./]+=[^`]*)`", _section(title)))
    assert len(ours) > 10
    # with what some of them need beside them
    beside = {
        "data.length_grouped=true": ["data.packing=none"],
        "quantization=nf4": ["precision=bf16"],
        "strategy.cpu_offload=true": ["strategy=fsdp"],
    }
    parser = OverridesParser.create()
    for setting in ours:
        config = copy.deepcopy(composed)
        for override in parser.parse_overrides([*beside.get(setting, []), setting]):
            key, value = override.get_key_element(), override.value()
            if (ROOT / "configs" / key).is_dir():  # a choice
                files = [Path(f"{key}_defaults.yaml"), Path(key) / f"{value}.yaml"]
                found = [ROOT / "configs" / f for f in files if (ROOT / "configs" / f).exists()]
                config[key] = OmegaConf.merge(*map(OmegaConf.load, found))
            else:
                assert OmegaConf.select(config, key, default="no such key") != "no such key", key
                OmegaConf.update(config, key, value)
        validated(TrainConfig, OmegaConf.to_container(config, resolve=True))


# README's table beside others: what it says of transformers and peft, which are installed


@pytest.fixture(scope="module")
def theirs():
    config = transformers.Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=80, state_size=8, head_dim=8, num_heads=8,
        n_groups=1, expand=2, chunk_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def test_peft_refuses_out_proj(theirs):
    lora = peft.LoraConfig(target_modules=["in_proj", "out_proj", "embeddings"])
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.get_peft_model(theirs, lora)


def test_transformers_drops_seq_idx(theirs):
    ids = torch.randint(5, 80, (1, 40), generator=torch.Generator().manual_seed(0))
    seq_idx = torch.tensor([[0] * 17 + [1] * 23], dtype=torch.int32)
    with torch.no_grad():
        packed = theirs(ids, seq_idx=seq_idx).logits[:, 17:]
        alone = theirs(ids[:, 17:]).logits
    assert (packed - alone).abs().max() > 1


def test_transformers_does_not_know_state_spaces(tmp_path):
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 80, "ssm_cfg": {"layer": "Mamba2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Unrecognized model"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_has_no_plan_to_split_it(theirs):
    assert not getattr(theirs.config, "base_model_tp_plan", None)


# the site


def test_the_reference_names_what_exists():
    from pydoc import locate

    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert len(names) > 30
    for name in names:
        assert (found := locate(name)) is not None, name
        assert found.__doc__, name


def test_the_site_is_built(tmp_path):
    """Without a warning, and with nothing in it that a browser would fetch from the network."""
    pytest.importorskip("material", reason="mkdocs comes with the extra docs")
    pytest.importorskip("mkdocstrings", reason="mkdocs comes with the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for page in tmp_path.glob("*.html"):
        fetched = r'<(?:script|img|iframe)[^>]+src="?https?:|<link[^>]+href="?https?:'
        assert not re.search(fetched, page.read_text()), page.name
    settings = (tmp_path / "settings.html").read_text()
    known = [one.key for one in help.settings(TrainConfig)]
    assert all(f"<code>{key}</code>" in settings for key in known)
    assert "<code>adapter=continue</code>" in settings
    assert "<code>max_new_tokens</code>" in settings
    assert 'id="mamba2_kernels.ssd_scan"' in (tmp_path / "reference.html").read_text()
