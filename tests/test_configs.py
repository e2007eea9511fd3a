"""Every config and recipe composes; every misspelling is caught with its path and the cure."""

import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf

from mamba2_train.commands import _quoted, extend_hydra
from mamba2_train.errors import UserError
from mamba2_train.schema import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    StrategyConfig,
    TrainConfig,
    validated,
)

ROOT = Path(__file__).parent.parent
GROUPS = sorted(p.relative_to(ROOT / "configs") for p in (ROOT / "configs").glob("*/*.yaml"))
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))


def composed(*overrides: str, name: str = "train"):
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        return OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=True)


def config(*overrides: str) -> TrainConfig:
    return validated(TrainConfig, composed(*overrides))


def _plain(value):
    """Tuples, which YAML has none of, as lists."""
    return list(value) if isinstance(value, tuple) else value


def test_the_default():
    default = config()
    assert default.model.source == "embedded"
    assert default.adapter.target_names == ["in_proj", "out_proj", "embeddings"]


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_group_file_composes(path):
    extra = {
        "data/local.yaml": ["data.source=x.jsonl"],
        "model/scratch.yaml": ["adapter=full"],
        "adapter/full.yaml": [],
        "adapter/continue.yaml": ["adapter.source=an_adapter"],
        "long_context/truncated.yaml": ["data.packing=continued"],
        "long_context/parallel.yaml": ["strategy=fsdp"],
    }.get(str(path), [])
    chosen = config(f"{path.parent}={path.stem}", *extra).model_dump()[str(path.parent)]
    own = yaml.safe_load((ROOT / "configs" / path).read_text())
    own.pop("defaults", None)
    given = [override.partition("=")[0].rpartition(".")[2] for override in extra]
    # what `auto` has become, the machine says
    kept = {key: value for key, value in own.items() if key not in given and value != "auto"}
    assert all(_plain(chosen[key]) == _plain(value) for key, value in kept.items())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes(name):
    assert validated(TrainConfig, composed(name=name)).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_its_launch_line(name):
    first = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert f"--config-name {name}" in first


def test_ranges_of_blocks():
    assert config("adapter.layers=[0,4-6,5]").adapter.layers == [0, 4, 5, 6]
    assert config("adapter=full", "adapter.freeze_layers=0-2").adapter.freeze_layers == [0, 1, 2]


def test_export_composes():
    values = composed("checkpoint=[a,b]", "out=c", name="export")
    assert validated(ExportConfig, values).checkpoint == ["a", "b"]


def test_generate_composes():
    assert validated(GenerateConfig, composed("prompt=a", name="generate")).checkpoint == "embedded"


def test_evaluate_composes():
    assert validated(EvaluateConfig, composed(name="evaluate")).against == "base"


def test_every_field_of_ours_can_be_overridden():
    """Hydra refuses a key that no YAML names, so each schema field must stand in one."""

    def missing(values, model, path=""):
        for name, value in model.model_dump().items():
            if name not in values:
                yield path + name
            elif isinstance(value, dict):
                yield from missing(values[name], getattr(model, name), f"{path}{name}.")

    values = composed()
    assert list(missing(values, validated(TrainConfig, values))) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.sorce=x"], r"model.sorce: unknown key. Did you mean 'source'\? Known: .*"),
        (["+trainer.lr=1"], "trainer.lr: unknown key"),
        (["trainer.max_steps=abc"], r"trainer.max_steps: .*integer.*got 'abc'"),
        (["optimizer.lr=-1"], r"optimizer.lr: .*greater than 0.*got -1"),
        (
            ["adapter.targets=[x_proj]"],
            r"^adapter.targets: 'x_proj' is no module to adapt. Did you mean 'in_proj'\? Known",
        ),
        (["adapter.targets=[]"], "^adapter.targets: is empty"),
        (["long_context=truncated"], r"data.packing=bfd.*use long_context=truncated and data.pack"),
        (
            ["data.packing=continued"],
            r"long_context=none with data.packing=continued: .*or neither",
        ),
        (["long_context=exact", "long_context.segment_len=0"], r"segment_len: .*greater than 0"),
        (["long_context=exact", "+long_context.segments=4"], r"Did you mean 'segment_len'\?"),
        (
            ["long_context=truncated", "data.packing=continued", "data.streaming=true"],
            "packing=continued needs all documents before training",
        ),
        (["adapter.r=0"], r"adapter.r: .*greater than 0"),
        (["adapter.r=-3"], r"adapter.r: .*greater than 0.*got -3"),
        (["adapter.alpha=null"], r"adapter.alpha: .*valid number.*got None"),
        (["adapter.targets=[conv1d]"], r"train it in full with adapter.train=\[conv1d\]"),
        (['adapter.targets=["in_proj("]'], "is no regular expression"),
        (["adapter.train=[A]"], r"adapter.train.0: .*'conv1d'.*got 'A'"),
        (["adapter.rank_pattern={in_proj: 0}"], "adapter.rank_pattern.in_proj: .*greater than 0"),
        (["adapter.layers=[7-4]"], "adapter.layers: 7-4 counts down: write 4-7"),
        (["adapter.layers=[]"], "adapter.layers: is empty"),
        (["adapter.layers=[first]"], "adapter.layers: 'first' is no block"),
        (["adapter.init=pisa"], "adapter.init: .*got 'pisa'"),
        (["adapter.init=pissa", "adapter.dora=true"], "set dora=false or init=default"),
        (["adapter=full", "+adapter.r=8"], "adapter.r: unknown key.*Known: freeze, freeze_layers"),
        (["adapter=continue", "adapter.source=x", "+adapter.r=8"], "adapter.r: unknown.*source"),
        (["adapter.lora_plus_ratio=0.5"], "adapter.lora_plus_ratio: .*got 0.5"),
        (["model.preset=tiny"], "model: set source .* or preset"),
        (["model=scratch", "model.preset=tinny", "adapter=full"], "Did you mean 'tiny'"),
        (["model=scratch"], "adapter=lora needs weights to adapt"),
        (["trainer.validate_every=often"], r"^trainer.validate_every: [^;]*got 'often'\)$"),
        (["trainer.max_epochs=null"], "the run would never end"),
        (["adapter=full", "precision=bf16"], "use precision=bf16-mixed"),
        (["scheduler=wsd", "scheduler.warmup_fraction=0.9"], "exceed the whole run"),
        (["name=a/b"], "name: .*got 'a/b'"),
        (["data.streaming=true"], "max_steps=None and trainer.validate_every=.*set both"),
        (["data.streaming=true", "trainer.max_steps=9"], "max_steps=9 and .*numbers of steps"),
        (["data.length_grouped=true"], "data: length_grouped .*packing is 'bfd'"),
        (
            ["data.length_grouped=true", "data.packing=none", "data.streaming=true"],
            "data: length_grouped needs all lengths",
        ),
        (
            ["quantization=nf4", "adapter.init=pissa"],
            "adapter.init=pissa .*use adapter.init=default",
        ),
        (["objective=dpo", "adapter=full"], "adapter=full has none: use adapter=lora"),
        (
            ["objective=dpo", "adapter=continue", "adapter.source=runs/x"],
            "merge that first .mamba2-export checkpoint=runs/x",
        ),
        (["objective=dpo", "adapter.init=pissa"], "takes a part out of the base.*init=default"),
        (["objective=dpo", "data.packing=split"], "data.packing=split may cut.*packing=bfd or no"),
        (["objective=dpo", "long_context=exact"], "long_context=exact cuts a row"),
        (["objective=dpo", "data.loss_on=all"], "learns one answer.*data.loss_on=null"),
        (["data.loss_on=pairs"], "data.loss_on=pairs is what objective=dpo learns"),
        (
            ["objective=dpo", "strategy=fsdp", "adapter.train=[conv1d]"],
            r"adapter.train=\['conv1d'\] changes the base.*or strategy=ddp",
        ),
        (["objective=dpo", "objective.beta=0"], "objective.beta: .*greater than 0"),
        (["objective=dpo", "objective.loss_type=kto"], "objective.loss_type: .*'hinge'.*got 'kto'"),
        (
            ["objective=dpo", "objective.loss_type=ipo", "objective.label_smoothing=0.1"],
            "label_smoothing=0.1 is of loss_type=sigmoid",
        ),
        (["objective=dpo", "objective.label_smoothing=0.5"], "label_smoothing: .*less than 0.5"),
        (["+objective.beta=0.1"], "objective.beta: unknown key"),
        (["quantization=nf4", "adapter=full"], "adapter=full trains them: use adapter=lora"),
        (["quantization=int8", "precision=bf16-mixed"], "use precision=bf16 or precision=fp32"),
        (["quantization.kind=nf5"], r"^quantization.kind: .*'nf4', 'fp4' or 'int8' \(got 'nf5'\)"),
        (["optimizer.kind=adam"], "^optimizer: .*'adam'.*'adamw_8bit'"),
        (
            ["optimizer=adafactor", "+optimizer.betas=[0.9,0.9]"],
            r"^optimizer.betas: unknown key. Known: clip_threshold, kind, lr, weight_decay",
        ),
        (["optimizer=muon", "optimizer.momentum=1"], "^optimizer.momentum: .*less than 1"),
    ],
)
def test_faults_carry_path_value_and_cure(overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization=int8"], "int8 cannot be sharded.*use quantization=nf4, or strategy=ddp"),
        (["optimizer=adamw_8bit"], "8bit cannot keep its state of sharded.*use optimizer=adamw"),
        (["optimizer=paged_adamw_8bit"], "8bit cannot keep its state of sharded"),
        (["optimizer=muon"], "muon cannot keep its state of sharded"),
        (["quantization=nf4"], None),
    ],
)
def test_what_cannot_be_sharded(overrides, message):
    """By a strategy that is none of those which keep every parameter whole."""
    sharded = StrategyConfig.model_construct(kind="fsdp")
    run = config(*overrides).model_copy(update={"strategy": sharded})
    if message is None:
        run._across_groups()
    else:
        with pytest.raises(ValueError, match=message):
            run._across_groups()


@pytest.mark.parametrize("choice", ["quantization=nf4", "optimizer=adamw_8bit"])
def test_without_bitsandbytes(monkeypatch, choice):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'bitsandbytes.*quantization=none"):
        config(choice)
    config()


@pytest.mark.parametrize(
    "prompt",
    [
        "Love is",
        "It's (a, test): [x], {y}=1",
        '"Quoted," he said, "twice."',
        "'single'",
        "ends with a backslash \\",
        "\\' in the middle",
        "a price of ${price} and $5",
        "two\nlines\tand a tab",
        "",
        "null",
        "1e5",
    ],
)
def test_free_text_arrives_as_it_was_typed(prompt):
    quoted = _quoted(f"prompt={prompt}", ("prompt",))
    assert composed(quoted, name="generate")["prompt"] == prompt


def test_unknown_group_choice_is_refused():
    with pytest.raises(HydraException, match="auto"):
        config("strategy=fspd")


def test_no_number_is_a_string():
    """YAML 1.1 reads 1e-3 as a string; ours must all be numbers already."""
    for path in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")]:
        stack = [yaml.safe_load(path.read_text())]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += value.values()
            elif isinstance(value, list):
                stack += value
            elif isinstance(value, str):
                with pytest.raises(ValueError):
                    float(value)
