"""mamba2-eval: how well a model predicts documents, or does the harness's tasks.

mamba2-eval checkpoint=runs/quotes/2026-01-01_12-00-00      an adapter beside its base
mamba2-eval checkpoint=A against=B data=local data.source=test.jsonl part=all out=eval.json
mamba2-eval checkpoint=A tasks=[lambada_openai]
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mamba2_train.adapters import ADAPTER_FILES, is_adapter
from mamba2_train.assets import resolve
from mamba2_train.commands import command, console
from mamba2_train.commands.generate import load_for_generation, write_whole
from mamba2_train.errors import UserError
from mamba2_train.evaluation import score, token_bytes, whole_documents
from mamba2_train.model import Mamba2LM
from mamba2_train.schema import EvaluateConfig

Results = dict[str, dict[str, Any]]  # of each checkpoint
COLUMNS = {
    "perplexity": "{:.2f}",
    "bits_per_byte": "{:.4f}",
    "accuracy": "{:.2%}",
    "loss": "{:.4f}",
    "tokens": "{:,}",
    "documents": "{:,}",
}


@command(EvaluateConfig, "evaluate")
def main(config: EvaluateConfig) -> None:
    measure = _tasks if config.tasks else _documents
    results = {source: measure(source, config) for source in _sources(config)}
    _print(results, by_task=bool(config.tasks))
    if config.out is not None:
        settings = config.model_dump(mode="json", exclude={"out", "plot", "debug"})
        write_whole(config.out, json.dumps({"config": settings, "results": results}, indent=2))
        console.print(f"json      {config.out}")
    if config.plot is not None:
        _plot(results, config.plot)
        console.print(f"plot      {config.plot}")


def _sources(config: EvaluateConfig) -> list[str]:
    """What is measured; the one to compare with comes first."""
    other = config.against
    if other == "base":
        other = base_of(config.checkpoint)
    return [config.checkpoint] if other in (None, config.checkpoint) else [other, config.checkpoint]


def base_of(source: str) -> str | None:
    """The base that an adapter, or the adapter of a run, names."""
    folder = Path(resolve(source))
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not is_adapter(folder):
        return None
    return json.loads((folder / ADAPTER_FILES[0]).read_text()).get("base_model_name_or_path")


def _load(source: str, config: EvaluateConfig) -> tuple[Mamba2LM, Any]:
    model, tokenizer = load_for_generation(source)
    if config.dtype == "float32":
        model.float()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _documents(source: str, config: EvaluateConfig) -> dict[str, Any]:
    model, tokenizer = _load(source, config)
    documents = whole_documents(config.data, tokenizer, config.part)
    highest = int(documents.tokens.max())
    if highest >= model.config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer gives the token {highest} and its model's are 0 to "
            f"{model.config.vocab_size - 1}; give the tokenizer that it was trained with"
        )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(source, total=len(documents))
        found = score(
            model,
            documents,
            token_bytes(tokenizer, model.config.vocab_size),
            segment_len=config.segment_len,
            batch_tokens=config.batch_tokens,
            on_documents=lambda n: progress.advance(task, n),
        )
    return found.values()


def _tasks(source: str, config: EvaluateConfig) -> dict[str, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from mamba2_train.harness import HarnessModel
    except ImportError as error:
        raise UserError(
            f"tasks need the lm-evaluation-harness ({error}): pip install 'mamba2-train[eval]'"
        ) from error
    manager = TaskManager(include_path=None if config.task_path is None else str(config.task_path))
    known = set(manager.all_tasks)
    if unknown := [name for name in config.tasks if name not in known]:
        raise UserError(
            f"the harness has no task {unknown[0]!r}: `lm_eval ls tasks` lists them; set "
            "task_path to a folder with tasks of your own"
        )
    model, tokenizer = _load(source, config)
    found = simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size=config.batch_size),
        tasks=list(config.tasks),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        bootstrap_iters=0,
    )
    return {
        task: {
            name.partition(",")[0]: value
            for name, value in values.items()
            if isinstance(value, int | float) and "stderr" not in name
        }
        for task, values in found["results"].items()
    }


def _print(results: Results, by_task: bool) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for source in results:
        table.add_column(source.replace("[", r"\["), justify="right", overflow="fold")
    first = next(iter(results.values()))
    if by_task:
        for task, values in first.items():
            for name in values:
                cells = [f"{r[task][name]:.4f}" for r in results.values()]
                table.add_row(f"{task} {name}", *cells)
    else:
        for name, form in COLUMNS.items():
            cells = ["-" if r[name] is None else form.format(r[name]) for r in results.values()]
            table.add_row(name.replace("_", " "), *cells)
    console.print(table)


def _plot(results: Results, file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for source, values in results.items():
        bins = values["loss_by_position"]
        # each bin at the middle of its positions, as they are spaced
        middles = [(b["from"] * b["to"]) ** 0.5 for b in bins]
        axes.plot(middles, [b["loss"] for b in bins], marker="o", markersize=3, label=source)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    new = file.with_name(f".{file.name}.new{file.suffix}")
    try:
        figure.savefig(new)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error}): choose another place") from error
    finally:
        pyplot.close(figure)
