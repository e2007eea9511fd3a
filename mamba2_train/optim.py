"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mamba2_train.schema import OptimizerConfig, SchedulerConfig


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, lora_plus_ratio: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over what is trainable; A_log, D, dt_bias, norms and biases do not decay.

    These are the parameters with a single dimension: pulling a decay rate or a norm's scale
    towards zero is not regularisation.

    Args:
        lora_plus_ratio: learning rate of the B of adapted linear layers over that of all else
            (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    faster = [p for name, p in named if lora_plus_ratio != 1 and ".lora_B." in name]
    fast = {id(p) for p in faster}
    trainable = [p for _, p in named if id(p) not in fast]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        {
            "params": faster,
            "weight_decay": config.weight_decay,
            "lr": config.lr * lora_plus_ratio,
        },
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps
    )


def lr_factor(config: SchedulerConfig, total_steps: int) -> Callable[[int], float]:
    """Factor of the highest rate, as a function of the number of steps already taken.

    Step 0 of a warm-up of w steps has 1 / w and not 0: a step at rate 0 is a step lost. The last
    step, total_steps - 1, is the first to have `min_lr_fraction`.
    """
    warmup = math.ceil(config.warmup_fraction * total_steps)
    low = config.min_lr_fraction
    if config.kind == "wsd":
        decay = max(1, math.ceil(config.decay_fraction * total_steps))
    else:
        decay = max(1, total_steps - warmup)
    begin = total_steps - decay

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.kind == "constant" or step < begin:
            return 1.0
        progress = min(1.0, (step - begin) / max(1, decay - 1))
        if config.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1.0 - (1.0 - low) * progress

    return factor
