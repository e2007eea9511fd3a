"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mamba2_train.quantization import bitsandbytes
from mamba2_train.schema import AdamWConfig, MuonConfig, OptimizerConfig, SchedulerConfig

Parameters = list[tuple[str, nn.Parameter]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, lora_plus_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """The optimizer of what is trainable, which is on its device by now.

    Args:
        lora_plus_ratio: learning rate of the B of adapted linear layers over that of all else
            (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(config, MuonConfig):
        return MuonWithAdamW(trainable, config, lora_plus_ratio)
    groups = _groups(trainable, config, lora_plus_ratio)
    if not isinstance(config, AdamWConfig):
        from transformers.optimization import Adafactor  # transformers takes seconds to import

        return Adafactor(
            groups,
            lr=config.lr,
            clip_threshold=config.clip_threshold,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    betas = config.betas
    if config.kind == "adamw":
        adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=betas, eps=config.eps, **_fastest(trainable)
        )
        # Says that a fused step divides by a loss scale: there is none in bfloat16, and Lightning
        # would refuse to clip before it.
        adamw._step_supports_amp_scaling = False
        return adamw
    kinds = bitsandbytes().optim
    kind = {"adamw_8bit": kinds.AdamW8bit, "paged_adamw_8bit": kinds.PagedAdamW8bit}[config.kind]
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices between features; AdamW for all that is none, or that maps tokens.

    Two of torch's optimizers that share one state and one list of groups, so that a schedule and a
    checkpoint see an optimizer like any other.
    """

    def __init__(
        self, trainable: Parameters, config: MuonConfig, lora_plus_ratio: float = 1.0
    ) -> None:
        def is_matrix(name: str, p: nn.Parameter) -> bool:
            return p.dim() == 2 and "embeddings" not in name and "lm_head" not in name

        matrices = [(name, p) for name, p in trainable if is_matrix(name, p)]
        rest = [(name, p) for name, p in trainable if not is_matrix(name, p)]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                _groups(matrices, config, lora_plus_ratio),
                lr=config.lr,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",  # so that one learning rate suits both
            )
            self.parts.append(muon)
        if rest:
            groups = _groups(rest, config, lora_plus_ratio)
            adamw = torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, eps=config.eps, **_fastest(rest)
            )
            self.parts.append(adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What loading a state ends with: the groups are new ones then."""
        super().__setstate__(state)
        if hasattr(self, "parts"):
            self._share()

    def _share(self) -> None:
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end


def _groups(
    parameters: Parameters, config: OptimizerConfig, lora_plus_ratio: float
) -> list[dict[str, Any]]:
    """With and without decay: A_log, D, dt_bias, norms and biases have none.

    These are the parameters with a single dimension: pulling a decay rate or a norm's scale
    towards zero is not regularisation. Matrices, which a strategy may spread over the ranks, and
    the convolution, which stays whole, are apart: a fused step takes either.
    """
    faster = [p for name, p in parameters if lora_plus_ratio != 1 and ".lora_B." in name]
    fast = {id(p) for p in faster}
    other = [p for _, p in parameters if id(p) not in fast]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in other if p.dim() == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in other if p.dim() > 2], "weight_decay": config.weight_decay},
        {"params": [p for p in other if p.dim() <= 1], "weight_decay": 0.0},
        {
            "params": faster,
            "weight_decay": config.weight_decay,
            "lr": config.lr * lora_plus_ratio,
        },
    ]
    return [group for group in groups if group["params"]]


def _fastest(parameters: Parameters) -> dict[str, bool]:
    """One kernel for a step, where torch has one for the device; else one per operation."""
    fused = all(p.device.type in ("cpu", "cuda") for _, p in parameters)
    return {"fused": True} if fused else {"foreach": True}


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
