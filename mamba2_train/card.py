"""A model card, the page of a model on the hub: what was trained, on which data, and how well."""

import json
from pathlib import Path
from typing import Any

import yaml

CARD_FILE = "README.md"


def write_card(
    folder: Path, checkpoint: str | list[str], tokenizer: Any, what: str, merged: bool
) -> None:
    """Write `README.md`, from what the runs that `checkpoint` names have recorded."""
    sources = [checkpoint] if isinstance(checkpoint, str) else checkpoint
    runs = [found for source in sources if (found := _run_of(source)) is not None]
    bases = sorted({str(run["model"]["source"]) for run, _ in runs})
    library = "transformers" if merged else "peft"
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    head["tags"] = ["mamba2", "mamba2-train"]
    if names := [name for name in bases if "/" in name and not Path(name).exists()]:
        head["base_model"] = names
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {' + '.join(sources)}"]
    parts.append(f"{what[0].upper()}{what[1:]}.")
    for run, recipe in runs:
        parts += _about(run, recipe)
    if tokenizer.chat_template:
        parts.append("It talks through the chat template in its tokenizer.")
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _about(run: dict[str, Any], recipe: str | None) -> list[str]:
    rows = [("base", run["model"]["source"])]
    rows += [("command", f"`{run['command']}`"), ("steps", f"{run['steps']:,}")]
    trained, all_of_them = run["model"]["trainable"], run["model"]["parameters"]
    rows.append(("parameters trained", f"{trained:,} of {all_of_them:,}"))
    rows += [(f"data, {name.replace('_', ' ')}", f"{n:,}") for name, n in run["data"].items()]
    rows += [(name, f"{value:.4f}") for name, value in run["final"].items()]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    parts = [f"## {run['name']}", "\n".join(table)]
    if recipe is not None:
        parts.append(f"<details><summary>recipe</summary>\n\n```yaml\n{recipe}```\n\n</details>")
    return parts


def _run_of(source: str) -> tuple[dict[str, Any], str | None] | None:
    """What a finished run has recorded, and its configuration; None where no run made this."""
    path = Path(source)
    for folder in (path, *path.parents[:2]):  # a run, its adapter or model, its checkpoints/step-N
        if (file := folder / "result.json").is_file():
            recipe = folder / "config.yaml"
            text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
            return json.loads(file.read_text(encoding="utf-8")), text
    return None
