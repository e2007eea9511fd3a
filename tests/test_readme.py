"""What the README and the recipes' README say can be typed, exists."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.commands import extend_hydra
from mamba2_train.schema import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    TrainConfig,
    validated,
)

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "mamba2-train": ("train", TrainConfig),
    "mamba2-generate": ("generate", GenerateConfig),
    "mamba2-eval": ("evaluate", EvaluateConfig),
    "mamba2-export": ("export", ExportConfig),
    "mamba2-plan": ("plan", PlanConfig),
}
PAGES = ["README.md", "recipes/README.md", "mamba2_train/assets/README.md", "docs/distributed.md"]
BLOCKS = [
    (page, language, body)
    for page in PAGES
    for language, body in re.findall(
        r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
]
LINES = [
    (page, line.split("  #")[0].strip())
    for page, language, body in BLOCKS
    if language in ("", "sh")
    for line in body.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize(
    ("page", "line"), [x for x in LINES if x[1].startswith(("mamba2-", "torchrun"))]
)
def test_commands_compose(page, line):
    words = shlex.split(line)
    name, schema = COMMANDS.get(words[0], COMMANDS["mamba2-train"])
    if "mamba2_train.commands.evaluate" in words:  # after torchrun -m
        name, schema = COMMANDS["mamba2-eval"]
    if "--config-name" in words:
        name = words[words.index("--config-name") + 1]
    overrides = [w for w in words[1:] if re.match(r"[\w.]+=", w)]
    overrides = [re.sub(r"^prompt=(.*)$", r"prompt='\1'", w) for w in overrides]
    assert overrides or len(words) == 1 or "--config-name" in words
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = OmegaConf.to_container(compose(name, overrides=overrides), resolve=True)
    validated(schema, composed)


@pytest.mark.parametrize(("page", "line"), [x for x in LINES if x[1].startswith("make ")])
def test_make_targets_exist(page, line):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split()[1:]) <= set(targets)


def test_python_imports_what_exists():
    for _, language, body in BLOCKS:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_files_of_the_tree_exist():
    tree = next(body for page, _, body in BLOCKS if body.startswith("configs/"))
    folder = ROOT
    for line in tree.splitlines():
        depth = ROOT / "mamba2_train" if line.startswith("  ") else ROOT
        for name in re.findall(r"[\w/]+\.py|[\w_]+/", line):
            here = (depth / name, ROOT / "kernels" / "mamba2_kernels" / name, folder / name)
            assert any(path.exists() for path in here), name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
