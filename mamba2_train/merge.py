"""Adapters into the weights below them, exactly.

    W <- W + alpha / r * B A        computed in float32 at least, and rounded once

What has the same values as embeddings and head together is no longer so after one of the two has
been adapted: a merged model whose adapters touch either is untied.
"""

import dataclasses
import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mamba2_train.adapters import adapted
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2LM


def merge_adapters(peft_model: PeftModel) -> Mamba2LM:
    """The model, in place, with every active adapter merged and no trace of peft.

    Raises:
        UserError: there is nothing to merge, for instance because it has been merged already.
    """
    model = adapted(peft_model)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise UserError("there is no adapter on the model: it has been merged already")
    if not all(layer.get_base_layer().weight.is_floating_point() for layer in layers):
        raise UserError("the weights below the adapter are quantized: dequantize them first")
    _untie(model)
    for layer in layers:
        _merge(layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already")  # it is, and need only be taken out
        tuner: Any = peft_model.base_model
        tuner.merge_and_unload()
    return model.requires_grad_(False)


def _merge(layer: Any) -> None:
    weight = layer.get_base_layer().weight
    dtype = weight.dtype
    # peft would round the update of the embeddings, and then the sum
    weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
    layer.merge()
    weight.data = weight.data.to(dtype)


def _untie(model: Mamba2LM) -> None:
    head, embeddings = model.lm_head, model.backbone.embeddings
    touched = isinstance(head, BaseTunerLayer) or isinstance(embeddings, BaseTunerLayer)
    if not (model.config.tie_embeddings and touched):
        return
    plain: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    model.config = dataclasses.replace(model.config, tie_embeddings=False)
    model.backbone.config = model.config
