"""mamba2-eval: how well a model predicts documents, or does the harness's tasks.

mamba2-eval checkpoint=runs/quotes/2026-01-01_12-00-00      an adapter beside its base
mamba2-eval checkpoint=A against=B data=local data.source=test.jsonl part=all out=eval.json
mamba2-eval checkpoint=A tasks=[lambada_openai]
torchrun --nproc-per-node 8 -m mamba2_train.commands.evaluate ...     the same on eight GPUs
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from lightning import Fabric
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mamba2_train.adapters import read_config
from mamba2_train.assets import resolve
from mamba2_train.commands import command, console
from mamba2_train.commands.generate import find_adapters, load_base, load_checkpoint, write_whole
from mamba2_train.commands.train import placement
from mamba2_train.data.tokenizer import load_tokenizer
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


class Subject(NamedTuple):
    """What is measured, under the name of its column."""

    name: str
    load: Callable[[], tuple[Mamba2LM, Any]]


@command(EvaluateConfig, "evaluate")
def main(config: EvaluateConfig) -> None:
    # the documents are dealt to ranks that hold the whole model, however its training was sharded
    alone = config.strategy.kind in ("auto", "single")
    fabric = Fabric(**placement(config.strategy), strategy="auto" if alone else "ddp")
    fabric.launch()
    measure = _tasks if config.tasks else _documents
    results = {subject.name: measure(subject, config, fabric) for subject in subjects(config)}
    if fabric.is_global_zero:
        _report(results, config)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves early aborts the others at their very end
        torch.distributed.destroy_process_group()


def subjects(config: EvaluateConfig) -> list[Subject]:
    """What is measured; the one to compare with comes first."""
    own = Subject(_name(config.checkpoint), partial(_load, config.checkpoint, config))
    if config.against is None or config.against == config.checkpoint:
        return [own]
    if config.against != "base":
        return [Subject(config.against, partial(_load, config.against, config)), own]
    adapters = find_adapters(config.checkpoint)
    if not adapters:
        return [own]
    base = read_config(adapters[0]).base_model_name_or_path or ""
    return [Subject(base, partial(_load_base_of, adapters[0], config)), own]


def _name(source: str | list[str]) -> str:
    return source if isinstance(source, str) else " + ".join(source)


def _load(source: str | list[str], config: EvaluateConfig) -> tuple[Mamba2LM, Any]:
    model, tokenizer, _ = load_checkpoint(
        source, dtype=_dtype(config), quantization=config.quantization.stored
    )
    return model, tokenizer


def _load_base_of(adapter: Path, config: EvaluateConfig) -> tuple[Mamba2LM, Any]:
    """The base, with the adapter's tokenizer: state-spaces' have none of their own."""
    found = read_config(adapter)
    source = resolve(found.base_model_name_or_path or "")
    model = load_base(source, found.revision, _dtype(config), config.quantization.stored)
    return model.eval(), load_tokenizer(str(adapter))


def _dtype(config: EvaluateConfig) -> torch.dtype | None:
    return torch.float32 if config.dtype == "float32" else None


def _documents(subject: Subject, config: EvaluateConfig, fabric: Fabric) -> dict[str, Any]:
    model, tokenizer = subject.load()
    model.to(fabric.device)
    documents = whole_documents(config.data, tokenizer, config.part)
    highest = int(documents.tokens.max())
    if highest >= model.config.vocab_size:
        raise UserError(
            f"{subject.name}: its tokenizer gives the token {highest} and its model's are 0 to "
            f"{model.config.vocab_size - 1}; give the tokenizer that it was trained with"
        )
    shown = Progress(
        console=Console(stderr=True), transient=True, disable=not fabric.is_global_zero
    )
    with shown as progress:
        task = progress.add_task(escape(subject.name), total=len(documents))
        found = score(
            model,
            documents,
            token_bytes(tokenizer, model.config.vocab_size),
            segment_len=config.segment_len,
            batch_tokens=config.batch_tokens,
            on_documents=lambda n: progress.advance(task, n),
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
    return found.of_all_ranks(partial(_added_up, fabric)).values()


def _added_up(fabric: Fabric, mine: Tensor) -> Tensor:
    total: Any = fabric.all_reduce(mine.to(fabric.device), reduce_op="sum")
    return total.cpu()


def _tasks(subject: Subject, config: EvaluateConfig, fabric: Fabric) -> dict[str, Any]:
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
    model, tokenizer = subject.load()
    found = simple_evaluate(
        model=HarnessModel(model.to(fabric.device), tokenizer, batch_size=config.batch_size),
        tasks=list(config.tasks),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        bootstrap_iters=0,
    )
    if found is None:  # the harness gives them to the first process of a node
        return {}
    return {
        task: {
            name.partition(",")[0]: value
            for name, value in values.items()
            if isinstance(value, int | float) and "stderr" not in name
        }
        for task, values in found["results"].items()
    }


def _report(results: Results, config: EvaluateConfig) -> None:
    _print(results, by_task=bool(config.tasks))
    if config.out is not None:
        settings = config.model_dump(mode="json", exclude={"out", "plot", "debug"})
        write_whole(config.out, json.dumps({"config": settings, "results": results}, indent=2))
        console.print(f"json      {config.out}")
    if config.plot is not None:
        _plot(results, config.plot)
        console.print(f"plot      {config.plot}")


def _print(results: Results, by_task: bool) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for source in results:
        table.add_column(escape(source), justify="right", overflow="fold")
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


if __name__ == "__main__":
    main()
