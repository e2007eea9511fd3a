"""What `--help` of a command says: what it does, the choices of each group, and its settings.

Nothing is written here that stands elsewhere: a command describes itself in its docstring, a choice
in the first line of its config file, a setting in the schema.
"""

from importlib import resources
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Of the settings of a run, those that most runs set.
COMMONEST = (
    "name",
    "model.source",
    "model.tokenizer",
    "model.checkpointing",
    "data.source",
    "data.format",
    "data.loss_on",
    "data.preview",
    "data.seq_len",
    "data.batch_size",
    "adapter.r",
    "adapter.alpha",
    "adapter.targets",
    "optimizer.lr",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.accumulate",
    "trainer.validate_every",
    "callbacks.saving.every_steps",
    "resume",
    "run_dir",
    "seed",
    "debug",
)


class Choice(NamedTuple):
    """One file of a group: `GROUP=NAME`."""

    name: str
    line: str
    is_default: bool


class Setting(NamedTuple):
    """One key, as it is set on the command line."""

    key: str
    types: str
    meaning: str


def choices(config_name: str) -> dict[str, list[Choice]]:
    """The groups in the defaults list of `config_name`, in its order, and the files of each."""
    folder = resources.files("mamba2_configs")
    groups: dict[str, list[Choice]] = {}
    for entry in yaml.safe_load((folder / f"{config_name}.yaml").read_text()).get("defaults", ()):
        if isinstance(entry, str):
            groups |= {} if entry == "_self_" else choices(entry)
            continue
        ((group, default),) = entry.items()
        if group.startswith("override "):
            continue
        files = (f for f in (folder / group).iterdir() if f.name.endswith(".yaml"))
        found = {f.name.removesuffix(".yaml"): f.read_text() for f in files}
        groups[group] = [
            Choice(name, first_line(found[name]), name == default)
            for name in sorted(found, key=lambda name: (name != default, name))
        ]
    return groups


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("mamba2_recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def first_line(text: str) -> str:
    """The comment that a config file opens with; nothing where there is none."""
    opening = text.partition("\n")[0]
    return opening.removeprefix("#").strip() if opening.startswith("#") else ""


def settings(schema: type[BaseModel], prefix: str = "") -> list[Setting]:
    """Every key below a group of settings, in the order of the schema; of the types that a group
    may have, each key once."""
    found: dict[str, Setting] = {}
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        inner = _groups(field.annotation)
        if not inner:
            found.setdefault(key, Setting(key, _types(field), field.description or ""))
        for group in inner:
            for one in settings(group, f"{key}."):
                if not one.key.endswith(".kind"):  # set by the choice of the group
                    found.setdefault(one.key, one)
    return list(found.values())


def _groups(annotation: Any) -> list[type[BaseModel]]:
    """The groups that a field may hold, of which `a` and `a | b` and `a | None` are cases."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [group for member in get_args(annotation) for group in _groups(member)]
    return []


def _types(field: FieldInfo) -> str:
    """As a user thinks of them: `integer | none`, `auto | cpu | cuda`."""
    return " | ".join(dict.fromkeys(_names(field.annotation)))


def _names(annotation: Any) -> list[str]:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _names(members[0])
    if origin in (Union, UnionType):
        return [name for member in members for name in _names(member)]
    if origin in (list, tuple):
        inner = " or ".join(dict.fromkeys(n for m in members if m is not ... for n in _names(m)))
        return [f"list of {inner}"]
    if origin is dict:
        return ["mapping"]
    if members:  # of a Literal
        return [str(member) for member in members]
    if annotation is type(None):
        return ["null"]
    plain = {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}
    name = getattr(annotation, "__name__", str(annotation))
    return [plain.get(name, {"Path": "path", "SourceConfig": "source"}.get(name, name))]


def defaults(config_name: str) -> dict[str, str]:
    """What each key is where nothing is set, as a user would write it."""
    from mamba2_train.commands import extend_hydra

    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = OmegaConf.to_container(compose(config_name), resolve=False)
    return dict(_flat(composed))


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", _written(value)))
    return flat


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "" if value == "???" else str(value)


def print_help(config_name: str, schema: type[BaseModel], about: str) -> None:
    """`about` is the docstring of the command: a line, and then examples."""
    # of one width where it goes to a file, a pager or a test
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 120
    summary, _, examples = about.strip().partition("\n")
    command = summary.partition(":")[0]
    console.print(f"[bold]{escape(summary)}[/]\n{escape(examples)}\n", soft_wrap=True)

    known = {one.key: one for one in settings(schema)}
    values = defaults(config_name)
    groups = choices(config_name)
    if groups:
        console.print("[bold]Choices[/], as GROUP=NAME; the first is the default\n")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        for group, files in groups.items():
            for i, choice in enumerate(files):
                table.add_row("" if i else group, choice.name, f"[dim]{escape(choice.line)}[/]")
        console.print(table)

    own = [key for key in known if key.partition(".")[0] not in groups]
    of_a_run = {"trainer", "callbacks"} <= {key.partition(".")[0] for key in known}
    shown = [k for k in COMMONEST if k in known] if of_a_run else own
    shown += [key for key in own if key.startswith("plan.")]
    console.print(f"\n[bold]{'Commonest settings' if of_a_run else 'Settings'}[/], as KEY=VALUE\n")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for key in shown:
        written = f"{key}={values.get(key, '')}"
        table.add_row(escape(written), f"[dim]{escape(known[key].meaning)}[/]")
    console.print(table)

    if command == "mamba2-train":
        names = ", ".join(recipes())
        console.print(f"\n[bold]Recipes[/], as --config-name NAME\n\n{names}", soft_wrap=True)
    console.print(
        f"\n{command} --cfg job            every setting, with the value that this command line "
        "gives it\n"
        f"{command} --config-dir . --config-name my_run      a YAML of your own, which begins\n"
        f"                                  defaults: [{config_name}, _self_]",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if command == "mamba2-train":
        console.print(
            "mamba2-train -m optimizer.lr=1e-4,3e-4 adapter.r=8,16      a sweep: a process and a "
            "folder for each",
            soft_wrap=True,
        )
