"""Two training steps, each time in a process of its own: the most memory they took, in bytes.

    python tests/peak_memory.py '[{"shape": {...}, "overrides": [...]}, ...]'

Counted by the system: resident memory at its highest, less what it was before the model was built.
"""

import ctypes
import json
import os
import sys
from functools import partial

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.commands import extend_hydra
from mamba2_train.commands.train import DTYPES, adapt
from mamba2_train.long_context import ExactStep
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.optim import build_optimizer
from mamba2_train.quantization import is_quantized, quantize
from mamba2_train.schema import TrainConfig, validated


def configured(overrides: list[str]) -> TrainConfig:
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", overrides=overrides)
    return validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


def train(config: TrainConfig, shape: Mamba2Config) -> None:
    """In Lightning's order: the last step's gradients go after the forward pass."""
    model = initialize(Mamba2LM(shape))
    for name, p in list(model.named_parameters()):
        if name.rpartition(".")[2] not in ("A_log", "D", "dt_bias"):
            p.data = p.data.to(DTYPES[config.precision.weights])
        if config.quantization.stored is not None and is_quantized(name):
            quantize(model, name, p.detach(), config.quantization.stored, dtype=p.dtype)
    model.tie_weights()
    adapt(model, config)
    model.set_checkpointing(config.model.checkpointing)
    optimizer = build_optimizer(model, config.optimizer)
    for _ in range(2):
        ids = torch.randint(shape.vocab_size, (config.data.batch_size, config.data.seq_len))
        autocast = partial(
            torch.autocast, "cpu", torch.bfloat16, enabled=config.precision.autocast is not None
        )
        c = config.long_context
        if c.kind == "exact":
            batch = {"input_ids": ids, "shift_labels": ids, "seq_idx": torch.zeros_like(ids).int()}
            step = ExactStep(model, batch, c.segment_len, offload=c.offload, context=autocast)
            with autocast():
                loss, _ = step.forward()
        else:
            with autocast():
                loss = model(ids, shift_labels=ids, reduction="sum").loss
        optimizer.zero_grad()
        step.backward(loss) if c.kind == "exact" else loss.backward()
        optimizer.step()


def resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(config: TrainConfig, shape: Mamba2Config) -> int:
    """Of a child, which begins with nothing but the libraries: a small run makes it map them."""
    small = {"d_model": 64, "n_layers": 2, "vocab_size": 256, "d_state": 16, "headdim": 32}
    less = {"data": config.data.model_copy(update={"batch_size": 1, "seq_len": 64})}
    reader, writer = os.pipe()
    if os.fork() == 0:
        train(config.model_copy(update=less), Mamba2Config(**small))
        before = resident("VmRSS")
        train(config, shape)
        os.write(writer, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return int(os.read(reader, 100))


def main() -> None:
    torch.set_num_threads(1)
    # every large tensor in pages of its own, which go back when it is freed
    for mmap_or_trim_threshold in (-3, -1):
        ctypes.CDLL(None).mallopt(mmap_or_trim_threshold, 65536)
    for request in json.loads(sys.argv[1]):
        config = configured(request["overrides"])
        print(peak(config, Mamba2Config(**request["shape"])))


if __name__ == "__main__":
    main()
