"""Checkpoints in a folder, to which each rank writes what it holds, through torch's DCP.

    step-00000200/
      __0_0.distcp, __1_0.distcp, ...   boxes of plain tensors: weights and optimizer state
      .metadata                         where each box is (DCP's)
      meta.pt                           all else, and the checksum of every other file

Tensors are those of a model in one process, under the same names, in as many boxes as the ranks
cut them into: any number of ranks reads what any other wrote, each of them its own boxes alone. A
folder is written under another name, `meta.pt` last, and renamed: one with a checkpoint's name is
whole.
"""

import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.optim import Optimizer

from mamba2_train.errors import UserError
from mamba2_train.parallel.shards import Box, boxes, local

META = "meta.pt"
TEMPORARY = ".tmp"
Tensors = dict[str, list[Box]]  # by the name in the checkpoint


def weights(module: nn.Module) -> Tensors:
    """What is trained, as this rank has it."""
    return {name: [b for _, b in found] for name, found in boxes(module, _trained)}


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state by the names of the parameters: `tensors` in boxes; `scalars`, and the
    groups' settings with the `names` in them, the same on every rank."""
    tensors: Tensors = {}
    scalars: dict[str, dict[str, Any]] = {}
    names: dict[nn.Parameter, str] = {}
    keys: dict[str, None] = {}  # of the tensors, in order
    for name, found in boxes(module, _trained):
        for p, box in found:
            names[p] = name
            for key, value in optimizer.state[p].items():
                if isinstance(value, Tensor) and value.dim():
                    held = tensors.setdefault(_state_name(name, key), [])
                    held.append(box._replace(local=local(value)))
                    keys[key] = None
                else:
                    scalars.setdefault(name, {})[key] = value
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        | {"names": list(dict.fromkeys(names[p] for p in group["params"]))}
        for group in optimizer.param_groups
    ]
    return {"tensors": tensors, "scalars": scalars, "groups": groups, "keys": list(keys)}


def save(
    checkpoint: dict[str, Any],
    path: Path,
    group: dist.ProcessGroup | None = None,
    *,
    same_tensors: bool = False,
) -> None:
    """Write a checkpoint of Lightning's, whose tensors are boxes, into the folder `path`.

    Every rank must call it; what a killed save has left beside `path` is removed.

    Args:
        group: of all ranks, on the CPU, that nothing else uses meanwhile; None where there is one.
        same_tensors: `path` has been written, by this process and with these tensors: all but them
            takes the place of what it holds.
    """
    tensors: Tensors = checkpoint.pop("state_dict")
    names = list(tensors)
    states = checkpoint.pop("optimizer_states")
    for state in states:
        tensors = tensors | state.pop("tensors")
    meta = checkpoint | {"optimizers": states, "weights": names}
    first = group is None or dist.get_rank() == 0
    if same_tensors:
        if first:
            _write_meta(meta | {"files": read_meta(path)["files"]}, path)
        _barrier(group)
        return
    temporary = path.with_name(path.name + TEMPORARY)
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f"*{TEMPORARY}"):
            remove(abandoned)
        temporary.mkdir()
    _barrier(group)
    dcp.save(
        tensors,
        storage_writer=dcp.FileSystemWriter(temporary),  # which syncs its files to the disk
        planner=_Writer(),
        process_group=group,
        no_dist=group is None,
    )
    _barrier(group)
    if first:
        _write_meta(meta | {"files": _checksums(temporary)}, temporary)
        if path.exists():  # damaged, or no later run's
            path.rename(path.with_name(f"{path.name}.old{TEMPORARY}"))
        temporary.rename(path)
        _sync(path.parent)
        for replaced in path.parent.glob(f"*{TEMPORARY}"):
            remove(replaced)
    _barrier(group)


def load(path: Path, module: Any, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint's weights into `module`, in place, and its state into the optimizers.

    Returns the rest, in which `state_dict` has the weights' names alone.

    Args:
        path: a folder, or the file that a run in one process has written.

    Raises:
        UserError: it was trained on other weights.
    """
    meta = read_meta(path)
    names = meta.pop("weights") if path.is_dir() else list(meta["state_dict"])
    module.check_trained(names)
    held = weights(module)
    if path.is_dir():
        states = meta.pop("optimizers")
        source = path
    else:
        whole = meta.pop("state_dict")
        states = []
        for optimizer, state in zip(optimizers, meta.pop("optimizer_states"), strict=False):
            named, tensors = _by_name(state, optimizer_names(module, optimizer))
            states.append(named)
            whole |= tensors
        source = whole
    for optimizer, state in zip(optimizers, states, strict=False):
        held |= _prepared(module, optimizer, state)
    _read(held, source)
    return meta | {"state_dict": dict.fromkeys(names)}


def load_weights(path: Path, module: nn.Module) -> None:
    """Put a checkpoint's weights, a folder's or a file's, into `module`, in place."""
    held = weights(module)
    _read(held, path if path.is_dir() else read_meta(path)["state_dict"])


def load_whole(path: Path) -> dict[str, Any]:
    """A checkpoint in a folder as one process has it in a file; the optimizers' states are by name
    still, under `optimizers`, with `tensors`."""
    meta = read_meta(path)
    reader = _Files(path)
    stored = reader.read_metadata().state_dict_metadata
    values: dict[str, Tensor] = {}
    for name, of in stored.items():
        assert isinstance(of, TensorStorageMetadata)
        values[name] = torch.empty(of.size, dtype=of.properties.dtype)
    _read({name: [Box(v, (0,) * v.dim(), v.shape)] for name, v in values.items()}, path)
    meta["state_dict"] = {name: values.pop(name) for name in meta.pop("weights")}
    for state in meta["optimizers"]:
        state["tensors"] = values
    return meta


def indexed(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A state by name, with its tensors, as torch's optimizers have it: by the parameter's number.

    Args:
        names: of the optimizer's parameters, in its order.
    """
    number = {name: i for i, name in enumerate(names)}
    groups = [
        {k: v for k, v in group.items() if k != "names"}
        | {"params": sorted(number[name] for name in group["names"])}
        for group in state["groups"]
    ]
    values: dict[int, dict[str, Any]] = {}
    for name, i in number.items():
        scalars = state["scalars"].get(name, {})
        found = {key: state["tensors"].get(_state_name(name, key)) for key in state["keys"]}
        values[i] = scalars | {key: value for key, value in found.items() if value is not None}
    return {"state": values, "param_groups": groups}


def optimizer_names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Plain names of an optimizer's parameters, in its order."""
    names = {p: name for name, found in boxes(module, _trained) for p, _ in found}
    return list(dict.fromkeys(names[p] for g in optimizer.param_groups for p in g["params"]))


def read_meta(path: Path) -> dict[str, Any]:
    """All but the tensors of a checkpoint; those in a single file are mapped.

    Raises:
        UserError: it is damaged or another file; a pickle of more than values is not run.
    """
    file = path / META if path.is_dir() else path
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(found)
    except Exception as error:  # whatever comes of bytes that nobody wrote
        raise UserError(_damaged(path, error)) from error


def is_whole(path: Path) -> bool:
    """Whether the disk gives back what was written into the folder."""
    try:
        with zipfile.ZipFile(path / META) as archive:  # each part of it has a checksum
            if archive.testzip() is not None:
                return False
        return _checksums(path) == read_meta(path)["files"]
    except Exception:  # whatever torch makes of what is no checkpoint
        return False


def remove(path: Path) -> None:
    """A checkpoint, a file or a folder, which never looks like one when it is no longer whole."""
    if path.is_dir():
        gone = path
        if not path.name.endswith(TEMPORARY):
            gone = path.rename(path.with_name(path.name + TEMPORARY))
        shutil.rmtree(gone)
    else:
        path.unlink()


class _Files(dcp.FileSystemReader):
    """torch's reader, which would run whatever code `.metadata` names, and open any file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Description(file).load()
            files = {stored.relative_path for stored in metadata.storage_data.values()}
            if outside := [name for name in files if name != os.path.basename(name)]:
                raise pickle.UnpicklingError(f"it names {outside[0]}, which is not beside it")
        except Exception as error:  # whatever comes of bytes that nobody wrote
            raise UserError(_damaged(self.path, error)) from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Description(pickle.Unpickler):
    """Unpickles where the tensors of a checkpoint are, and nothing that could run."""

    known = frozenset(
        {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
        | {("pathlib", "WindowsPath"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
                *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if (module, name) in self.known else None
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            found = dtype
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return found


class _Writer(DefaultSavePlanner):
    """Plans to write each box once, whichever ranks hold it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.found: dict[tuple[str, torch.Size], Tensor] = {}
        items = []
        for name, held in self.state_dict.items():
            for box in held:
                if box.local.numel() == 0:  # fewer rows than ranks
                    continue
                at = torch.Size(box.offsets)
                value = box.local.detach()
                self.found[name, at] = value
                items.append(
                    WriteItem(
                        index=MetadataIndex(name, at),
                        type=WriteItemType.SHARD,
                        tensor_data=TensorWriteData(
                            chunk=ChunkStorageMetadata(offsets=at, sizes=value.shape),
                            properties=TensorProperties.create_from_tensor(value),
                            size=box.size,
                        ),
                    )
                )
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.found[index.fqn, index.offset]


class _Reader(DefaultLoadPlanner):
    """Plans to read what overlaps with this rank's boxes."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[Any] = []
        self.found: dict[tuple[str, torch.Size], Tensor] = {}
        for name, held in self.state_dict.items():
            stored: Any = self.metadata.state_dict_metadata[name]
            chunks = []
            for box in held:
                if box.size != stored.size:
                    raise UserError(
                        f"the checkpoint's {name} is {tuple(stored.size)}, the model's "
                        f"{tuple(box.size)}: give the model and the adapter that it was made with"
                    )
                if box.local.numel():
                    at = torch.Size(box.offsets)
                    self.found[name, at] = box.local.detach()
                    chunks.append(ChunkStorageMetadata(offsets=at, sizes=box.local.shape))
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.found[index.fqn, index.offset]


def _read(held: Tensors, source: Path | dict[str, Tensor]) -> None:
    if isinstance(source, Path):
        # no communication: each rank knows what it needs
        reader = _Files(source)
        try:
            dcp.load(held, storage_reader=reader, planner=_Reader(), no_dist=True)
        except CheckpointException as error:  # of all ranks, each with its own reason
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, UserError):
                raise cause from error
            raise UserError(_damaged(source, cause)) from error
        return
    for name, some in held.items():
        for box in some:
            box.local.detach().copy_(source[name][box.region])


def _prepared(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> Tensors:
    """The boxes of an optimizer whose groups and scalars are set, and whose tensors wait for their
    values."""
    if len(state["groups"]) != len(optimizer.param_groups):
        raise UserError(
            f"the checkpoint's optimizer has {len(state['groups'])} groups of parameters and this "
            f"one {len(optimizer.param_groups)}: give the adapter that it was made with"
        )
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({k: v for k, v in saved.items() if k != "names"})
    keys = state["keys"]
    held: Tensors = {}
    for name, found in boxes(module, _trained):
        for p, box in found:
            mine = {key: torch.zeros_like(p) for key in keys}
            optimizer.state[p] = mine | {
                # on the device where a fused step wants it
                k: v.to(local(p).device, copy=True) if isinstance(v, Tensor) else v
                for k, v in state["scalars"].get(name, {}).items()
            }
            for key, value in mine.items():
                held.setdefault(_state_name(name, key), []).append(box._replace(local=local(value)))
    return held


def _by_name(state: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """torch's state of an optimizer by name: groups and scalars, and the tensors."""
    scalars: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    keys: list[str] = []
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim():
                tensors[_state_name(names[i], key)] = value
                keys.append(key)
            else:
                scalars.setdefault(names[i], {})[key] = value
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        | {"names": [names[i] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    named = {"scalars": scalars, "groups": groups, "keys": list(dict.fromkeys(keys))}
    return named, tensors


def _trained(p: nn.Parameter) -> nn.Parameter | None:
    return p if p.requires_grad else None


def _state_name(name: str, key: str) -> str:
    return f"optimizer.{name}.{key}"


def _barrier(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group)


def _write_meta(meta: dict[str, Any], folder: Path) -> None:
    temporary = folder / f"{META}{TEMPORARY}"
    with temporary.open("wb") as file:
        torch.save(meta, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / META)
    _sync(folder)


def _checksums(folder: Path) -> dict[str, int]:
    """Of every file but the last one, a few at a time."""
    files = sorted(f for f in folder.iterdir() if not f.name.startswith(META))
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(_checksum, files))
    return {file.name: s for file, s in zip(files, sums, strict=True)}


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _damaged(path: Any, error: BaseException) -> str:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{path} is damaged or no checkpoint of mamba2-train ({reason}): take another"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
