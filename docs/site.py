"""What mkdocs is to do with our pages (hooks of mkdocs.yml).

The page of settings is made from the schema and the configs each time the site is built. Pages that
lie beside what they describe, and not in docs/, become part of the site, and links follow them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mamba2_train.commands import help as said
from mamba2_train.schema import (
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    PlanSettings,
    ReportConfig,
    TrainConfig,
)

ROOT = Path(__file__).parent.parent
ELSEWHERE = {  # page of the site -> where it lies
    "recipes.md": "recipes/README.md",
    "benchmarks.md": "BENCHMARKS.md",
    "assets.md": "mamba2_train/assets/README.md",
}
COMMANDS = {
    "mamba2-train": ("train", TrainConfig),
    "mamba2-generate": ("generate", GenerateConfig),
    "mamba2-eval": ("evaluate", EvaluateConfig),
    "mamba2-export": ("export", ExportConfig),
    "mamba2-plan": ("plan", PlanConfig),
    "mamba2-report": ("report", ReportConfig),
    "mamba2-doctor": ("doctor", DoctorConfig),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "settings.md", content=settings_page()))
    for name, path in ELSEWHERE.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    config.nav = _existing(config.nav, {file.src_uri for file in files})
    return files


def _existing(nav: Any, pages: set[str]) -> Any:
    """`nav` without pages that are not there."""
    if isinstance(nav, str):
        return nav if nav in pages else None
    if isinstance(nav, dict):
        return {title: kept for title, part in nav.items() if (kept := _existing(part, pages))}
    return [kept for part in nav if (kept := _existing(part, pages))]


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Links as they are in the repository, made to lead to pages of the site; those to what is no
    page become their text."""
    here = posixpath.dirname(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    pages = {f"docs/{f.src_uri}": f.src_uri for f in files}
    pages |= {path: name for name, path in ELSEWHERE.items()} | {"README.md": "index.md"}
    pages |= {posixpath.dirname(path): name for name, path in ELSEWHERE.items() if "/" in path}

    def followed(link: re.Match[str]) -> str:
        text, target, anchor = link.groups(default="")
        if not target or target.startswith(("http:", "https:")):
            return link[0]
        found = pages.get(posixpath.normpath(posixpath.join(here, target)))
        if found is None or files.get_file_from_path(found) is None:
            return text
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(page.file.src_uri))}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)", followed, markdown)


def settings_page() -> str:
    """Every choice and setting of every command, in Markdown."""
    lines = [
        "# Settings",
        "",
        "Every key of every command, from the schema that checks them. `mamba2-train --cfg job` "
        "prints them with the values that a command line gives. Of a group (`adapter=lora`) the "
        "default is in bold; other choices have other keys and defaults.",
    ]
    told: set[str] = set()  # groups that an earlier command has
    for command, (name, schema) in COMMANDS.items():
        groups = said.choices(name)
        values = said.defaults(name)
        known = said.settings(schema)
        lines += ["", f"## {command}", "", (schema.__doc__ or "").strip()]
        if name == "plan":
            known = said.settings(PlanSettings, "plan.")
            lines += ["", "All of mamba2-train's, and"]
            groups = {}
        own = [one for one in known if one.key.partition(".")[0] not in groups]
        lines += _table(own, values)
        for group, choices in groups.items():
            if group in told:
                lines += ["", f"`{group}`: as of mamba2-train."]
                continue
            told.add(group)
            lines += ["", f"### {group}", ""]
            if len(choices) > 1:
                lines += ["| choice | |", "|---|---|"]
                for choice in choices:
                    shown = f"`{group}={choice.name}`"
                    shown = f"**{shown}**" if choice.is_default else shown
                    lines.append(f"| {shown} | {_cell(choice.line)} |")
            inside = [one for one in known if one.key.startswith(f"{group}.")]
            lines += _table(inside, values)
    return "\n".join(lines) + "\n"


def _table(settings: list[said.Setting], values: dict[str, str]) -> list[str]:
    if not settings:
        return []
    rows = ["", "| key | type | default | |", "|---|---|---|---|"]
    for one in settings:
        default = f"`{_cell(values[one.key])}`" if values.get(one.key) else ""
        rows.append(f"| `{one.key}` | {_cell(one.types)} | {default} | {_cell(one.meaning)} |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{%", "{&#37;").replace("\n", " ")
