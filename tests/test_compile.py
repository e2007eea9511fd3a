"""Compiled blocks compute what the others do, in one graph each.

Under strategies: test_sharded.py and test_tensor_parallel.py.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from mamba2_train.adapters import add_lora
from mamba2_train.long_context import ExactStep
from mamba2_train.model import Mamba2Mixer


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(small_config, random_model, *, lora, checkpointing="none", n_layers=3):
    model = random_model(small_config(n_groups=2, n_layers=n_layers, use_bias=True))
    if lora:
        add_lora(model, ["in_proj", "out_proj"], r=3, alpha=6, in_full=["conv1d", "A_log"])
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(generator=torch.Generator().manual_seed(0))
    model.set_checkpointing(checkpointing)
    return model


def batch():
    """Two documents and padding."""
    ids = torch.randint(0, 80, (2, 40), generator=torch.Generator().manual_seed(0))
    seq_idx = torch.zeros(2, 40, dtype=torch.int32)
    seq_idx[:, 17:] = 1
    seq_idx[1, 33:] = -1
    return {"input_ids": ids, "labels": ids.masked_fill(seq_idx < 0, -100), "seq_idx": seq_idx}


def gradients(model, step):
    model.zero_grad()
    loss = step(model)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole(model):
    loss = model(**batch(), reduction="sum").loss
    loss.backward()
    return loss.item()


def segments(model):
    step = ExactStep(model, batch(), 16)
    loss, _ = step.forward()
    step.backward(loss)
    return loss.item()


def check(model, backend, step=whole):
    expected_loss, expected = gradients(model, whole)
    model.compile_blocks(backend=backend)
    loss, got = gradients(model, step)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        assert (got[name] - g).norm() < 1e-5 * g.norm() + 1e-7, name
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("lora", "checkpointing"),
    [(False, "none"), (True, "selective"), (True, "every_2")],
)
def test_one_graph_and_the_same_gradients(small_config, random_model, lora, checkpointing):
    model = made(small_config, random_model, lora=lora, checkpointing=checkpointing)
    check(model, "aot_eager")
    # the first block's input needs no gradient under LoRA; blocks that are alike share a graph
    n_kinds = 1 + lora + (checkpointing == "every_2")
    assert counters["stats"]["unique_graphs"] <= n_kinds


def test_in_segments(small_config, random_model):
    check(made(small_config, random_model, lora=True, n_layers=1), "aot_eager", segments)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_by_inductor(small_config, random_model, checkpointing):
    check(made(small_config, random_model, lora=True, checkpointing=checkpointing), "inductor")


def test_a_break_in_a_graph_is_an_error(small_config, random_model, monkeypatch):
    plain = Mamba2Mixer._A

    def broken(mixer):
        torch._dynamo.graph_break()
        return plain(mixer)

    monkeypatch.setattr(Mamba2Mixer, "_A", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        check(made(small_config, random_model, lora=False, n_layers=1), "aot_eager")
