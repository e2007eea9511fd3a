"""The schedule's ends and shapes, what decays, and each optimizer against its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.optim import build_optimizer, lr_factor
from mamba2_train.schema import AdafactorConfig, AdamWConfig, MuonConfig, SchedulerConfig

KINDS = ["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"]


def settings(kind, weight_decay=0.0):
    values = {"kind": kind, "lr": 1e-2, "weight_decay": weight_decay}
    adam = {"betas": (0.9, 0.99), "eps": 1e-8}
    if kind == "adafactor":
        return AdafactorConfig(**values, clip_threshold=1.0)
    return (
        MuonConfig(**values, **adam, momentum=0.9)
        if kind == "muon"
        else (AdamWConfig(**values, **adam))
    )


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


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_decay(kind):
    torch.manual_seed(0)
    model = initialize(
        Mamba2LM(Mamba2Config(d_model=32, n_layers=1, vocab_size=64, headdim=16, use_bias=True))
    )
    optimizer = build_optimizer(model, settings(kind, weight_decay=0.5))
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


class Layers(nn.Module):
    """A matrix, what maps tokens, and a vector; 8 bits are for 4,096 elements or more."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (96, 64), "embeddings": (80, 64), "norm": (96,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def trained(kind, steps=5, weight_decay=0.1):
    model = Layers()
    optimizer = build_optimizer(model, settings(kind, weight_decay))
    for step in range(steps):
        gradients(model, step)
        optimizer.step()
    return model, optimizer


def adamw(name, steps=5, lr=1e-2, decay=0.1):
    """The paper's algorithm 2 in fp64 (arXiv 1711.05101), on one parameter of Layers."""
    model = Layers()
    p = getattr(model, name).detach().double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(steps):
        gradients(model, step)
        g = getattr(model, name).grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        p = p - lr * (update + decay * p * (p.dim() > 1))
    return p


def adafactor(name, steps=5, lr=1e-2, decay=0.1):
    """Algorithm 4 of the paper in fp64 (arXiv 1804.04235), with given rates."""
    model = Layers()
    p = getattr(model, name).detach().double()
    rows = columns = v = 0
    for step in range(1, steps + 1):
        gradients(model, step - 1)
        g = getattr(model, name).grad.double()
        beta, squares = 1 - step**-0.8, g * g + 1e-30
        v = beta * v + (1 - beta) * squares
        rows = beta * rows + (1 - beta) * squares.mean(-1)
        if p.dim() > 1:
            columns = beta * columns + (1 - beta) * squares.mean(0)
            v_hat = torch.outer(rows, columns) / rows.mean()
        else:
            v_hat = v
        update = g / v_hat.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        p = p - lr * update - lr * decay * p * (p.dim() > 1)
    return p


def muon(name, steps=5, lr=1e-2, decay=0.1):
    """Its author's description with an exact orthogonalisation, by singular values."""
    model = Layers()
    p = getattr(model, name).detach().double()
    m = torch.zeros_like(p)
    for step in range(steps):
        gradients(model, step)
        g = getattr(model, name).grad.double()
        m = 0.9 * m + 0.1 * g
        u, _, v = torch.linalg.svd(0.1 * g + 0.9 * m, full_matrices=False)
        p = p - lr * (0.2 * max(p.shape) ** 0.5 * (u @ v) + decay * p)
    return p


def moved(p, name):
    return p.double() - getattr(Layers(), name).detach().double()


def test_adamw_and_adafactor_against_their_papers():
    for kind, truth in (("adamw", adamw), ("adafactor", adafactor)):
        model, _ = trained(kind)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.double(), truth(name), rtol=1e-5, atol=1e-6)


def test_muon_is_for_matrices_between_features():
    """Its iteration leaves singular values between 0.5 and 1.5, so that only the direction and
    the size of the way can be compared."""
    model, _ = trained("muon")
    for name in ("embeddings", "norm"):
        torch.testing.assert_close(getattr(model, name).double(), adamw(name), rtol=1e-5, atol=1e-6)
    ours, truth = moved(model.matrix, "matrix"), moved(muon("matrix"), "matrix")
    assert torch.cosine_similarity(ours.flatten(), truth.flatten(), 0) > 0.99
    assert 0.7 < ours.norm() / truth.norm() < 1.3
    other = moved(adamw("matrix"), "matrix")  # the comparison tells them apart
    assert torch.cosine_similarity(ours.flatten(), other.flatten(), 0) < 0.92


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_eight_bits_follow_adamw(kind):
    """20 steps: within 3% of the way; a small vector, in 32 bits, to rounding."""
    model, _ = trained(kind, steps=20)
    for name in ("matrix", "embeddings"):
        ours, truth = moved(getattr(model, name), name), moved(adamw(name, 20), name)
        assert 1e-4 < (ours - truth).norm() / truth.norm() < 0.03
    torch.testing.assert_close(model.norm.double(), adamw("norm", 20), rtol=1e-5, atol=1e-5)
    large = build_optimizer(matrix := nn.Linear(1024, 1024, bias=False), settings(kind))
    matrix.weight.grad = torch.ones_like(matrix.weight)
    large.step()
    state = sum(t.nbytes for t in large.state[matrix.weight].values() if torch.is_tensor(t))
    assert state < 2.05 * matrix.weight.numel()  # AdamW's is 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_resumed_equals_uninterrupted(kind, tmp_path):
    truth, _ = trained(kind, steps=5)
    model, optimizer = trained(kind, steps=3)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(copy.deepcopy(saved), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    model = Layers()
    optimizer = build_optimizer(model, settings(kind, weight_decay=0.5))  # the state has 0.1
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for step in (3, 4):
        gradients(model, step)
        optimizer.step()
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_reaches_every_group():
    model, optimizer = trained("muon", steps=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model)
    gradients(model, 0)
    optimizer.step()
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert schedule.get_last_lr() == [0.0] * 3
