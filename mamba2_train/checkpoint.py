"""Checkpoints in and out, in the layouts that Mamba2 models are published in.

    layout        config        weights                                      names
    huggingface   config.json   model.safetensors or pytorch_model.bin,      ours
                                or shards of either with an index
    state-spaces  config.json   pytorch_model.bin                            backbone.embedding
    mistral       params.json   consolidated.safetensors                     model.backbone.embedding

Each layout is one table below: what our fields are called there, what it may ask for that we do
not build, and where its weights lie. The tables serve both directions; Mistral's is only read.
"""

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from torch import Tensor

from mamba2_train.errors import UserError, nearest
from mamba2_train.model import Mamba2Config, Mamba2LM

_HEAD, _EMBEDDINGS = "lm_head.weight", "backbone.embeddings.weight"
_FLOAT32 = ("A_log", "D", "dt_bias")  # in bf16 neighbouring decay rates collapse into one
_REQUIRED: Any = object()


@dataclass(frozen=True)
class _Layout:
    """How one publisher writes a model down. Dots in a name descend into nested objects."""

    config_file: str
    weight_files: tuple[str, ...]  # the first that exists is read
    fields: dict[str, tuple[str, Any]]  # our field -> (their name, its value when absent)
    demands: dict[str, tuple[Any, tuple[Any, ...], str]]  # name -> (if absent, accepted, refusal)
    constants: dict[str, Any] = field(default_factory=dict)  # what is written beside the fields
    # the vocabulary is padded to a multiple of this when the model is built
    pad_vocab: tuple[str, int] | None = None
    known: dict[str, frozenset[str]] = field(default_factory=dict)  # harmless keys of an object


_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NO_LAYER_NORM = (True, (True,), "it uses LayerNorm; only RMSNorm is built")
_NO_MIXER = "its mixer differs from the published models'; no such variant is built"

LAYOUTS: dict[str, _Layout] = {
    "huggingface": _Layout(
        config_file="config.json",
        weight_files=_WEIGHT_FILES,
        fields={
            "d_model": ("hidden_size", _REQUIRED),
            "n_layers": ("num_hidden_layers", _REQUIRED),
            "vocab_size": ("vocab_size", _REQUIRED),
            "d_state": ("state_size", 128),
            "d_conv": ("conv_kernel", 4),
            "expand": ("expand", 2),
            "headdim": ("head_dim", 64),
            "n_groups": ("n_groups", 8),
            "chunk_size": ("chunk_size", 256),
            "dt_limit": ("time_step_limit", (0.0, math.inf)),
            "norm_eps": ("layer_norm_epsilon", 1e-5),
            "residual_in_fp32": ("residual_in_fp32", True),
            "tie_embeddings": ("tie_word_embeddings", False),
            "use_bias": ("use_bias", False),
            "use_conv_bias": ("use_conv_bias", True),
        },
        demands={
            "model_type": (
                None,
                ("mamba2",),
                "only mamba2 is built (no Mamba1, no hybrid, no transformer); "
                "choose a Mamba2 checkpoint",
            ),
            "hidden_act": ("silu", ("silu", "swish"), "only silu is built"),
            "quantization_config": (
                None,
                (None,),
                "its weights are quantized already; load the original and quantize that",
            ),
        },
        constants={
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_act": "silu",
            "use_cache": True,
        },
    ),
    "state-spaces": _Layout(
        config_file="config.json",
        weight_files=_WEIGHT_FILES,
        fields={
            "d_model": ("d_model", _REQUIRED),
            "n_layers": ("n_layer", _REQUIRED),
            "vocab_size": ("vocab_size", _REQUIRED),
            "d_state": ("ssm_cfg.d_state", 128),
            "d_conv": ("ssm_cfg.d_conv", 4),
            "expand": ("ssm_cfg.expand", 2),
            "headdim": ("ssm_cfg.headdim", 64),
            "n_groups": ("ssm_cfg.ngroups", 1),
            "chunk_size": ("ssm_cfg.chunk_size", 256),
            "dt_limit": ("ssm_cfg.dt_limit", (0.0, math.inf)),
            "use_bias": ("ssm_cfg.bias", False),
            "use_conv_bias": ("ssm_cfg.conv_bias", True),
            "residual_in_fp32": ("residual_in_fp32", True),
            "tie_embeddings": ("tie_embeddings", True),
        },
        demands={
            "ssm_cfg.layer": (
                "Mamba1",
                ("Mamba2",),
                "its layers are not Mamba2; choose a mamba2 checkpoint",
            ),
            "attn_layer_idx": ([], ([], None), "a hybrid with attention layers is not built"),
            "d_intermediate": (0, (0,), "a hybrid with MLP layers is not built"),
            "rms_norm": _NO_LAYER_NORM,
            "ssm_cfg.D_has_hdim": (False, (False,), _NO_MIXER),
            "ssm_cfg.norm_before_gate": (False, (False,), _NO_MIXER),
            "ssm_cfg.rmsnorm": (True, (True,), _NO_MIXER),
            "ssm_cfg.d_ssm": (None, (None,), _NO_MIXER),
        },
        constants={
            "ssm_cfg.layer": "Mamba2",
            "d_intermediate": 0,
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 1,
        },
        pad_vocab=("pad_vocab_size_multiple", 8),
        known={
            "ssm_cfg": frozenset(  # these only draw fresh weights or choose a kernel
                "conv_init A_init_range dt_min dt_max dt_init_floor use_mem_eff_path".split()
            )
        },
    ),
    "mistral": _Layout(
        config_file="params.json",
        weight_files=("consolidated.safetensors",),
        fields={
            "d_model": ("dim", _REQUIRED),
            "n_layers": ("n_layers", _REQUIRED),
            "vocab_size": ("vocab_size", _REQUIRED),
            "n_groups": ("n_groups", _REQUIRED),
            "residual_in_fp32": ("residual_in_fp32", _REQUIRED),
            "tie_embeddings": ("tie_embeddings", _REQUIRED),
        },
        demands={
            "model_type": ("mamba", ("mamba",), "only Mamba2 is built (Mistral's 'mamba')"),
            "n_heads": (None, (None,), "attention heads make it a transformer; choose Mamba2"),
            "rms_norm": _NO_LAYER_NORM,
        },
        pad_vocab=("pad_vocab_size_multiple", 1),
    ),
}
WRITABLE = ("huggingface", "state-spaces")
# what a save replaces in an existing checkpoint; all other files stay
_OURS = (
    "config.json",
    "params.json",
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "consolidated*",
)


def load_config(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> Mamba2Config:
    """The shape of a model, without its weights. Arguments and errors as in `load_pretrained`."""
    return _open(path_or_id, revision)[2]


def load_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Mamba2LM:
    """Read a model in any of the three layouts.

    Args:
        path_or_id: a folder, or a model on the Hugging Face hub (`owner/name`), of which only the
            files that are needed are downloaded.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; None keeps what is stored. A_log, D and dt_bias are never narrower
            than float32, whatever is asked or stored.
        device: where the weights go, one tensor at a time; None is the CPU.

    Memory peaks at one model: files are mapped, and each tensor is copied once.

    Raises:
        UserError: nothing there, a model that is not Mamba2, or weights that do not fit its config.
    """
    folder, layout, config, files = _open(path_or_id, revision, weights=True)
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= {_our_name(name): tensor for name, tensor in _mapped(file).items()}
    with torch.device("meta"):
        model = Mamba2LM(config)
    if config.tie_embeddings:
        _drop_tied_head(stored, folder)
    expected = _shapes(model)
    if misfit := _misfit(expected, stored):
        raise UserError(
            f"{folder}: the weights do not fit {layout.config_file}: {misfit}; "
            f"check that both belong to the same model"
        )
    weights = {}
    for name in expected:
        tensor = stored.pop(name)
        target = dtype or tensor.dtype
        if name.rpartition(".")[2] in _FLOAT32:
            target = torch.promote_types(target, torch.float32)
        # a copy even where nothing changes: aligned, and independent of the file
        weights[name] = tensor.to(
            device or "cpu", target, copy=True, memory_format=torch.contiguous_format
        )
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model


def save_pretrained(
    model: Mamba2LM,
    path: str | os.PathLike[str],
    layout: str = "huggingface",
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
        max_shard_size: bytes, or "200KB", "5GB"; a larger model is split. Hugging Face only: the
            other layout has one file.
        token_ids: {"bos": ..., "eos": ..., "pad": ...} for Hugging Face's config; null where not
            given.

    Raises:
        UserError: a model this layout cannot hold, a folder that holds something else, a full disk.
    """
    path = Path(path).expanduser().resolve()
    if layout not in WRITABLE:
        raise UserError(
            f"layout {layout!r} is not one that is written; choose one of "
            f"{', '.join(WRITABLE)}.{nearest(layout, WRITABLE)}"
        )
    tensors = _to_write(model)
    text = _config_text(model, layout, token_ids or {})
    if layout == "huggingface" and model.config.tie_embeddings:
        del tensors[_HEAD]
    try:
        with _replacing(path) as folder:
            (folder / LAYOUTS[layout].config_file).write_text(text)
            if layout == "huggingface":
                _write_shards(tensors, folder, max_shard_size)
            else:
                torch.save(tensors, folder / "pytorch_model.bin")
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch wrap the system's error in their own
        raise UserError(
            f"cannot write the checkpoint {path}: {error}; nothing was left behind. "
            f"Free space there (it needs {_gigabytes(tensors):.2f} GB) or choose another folder"
        ) from error


# Finding a checkpoint


def _open(
    path_or_id: str | os.PathLike[str], revision: str | None, *, weights: bool = False
) -> tuple[Path, _Layout, Mamba2Config, list[Path]]:
    folder = _fetch(path_or_id, revision, ["config.json", "params.json"])
    candidates = _candidates(folder)
    tried: list[str] = []
    for layout, values in candidates:
        # the config's own commit: a branch may move between two downloads
        files = _weight_files(path_or_id, folder, layout) if weights else []
        if files or not weights:
            return folder, layout, _config(layout, values, folder / layout.config_file), files
        tried += layout.weight_files
    layout, values = candidates[0]
    _config(layout, values, folder / layout.config_file)  # a model we refuse, if it is one
    raise UserError(f"{folder} holds a config but no weights; expected one of {', '.join(tried)}")


def _fetch(path_or_id: str | os.PathLike[str], revision: str | None, patterns: list[str]) -> Path:
    """The folder that holds the files `patterns`, downloaded if `path_or_id` is on the hub."""
    name = os.fspath(path_or_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} is for models on the hub; {name} is a folder")
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; give the folder that holds it and its config")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"there is no folder {name!r}; give an existing folder, or a model on the hub as "
            f"owner/name"
        )
    at = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except hub_errors.GatedRepoError as error:
        cure = "its owner asks for consent: accept on its page, then `hf auth login`"
        raise UserError(f"{at} may not be downloaded; {cure}") from error
    except hub_errors.RevisionNotFoundError as error:
        raise UserError(f"{at} does not exist; check the revision on its page") from error
    except hub_errors.RepositoryNotFoundError as error:
        cure = "check the spelling; for a private model `hf auth login`"
        raise UserError(f"{at} is neither a folder here nor a model on the hub; {cure}") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{at} is neither a folder here nor in the hub's local cache, and the hub cannot be "
            f"reached; check the path, or run `hf download {name}` with a network"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{at} could not be downloaded: {reason}") from error


def _candidates(folder: Path) -> list[tuple[_Layout, dict[str, Any]]]:
    """The layouts whose config is there; Codestral's repository holds two."""
    found = []
    if (file := folder / "config.json").is_file():
        values = _json(file)
        if not values.get("model_type") and not {"d_model", "ssm_cfg"} & set(values):
            raise UserError(
                f"{file} describes no Mamba2 model: it has neither model_type (Hugging Face) nor "
                f"d_model and ssm_cfg (state-spaces)"
            )
        name = "huggingface" if values.get("model_type") else "state-spaces"
        found.append((LAYOUTS[name], values))
    if (file := folder / "params.json").is_file():
        found.append((LAYOUTS["mistral"], _json(file)))
    if not found:
        raise UserError(f"{folder} holds neither config.json nor params.json; is it a checkpoint?")
    return found


def _weight_files(path_or_id: str | os.PathLike[str], folder: Path, layout: _Layout) -> list[Path]:
    def fetch(names: list[str]) -> None:
        if not Path(path_or_id).expanduser().is_dir():
            _fetch(path_or_id, folder.name, names)

    for name in layout.weight_files:
        fetch([name])
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = _json(file).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{file} has no weight_map; download it again")
        names = sorted(set(shards.values()))
        fetch(names)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{file} names shards that are not there: {_first(missing)}")
        return [folder / name for name in names]
    return []


# Reading


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not an object; download it again")
    return values


def _config(layout: _Layout, values: dict[str, Any], file: Path) -> Mamba2Config:
    for name, (absent, accepted, reason) in layout.demands.items():
        value = _get(values, name, absent)
        if value not in accepted:
            raise UserError(f"{file}: {name} is {value!r}: {reason}")
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Mamba2Config)}
    shape = {}
    for ours, (theirs, absent) in layout.fields.items():
        value = _get(values, theirs, absent)
        if value is _REQUIRED:
            raise UserError(f"{file}: {theirs} is missing; a Mamba2 config needs it")
        if ours == "dt_limit":
            value = _limit(value, f"{file}: {theirs}")
        elif kinds[ours] is float and type(value) is int:
            value = float(value)
        elif type(value) is not kinds[ours]:
            raise UserError(f"{file}: {theirs} is {value!r}; expected {kinds[ours].__name__}")
        shape[ours] = value
    for part, harmless in layout.known.items():
        ours_too = {theirs.partition(".")[2] for theirs in _names_of(layout)}
        if unknown := sorted(set(_get(values, part, {})) - ours_too - harmless):
            raise UserError(
                f"{file}: {part} has {_first(unknown)}, whose meaning is not known here"
            )
    if layout.pad_vocab is not None:
        multiple = _get(values, *layout.pad_vocab)
        if type(multiple) is not int or multiple < 1:
            raise UserError(f"{file}: {layout.pad_vocab[0]} is {multiple!r}; expected 1 or more")
        shape["vocab_size"] = -(-shape["vocab_size"] // multiple) * multiple
    try:
        config = Mamba2Config(**shape)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if (
        layout is LAYOUTS["huggingface"]
        and values.get("num_heads", config.n_heads) != config.n_heads
    ):
        raise UserError(
            f"{file}: num_heads is {values['num_heads']}, but expand * hidden_size / head_dim is "
            f"{config.n_heads}; correct the one that is wrong"
        )
    return config


def _limit(value: Any, where: str) -> tuple[float, float]:
    """Bounds as JSON holds them: Infinity, "Infinity", null or transformers' {"__float__": ...}."""
    try:
        low, high = (v["__float__"] if isinstance(v, dict) else v for v in value)
        limit = float(low or 0.0), math.inf if high is None else float(high)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where} is {value!r}; expected two numbers [low, high]") from error
    if not 0.0 <= limit[0] <= limit[1]:
        raise UserError(f"{where} is {value!r}; expected 0 <= low <= high")
    return limit


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory rather than read."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        tensors = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds more than tensors and is not opened for safety; "
            f"download it again, or ask for safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        with file.open("rb") as start:
            if start.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{file} is a git-lfs pointer; run `git lfs pull`") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is damaged or cut off ({reason}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file} holds something else than a dictionary of tensors")
    return tensors


def _our_name(name: str) -> str:
    name = name.removeprefix("model.")  # Mistral's
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def _drop_tied_head(stored: dict[str, Tensor], folder: Path) -> None:
    head, embeddings = stored.pop(_HEAD, None), stored.get(_EMBEDDINGS)
    if head is None or embeddings is None:
        return
    if head.shape != embeddings.shape or not torch.equal(head, embeddings.to(head.dtype)):
        raise UserError(
            f"{folder}: the config ties lm_head to the embeddings, but their weights differ; "
            f"if the model was trained untied, set tie_word_embeddings (tie_embeddings) to false"
        )


def _shapes(model: Mamba2LM) -> dict[str, torch.Size]:
    """Every parameter once: a tied head counts as the embeddings."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _misfit(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> str:
    """What keeps `found` from being `expected`, or an empty string."""
    shapes = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(v)} {kind}: {_first(v)}" for kind, v in problems.items() if v)


# Writing


def _to_write(model: Mamba2LM) -> dict[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Mamba2LM(model.config).state_dict().items()}
    if misfit := _misfit(expected, tensors):
        raise UserError(
            f"this model is not a plain Mamba2LM any more ({misfit}); merge its adapter and undo "
            f"its quantization before saving"
        )
    head, embeddings = tensors[_HEAD], tensors[_EMBEDDINGS]
    if model.config.tie_embeddings and head.data_ptr() != embeddings.data_ptr():
        if not torch.equal(head, embeddings):
            raise UserError(
                "the config ties lm_head to the embeddings, but their weights differ; "
                "give the model a config with tie_embeddings=False"
            )
        tensors[_HEAD] = embeddings
    return tensors


def _config_text(
    model: Mamba2LM, layout: str, token_ids: Mapping[str, int | list[int] | None]
) -> str:
    table, values = LAYOUTS[layout], {}
    for f in dataclasses.fields(Mamba2Config):
        value = getattr(model.config, f.name)
        theirs, absent = table.fields.get(f.name, (None, f.default))
        if theirs is None and value != absent:
            raise UserError(
                f"the {layout} layout cannot say {f.name} = {value}; save as huggingface"
            )
        if theirs is not None and not ("." in theirs and value == absent):  # overrides only
            _set(values, theirs, value)
    for name, value in table.constants.items():
        _set(values, name, value)
    if layout == "huggingface":
        values["num_heads"] = model.config.n_heads
        values["torch_dtype"] = str(model.backbone.embeddings.weight.dtype).removeprefix("torch.")
        if unknown := set(token_ids) - {"bos", "eos", "pad"}:
            raise ValueError(f"token_ids has {unknown}; its names are bos, eos and pad")
        # null rather than absent: transformers would fill in 0, 2 and 1
        values |= {f"{name}_token_id": token_ids.get(name) for name in ("bos", "eos", "pad")}
    return json.dumps(values, indent=2) + "\n"


def _write_shards(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    try:
        split = huggingface_hub.split_torch_state_dict_into_shards(
            tensors, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UserError(
            f"max_shard_size is {max_shard_size!r}; give bytes, or a size such as 200KB or 5GB"
        ) from error
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place if all goes well, else leaves no trace."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose a folder to save into")
    old = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if old and not {"config.json", "params.json"} & set(old):
        raise UserError(
            f"{path} holds something else than a checkpoint ({_first(old)}); choose an empty folder"
        )
    mark = uuid.uuid4().hex[:8]
    new, aside = (path.with_name(f".{path.name}.{role}-{mark}") for role in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        if old:
            shutil.copytree(
                path,
                new,
                symlinks=True,
                ignore=lambda folder, names: _replaced(names) if folder == str(path) else [],
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
            )
            path.rename(aside)
            try:
                new.rename(path)
            except OSError:
                aside.rename(path)
                raise
        else:
            new.rename(path)  # takes the place of an empty folder too
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _replaced(names: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in _OURS)]


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _gigabytes(tensors: Mapping[str, Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e9


def _get(values: dict[str, Any], name: str, absent: Any) -> Any:
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return absent
        values = values[part]
    return values


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for part in parents:
        values = values.setdefault(part, {})
    values[last] = value


def _names_of(layout: _Layout) -> Iterable[str]:
    return [theirs for theirs, _ in layout.fields.values()] + list(layout.demands)


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
