"""The schedule's ends and shapes, and what decays."""

import math

import pytest
import torch

from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.optim import build_optimizer, lr_factor
from mamba2_train.schema import OptimizerConfig, SchedulerConfig


def schedule(kind, total, **kw):
    settings = {"kind": kind, "warmup_fraction": 0.1, "min_lr_fraction": 0.1} | kw
    factor = lr_factor(SchedulerConfig(**settings), total)
    return [factor(step) for step in range(total)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_ends_at_the_lowest_rate_and_never_leaves_the_range(kind, total):
    rates = schedule(kind, total)
    assert all(0 < r <= 1 for r in rates)
    assert max(rates) == 1.0
    if total > 2:
        assert rates[-1] == pytest.approx(0.1)


def test_warm_up_is_linear_and_takes_no_step_at_rate_zero():
    assert schedule("cosine", 100)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_shapes_against_their_formulas():
    total, warmup = 101, 11
    t = [(step - warmup) / (total - warmup - 1) for step in range(warmup, total)]
    linear = [1 - 0.9 * x for x in t]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in t]
    assert schedule("linear", total)[warmup:] == pytest.approx(linear)
    assert schedule("cosine", total)[warmup:] == pytest.approx(cosine)
    assert schedule("constant", total)[warmup:] == [1.0] * (total - warmup)


def test_wsd_is_flat_until_it_decays():
    rates = schedule("wsd", 100, decay_fraction=0.3)
    assert rates[10:70] == [1.0] * 60
    assert rates[70] == 1.0
    assert rates[71] < 1.0


def test_what_does_not_decay():
    torch.manual_seed(0)
    model = initialize(
        Mamba2LM(Mamba2Config(d_model=32, n_layers=1, vocab_size=64, headdim=16, use_bias=True))
    )
    config = OptimizerConfig(kind="adamw", lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # without a gradient only the decay moves a weight
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    still = set(before) - moved
    assert {n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1] for n in moved} == {
        "embeddings.weight",
        "in_proj.weight",
        "conv1d.weight",
        "out_proj.weight",
    }
    assert any("A_log" in n for n in still)
    assert any("dt_bias" in n for n in still)
    assert any("in_proj.bias" in n for n in still)
