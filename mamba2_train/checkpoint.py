"""Checkpoints in and out: Hugging Face's, state-spaces' and Mistral's layouts (`layouts.py`).

Reading maps the files and fills a model on the meta device, file by file, so that memory peaks at
the model, quantized if that was asked for, and one file.
Writing goes to a new folder that then takes the old one's place, so that a crash or a full disk
leaves what was there.
"""

import contextlib
import fnmatch
import json
import logging
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mamba2_train.checksums import check_finite, check_tensor, facts_of, write_tensors
from mamba2_train.errors import UserError, nearest
from mamba2_train.layouts import (
    CONFIG_FILE,
    HUGGINGFACE,
    MISTRAL,
    WEIGHT_FILES,
    WRITABLE,
    config_from,
    config_to,
    layout_of,
    our_name,
    their_name,
)
from mamba2_train.model import Mamba2Config, Mamba2LM
from mamba2_train.quantization import Quantization, is_quantized, quantize

logger = logging.getLogger(__name__)

# what a save takes out of an existing checkpoint; all other files stay
_REPLACED = (
    "config.json",
    "params.json",
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "consolidated*.safetensors",
)
_HEAD, _EMBEDDINGS = "lm_head.weight", "backbone.embeddings.weight"
_FLOAT32 = ("A_log", "D", "dt_bias")  # in bf16 neighbouring decay rates collapse into one


def load_config(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Mamba2Config:
    """A model's shape, without its weights; arguments and errors as in `load_pretrained`."""
    folder = _fetch(path_or_id, revision, CONFIG_FILE.values())
    _, config = next(_configs(folder))
    return config


def load_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
) -> Mamba2LM:
    """Read a model in any of the three layouts.

    Files are mapped, and each tensor is copied (or quantized) once, to where it goes; a file's
    memory is given back before the next one is touched.

    Args:
        path_or_id: a folder, or a model on the Hugging Face hub (`owner/name`), of which only the
            files that are needed are downloaded.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, norms included; None keeps what is stored. A_log, D and dt_bias are
            never narrower than float32, whatever is asked for or stored.
        device: where the weights go; None is the CPU.
        quantization: of in_proj and out_proj, "nf4", "fp4" or "int8", from the weights as stored;
            the model computes in `dtype` and they are frozen.

    Raises:
        UserError: nothing there, a model that is not Mamba2, weights that do not fit its config,
            or a damaged file (see `checksums.py` for what of it can be told).
    """
    config, stored, origins = _stored(path_or_id, revision)
    with torch.device("meta"):
        model = Mamba2LM(config)
    weights = {}
    for name in list(stored):  # file by file
        tensor = stored.pop(name)
        check_tensor(*origins[name].named(tensor))
        wanted = dtype or tensor.dtype
        if quantization is not None and is_quantized(name):
            quantize(model, name, tensor, quantization, dtype=wanted, device=device)
            continue
        wanted = kept_dtype(name, wanted)
        # a copy even where nothing changes: aligned, and independent of the file
        dense = torch.contiguous_format
        weights[name] = tensor.to(device or "cpu", wanted, copy=True, memory_format=dense)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model


class StoredWeights:
    """The weights of a checkpoint by our names, of which parts are read when they are asked for.

    A file is mapped for the time of a read, so that no more of it than one tensor is in memory.
    """

    def __init__(self, path_or_id: str | os.PathLike[str], revision: str | None = None) -> None:
        """Arguments and errors as in `load_pretrained`."""
        self.config, stored, self._origins = _stored(path_or_id, revision)
        self.dtypes = {name: tensor.dtype for name, tensor in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.dtypes

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """A copy of a part of a tensor, on the CPU, in the dtype in which it is stored.

        A checksum is of the whole, so a part is only seen to be finite.
        """
        file, theirs, _ = self._origins[name]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                part = tensors.get_slice(theirs)[region].clone()
        else:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
            part = part[theirs][region].clone()
        check_finite(theirs, part, file)
        return part


class _Origin(NamedTuple):
    """Where a tensor is stored, under which name, and what its file says about itself."""

    file: Path
    name: str
    facts: dict[str, Any]

    def named(self, tensor: Tensor) -> tuple[str, Tensor, Path, dict[str, Any]]:
        return self.name, tensor, self.file, self.facts


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """In which a weight is kept where `dtype` is asked for."""
    if name.rpartition(".")[2] in _FLOAT32:
        return torch.promote_types(dtype, torch.float32)
    return dtype


def save_pretrained(
    model: Mamba2LM,
    path: str | os.PathLike[str],
    layout: str = HUGGINGFACE,
    *,
    max_shard_size: int | str = "5GB",
    token_ids: Mapping[str, int | list[int] | None] | None = None,
) -> None:
    """Write a model into the folder `path`, all of it or nothing.

    Args:
        path: new, empty, or a checkpoint. A checkpoint's config and weights are replaced; its
            other files, such as a tokenizer, stay.
        layout: "huggingface", which transformers loads as Mamba2ForCausalLM, or "state-spaces",
            which mamba_ssm loads.
        max_shard_size: in bytes, or as "200KB", "5GB"; a larger model is split into several
            files. state-spaces' layout has one file at any size.
        token_ids: {"bos": ..., "eos": ..., "pad": ...} for Hugging Face's config.

    Raises:
        UserError: a model that the layout cannot hold, a folder of something else, a full disk.
    """
    if layout not in WRITABLE:
        raise UserError(
            f"layout {layout!r} cannot be written; choose {' or '.join(WRITABLE)}."
            f"{nearest(layout, WRITABLE)}"
        )
    path = Path(path).expanduser().resolve()
    tensors = _weights_of(model)
    dtype = str(tensors[_EMBEDDINGS].dtype).removeprefix("torch.")
    config = config_to(model.config, layout, dtype=dtype, token_ids=token_ids or {})
    if layout == HUGGINGFACE and model.config.tie_embeddings:
        del tensors[_HEAD]
    tensors = {their_name(name, layout): tensor for name, tensor in tensors.items()}
    try:
        with replacing(path) as folder:
            _write_json(config, folder / CONFIG_FILE[layout])
            if layout == HUGGINGFACE:
                _write_shards(tensors, folder, max_shard_size, asdict(model.config))
            else:
                with (folder / "pytorch_model.bin").open("wb") as file:
                    torch.save(tensors, file)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch hides the system's reason behind its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        size = sum(t.nbytes for t in tensors.values()) / 1e9
        raise UserError(
            f"cannot write {path}: {_line(reason)}. What was there is untouched; choose a folder "
            f"that may be written to, with {size:.3f} GB free"
        ) from error


def _fetch(path_or_id: str | os.PathLike[str], revision: str | None, files: Iterable[str]) -> Path:
    """The folder that holds those of `files` that exist, downloaded if it is on the hub."""
    name = os.fspath(path_or_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} is for models on the hub; {name} is a folder")
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; give the folder that holds it and its config")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"no folder {name!r}; give one that exists, or owner/name on the hub")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        at = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
        raise UserError(f"{at} {_hub_reason(error, name)}") from error


def _hub_reason(error: Exception, name: str) -> str:
    if isinstance(error, hub.GatedRepoError):
        return "may be downloaded with consent only; give it on its page, then `hf auth login`"
    if isinstance(error, hub.RevisionNotFoundError):
        return "does not exist on the hub; choose a revision from the model's page"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "is neither a folder nor on the hub; check it, or `hf auth login` if it is private"
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        return (
            f"is neither a folder nor in the hub's cache, and the hub cannot be reached; check "
            f"the path, or run `hf download {name}` where there is a network"
        )
    return f"could not be downloaded: {_line(error)}"


def _configs(folder: Path) -> Iterator[tuple[str, Mamba2Config]]:
    """(layout, config) of those that are there: Codestral's repository holds two."""
    found = []
    if (file := folder / CONFIG_FILE[HUGGINGFACE]).is_file():
        values = _read_json(file)
        if (layout := layout_of(values)) is None:
            raise UserError(
                f"{file} describes no Mamba2 model: it has neither model_type (Hugging Face) nor "
                f"d_model (state-spaces); give the folder of a Mamba2 checkpoint"
            )
        found.append((layout, values, file))
    if (file := folder / CONFIG_FILE[MISTRAL]).is_file():
        found.append((MISTRAL, _read_json(file), file))
    if not found:
        raise UserError(
            f"{folder} holds neither config.json nor params.json; give the folder of a checkpoint"
        )
    for layout, values, file in found:
        yield layout, config_from(values, layout, file)


def _find(
    path_or_id: str | os.PathLike[str], revision: str | None
) -> tuple[Path, Mamba2Config, list[Path]]:
    """Folder, config and weight files; what is not built is refused before its weights load."""
    folder = _fetch(path_or_id, revision, CONFIG_FILE.values())
    on_hub = not Path(path_or_id).expanduser().is_dir()

    def present(names: Iterable[str]) -> list[Path]:
        if on_hub:  # at the config's own commit: a branch may have moved since
            _fetch(path_or_id, folder.name, names)
        return [folder / name for name in names if (folder / name).is_file()]

    looked_for: list[str] = []
    for layout, config in _configs(folder):
        for name in WEIGHT_FILES[layout]:
            looked_for.append(name)
            if not (files := present([name])):
                continue
            if name.endswith(".index.json"):
                shards = _shards(files[0])
                files = present(shards)
                if missing := sorted(set(shards) - {file.name for file in files}):
                    raise UserError(f"{folder} lacks {_first(missing)}; download it again")
                for file in files:
                    _check_inside(folder, file)
            return folder, config, files
    raise UserError(f"{folder} holds no weights; expected one of {', '.join(looked_for)}")


def _shards(index: Path) -> list[str]:
    """The files that an index names, which are beside it."""
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index} has no weight_map of tensors to files; download it again")
    shards = sorted(set(table.values()))
    for name in shards:
        if not re.fullmatch(r"\w[\w. +-]*", name):
            raise UserError(
                f"{index} names {name!r}, and the files of a model are beside its index: do not "
                "use it, or correct the name"
            )
    return shards


def _check_inside(folder: Path, file: Path) -> None:
    """Refuse a link to outside of the folder; the hub's cache keeps what its links lead to in
    `blobs`."""
    target, blobs = file.resolve(), folder.resolve().parent.parent / "blobs"
    if target.parent not in (folder.resolve(), blobs):
        raise UserError(
            f"{file} is a link to {target}, outside of the model's folder: give that folder, or "
            "copy the file"
        )


def _stored(
    path_or_id: str | os.PathLike[str], revision: str | None
) -> tuple[Mamba2Config, dict[str, Tensor], dict[str, _Origin]]:
    """Config and mapped weights, by our names, which fit it, and where each of them is."""
    folder, config, files = _find(path_or_id, revision)
    stored: dict[str, Tensor] = {}
    origins: dict[str, _Origin] = {}
    for file in files:
        facts = _facts(file)
        for name, tensor in read_tensors(file).items():
            ours = our_name(name)
            if ours in stored:
                raise UserError(
                    f"{name} is in {file.name} and as {origins[ours].name} in "
                    f"{origins[ours].file.name} of {folder}: download the model again"
                )
            stored[ours], origins[ours] = tensor, _Origin(file, name, facts)
        _tell_config(facts.get("config"), config, folder)
    if config.tie_embeddings:
        _drop_tied_head(stored, folder)
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Mamba2LM(config).named_parameters()}
    if misfit := _misfit(expected, stored):
        raise UserError(
            f"{folder}: the weights do not fit the config: {misfit}; check that both belong to "
            f"the same model"
        )
    return config, stored, origins


def _facts(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    try:
        return facts_of(file)
    except (SafetensorError, OSError):  # `read_tensors` says what is wrong
        return {}


def _tell_config(saved: Any, config: Mamba2Config, folder: Path) -> None:
    """Say so if a config was changed since its weights were saved: some settings leave every shape
    as it was. It may be on purpose."""
    now = json.loads(json.dumps(asdict(config)))  # tuples become lists
    if not isinstance(saved, dict) or saved == now:
        return
    changed = [f"{k}={now.get(k)} (was {saved.get(k)})" for k in now if now[k] != saved.get(k)]
    logger.warning(
        "%s: its config has %s since the weights were saved; unless that was meant, put it back",
        *(folder, ", ".join(changed)),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a JSON {type(values).__name__}, not an object")
    return values


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or torch's, mapped into memory rather than read.

    Raises:
        UserError: it is damaged or anything else, a pickle of more than tensors included, of which
            nothing is run.
    """
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        mmap = _is_zip(file)
        if mmap:
            # torch does not look at the checksums of its own format; a bit would be another weight
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} differs")
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever is made of bytes that nobody wrote
        with file.open("rb") as start:
            if start.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{file} is a git-lfs pointer; run `git lfs pull`") from error
        raise UserError(
            f"{file} is damaged, cut off or no file of tensors ({_line(error)}); download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise UserError(f"{file} is no dictionary of tensors; give a folder of model weights")
    return tensors


def _is_zip(file: Path) -> bool:
    """torch's format since 1.6, which has checksums and can be mapped."""
    return zipfile.is_zipfile(file)


def _drop_tied_head(stored: dict[str, Tensor], folder: Path) -> None:
    head, embeddings = stored.pop(_HEAD, None), stored.get(_EMBEDDINGS)
    if head is None or embeddings is None:
        return
    if head.shape != embeddings.shape or not torch.equal(head, embeddings.to(head.dtype)):
        raise UserError(
            f"{folder}: the config ties {_HEAD} to the embeddings, but the two differ; "
            f"set tie_word_embeddings (or tie_embeddings) to false there"
        )


def _misfit(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> str:
    """What keeps `found` from being `expected`, or an empty string."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "mis-shaped": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
    }
    return "; ".join(f"{len(v)} {kind}: {_first(v)}" for kind, v in problems.items() if v)


def _weights_of(model: Mamba2LM) -> dict[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Mamba2LM(model.config).state_dict().items()}
    if misfit := _misfit(expected, tensors):
        raise UserError(
            f"not a plain Mamba2 model ({misfit}); merge the adapter and undo the quantization "
            f"before saving"
        )
    if model.config.tie_embeddings and tensors[_HEAD].data_ptr() != tensors[_EMBEDDINGS].data_ptr():
        raise UserError(
            "the config ties lm_head to the embeddings, but they are two tensors; call "
            "tie_weights(), or give the model a config with tie_embeddings=False"
        )
    return tensors


def _write_json(values: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str, config: dict[str, Any]
) -> None:
    try:
        split = huggingface_hub.split_torch_state_dict_into_shards(
            tensors, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UserError(
            f"max_shard_size is {max_shard_size!r}; give bytes, or a size such as 200KB or 5GB"
        ) from error
    for file, names in split.filename_to_tensors.items():
        write_tensors({name: tensors[name] for name in names}, folder / file, config=config)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(index, folder / "model.safetensors.index.json")


@contextlib.contextmanager
def replacing(path: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside `path` that takes its place once all went well.

    Args:
        force: also that of a folder that holds no checkpoint. What the new one does not have and is
            no part of a checkpoint stays.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose a folder to save into")
    old = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if old and not force and not {"config.json", "params.json"} & set(old):
        raise UserError(f"{path} holds something else ({_first(old)}); choose an empty folder")
    mark = uuid.uuid4().hex[:8]
    new, aside = (path.with_name(f".{path.name}.{role}-{mark}") for role in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        for name in old:
            replaced = any(fnmatch.fnmatch(name, pattern) for pattern in _REPLACED)
            if not replaced and not (new / name).exists():
                _link(path / name, new / name)
        if old:
            path.rename(aside)
        try:
            new.rename(path)  # an empty folder gives way
        except OSError:
            if old:
                aside.rename(path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """The same file or folder at `target`, without a copy where the file system can."""

    def one(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=one)
    else:
        one(str(source), str(target))


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
