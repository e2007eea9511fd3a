"""mamba2-generate: continue a prompt.

mamba2-generate prompt="Love is"
mamba2-generate checkpoint=runs/quotes/2026-01-01_12-00-00 prompt="Love is" temperature=0.9
mamba2-generate checkpoint=... quantization=nf4 prompt="Love is"
mamba2-generate checkpoint='[ADAPTER,ADAPTER]' prompt="Love is"      the sum of several
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mamba2_train.adapters import is_adapter, load_adapter, read_config
from mamba2_train.assets import resolve
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import command
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.model import Mamba2LM
from mamba2_train.quantization import Quantization, dequantize
from mamba2_train.schema import GenerateConfig


@command(GenerateConfig, "generate", free_text=("prompt",))
def main(config: GenerateConfig) -> None:
    model, tokenizer, _ = load_checkpoint(
        config.checkpoint, quantization=config.quantization.stored
    )
    ids = tokenizer.encode(config.prompt) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
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
        model = _base(where, None, dtype, quantization, dequantized)
        return model.eval(), load_tokenizer(where), None
    bases = {(c.base_model_name_or_path, c.revision) for c in map(read_config, adapters)}
    if len(bases) > 1:
        names = " and ".join(sorted(str(name) for name, _ in bases))
        raise UserError(f"these adapters are of {names}: only those of one base have a sum")
    base, revision = bases.pop()
    model = _base(resolve(base or ""), revision, dtype, quantization, dequantized)
    peft_model = load_adapter(model, *adapters).eval()
    return model, load_tokenizer(str(adapters[0])), peft_model


def _base(
    source: str | Path,
    revision: str | None,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
    dequantized: bool,
) -> Mamba2LM:
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
