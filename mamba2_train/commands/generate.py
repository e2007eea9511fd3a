"""mamba2-generate: continue a prompt.

mamba2-generate prompt="Love is"
mamba2-generate checkpoint=runs/quotes/2026-01-01_12-00-00 prompt="Love is" temperature=0.9
mamba2-generate checkpoint=... quantization=nf4 prompt="Love is"
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba2_train.adapters import ADAPTER_FILES, is_adapter, load_adapter
from mamba2_train.assets import resolve
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import command
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.model import Mamba2LM
from mamba2_train.quantization import Quantization
from mamba2_train.schema import GenerateConfig


@command(GenerateConfig, "generate", free_text=("prompt",))
def main(config: GenerateConfig) -> None:
    model, tokenizer = load_for_generation(config.checkpoint, config.quantization.stored)
    ids = tokenizer.encode(config.prompt) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    sys.stdout.write(config.prompt)
    stream = Stream(tokenizer, config.prompt, ids)
    generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_token_id=tokenizer.eos_token_id,
        seed=config.seed,
        on_token=stream,
    )
    print()


def load_for_generation(
    source: str, quantization: Quantization | None = None
) -> tuple[Mamba2LM, Any]:
    """Model and tokenizer of a checkpoint, an adapter (with its base) or a run's folder."""
    folder = Path(resolve(source))
    for inside in ("adapter", "model"):  # of a run
        if (folder / inside).is_dir():
            folder = folder / inside
    if not is_adapter(folder):
        where = str(folder) if folder.exists() else source
        return load_pretrained(where, quantization=quantization), load_tokenizer(where)
    base = json.loads((folder / ADAPTER_FILES[0]).read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder / ADAPTER_FILES[0]} names no base_model_name_or_path; add it")
    model = load_pretrained(resolve(base), quantization=quantization)
    load_adapter(model, folder)
    return model, load_tokenizer(str(folder))


class Stream:
    """Prints the text as it grows. A token may end in the middle of a character: what cannot be
    decoded yet waits for the next one."""

    def __init__(self, tokenizer: Any, prompt: str, ids: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(ids)
        self.shown = tokenizer.decode(ids, skip_special_tokens=True)

    def __call__(self, token: Tensor) -> None:
        self.ids.append(int(token[0]))
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[len(self.shown) :])
            sys.stdout.flush()
            self.shown = text
