"""LoRA through peft: adapt a Mamba2LM in place, save and load in peft's own format.

peft replaces the target modules inside the model, so the model keeps its class and its paths and
is used as before; the `PeftModel` returned here is only the handle to save by.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2LM

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def add_lora(
    model: Mamba2LM,
    targets: list[str],
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Freeze `model` and put LoRA on `targets`, the last parts of module paths.

    The adapters are float32 and begin as the identity (B is zero); A is drawn from `seed`.

    Raises:
        UserError: a target that no module is called, with the names that exist.
    """
    names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _adaptable(m)})
    for target in targets:
        if target not in names:
            raise UserError(
                f"LoRA target '{target}' matches no module; this model has {', '.join(names)}"
            )
    # no task_type: peft would then want the methods of a transformers model
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _wrapped(model, config)


def save_adapter(peft_model: PeftModel, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as stock peft reads them.

    Args:
        base: name or path of the weights below, kept as `base_model_name_or_path`.
    """
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = base
    config.task_type = "CAUSAL_LM"
    try:
        # the adapted embeddings are LoRA weights like any other: never the whole matrix
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        config.task_type = None


def load_adapter(model: Mamba2LM, folder: str | Path) -> PeftModel:
    """Put a saved adapter on `model`, in place.

    Raises:
        UserError: keys that are missing, or that the model has no place for.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type = None
    peft_model = _wrapped(model, config)
    result: Any = set_peft_model_state_dict(
        peft_model, load_peft_weights(str(folder), device="cpu")
    )
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise UserError(
            f"adapter {folder} does not fit the model: {len(missing)} keys missing "
            f"{missing[:3]}, {len(result.unexpected_keys)} unexpected "
            f"{result.unexpected_keys[:3]}; was it trained on another base?"
        )
    return peft_model


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_FILES[0]).is_file()


def _wrapped(model: Mamba2LM, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # peft warns that the head is tied to the adapted embeddings, which only a merge must
        # mind, and that our config names another base than the plain model, which has no name
        warnings.filterwarnings("ignore", message=".*(tie|base_model_name_or_path)")
        return get_peft_model(model, config)


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)
