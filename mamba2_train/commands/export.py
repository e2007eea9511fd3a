"""mamba2-export: write a checkpoint as a Hugging Face folder, adapters merged.

mamba2-export checkpoint=runs/quotes/2026-01-01_12-00-00 out=merged
mamba2-export checkpoint='[ADAPTER,ADAPTER]' out=merged          the sum of several
mamba2-export checkpoint=ADAPTER quantization=nf4 out=merged     into the base as trained over
"""

from pathlib import Path

import torch

from mamba2_train.adapters import read_config
from mamba2_train.assets import resolve
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.commands import command, console
from mamba2_train.commands.generate import find_adapters, load_checkpoint
from mamba2_train.data.tokenizer import save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.merge import merge_adapters
from mamba2_train.schema import ExportConfig


@command(ExportConfig, "export")
def main(config: ExportConfig) -> None:
    adapters = find_adapters(config.checkpoint)
    bases = [resolve(read_config(folder).base_model_name_or_path or "") for folder in adapters]
    given = config.checkpoint if isinstance(config.checkpoint, str) else config.checkpoint[0]
    sources: list[str | Path] = [*adapters, *bases, resolve(given)]
    for folder in sources:
        if Path(folder).exists() and config.out.resolve() == Path(folder).resolve():
            raise UserError(f"out={config.out} is what the model is made from: choose another")

    dtype = getattr(torch, config.dtype) if config.dtype else None
    model, tokenizer, peft_model = load_checkpoint(
        config.checkpoint, dtype=dtype, quantization=config.quantization.stored, dequantized=True
    )
    if peft_model is not None:
        tied = model.config.tie_embeddings
        model = merge_adapters(peft_model)
        if tied and not model.config.tie_embeddings:
            console.print("embeddings and lm_head are no longer tied: only one of them has learned")
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    save_pretrained(model, config.out, token_ids=special)
    save_tokenizer(tokenizer, config.out)
    n_merged = f"{len(adapters)} adapter{'s' * (len(adapters) > 1)} merged" if adapters else "whole"
    console.print(f"{config.out}  transformers' Mamba2ForCausalLM, {n_merged}", soft_wrap=True)
