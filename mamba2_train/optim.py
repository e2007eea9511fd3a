"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from torch import nn

from mamba2_train.schema import OptimizerConfig, SchedulerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; A_log, D, dt_bias, norms and biases do not decay.

    These are the parameters with a single dimension: pulling a decay rate or a norm's scale
    towards zero is not regularisation.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
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
