"""precision=auto: what it becomes, and that it changes the loss by no more than it says."""

import logging

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train import schema
from mamba2_train.assets import resolve
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.hardware import products_in_bfloat16
from mamba2_train.schema import TrainConfig, validated


def configured(*overrides):
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("train", overrides=list(overrides))
    return validated(TrainConfig, OmegaConf.to_container(composed, resolve=True))


@pytest.mark.parametrize(("fast", "as_if"), [(True, "bf16-mixed"), (False, "fp32")])
def test_auto_becomes_one_of_the_others_and_says_so(monkeypatch, caplog, fast, as_if):
    asked = []
    monkeypatch.setattr(
        schema, "products_in_bfloat16", lambda a: asked.append(a) or (fast, "the reason")
    )
    with caplog.at_level(logging.INFO, logger="mamba2_train"):
        found = configured("precision=auto", "strategy.accelerator=cpu")
    assert found.precision == configured(f"precision={as_if}").precision
    assert asked == ["cpu"]
    assert f"precision=auto takes {as_if}: the reason" in caplog.text


@pytest.mark.parametrize(
    ("bf16", "amx", "fast"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_a_cpu_is_asked_what_it_has(monkeypatch, bf16, amx, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert products_in_bfloat16("cpu")[0] is fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True)])
def test_a_gpu_is_asked_for_its_generation(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert products_in_bfloat16("auto")[0] is fast


def test_the_loss_is_that_of_fp32_to_a_thousandth(quote_rows):
    """The embedded base and quotes; the difference is 2e-4."""
    model = load_pretrained(resolve("embedded"), dtype=torch.float32)
    losses = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(model(quote_rows, labels=quote_rows).loss))
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 1e-3


@pytest.fixture
def quote_rows():
    from mamba2_train.assets import FOLDER
    from mamba2_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve("embedded"), vocab_size=4096)
    ids = tokenizer((FOLDER / "quotes.jsonl").read_text()[:12_000]).input_ids
    return torch.tensor(ids[:2048]).view(4, 512)
