"""Files of tensors that notice when they are damaged.

safetensors checks its header and not its contents, so a bit that flips on a disk becomes another
model. What we write says in its metadata, under `mamba2_train`, the xxh3_64 of each tensor (its
name, dtype, shape and bytes) and what it was saved with; others ignore the entry. Of files that
others wrote only values that are not finite are seen.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mamba2_train.errors import UserError

KEY, SUMS = "mamba2_train", "xxh3_64"


def write_tensors(tensors: Mapping[str, Tensor], file: Path, **facts: Any) -> None:
    """Write a safetensors file with checksums, and with `facts`, which JSON can hold, beside them.

    Equal tensors and facts make equal files.
    """
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sums = {name: checksum(name, tensor) for name, tensor in dense.items()}
    metadata = {"format": "pt", KEY: json.dumps({SUMS: sums} | facts)}
    try:
        safetensors.torch.save_file(dense, file, metadata=metadata)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # its own words for the disk's
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise
    # safetensors writes its metadata in another order each time; sorted, they are as long
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= size, (len(ordered), size)
        stream.seek(8)
        stream.write(ordered.ljust(size))


def facts_of(file: Path) -> dict[str, Any]:
    """What `write_tensors` noted, checksums included; empty where another program wrote the file.

    Raises:
        UserError: the note is damaged.
    """
    with safe_open(file, "pt") as stored:
        note = (stored.metadata() or {}).get(KEY)
    if note is None:
        return {}
    try:
        facts = json.loads(note)
        if isinstance(facts, dict) and isinstance(facts[SUMS], dict):
            return facts
    except (ValueError, KeyError, RecursionError):
        pass
    raise UserError(f"{file} is damaged: its checksums cannot be read; copy it again")


def checksum(name: str, tensor: Tensor) -> str:
    """16 hex digits, of a tensor's name, dtype, shape and bytes, wherever it is."""
    h = xxhash.xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    h.update(raw.numpy().data)
    return h.hexdigest()


def check_tensor(name: str, tensor: Tensor, file: Path, facts: Mapping[str, Any]) -> None:
    """Raise a UserError unless `tensor` is what was written as `name`, as far as can be told.

    Args:
        facts: of its file; without checksums only its dtype and finiteness are looked at.
    """
    if facts and facts[SUMS].get(name) != checksum(name, tensor):
        raise UserError(
            f"{file} is damaged: {name} is not what was written (its checksum differs); copy or "
            "make the file again"
        )
    check_finite(name, tensor, file)


def check_finite(name: str, tensor: Tensor, file: Path) -> None:
    """Raise a UserError unless `tensor` holds numbers, all of them finite."""
    if not tensor.is_floating_point():
        raise UserError(f"{file}: {name} is {tensor.dtype}, and weights are floats; get it again")
    if tensor.element_size() > 1 and tensor.numel():  # there is no aminmax of 8 bits
        low, high = tensor.aminmax()
        if not (low.isfinite() & high.isfinite()):
            raise UserError(
                f"{file}: {name} holds values that are not finite (inf or nan), so it is damaged "
                "or of a run that diverged; get it again, or take an earlier checkpoint"
            )
