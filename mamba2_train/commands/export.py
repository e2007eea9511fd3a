"""mamba2-export: write a checkpoint as a Hugging Face folder, adapters merged.

mamba2-export checkpoint=runs/quotes/2026-01-01_12-00-00 out=merged
mamba2-export checkpoint='[ADAPTER,ADAPTER]' out=merged          the sum of several
mamba2-export checkpoint=ADAPTER quantization=nf4 out=merged     into the base as trained over
mamba2-export checkpoint=RUN/checkpoints/step-00000200 out=model       a run's, of any strategy
mamba2-export checkpoint=RUN/checkpoints/step-00000200 merge=false out=adapter
"""

from pathlib import Path

import torch
from peft import PeftModel

from mamba2_train.adapters import read_config, save_adapter
from mamba2_train.assets import resolve
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.commands import command, console
from mamba2_train.commands.generate import find_adapters, load_checkpoint
from mamba2_train.commands.train import adapt, build_model
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.merge import merge_adapters
from mamba2_train.model import Mamba2LM
from mamba2_train.parallel.checkpoint import META, load_whole, read_meta
from mamba2_train.parallel.shards import trained_names
from mamba2_train.quantization import dequantize
from mamba2_train.resume import is_whole
from mamba2_train.run import base_name
from mamba2_train.saving import RUN, SUFFIX
from mamba2_train.schema import ExportConfig, TrainConfig, validated


@command(ExportConfig, "export")
def main(config: ExportConfig) -> None:
    of_run = is_run_checkpoint(config.checkpoint)
    if not of_run and not config.merge:
        raise UserError(
            f"merge=false is for a run's checkpoint, such as RUN/checkpoints/step-00000200, and "
            f"checkpoint={config.checkpoint} is none: copy the adapter, or set merge=true"
        )
    adapters = [] if of_run else find_adapters(config.checkpoint)
    bases = [resolve(read_config(folder).base_model_name_or_path or "") for folder in adapters]
    given = config.checkpoint if isinstance(config.checkpoint, str) else config.checkpoint[0]
    sources: list[str | Path] = [*adapters, *bases, resolve(given)]
    for folder in sources:
        if Path(folder).exists() and config.out.resolve() == Path(folder).resolve():
            raise UserError(f"out={config.out} is what the model is made from: choose another")

    if of_run:
        run, model, peft_model = load_run_checkpoint(Path(given), config.dtype)
        tokenizer = load_tokenizer(resolve(run.model.tokenizer or run.model.source or ""))
        if not config.merge:
            if peft_model is None:
                raise UserError(f"{given} is a whole model, without an adapter: set merge=true")
            save_adapter(peft_model, config.out, base_name(run), run.model.revision)
            save_tokenizer(tokenizer, config.out)
            console.print(f"{config.out}  adapter", soft_wrap=True)
            return
        dequantize(model)
    else:
        dtype = getattr(torch, config.dtype) if config.dtype else None
        model, tokenizer, peft_model = load_checkpoint(
            config.checkpoint,
            dtype=dtype,
            quantization=config.quantization.stored,
            dequantized=True,
        )
    if peft_model is not None:
        tied = model.config.tie_embeddings
        model = merge_adapters(peft_model)
        if tied and not model.config.tie_embeddings:
            console.print("embeddings and lm_head are no longer tied: only one of them has learned")
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    save_pretrained(model, config.out, config.layout, token_ids=special)
    save_tokenizer(tokenizer, config.out)
    n_merged = len(adapters) or int(peft_model is not None)
    what = f"{n_merged} adapter{'s' * (n_merged > 1)} merged" if n_merged else "whole"
    reader = {"huggingface": "transformers' Mamba2ForCausalLM", "state-spaces": "mamba_ssm"}
    console.print(f"{config.out}  {reader[config.layout]}, {what}", soft_wrap=True)


def is_run_checkpoint(source: str | list[str]) -> bool:
    """Whether it is what a run goes on from, a folder or a file."""
    if not isinstance(source, str):
        return False
    path = Path(source)
    return path.suffix == SUFFIX or (path / META).is_file()


def load_run_checkpoint(
    path: Path, dtype: str | None = None
) -> tuple[TrainConfig, Mamba2LM, PeftModel | None]:
    """The run's settings, and its model as it was at a step, in one process.

    Args:
        dtype: of the base's weights; None: as the run had them.

    Raises:
        UserError: the checkpoint is damaged, or is not of the base that its settings name.
    """
    if not is_whole(path):
        raise UserError(f"checkpoint={path}: it is damaged; give another one of {path.parent}")
    run: TrainConfig = validated(TrainConfig, read_meta(path)[RUN]["config"])
    if dtype is not None:
        precision = run.precision.model_copy(update={"weights": dtype})
        run = run.model_copy(update={"precision": precision})
    model = build_model(run)
    peft_model = adapt(model, run)
    trained = load_whole(path) if path.is_dir() else read_meta(path)
    weights = {n.removeprefix("model."): w for n, w in trained["state_dict"].items()}
    if weights.keys() != trained_names(model):
        raise UserError(f"checkpoint={path} is not of {run.model.source}: has it been replaced?")
    model.load_state_dict(weights, strict=False)
    return run, model, peft_model
