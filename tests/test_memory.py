"""Bytes in use: the count itself, and what each checkpointing mode holds."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mamba2_kernels import ssd_scan
from mamba2_kernels.testing import random_ssd_inputs
from mamba2_train.adapters import add_lora
from mamba2_train.benchmark import held
from mamba2_train.memory import LiveMemory, counted
from mamba2_train.model import Mamba2Config
from mamba2_train.quantization import is_quantized, quantize

# blocks in mamba2-130m's proportions
SHAPE = Mamba2Config(d_model=192, n_layers=24, vocab_size=64, d_state=32, headdim=64)
TOKENS = torch.arange(128)[None] % SHAPE.vocab_size


def test_views_count_once_and_go_with_the_last_of_them():
    with LiveMemory() as count:
        x = torch.zeros(1000)
        view = x[10:].view(2, 495)
        assert count.live == 4000
        del x
        assert count.live == 4000
        y = view + 1
        del view, y
        assert (count.live, count.peak) == (0, 4000 + 4 * 990)
        assert count.restart() == 4000 + 4 * 990
        assert count.peak == 0


def test_fake_tensors_count_as_real_ones():
    def work():
        x = torch.ones(300, 200, requires_grad=True)
        loss = checkpoint(lambda x: (x @ x.T).sin().exp(), x, use_reentrant=False).sum()
        loss.backward()

    with LiveMemory() as real:
        work()
    with counted() as fake:
        work()
    assert real.peak == fake.peak > 4 * 300 * 300


def test_what_an_op_takes_inside_is_counted():
    """Against PyTorch's allocator, which reports every allocation."""
    inputs = random_ssd_inputs(2, 300, 4, 32, 2, 16, dtype=torch.float32)
    with LiveMemory() as count, torch.no_grad():
        ssd_scan(**inputs)
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        torch.no_grad(),
    ):
        ssd_scan(**inputs)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    outputs = 4 * inputs["x"].numel()
    assert count.peak > 1.5 * outputs  # chunks' matrices beside y
    assert count.peak == pytest.approx(peak, rel=0.001)


def test_a_gpu_s_kernels_are_counted_and_not_launched():
    from mamba2_kernels.launch import launches

    inputs = random_ssd_inputs(1, 1024, 4, 64, 1, 64, dtype=torch.bfloat16)
    before = launches.total()
    with LiveMemory(gpu=True) as count, torch.no_grad():
        ssd_scan(**inputs)
    assert launches.total() == before
    y = 2 * inputs["x"].numel()
    vectors = 2 * 4 * 4 * 1024  # decay and step of every head, float32
    # and a state for every chunk, at most 512 tokens long
    assert count.peak >= y + vectors + 2 * 2 * 4 * 64 * 64


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.float32, {"selective": 0.50, "full": 0.13, "every_2": 0.60}),
        (torch.bfloat16, {"selective": 0.50, "full": 0.20, "every_2": 0.60}),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_limits_of_checkpointing(random_model, dtype, most, lora):
    model = random_model(SHAPE, dtype=dtype)
    if lora:
        add_lora(model, ["in_proj", "out_proj", "embeddings"], r=8, alpha=16, dropout=0.1)
    model.train()
    none = held(model, "none", TOKENS)
    for mode, limit in most.items():
        assert held(model, mode, TOKENS) <= limit * none, mode


def test_held_is_what_autograd_saves(random_model):
    """In the mode that has no cache of its own, autograd's own list is the truth."""
    model = random_model(dataclasses.replace(SHAPE, n_layers=3))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.set_checkpointing("none")
        hidden, _ = model.backbone(TOKENS, None, None, None, False)
    expected = sum(s.nbytes() for s in saved.values())
    counted_bytes = held(model, "none", TOKENS)
    # besides: hidden, which the loss keeps, and A = -exp(A_log), conv weights' views: small
    n, d = TOKENS.numel(), SHAPE.d_model
    assert counted_bytes - 4 * n * d == pytest.approx(expected - TOKENS.nbytes, rel=0.01)
    del hidden


def test_formula_of_a_block(random_model):
    """bytes = rows of norm's input and output, in_proj, convolution, scan and gated norm."""
    few, more = (
        held(random_model(dataclasses.replace(SHAPE, n_layers=n)), "none", TOKENS) for n in (2, 3)
    )
    c = SHAPE
    numbers = 2 * c.d_model + c.d_in_proj + c.d_conv_channels + 2 * c.d_inner
    assert more - few == pytest.approx(4 * TOKENS.numel() * numbers, rel=0.01)


def test_selective_keeps_in_proj_and_input(random_model):
    few, more = (
        held(random_model(dataclasses.replace(SHAPE, n_layers=n)), "selective", TOKENS)
        for n in (2, 3)
    )
    numbers = SHAPE.d_model + SHAPE.d_in_proj
    assert more - few == pytest.approx(4 * TOKENS.numel() * numbers, rel=0.01)


def test_selective_keeps_an_adapted_out_proj_and_no_adapter_s_product(random_model):
    sizes = []
    for n in (2, 3):
        model = random_model(dataclasses.replace(SHAPE, n_layers=n))
        add_lora(model, ["in_proj", "out_proj"], r=8, alpha=16)
        sizes.append(held(model, "selective", TOKENS))
    numbers = SHAPE.d_model + SHAPE.d_in_proj + SHAPE.d_model + 2 * 8  # and two of A's
    assert sizes[1] - sizes[0] == pytest.approx(4 * TOKENS.numel() * numbers, rel=0.01)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_selective_keeps_the_same_of_quantized_projections(random_model, kind):
    sizes = []
    for quantized in (False, True):
        model = random_model(dataclasses.replace(SHAPE, n_layers=3), dtype=torch.float32)
        for name, p in list(model.named_parameters()):
            if quantized and is_quantized(name):
                quantize(model, name, p.detach(), kind, dtype=torch.float32)
        add_lora(model, ["in_proj", "out_proj"], r=8, alpha=16)
        sizes.append(held(model, "selective", TOKENS))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.001)
