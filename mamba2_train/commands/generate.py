"""mamba2-generate: continue a prompt, or many, or talk.

mamba2-generate prompt="Love is"
mamba2-generate checkpoint=runs/quotes/2026-01-01_12-00-00 prompt="Love is" temperature=0.9
mamba2-generate checkpoint=... quantization=nf4 prompt="Love is"
mamba2-generate checkpoint='[ADAPTER,ADAPTER]' prompt="Love is"      the sum of several
mamba2-generate checkpoint=ADAPTER merge=true prompts=questions.jsonl      faster for many tokens
mamba2-generate prompts=questions.jsonl out=answers.jsonl batch_size=32
mamba2-generate checkpoint=... chat=true
mamba2-generate prompt_file=book.txt save_state=book.state max_new_tokens=0
mamba2-generate state=book.state prompt="In short,"
"""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mamba2_train.adapters import is_adapter, load_adapter, read_config
from mamba2_train.assets import resolve
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import command
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation import (
    Completion,
    Conversation,
    complete,
    load_prefix,
    read,
    save_prefix,
)
from mamba2_train.generation.chat import rendered, with_system
from mamba2_train.generation.text import checked, encoded
from mamba2_train.merge import merge_adapters
from mamba2_train.model import Mamba2LM
from mamba2_train.quantization import Quantization, dequantize
from mamba2_train.schema import GenerateConfig


@command(GenerateConfig, "generate", free_text=("prompt", "system"))
def main(config: GenerateConfig) -> None:
    model, tokenizer, peft_model = load_checkpoint(
        config.checkpoint, quantization=config.quantization.stored, dequantized=config.merge
    )
    if config.merge and peft_model is not None:
        model = merge_adapters(peft_model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = None if config.state is None else load_prefix(config.state, model)
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "stop": config.stop,
        "seed": config.seed,
    }

    def ids_of(row: dict[str, Any]) -> list[int]:
        vocab_size, most = model.config.vocab_size, config.max_prompt_tokens
        if config.chat:
            messages = row.get("messages") or [{"role": "user", "content": _content(row)}]
            messages = with_system(messages, config.system)
            return checked(rendered(messages, tokenizer), vocab_size, most)
        return encoded(_content(row), tokenizer, vocab_size, begins=before is None, most=most)

    if config.prompts is not None:
        _many(
            config,
            ids_of,
            partial(complete, model, tokenizer, batch_size=config.batch_size, after=before),
            options,
        )
    elif config.chat and config.prompt is None and config.prompt_file is None:
        _talk(Conversation(model, tokenizer, config.system, config.max_prompt_tokens), options)
    else:
        text = config.prompt if config.prompt_file is None else _read(config.prompt_file)
        ids = torch.tensor([ids_of({"prompt": text})], device=model.lm_head.weight.device)
        after = read(model, ids, after=before)
        if config.save_state is not None:
            save_prefix(after, config.save_state, model)
        if config.max_new_tokens:
            if config.prompt is not None and not config.chat:
                _show(config.prompt)
            list(complete(model, tokenizer, [[]], after=after, on_text=_show, **options))
            print()


def load_checkpoint(
    source: str | list[str],
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    dequantized: bool = False,
) -> tuple[Mamba2LM, Any, PeftModel | None]:
    """Model, tokenizer and adapters of a checkpoint, an adapter (with its base) or a run's folder;
    without dropout.

    Args:
        source: of several adapters, the sum is put on their base.
        dtype: of the base's weights; None: as they are stored.
        quantization: how to hold the base's projections, which adapters trained over such a base
            belong to; with `dequantized` these values in ordinary layers, ready for a merge.
    """
    adapters = find_adapters(source)
    if not adapters:
        assert isinstance(source, str)
        folder = _inside(source)
        where = str(folder) if folder.exists() else source
        model = load_base(where, None, dtype, quantization, dequantized)
        return model.eval(), load_tokenizer(where), None
    bases = {(c.base_model_name_or_path, c.revision) for c in map(read_config, adapters)}
    if len(bases) > 1:
        names = " and ".join(sorted(str(name) for name, _ in bases))
        raise UserError(f"these adapters are of {names}: only those of one base have a sum")
    base, revision = bases.pop()
    model = load_base(resolve(base or ""), revision, dtype, quantization, dequantized)
    peft_model = load_adapter(model, *adapters).eval()
    return model, load_tokenizer(str(adapters[0])), peft_model


def load_base(
    source: str | Path,
    revision: str | None,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
    dequantized: bool = False,
) -> Mamba2LM:
    """A model without adapters; arguments as in `load_checkpoint`."""
    model = load_pretrained(source, revision=revision, dtype=dtype, quantization=quantization)
    if dequantized and quantization is not None:
        dequantize(model)
    return model


def find_adapters(source: str | list[str]) -> list[Path]:
    """The folders of the adapters, where a run may have been given; none for a whole model."""
    sources = [source] if isinstance(source, str) else source
    folders = [_inside(name) for name in sources]
    if isinstance(source, str) and not is_adapter(folders[0]):
        return []
    for name, folder in zip(sources, folders, strict=True):
        if not is_adapter(folder):
            raise UserError(f"checkpoint: {name} is no adapter, and only adapters have a sum")
    return folders


def _inside(source: str) -> Path:
    folder = Path(resolve(source))
    for made in ("adapter", "model"):  # by a run
        if (folder / made).is_dir():
            return folder / made
    return folder


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _talk(conversation: Conversation, options: dict[str, Any]) -> None:
    """Answers to the lines of the standard input, until it ends."""
    asks = "> " if sys.stdin.isatty() else ""
    turn = 0
    while True:
        try:
            message = input(asks)
        except (EOFError, KeyboardInterrupt):
            return
        if message.strip():
            conversation.answer(
                message, on_text=_show, **(options | {"seed": options["seed"] + turn})
            )
            turn += 1
            print()


def _many(
    config: GenerateConfig,
    ids_of: Callable[[dict[str, Any]], list[int]],
    complete_all: Callable[..., Iterator[Completion]],
    options: dict[str, Any],
) -> None:
    """Each row of `prompts` with its completion, to `out` all at once or to the terminal."""
    assert config.prompts is not None
    rows, prompts = [], []
    for place, row in _rows(config.prompts):
        try:
            prompts.append(ids_of(row))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        rows.append(row)
    lines = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with bar:
        found = bar.track(complete_all(prompts, **options), len(rows), description="prompts")
        for row, completion in zip(rows, found, strict=True):
            values = {"completion": completion.text, "ended_by": completion.ended_by}
            lines.append(json.dumps(row | values, ensure_ascii=False))
            if config.out is None:
                print(lines[-1])
    if config.out is not None:
        write_whole(config.out, "".join(f"{line}\n" for line in lines))
        print(f"{len(rows)} completions  {config.out}")


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each prompt."""
    lines = _read(file).rstrip("\n").split("\n")
    if not any(line.strip() for line in lines):
        raise UserError(f"{file} holds no prompt: write one to a line")
    for number, line in enumerate(lines, 1):
        place = f"{file}, line {number}"
        if file.suffix != ".jsonl":
            yield place, {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON ({error}): write an object to a line") from error
        if not isinstance(row, dict):
            raise UserError(f'{place} is no object: write {{"prompt": "..."}}')
        yield place, row


def _content(row: dict[str, Any]) -> str:
    if isinstance(text := row.get("prompt"), str):
        return text
    if "messages" in row:
        raise UserError("there are messages, but no prompt: set chat=true")
    raise UserError(f"there is no string called prompt, only {', '.join(row) or 'nothing'}")


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): give a UTF-8 text") from error


def write_whole(file: Path, text: str) -> None:
    """All of it or nothing."""
    file = file.expanduser()
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error}): choose another place") from error
