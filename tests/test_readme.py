"""What the README, the guides and the recipes' README say can be typed, exists."""

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import OmegaConf

from mamba2_train.commands import extend_hydra
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
    "mamba2-train": ("train", TrainConfig),
    "mamba2-generate": ("generate", GenerateConfig),
    "mamba2-eval": ("evaluate", EvaluateConfig),
    "mamba2-export": ("export", ExportConfig),
    "mamba2-plan": ("plan", PlanConfig),
    "mamba2-report": ("report", ReportConfig),
    "mamba2-doctor": ("doctor", DoctorConfig),
}
PAGES = ["README.md", "recipes/README.md", "mamba2_train/assets/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
PAGES += ["BENCHMARKS.md"] if (ROOT / "BENCHMARKS.md").exists() else []
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
    overrides = [w for w in words[1:] if re.match(r"[\w./]+=", w)]
    overrides = [re.sub(r"^prompt=(.*)$", r"prompt='\1'", w) for w in overrides]
    flags = {"--config-name", "--config-dir", "--help", "--cfg"} & set(words)
    assert overrides or len(words) == 1 or flags
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        if "--config-dir" in words:  # a recipe of the reader's own
            name = "train"
        for job in _jobs(overrides) if "-m" in words else [overrides]:
            composed = OmegaConf.to_container(compose(name, overrides=job), resolve=True)
            validated(schema, composed)


def _jobs(overrides: list[str]) -> list[list[str]]:
    """What a sweep over them runs; of an interval its ends. Plugins, which need not be installed,
    and their settings are left out."""
    kept = [o for o in overrides if not re.match(r"hydra(/|\.(sweeper|launcher)\.)", o)]
    values = []
    for override in OverridesParser.create().parse_overrides(kept):
        if isinstance(ends := override.value(), IntervalSweep):
            strings = [str(ends.start), str(ends.end)]
        elif override.is_sweep_override():
            strings = list(override.sweep_string_iterator())
        else:
            strings = [override.get_value_element_as_str()]
        values.append([f"{override.get_key_element()}={string}" for string in strings])
    return [list(job) for job in itertools.product(*values)]


@pytest.mark.parametrize(("page", "line"), [x for x in LINES if x[1].startswith("python -m ")])
def test_modules_exist(page, line):
    assert importlib.util.find_spec(shlex.split(line)[2]) is not None


@pytest.mark.parametrize(("page", "line"), [x for x in LINES if x[1].startswith("pip install ")])
def test_extras_exist(page, line):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[([\w,]+)\]", line):
        assert set(extra.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(("page", "line"), [x for x in LINES if x[1].startswith("make ")])
def test_make_targets_exist(page, line):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split()[1:]) <= set(targets)


def test_python_imports_what_exists():
    for page, language, body in BLOCKS:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.module == "trl" and importlib.util.find_spec("trl") is None:
                continue  # the one package named there that is no dependency of ours
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"


def test_files_of_the_tree_exist():
    tree = next(body for page, _, body in BLOCKS if body.startswith("configs/"))
    folder = ROOT
    for line in tree.splitlines():
        depth = ROOT / "mamba2_train" if line.startswith("  ") else ROOT
        for name in re.findall(r"[\w/]+\.py|[\w_]+/", line):
            here = (depth / name, ROOT / "kernels" / "mamba2_kernels" / name, folder / name)
            assert any(path.exists() for path in here), name


def _anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page}: {link}"
