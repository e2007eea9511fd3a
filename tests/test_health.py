"""What is watched beside the training, against the same by other means."""

import types

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from mamba2_train.adapters import add_lora
from mamba2_train.health import (
    N_POSITIONS,
    Health,
    base_norms,
    dt_statistics,
    gradient_norms,
    lora_norms,
)


@pytest.fixture
def adapted(small_config, random_model):
    """Every adapter drawn, in float64, with ranks and alphas that differ by kind."""
    model = random_model(small_config(n_layers=3, dt_limit=(0.01, 0.5)), dtype=torch.float64)
    add_lora(
        model,
        ["in_proj", "out_proj", "embeddings"],
        r=4,
        alpha=6,
        rank_pattern={"out_proj": 3},
        in_full=["conv1d", "A_log"],
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture
def batch(small_config):
    ids = torch.randint(0, 80, (3, 40), generator=torch.Generator().manual_seed(2))
    seq_idx = torch.zeros(3, 40, dtype=torch.int32)
    seq_idx[1, 11:] = 1
    seq_idx[2, 17:] = -1  # padding
    return {"input_ids": ids, "labels": ids, "seq_idx": seq_idx}


def test_gradient_norms_by_kind(adapted, batch):
    adapted(**batch).loss.backward()
    found = {kind: float(norm) for kind, norm in gradient_norms(adapted).items()}
    gradients = {n: p.grad.numpy() for n, p in adapted.named_parameters() if p.grad is not None}
    parts = {
        "in_proj_lora_A": ("in_proj", "lora_A"),
        "out_proj_lora_B": ("out_proj", "lora_B"),
        "embeddings_lora_A": ("embeddings", "lora_embedding_A"),
        "conv1d": ("conv1d",),
        "A_log": ("A_log",),
    }
    for kind, words in parts.items():
        some = [g.ravel() for n, g in gradients.items() if all(word in n for word in words)]
        assert found[kind] == pytest.approx(np.linalg.norm(np.concatenate(some)), rel=1e-12), kind
    assert len(found) == 8
    everything = np.linalg.norm(np.concatenate([g.ravel() for g in gradients.values()]))
    assert np.linalg.norm(list(found.values())) == pytest.approx(everything, rel=1e-12)


def test_lora_norms_are_those_of_the_updates(adapted):
    """peft's own product, whole."""
    found = lora_norms(adapted, base_norms(adapted))
    for kind in ("in_proj", "out_proj", "embeddings"):
        layers = [
            m for n, m in adapted.named_modules() if kind in n and isinstance(m, BaseTunerLayer)
        ]
        updates = [layer.get_delta_weight("default").detach().numpy().ravel() for layer in layers]
        weights = [layer.get_base_layer().weight.detach().numpy().ravel() for layer in layers]
        norm, base = (np.linalg.norm(np.concatenate(x)) for x in (updates, weights))
        assert found[f"lora_norm/{kind}"] == pytest.approx(norm, rel=1e-10)
        assert found[f"lora_share/{kind}"] == pytest.approx(norm / base, rel=1e-6)


def test_quantized_bases_have_norms_too(adapted, monkeypatch):
    """By the weight that a quantized layer multiplies by."""
    from mamba2_train import health

    expected = base_norms(adapted)
    weights = {m: m.weight for m in adapted.modules() if isinstance(m, torch.nn.Linear)}
    monkeypatch.setattr(health, "is_quantized_layer", lambda m: isinstance(m, torch.nn.Linear))
    monkeypatch.setattr(health, "dequantized", weights.__getitem__)
    assert base_norms(adapted) == pytest.approx(expected, rel=1e-6)


def listening(model, batch, **forward):
    health = Health(1)
    health._listen(model, batch["seq_idx"])
    out = model(**batch, **forward)
    health._stop_listening()
    return health, out


def test_dt_and_decay_of_the_first_layer(adapted, batch):
    """softplus, limits and exp in NumPy, of the tokens that are none of the padding."""
    found = dt_statistics(adapted, listening(adapted, batch)[0].dt)
    layer = adapted.backbone.layers[0]
    mixer = layer.mixer
    with torch.no_grad():
        u = layer.norm(adapted.backbone.embeddings(batch["input_ids"]))
        raw = mixer.in_proj(u)[..., -mixer.config.n_heads :][batch["seq_idx"] >= 0].numpy()
        assert len(raw) == 97 < N_POSITIONS
        bias, A = mixer.dt_bias.numpy(), -np.exp(mixer.A_log.numpy())
    dt = np.clip(np.log1p(np.exp(raw + bias)), 0.01, 0.5)
    for name, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert found[f"dt/layer_00_{name}"] == pytest.approx(np.quantile(dt, q), rel=1e-5)
        expected = np.quantile(np.exp(dt * A), q)
        assert found[f"decay/layer_00_{name}"] == pytest.approx(expected, rel=1e-5)
    assert len(found) == 3 * 2 * 3


@pytest.mark.parametrize("mode", ["none", "selective", "full", "every_2"])
def test_listening_changes_no_bit(adapted, batch, mode):
    """And hears each layer once, whatever is computed again for the backward."""
    adapted.set_checkpointing(mode)
    gradients, heard = [], []
    for _ in range(2):
        adapted.zero_grad()
        if gradients:
            health = Health(1)
            health._listen(adapted, batch["seq_idx"])
        loss = adapted(**batch).loss
        loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.grad is not None])
    heard = health.dt
    health._stop_listening()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert [tuple(dt.shape) for dt in heard] == [(N_POSITIONS, 8)] * 3


def test_ordinary_steps_are_left_alone(adapted, batch):
    """No hook on the model, and nothing is read, but in the first batch of the steps asked for."""
    health = Health(3)
    trainer = types.SimpleNamespace(accumulate_grad_batches=2, global_step=0)
    module = types.SimpleNamespace(model=adapted)
    hooked = []
    for index in range(12):
        trainer.global_step = index // 2
        health.on_train_batch_start(trainer, module, batch, index)
        hooks = [m for m in adapted.modules() if m._forward_hooks]
        hooked.append(len(hooks))
        assert health.due == bool(hooks)
        health._stop_listening()
        health.due = False
    assert hooked == [0, 0, 0, 0, 3, 0] * 2
