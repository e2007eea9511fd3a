"""mamba2-export: write what was trained for others to use, and read it back before it counts.

mamba2-export checkpoint=runs/quotes/2026-01-01_12-00-00 out=merged
mamba2-export checkpoint='[ADAPTER,ADAPTER]' out=merged          the sum of several
mamba2-export checkpoint=ADAPTER quantization=nf4 out=merged     into the base as trained over
mamba2-export checkpoint=ADAPTER out=adapter merge=false         the adapter alone
mamba2-export checkpoint=RUN out=FOLDER layout=state-spaces      for mamba_ssm
mamba2-export checkpoint=RUN/checkpoints/step-00000200 out=FOLDER     as a run of any strategy was
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig

from mamba2_train.adapters import (
    CONFIG_FILE,
    IN_FULL_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_config,
    save_adapter,
)
from mamba2_train.assets import resolve
from mamba2_train.card import write_card
from mamba2_train.checkpoint import load_pretrained, replacing, save_pretrained
from mamba2_train.commands import command, console
from mamba2_train.commands.generate import find_adapters, load_base, load_checkpoint
from mamba2_train.commands.train import DTYPES, adapt, build_model
from mamba2_train.data.tokenizer import load_tokenizer, pad_id, save_tokenizer
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

PROBE = 64  # tokens whose logits are compared
WHAT = {
    "huggingface": "transformers' Mamba2ForCausalLM",
    "state-spaces": "mamba_ssm's MambaLMHeadModel",
}


@command(ExportConfig, "export")
def main(config: ExportConfig) -> None:
    of_run = is_run_checkpoint(config.checkpoint)
    adapters = [] if of_run else find_adapters(config.checkpoint)
    check_target(config, adapters)
    run: TrainConfig | None = None
    dtype: torch.dtype | None
    if of_run:
        run, model, peft_model = load_run_checkpoint(Path(str(config.checkpoint)), config.dtype)
        dtype, stored = DTYPES[run.precision.weights], run.quantization.stored
        tokenizer = load_tokenizer(resolve(run.model.tokenizer or run.model.source or ""))
        if config.merge:
            dequantize(model)
    else:
        dtype = DTYPES[config.dtype] if config.dtype else None
        stored = config.quantization.stored
        model, tokenizer, peft_model = load_checkpoint(
            config.checkpoint, dtype=dtype, quantization=stored, dequantized=config.merge
        )
    if not config.merge and peft_model is None:
        raise UserError(f"checkpoint={config.checkpoint} is no adapter: set merge=true")
    if config.merge and peft_model is not None:
        tied = model.config.tie_embeddings
        model = merge_adapters(peft_model)
        if tied and not model.config.tie_embeddings:
            console.print("embeddings and lm_head are no longer tied: only one of them has learned")
    logits = probed(model.eval())
    n_merged = len(adapters) or int(peft_model is not None)
    merged = f"{n_merged} adapter{'s' * (n_merged > 1)} merged" if n_merged else "whole"
    what = f"{WHAT[config.layout]}, {merged}" if config.merge else "an adapter as it is"
    try:
        with replacing(config.out.expanduser().resolve(), config.force) as folder:
            if config.merge:
                write_model(model, tokenizer, folder, config)
            elif run is not None and peft_model is not None:
                save_adapter(peft_model, folder, base_name(run), run.model.revision)
            else:
                copy_adapter(adapters[0], folder)
            save_tokenizer(tokenizer, folder)
            write_card(folder, config.checkpoint, tokenizer, what, config.merge)
            if config.merge:
                again = load_pretrained(folder)
            else:
                found = read_config(folder)
                base = resolve(found.base_model_name_or_path or "")
                again = load_base(base, found.revision, dtype, stored)
                load_adapter(again, folder)
            check_same(logits, probed(again.eval()), config.out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{config.out} cannot be written ({error}); what was there is untouched: free some "
            "space, or choose another place"
        ) from error
    console.print(f"{config.out}  {what}; read back, same logits", soft_wrap=True)


def check_target(config: ExportConfig, adapters: list[Path]) -> None:
    """Refuse what the model is made from, and what something else is in."""
    bases = [resolve(read_config(folder).base_model_name_or_path or "") for folder in adapters]
    given = config.checkpoint if isinstance(config.checkpoint, str) else config.checkpoint[0]
    sources: list[str | Path] = [*adapters, *bases, resolve(given)]
    out = config.out.expanduser().resolve()
    for folder in sources:
        if Path(folder).exists() and out == Path(folder).resolve():
            raise UserError(f"out={config.out} is what the model is made from: choose another")
    if out.is_dir() and any(out.iterdir()) and not config.force:
        raise UserError(
            f"out={config.out} is not empty: choose another folder, or set force=true to write "
            "over the checkpoint in it"
        )


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


def write_model(model: Mamba2LM, tokenizer: Any, folder: Path, config: ExportConfig) -> None:
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    save_pretrained(
        model, folder, config.layout, max_shard_size=config.max_shard_size, token_ids=special
    )
    if config.layout == "huggingface":
        ids = {f"{name}_token_id": i for name, i in special.items()}
        GenerationConfig(**(ids | {"pad_token_id": pad_id(tokenizer)})).save_pretrained(folder)


def copy_adapter(adapter: Path, folder: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE, IN_FULL_FILE):
        if (adapter / name).is_file():
            shutil.copy(adapter / name, folder / name)


@torch.no_grad()
def probed(model: Mamba2LM) -> torch.Tensor:
    """Logits (1, PROBE, vocab_size) of some tokens, the same for every model of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, PROBE), generator=generator)
    return model(tokens).logits.float()


def check_same(logits: torch.Tensor, again: torch.Tensor, out: Path) -> None:
    worst = float((logits - again).abs().max() / logits.abs().max())
    if not worst <= 1e-6:  # the same weights through the same operations; nan neither
        raise UserError(
            f"{out}: what was read back gives other logits, by {worst:.1e} of the largest: nothing "
            "was kept; the disk or the memory is failing, or this is a fault of ours to report"
        )
