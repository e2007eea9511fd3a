"""What a prompt leaves behind, all that is needed to go on from it: made, copied, saved, loaded.

It has the same size whatever the prompt's length, and the prompt is read a segment at a time, so
memory does not grow with it.
"""

import contextlib
import json
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mamba2_train.errors import UserError
from mamba2_train.model import LayerState, Mamba2LM, Mamba2State

SEGMENT = 8192  # tokens of all rows that one pass of the prompt reads
FORMAT = "mamba2-train state 1"
CONTEXT = 8  # last tokens that are kept: a character has at most 4
SAMPLE = 4096  # values of each weight that tell models apart


@dataclass
class Prefix:
    """
    state: of the model, after the last token of each row.
    logits: (b, vocab_size) of the token that follows.
    seen: (b, vocab_size) bool, the tokens that each row has had.
    n_tokens: (b,) how many.
    last: the last tokens of each row, after which the next one is spelt.
    """

    state: Mamba2State
    logits: Tensor
    seen: Tensor
    n_tokens: Tensor
    last: list[list[int]]

    def __len__(self) -> int:
        return len(self.logits)

    def copied(self, n_rows: int | None = None) -> "Prefix":
        """A copy to step on; of a single row, `n_rows` of them."""
        n = len(self) if n_rows is None else n_rows
        if len(self) not in (1, n):
            raise ValueError(f"the prefix has {len(self)} rows and the prompt {n}; give as many")

        def copy(tensor: Tensor) -> Tensor:
            return tensor.expand(n, *tensor.shape[1:]).clone(memory_format=torch.contiguous_format)

        layers = [LayerState(copy(s.conv), copy(s.ssm)) for s in self.state.layers]
        state = Mamba2State(layers, copy(self.state.seq_idx))
        last = self.last * (n // len(self))
        return Prefix(state, copy(self.logits), copy(self.seen), copy(self.n_tokens), last)


@torch.no_grad()
def read(
    model: Mamba2LM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    after: Prefix | None = None,
    segment: int = SEGMENT,
) -> Prefix:
    """Read a prompt through the scan.

    Args:
        input_ids: (b, t).
        attention_mask: (b, t), 0 marks padding, on either side.
        after: what comes before; one row of it goes before every row. It stays as it is.
        segment: tokens, of all rows together, that one pass reads.

    Raises:
        ValueError: shapes that disagree, a row without a token, a token outside the vocabulary.
    """
    _check(input_ids, attention_mask, model.config.vocab_size)
    b, t = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    mask = attention_mask.bool()
    padded = not bool(mask.all())
    state = None if after is None else after.copied(b).state
    logits: Tensor | None = None
    width = max(segment // b, 1)
    for start in range(0, t, width):
        ids, m = input_ids[:, start : start + width], mask[:, start : start + width]
        last = (m * torch.arange(m.shape[1], device=m.device)).argmax(1, keepdim=True)
        out = model(
            ids,
            attention_mask=m if padded else None,
            state=state,
            return_state=True,
            logits_to_keep=last,
        )
        state, new = out.state, out.logits[:, 0]
        # a row that is padding in this segment ended in an earlier one
        logits = new if logits is None else torch.where(m.any(1, keepdim=True), new, logits)
    assert state is not None
    assert logits is not None
    seen = logits.new_zeros(logits.shape, dtype=torch.bool)
    # padding marks a token that is in the row anyway
    first = input_ids.gather(1, mask.int().argmax(1, keepdim=True))
    seen.scatter_(1, torch.where(mask, input_ids, first), True)
    n_tokens = mask.sum(1)
    last_tokens = [ids[m].tolist()[-CONTEXT:] for ids, m in zip(input_ids, mask, strict=True)]
    if after is not None:
        seen |= after.seen
        n_tokens = n_tokens + after.n_tokens
        before = after.last * (b // len(after))
        last_tokens = [[*x, *y][-CONTEXT:] for x, y in zip(before, last_tokens, strict=True)]
    return Prefix(state, logits, seen, n_tokens, last_tokens)


def save_prefix(prefix: Prefix, file: str | os.PathLike[str], model: Mamba2LM) -> None:
    """Write `prefix`, all of it or nothing, marked as the work of `model`."""
    file = Path(file).expanduser()
    tensors = {"logits": prefix.logits, "seen": prefix.seen, "n_tokens": prefix.n_tokens}
    tensors["seq_idx"] = prefix.state.seq_idx
    for i, layer in enumerate(prefix.state.layers):
        tensors |= {f"layers.{i}.conv": layer.conv, f"layers.{i}.ssm": layer.ssm}
    metadata = {"format": FORMAT, "model": model_fingerprint(model)}
    metadata["last"] = json.dumps(prefix.last)
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, new, metadata=metadata)
        os.replace(new, file)
    except (OSError, SafetensorError) as error:
        size = sum(t.nbytes for t in tensors.values()) / 1e6
        raise UserError(
            f"the state cannot be written to {file} ({error}): choose a place that may be written "
            f"to, with {size:.0f} MB free"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def load_prefix(file: str | os.PathLike[str], model: Mamba2LM) -> Prefix:
    """Read what `save_prefix` wrote, onto the model's device.

    Raises:
        UserError: no such file, or the state of another model.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f"there is no state {file}; write one with save_state={file}")
    try:
        with safe_open(file, "pt", device=str(model.lm_head.weight.device)) as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no saved state ({error}); write it again") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} is no saved state of ours; write one with save_state=FILE")
    if metadata.get("model") != model_fingerprint(model):
        raise UserError(
            f"the state {file} was made by another model, adapter or precision: give the "
            "checkpoint that it was made with, or make it anew with save_state"
        )
    layers = [
        LayerState(tensors[f"layers.{i}.conv"], tensors[f"layers.{i}.ssm"])
        for i in range(model.config.n_layers)
    ]
    state = Mamba2State(layers, tensors["seq_idx"])
    last = json.loads(metadata["last"])
    return Prefix(state, tensors["logits"], tensors["seen"], tensors["n_tokens"], last)


def model_fingerprint(model: Mamba2LM) -> str:
    """Checksum of the model's shape and of some values of every weight, adapters included."""
    checksum = zlib.crc32(repr(model.config).encode())
    for name, p in model.named_parameters():
        checksum = zlib.crc32(f"{name} {tuple(p.shape)} {p.dtype}".encode(), checksum)
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLE)].cpu().contiguous()
        checksum = zlib.crc32(some.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _check(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give (batch, at least one token)"
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
                f"{tuple(input_ids.shape)}; they must be equal"
            )
        if not attention_mask.any(1).all():
            raise ValueError("a row of attention_mask has no token at all; give each row one")
    lowest, highest = torch.stack(input_ids.aminmax()).tolist()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"input_ids holds {lowest if lowest < 0 else highest}, and the model's tokens are 0 to "
            f"{vocab_size - 1}; use the tokenizer that it was trained with"
        )
