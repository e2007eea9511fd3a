"""What both sides read, made once: weights in Hugging Face's layout, a first adapter, rows.

The tiny shape is the embedded base; the others are drawn by our initialisation. Rows are token ids
of the embedded quotes, so that neither side tokenizes.
"""

import json
from dataclasses import replace
from pathlib import Path

from mamba2_train.adapters import add_lora, save_adapter
from mamba2_train.assets import FOLDER, resolve
from mamba2_train.benchmarks.workloads import Workload
from mamba2_train.checkpoint import load_pretrained, save_pretrained
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.model import PRESETS, Mamba2LM, initialize

RANK, TARGETS = 8, ["embeddings", "in_proj", "out_proj"]  # recipes/hf_docs_lora.yaml


def prepare(folder: Path, w: Workload, n_layers: int | None = None) -> dict[str, str]:
    """Paths of weights, adapter and rows.

    Args:
        n_layers: fewer than the shape has, for a quick check.
    """
    weights = _weights(folder, w.shape, n_layers)
    found = {"weights": str(weights), "rows": str(_rows(folder, w))}
    if w.trained == "lora":
        found["adapter"] = str(_adapter(folder, weights))
    return found


def _weights(folder: Path, shape: str, n_layers: int | None) -> Path:
    if shape == "tiny" and n_layers is None:
        return Path(resolve("embedded"))
    target = folder / shape
    if not target.exists():
        config = PRESETS[shape]
        if n_layers is not None:
            config = replace(config, n_layers=n_layers)
        tokenizer = load_tokenizer(resolve("embedded"), vocab_size=config.vocab_size)
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        save_pretrained(initialize(Mamba2LM(config), seed=0), target, token_ids=ids)
    return target


def _adapter(folder: Path, weights: Path) -> Path:
    target = folder / f"{weights.name}-adapter"
    if not target.exists():
        model = load_pretrained(weights)
        adapted = add_lora(model, TARGETS, r=RANK, alpha=RANK, seed=0)
        save_adapter(adapted, target, str(weights.resolve()))
    return target


def _rows(folder: Path, w: Workload) -> Path:
    target = folder / (f"{w.seq_len}.jsonl" if w.rows == "whole" else "quotes.jsonl")
    if not target.exists():
        tokenizer = load_tokenizer(resolve("embedded"), vocab_size=1 << 20)
        texts = [json.loads(line)["quote"] for line in (FOLDER / "quotes.jsonl").open()]
        documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
        if w.rows == "whole":
            stream = [token for ids in documents for token in ids]
            starts = range(0, len(stream) - w.seq_len, w.seq_len)
            documents = [stream[start : start + w.seq_len] for start in starts]
        target.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    return target
