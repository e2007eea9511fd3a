"""The configs that Mamba2 models are published with, to and from ours.

    layout        config       weights                                  tensor names
    huggingface   config.json  model.safetensors or pytorch_model.bin,  as in our model
                               or shards of either with an index
    state-spaces  config.json  pytorch_model.bin                        backbone.embedding
    mistral       params.json  consolidated.safetensors                 model.backbone.embedding

The tables say what our fields are called in each, and what each may ask for that is not built
here; they serve reading and writing alike. Mistral's layout is only read. Files are the business
of `checkpoint.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config

HUGGINGFACE, STATE_SPACES, MISTRAL = "huggingface", "state-spaces", "mistral"
WRITABLE = (HUGGINGFACE, STATE_SPACES)

CONFIG_FILE = {HUGGINGFACE: "config.json", STATE_SPACES: "config.json", MISTRAL: "params.json"}
_TORCH_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_FILES: dict[str, tuple[str, ...]] = {  # the first that exists is read
    HUGGINGFACE: _TORCH_FILES,
    STATE_SPACES: _TORCH_FILES,
    MISTRAL: ("consolidated.safetensors",),
}

# our field -> its name in each layout (a dot descends); None: it cannot be said there
_FIELDS: dict[str, tuple[str | None, str | None, str | None]] = {
    "d_model": ("hidden_size", "d_model", "dim"),
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "vocab_size": ("vocab_size", "vocab_size", "vocab_size"),
    "d_state": ("state_size", "ssm_cfg.d_state", None),
    "d_conv": ("conv_kernel", "ssm_cfg.d_conv", None),
    "expand": ("expand", "ssm_cfg.expand", None),
    "headdim": ("head_dim", "ssm_cfg.headdim", None),
    "n_groups": ("n_groups", "ssm_cfg.ngroups", "n_groups"),
    "chunk_size": ("chunk_size", "ssm_cfg.chunk_size", None),
    "dt_limit": ("time_step_limit", "ssm_cfg.dt_limit", None),
    "norm_eps": ("layer_norm_epsilon", None, None),
    "residual_in_fp32": ("residual_in_fp32", "residual_in_fp32", "residual_in_fp32"),
    "tie_embeddings": ("tie_word_embeddings", "tie_embeddings", "tie_embeddings"),
    "use_bias": ("use_bias", "ssm_cfg.bias", None),
    "use_conv_bias": ("use_conv_bias", "ssm_cfg.conv_bias", None),
}
_REQUIRED = {
    HUGGINGFACE: ("d_model", "n_layers", "vocab_size"),
    STATE_SPACES: ("d_model", "n_layers", "vocab_size"),
    MISTRAL: ("d_model", "n_layers", "vocab_size", "n_groups", "tie_embeddings"),
}
# what an absent field means, where that is not Mamba2Config's default
_ABSENT: dict[str, dict[str, Any]] = {HUGGINGFACE: {"n_groups": 8, "tie_embeddings": False}}
# `pad_vocab_size_multiple` where absent; the model is built with that many more rows
_PAD_VOCAB = {STATE_SPACES: 8, MISTRAL: 1}
# keys of ssm_cfg that only draw fresh weights or choose a kernel
_HARMLESS = {"conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "use_mem_eff_path"}

# beyond what anybody has built, a typing error or damage would take hours to be refused by memory
_MOST_LAYERS, _MOST_WEIGHTS, _LARGEST_CHUNK = 4096, 2**40, 2**16

_VARIANT = "a variant of the mixer that no published model has, and that is not built"
# name -> the values that are built (None: absent), and why others are refused
_DEMANDS: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    HUGGINGFACE: {
        "model_type": (("mamba2",), "only Mamba2 is built, no Mamba1, hybrid or transformer"),
        "hidden_act": ((None, "silu", "swish"), "only silu is built"),
        "quantization_config": ((None,), "load the original weights and quantize those"),
    },
    STATE_SPACES: {
        "ssm_cfg.layer": (("Mamba2",), "these are Mamba1 layers; choose a mamba2 checkpoint"),
        "attn_layer_idx": ((None, []), "a hybrid with attention layers is not built"),
        "d_intermediate": ((None, 0), "a hybrid with MLP layers is not built"),
        "rms_norm": ((None, True), "LayerNorm is not built"),
        "ssm_cfg.D_has_hdim": ((None, False), _VARIANT),
        "ssm_cfg.norm_before_gate": ((None, False), _VARIANT),
        "ssm_cfg.rmsnorm": ((None, True), _VARIANT),
        "ssm_cfg.d_ssm": ((None,), _VARIANT),
    },
    MISTRAL: {
        "model_type": ((None, "mamba"), "only Mamba2 is built, which is 'mamba' here"),
        "n_heads": ((None,), "attention heads: this is a transformer; choose a Mamba2 model"),
        "rms_norm": ((None, True), "LayerNorm is not built"),
    },
}


def layout_of(values: Mapping[str, Any]) -> str | None:
    """Whose a `config.json` is; None for nobody's."""
    if values.get("model_type"):
        return HUGGINGFACE
    return STATE_SPACES if {"d_model", "ssm_cfg"} & set(values) else None


def config_from(values: Mapping[str, Any], layout: str, source: object) -> Mamba2Config:
    """Our config for theirs.

    Raises:
        UserError: naming `source`, the field and its value, if no such model is built here.
    """
    for name, (accepted, reason) in _DEMANDS[layout].items():
        if (value := _get(values, name)) not in accepted:
            raise UserError(f"{source}: {name} is {value!r}: {reason}")
    names = _names(layout)
    if layout == STATE_SPACES:
        understood = {f"ssm_cfg.{key}" for key in _HARMLESS} | {*names.values(), *_DEMANDS[layout]}
        if unknown := sorted({f"ssm_cfg.{key}" for key in values["ssm_cfg"]} - understood):
            raise UserError(f"{source}: {unknown[0]} is set: {_VARIANT}")
    config: dict[str, Any] = {}
    for field in dataclasses.fields(Mamba2Config):
        name = names.get(field.name, "")
        value = _get(values, name)
        if value is None:
            if field.name in _REQUIRED[layout]:
                raise UserError(f"{source}: {name} is missing; download the file again")
            value = _ABSENT.get(layout, {}).get(field.name, field.default)
        if field.name == "dt_limit":
            value = _limit(value, f"{source}: {name} is {value!r}")
        elif type(value) is not type(field.default):
            kind = type(field.default).__name__
            raise UserError(f"{source}: {name} is {value!r}; it should be of type {kind}")
        config[field.name] = value
    if layout in _PAD_VOCAB:
        multiple = values.get("pad_vocab_size_multiple", _PAD_VOCAB[layout])
        if type(multiple) is not int or multiple < 1:
            raise UserError(f"{source}: pad_vocab_size_multiple is {multiple!r}; 1 is the least")
        config["vocab_size"] += -config["vocab_size"] % multiple
    try:
        ours = Mamba2Config(**config)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    largest = max(ours.d_in_proj, ours.vocab_size, ours.d_conv_channels) * ours.d_model
    for what, size, most in (
        ("layers", ours.n_layers, _MOST_LAYERS),
        ("weights in one matrix", max(largest, ours.d_conv_channels * ours.d_conv), _MOST_WEIGHTS),
        ("tokens in a chunk", ours.chunk_size, _LARGEST_CHUNK),
    ):
        if size > most:
            raise UserError(
                f"{source} asks for {size:,} {what}, and {most:,} are the most: correct it, or "
                "download it again"
            )
    if layout == HUGGINGFACE and values.get("num_heads", ours.n_heads) != ours.n_heads:
        raise UserError(
            f"{source}: num_heads is {values['num_heads']!r}, but expand * hidden_size / head_dim "
            f"is {ours.n_heads}; correct the one that is wrong"
        )
    return ours


def config_to(
    config: Mamba2Config,
    layout: str,
    *,
    dtype: str,
    token_ids: Mapping[str, int | list[int] | None],
) -> dict[str, Any]:
    """Theirs for ours. `dtype` ("bfloat16") and the token ids go into Hugging Face's alone."""
    names = _names(layout)
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {"layer": "Mamba2"}
    for field in dataclasses.fields(Mamba2Config):
        value, name = getattr(config, field.name), names.get(field.name)
        if name is None:
            if value != field.default:
                raise UserError(
                    f"{layout}'s layout cannot say {field.name}={value}; save as {HUGGINGFACE}"
                )
        elif not name.startswith("ssm_cfg."):
            values[name] = value
        elif value != field.default:
            overrides[name.removeprefix("ssm_cfg.")] = value
    if layout == STATE_SPACES:
        return values | {
            "ssm_cfg": overrides,
            "d_intermediate": 0,
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 1,
        }
    if unknown := set(token_ids) - {"bos", "eos", "pad"}:
        raise ValueError(f"token_ids has {sorted(unknown)}; its names are bos, eos and pad")
    return values | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": config.n_heads,
        "hidden_act": "silu",
        "use_cache": True,
        "torch_dtype": dtype,
        # null where unknown: transformers would otherwise assume 0, 2 and 1
        **{f"{name}_token_id": token_ids.get(name) for name in ("bos", "eos", "pad")},
    }


def our_name(name: str) -> str:
    """A tensor's name in our model, whatever the layout."""
    return name.removeprefix("model.").replace("backbone.embedding.", "backbone.embeddings.")


def their_name(name: str, layout: str) -> str:
    """The other way round."""
    if layout == STATE_SPACES:
        return name.replace("backbone.embeddings.", "backbone.embedding.")
    return name


def _limit(value: Any, where: str) -> tuple[float, float]:
    """Bounds of dt; in JSON the upper one is Infinity, "Infinity" or {"__float__": "Infinity"}."""
    try:
        low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{where}; it should be two numbers, [low, high]") from error
    if not 0.0 <= low <= high:
        raise UserError(f"{where}; it should be 0 <= low <= high")
    return low, high


def _names(layout: str) -> dict[str, str]:
    column = list(CONFIG_FILE).index(layout)
    return {ours: name for ours, row in _FIELDS.items() if (name := row[column]) is not None}


def _get(values: Any, name: str) -> Any:
    """values["a"]["b"] for "a.b"; None where there is no such thing."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
