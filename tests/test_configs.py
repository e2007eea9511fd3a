"""Every config and recipe composes; every misspelling is caught with its path and the cure."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf

from mamba2_train.commands import _quoted, extend_hydra
from mamba2_train.errors import UserError
from mamba2_train.schema import EvaluateConfig, GenerateConfig, TrainConfig, validated

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
    }.get(str(path), [])
    chosen = config(f"{path.parent}={path.stem}", *extra).model_dump()[str(path.parent)]
    own = yaml.safe_load((ROOT / "configs" / path).read_text())
    own.pop("defaults", None)
    kept = {key: value for key, value in own.items() if value != "???"}
    assert all(_plain(chosen[key]) == _plain(value) for key, value in kept.items())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes(name):
    assert validated(TrainConfig, composed(name=name)).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_its_launch_line(name):
    first = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert f"--config-name {name}" in first


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
        (["adapter.r=0"], r"adapter.r: .*greater than 0"),
        (["model.preset=tiny"], "model: set source .* or preset"),
        (["model=scratch", "model.preset=tinny", "adapter=full"], "Did you mean 'tiny'"),
        (["model=scratch"], "adapter=lora needs weights to adapt"),
        (["trainer.validate_every=often"], r"^trainer.validate_every: [^;]*got 'often'\)$"),
        (["trainer.max_epochs=null"], "the run would never end"),
        (["adapter=full", "precision=bf16"], "use precision=bf16-mixed"),
        (["scheduler=wsd", "scheduler.warmup_fraction=0.9"], "exceed the whole run"),
        (["name=a/b"], "name: .*got 'a/b'"),
    ],
)
def test_faults_carry_path_value_and_cure(overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)


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
