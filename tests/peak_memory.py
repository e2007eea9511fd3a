"""Three training steps in a process of its own: prints the most memory they took, in bytes.

    python tests/peak_memory.py '{"shape": {...}, "overrides": [...]}'

Counted by the kernel: resident memory at its highest, less what it was before the model was built.
A small run comes first, so that libraries and their threads are not counted.
"""

import json
import os
import sys

# every large tensor in pages of its own, which go back when it is freed
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
if os.environ.get("PEAK_MEMORY") is None:
    # glibc reads its settings when a process starts
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PEAK_MEMORY": "1"})

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.commands import extend_hydra
from mamba2_train.commands.train import DTYPES, adapt
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.optim import build_optimizer
from mamba2_train.schema import TrainConfig, validated


def configured(overrides: list[str]) -> TrainConfig:
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", overrides=overrides)
    return validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


def train(config: TrainConfig, shape: Mamba2Config) -> None:
    """In Lightning's order: the last step's gradients go after the forward pass."""
    model = initialize(Mamba2LM(shape))
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] not in ("A_log", "D", "dt_bias"):
            p.data = p.data.to(DTYPES[config.precision.weights])
    model.tie_weights()
    adapt(model, config)
    model.set_checkpointing(config.model.checkpointing)
    optimizer = build_optimizer(model, config.optimizer)
    for _ in range(3):
        ids = torch.randint(shape.vocab_size, (config.data.batch_size, config.data.seq_len))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision.autocast is not None):
            loss = model(ids, shift_labels=ids, reduction="sum").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    config, shape = configured(request["overrides"]), Mamba2Config(**request["shape"])
    small = {"d_model": 64, "n_layers": 2, "vocab_size": 256, "d_state": 16, "headdim": 32}
    tiny = config.model_copy(
        update={"data": config.data.model_copy(update={"batch_size": 1, "seq_len": 64})}
    )
    train(tiny, Mamba2Config(**small))
    before = resident("VmRSS")
    train(config, shape)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
