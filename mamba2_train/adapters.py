"""What of a model is trained: LoRA through peft, small parameters in full, all but what is frozen.

    W + alpha / r * B A        LoRA (Hu et al. 2021, arXiv 2106.09685); alpha / sqrt(r) is rsLoRA

peft replaces the target modules inside the model, so the model keeps its class and its paths and
is used as before; the `PeftModel` returned here is only the handle to save and to merge by.

An adapter's folder holds peft's two files. What is trained in full beside LoRA (a convolution is
depthwise and `A_log`, `D`, `dt_bias` are no modules, so LoRA cannot reach them) is in a third,
under the names of the checkpoint: peft does not read it.
"""

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from mamba2_train.checkpoint import read_tensors
from mamba2_train.checksums import check_tensor, facts_of, write_tensors
from mamba2_train.errors import UserError, nearest
from mamba2_train.model import Mamba2LM
from mamba2_train.parallel.layout import plain_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
IN_FULL_FILE = "trained_in_full.safetensors"
# the parts of a model, in its order
KINDS = (
    *("embeddings", "in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"),
    "lm_head",
)
# of its settings, those that decide what an adapter does
_SETTINGS = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "lora_bias", "layer_replication"),
)
_LARGEST_RANK = 4096  # that is believed before the weights have been read
logger = logging.getLogger(__name__)
_INITIAL = "initial_weights"  # on a PeftModel: A and B as PiSSA or OLoRA made them


def add_lora(
    model: Mamba2LM,
    targets: Sequence[str],
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "default",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    layers: Sequence[int] | None = None,
    in_full: Iterable[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Freeze `model`, put LoRA on `targets`, and train the kinds of parameters `in_full` beside it.

    The adapters are float32 and begin as the identity; what is random is drawn from `seed`.

    Args:
        targets: as in `find_targets`, and so are `layers` and the keys of the patterns.
        init: "default", "gaussian" or "orthogonal"; "pissa", "pissa_niter_N" or "olora" take the
            adapter out of the base's weights and leave the rest there, so that their sum is the
            base. The embeddings begin by default then.
        rank_pattern, alpha_pattern: r and alpha of the modules that a key matches.
        in_full: some of conv1d, dt_bias, A_log, D, norm; they become float32 if they are less.

    Raises:
        UserError: names that match nothing, or an init that the weights do not allow.
    """
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    paths = find_targets(model, targets, layers, [*rank_pattern, *alpha_pattern])
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]
        # names are easier to read in the file that is saved, where they say as much as paths
        target_modules=list(targets) if _are_names(targets) and layers is None else paths,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    if _mutates_base(config):
        _check_mutable(model, paths, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = _wrapped(model, config)
    train_in_full(model, in_full)
    return peft_model


def find_targets(
    model: nn.Module,
    targets: Iterable[str],
    layers: Sequence[int] | None = None,
    patterns: Iterable[str] = (),
) -> list[str]:
    """Paths of the modules that LoRA is put on.

    Args:
        targets: names such as `in_proj`, or regular expressions of how a path ends, such as
            `layers\\.[0-3]\\.mixer\\.in_proj`, with whole names only.
        layers: of the blocks, only these; modules outside of the blocks are not affected.
        patterns: further names or expressions, each of which must match one of the paths found.

    Raises:
        UserError: one of them that matches nothing, with what exists, or a block that does not.
    """
    adaptable = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    found: list[str] = []
    for target in targets:
        matched = [path for path in adaptable if _ends(path, target)]
        if not matched:
            raise UserError(_no_match("LoRA target", target, adaptable))
        found += [path for path in matched if layers is None or _layer(path) in (None, *layers)]
    _check_layers(model, layers)
    for pattern in patterns:
        if not any(_ends(path, pattern) for path in found):
            raise UserError(_no_match("the pattern", pattern, found, "adapted module"))
    return list(dict.fromkeys(found))


def train_in_full(model: nn.Module, kinds: Iterable[str]) -> None:
    """Let these kinds of parameters be trained themselves, in float32 at least."""
    kinds = set(kinds)
    for name, parameter in model.named_parameters():
        if kind_of(name) in kinds:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_()


def find_frozen(
    model: nn.Module, names: Iterable[str], layers: Sequence[int] | None = None
) -> list[nn.Parameter]:
    """Parameters that full fine-tuning leaves as they are.

    Args:
        names: of kinds (`embeddings`, `norm`), or regular expressions of how the path of a
            parameter, or of a module around it, ends: `layers\\.0\\.mixer`.
        layers: whole blocks.

    Raises:
        UserError: a name that matches nothing, a block that does not exist, or nothing to train.
    """
    everything = dict(model.named_parameters(remove_duplicate=False))  # a tied head too
    frozen: list[nn.Parameter] = []
    for name in names:
        matched = [p for path, p in everything.items() if _around(path, name)]
        if not matched:
            raise UserError(_no_match("freeze:", name, everything, "parameter"))
        frozen += matched
    _check_layers(model, layers)
    frozen += [p for path, p in everything.items() if _layer(path) in (layers or ())]
    if {id(p) for p in everything.values()} <= {id(p) for p in frozen}:
        raise UserError("every parameter is frozen, so there is nothing to train: freeze less")
    return frozen


def save_adapter(
    peft_model: PeftModel, folder: Path, base: str, revision: str | None = None
) -> None:
    """Write the adapter as stock peft reads it, and what is trained in full beside it.

    An adapter that began as a part of the base (PiSSA, OLoRA) becomes a LoRA of the base as it
    was: (A, A0) and (B, -B0) of twice the rank add to it what training did.

    Args:
        base: name or path of the weights below, kept as `base_model_name_or_path`.
        revision: of a base on the hub.
    """
    config: Any = copy.copy(peft_model.peft_config["default"])
    weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    initial = getattr(peft_model, _INITIAL, None)
    if initial is not None:
        config, weights = _of_the_original(config, weights, initial)
    config.base_model_name_or_path, config.revision = base, revision
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.target_modules = sorted(config.target_modules)  # a set: the same file each time
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _write(weights, folder / WEIGHTS_FILE, settings=_settings(config))
    in_full = {
        name: p.detach()
        for name, p in adapted(peft_model).named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    if in_full:
        _write(in_full, folder / IN_FULL_FILE)


def load_adapter(model: Mamba2LM, *folders: str | Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on `model`, in place; of several, the sum.

    On the meta device it gets the parameters, and no values.

    Args:
        trainable: go on training it, and what was trained in full beside it.

    Raises:
        UserError: no LoRA, keys that are missing or that the model has no place for, or several
            of which there is no sum: of DoRA, or of the same parameter trained in full.
    """
    peft_model: PeftModel | None = None
    names: list[str] = []
    in_full: dict[str, Tensor] = {}
    for i, folder in enumerate(folders):
        config = read_config(folder)
        weights = _read_weights(folder, config)
        if config.use_dora and len(folders) > 1:
            raise UserError(f"{folder} is DoRA, which scales all of a weight, so it has no sum")
        config.task_type, config.inference_mode = None, not trainable
        names.append("default" if i == 0 else f"adapter_{i}")
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
            try:
                if peft_model is None:
                    peft_model = _wrapped(model, config)
                else:
                    peft_model.add_adapter(names[-1], config)
            except Exception as error:  # as above
                raise UserError(
                    f"{Path(folder) / CONFIG_FILE} does not fit the model "
                    f"({type(error).__name__}: {_line(error)}): was it trained on another base?"
                ) from error
        _set_weights(peft_model, folder, weights, names[-1])
        beside = read_in_full(folder)
        if both := in_full.keys() & beside.keys():
            raise UserError(
                f"{folder} and another adapter have each trained {min(both)} in full: merge one "
                f"into the base, or give one of them"
            )
        in_full |= beside
    assert peft_model is not None
    tuner: Any = peft_model.base_model
    tuner.set_adapter(names, inference_mode=not trainable)
    parameters = dict(model.named_parameters())
    for name, value in in_full.items():
        if model.backbone.norm_f.weight.is_meta and name in parameters:
            value = torch.empty_like(parameters[name], dtype=value.dtype)
        if name not in parameters or parameters[name].shape != value.shape:
            raise UserError(f"{name} of {IN_FULL_FILE} does not fit the model: give its own base")
        parameters[name].data = value.to(parameters[name].device)
        parameters[name].requires_grad_(trainable)
    return peft_model


def adapted(peft_model: PeftModel) -> Mamba2LM:
    """The model that carries the adapters."""
    model = peft_model.get_base_model()
    assert isinstance(model, Mamba2LM)
    return model


def folder_of(source: str | Path) -> Path:
    """An adapter's folder, where a run may have been given."""
    return Path(source) / "adapter" if (Path(source) / "adapter").is_dir() else Path(source)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG_FILE).is_file()


def read_config(folder: str | Path) -> LoraConfig:
    """The settings of a saved adapter.

    Raises:
        UserError: it is not there, it is not LoRA, or it names no base.
    """
    if not is_adapter(folder):
        raise UserError(f"{folder} holds no {CONFIG_FILE}: give the folder of an adapter")
    file = Path(folder) / CONFIG_FILE
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever peft makes of settings that nobody wrote
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {_line(error)}): copy it again"
        ) from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder} is a {config.peft_type} adapter, and only LoRA is built")
    if not config.base_model_name_or_path:
        raise UserError(f"{file} names no base_model_name_or_path; add it")
    if config.megatron_config is not None:  # peft would import any module that it names
        raise UserError(f"{file} is for Megatron, which is not used here: remove megatron_config")
    return config


def only_merged(peft_model: PeftModel) -> list[str]:
    """Why other tools need the merged model and cannot do with the adapter; empty if they can."""
    model = adapted(peft_model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    reasons = []
    if any(".out_proj.lora_" in name for name in trained):
        reasons.append("peft refuses out_proj on transformers' Mamba2")
    in_full = sorted({kind_of(name) for name in trained if "lora_" not in name}, key=KINDS.index)
    if in_full:
        reasons.append(f"{', '.join(in_full)} are in {IN_FULL_FILE}, which peft does not read")
    return reasons


def kind_of(name: str) -> str:
    """Which part of a model a parameter, or an adapter on it, belongs to: one of KINDS."""
    parts = ["norm" if part == "norm_f" else part for part in plain_name(name).split(".")]
    return next(part for part in parts if part in KINDS)


def _wrapped(model: Mamba2LM, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # peft warns that the head is tied to the adapted embeddings, which only a merge must
        # mind, that our config names another base than the plain model, which has no name, and
        # that rsLoRA with patterns cannot be converted, which ours can
        warnings.filterwarnings("ignore", message=".*(tie|base_model_name_or_path|rslora|Rank-St)")
        # no task_type: peft would then want the methods of a transformers model
        peft_model = get_peft_model(model, config)
    if _mutates_base(config):
        weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        linear = {k: w.clone() for k, w in weights.items() if ".lora_A." in k or ".lora_B." in k}
        setattr(peft_model, _INITIAL, linear)
    return peft_model


def _read_weights(folder: str | Path, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors of a saved adapter, which are what was written as far as can be told."""
    names = (WEIGHTS_FILE, "adapter_model.bin")
    file = next((f for name in names if (f := Path(folder) / name).is_file()), None)
    if file is None:
        raise UserError(f"adapter {folder} holds no {' and no '.join(names)}: copy it again")
    weights = read_tensors(file)
    facts = facts_of(file) if file.name == WEIGHTS_FILE else {}
    for name, tensor in weights.items():
        check_tensor(name, tensor, file, facts)
    now = _settings(config)
    saved = facts.get("settings", now)
    if changed := [f"{k}={v} (was {saved.get(k)})" for k, v in now.items() if v != saved.get(k)]:
        logger.warning(
            "%s: its %s has %s since it was saved; unless that was meant, put it back",
            *(folder, CONFIG_FILE, ", ".join(changed)),
        )
    stored = max((min(t.shape, default=0) for n, t in weights.items() if "lora_" in n), default=0)
    asked = max([config.r, *(config.rank_pattern or {}).values()])
    if not isinstance(asked, int) or asked > max(stored, _LARGEST_RANK):
        raise UserError(
            f"{Path(folder) / CONFIG_FILE} asks for rank {asked}, and the weights beside it have "
            f"at most {stored}: copy both again"
        )
    return weights


def _settings(config: LoraConfig) -> dict[str, Any]:
    """What an adapter does beside its weights, as JSON holds it."""
    targets: Any = config.target_modules
    values = {name: getattr(config, name) for name in _SETTINGS}
    values["target_modules"] = targets if isinstance(targets, str) else sorted(targets or ())
    return dict(json.loads(json.dumps(values)))


def _set_weights(
    peft_model: PeftModel, folder: str | Path, weights: dict[str, Tensor], name: str
) -> None:
    if adapted(peft_model).backbone.norm_f.weight.is_meta:
        return  # there is nothing to write to
    try:
        result: Any = set_peft_model_state_dict(peft_model, weights, adapter_name=name)
    except RuntimeError as error:  # shapes
        mismatch = str(error).splitlines()[-1].strip()
        raise UserError(
            f"adapter {folder} does not fit the model: {mismatch}; was it trained on another base?"
        ) from error
    missing = [k for k in result.missing_keys if "lora_" in k and f".{name}" in k]
    if missing or result.unexpected_keys:
        raise UserError(
            f"adapter {folder} does not fit the model: {len(missing)} keys missing "
            f"{missing[:3]}, {len(result.unexpected_keys)} unexpected "
            f"{result.unexpected_keys[:3]}; was it trained on another base?"
        )


def _mutates_base(config: LoraConfig) -> bool:
    return str(config.init_lora_weights).startswith(("pissa", "olora"))


def _check_mutable(model: Mamba2LM, paths: list[str], config: LoraConfig) -> None:
    init = config.init_lora_weights
    if model.config.tie_embeddings and any(path.endswith("lm_head") for path in paths):
        raise UserError(
            f"init={init} would take the adapter of lm_head out of the embeddings, which are tied "
            "to it: leave lm_head out of the targets, or set init=default"
        )
    for path in paths:
        weight = model.get_submodule(path).weight
        if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16):
            raise UserError(
                f"init={init} decomposes the weights, but those of {path} are {weight.dtype}: load "
                "them in float32 or bfloat16, or set init=default"
            )
        r = _first_match(config.rank_pattern, path, config.r)
        if r > min(weight.shape):
            raise UserError(
                f"init={init} cannot take rank {r} out of {path}, of shape {tuple(weight.shape)}: "
                f"set r to at most {min(weight.shape)}"
            )


def _of_the_original(
    config: LoraConfig, weights: dict[str, Tensor], initial: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    # not peft's conversion, which loses the adapted embeddings
    for key, first in initial.items():
        now = weights[key]
        down = ".lora_A." in key
        weights[key] = torch.cat([now, first.to(now) if down else -first.to(now)], 0 if down else 1)
    # alpha / r, or alpha / sqrt(r), stays what it was
    factor = math.sqrt(2) if config.use_rslora else 2
    ranks: Any = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    alphas: Any = {key: factor * a for key, a in (config.alpha_pattern or {}).items()}
    if any("lora_embedding_" in key for key in weights):  # began by default, and stay as they are
        for doubled, before, value in (
            (ranks, config.rank_pattern, config.r),
            (alphas, config.alpha_pattern, config.lora_alpha),
        ):
            own = {"embeddings": _first_match(before, "backbone.embeddings", value)}
            others = {key: v for key, v in doubled.items() if key != "embeddings"}
            doubled.clear()
            doubled.update(own | others)  # the first that matches counts
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha  # type: ignore[assignment]
    config.init_lora_weights = True
    return config, weights


def _first_match(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    return next((value for key, value in (pattern or {}).items() if _ends(path, key)), default)


def _write(tensors: dict[str, Tensor], file: Path, **facts: Any) -> None:
    write_tensors({name: t.detach().cpu() for name, t in tensors.items()}, file, **facts)


def read_in_full(folder: str | Path) -> dict[str, Tensor]:
    """What was trained in full beside an adapter, by the names of the checkpoint."""
    file = Path(folder) / IN_FULL_FILE
    if not file.is_file():
        return {}
    tensors, facts = read_tensors(file), facts_of(file)
    for name, tensor in tensors.items():
        check_tensor(name, tensor, file, facts)
    return tensors


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def _ends(path: str, pattern: str) -> bool:
    """Whether `pattern` is how `path` ends, in whole names: peft's rule for its patterns."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _around(path: str, pattern: str) -> bool:
    """Whether `pattern` is the path of a parameter, or of what it is in; or its kind."""
    parts = path.split(".")
    inside = any(_ends(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
    return inside or kind_of(path) == pattern


def _are_names(targets: Iterable[str]) -> bool:
    return all(re.fullmatch(r"\w+", target) for target in targets)


def _layer(path: str) -> int | None:
    found = re.search(r"\blayers\.(\d+)\.", path)
    return int(found[1]) if found else None


def _check_layers(model: nn.Module, layers: Sequence[int] | None) -> None:
    config: Any = model.config
    n_layers = config.n_layers
    outside = [layer for layer in layers or () if layer >= n_layers]
    if outside:
        raise UserError(
            f"layer {outside[0]} does not exist: the model has {n_layers}, 0 to {n_layers - 1}"
        )


def _no_match(what: str, pattern: str, paths: Iterable[str], kind: str = "module") -> str:
    paths = list(paths)
    names = sorted({kind_of(path) for path in paths}, key=KINDS.index)
    return (
        f"{what} '{pattern}' matches no {kind}.{nearest(pattern, [*names, *paths])} There are "
        f"{', '.join(names)}, with paths such as {paths[len(paths) // 2]}"
    )
