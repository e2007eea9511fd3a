"""LoRA: the identity at first, a gradient on every target, saved and loaded in peft's format."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from mamba2_train.adapters import add_lora, load_adapter, save_adapter
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize

TARGETS = ["in_proj", "out_proj", "embeddings", "lm_head"]
CONFIG = Mamba2Config(d_model=32, n_layers=2, vocab_size=96, d_state=16, headdim=16)


def base(**changes):
    return initialize(Mamba2LM(Mamba2Config(**(CONFIG.__dict__ | changes))), seed=3)


@pytest.fixture
def ids():
    return torch.randint(0, 96, (2, 19), generator=torch.Generator().manual_seed(0))


def randomised(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_starts_as_the_identity_and_leaves_the_base_frozen(ids, tied):
    plain, model = base(tie_embeddings=tied), base(tie_embeddings=tied)
    add_lora(model, TARGETS, r=4, alpha=8)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_gets_a_gradient_and_changes_the_loss(ids, target):
    model = base(tie_embeddings=False)
    add_lora(model, [target], r=4, alpha=8)
    before = model(ids, labels=ids).loss.item()
    randomised(model)
    loss = model(ids, labels=ids).loss
    assert abs(loss.item() - before) > 1e-4
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any(target in name for name in gradients)
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_gradients_equal_those_of_the_composed_weight(ids):
    """dA and dB against autograd through W + alpha / r * B A, written out here."""
    torch.manual_seed(0)
    model = base().double()
    add_lora(model, ["out_proj"], r=3, alpha=12)
    randomised(model.double())
    model(ids, labels=ids).loss.backward()
    for i in range(CONFIG.n_layers):
        reference = base().double()
        layer = model.backbone.layers[i].mixer.out_proj
        a = layer.lora_A["default"].weight.detach().clone().requires_grad_()
        b = layer.lora_B["default"].weight.detach().clone().requires_grad_()
        products = {}
        for j, block in enumerate(model.backbone.layers):
            m = block.mixer.out_proj
            update = (
                4 * (b @ a)
                if i == j
                else 4 * (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach()
            )
            name = f"backbone.layers.{j}.mixer.out_proj.weight"
            products[name] = m.base_layer.weight.detach() + update
        loss = torch.func.functional_call(reference, products, (ids,), {"labels": ids}).loss
        da, db = torch.autograd.grad(loss, [a, b])
        torch.testing.assert_close(layer.lora_A["default"].weight.grad, da, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.lora_B["default"].weight.grad, db, rtol=1e-9, atol=1e-12)


def test_saved_and_loaded(ids, tmp_path):
    model = base()
    peft_model = add_lora(model, TARGETS, r=4, alpha=8)
    randomised(model)
    save_adapter(peft_model, tmp_path / "adapter", base="somewhere")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM"
    assert written["base_model_name_or_path"] == "somewhere"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in key for key in weights)
    assert sum(w.numel() for w in weights.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    again = base()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_stock_peft_reads_it_on_transformers(ids, tmp_path):
    """Without out_proj, which peft refuses there: the same logits in the stock stack."""
    model = base(tie_embeddings=False)
    save_pretrained(model, tmp_path / "base")
    peft_model = add_lora(model, ["in_proj", "embeddings", "lm_head"], r=4, alpha=8)
    randomised(model)
    save_adapter(peft_model, tmp_path / "adapter", base=str(tmp_path / "base"))
    stock = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    difference = (stock(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert difference < 1e-5


def test_unknown_target_names_what_exists():
    with pytest.raises(UserError, match=r"'x_proj' matches no module.*'in_proj'\?.*embeddings"):
        add_lora(base(), ["x_proj"], r=4, alpha=8)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = base()
    save_adapter(add_lora(model, ["in_proj"], r=4, alpha=8), tmp_path, base="x")
    with pytest.raises(UserError, match="was it trained on another base"):
        load_adapter(base(n_layers=1), tmp_path)


def test_lora_is_float32_over_a_bfloat16_base(ids):
    model = base().bfloat16()
    add_lora(model, TARGETS, r=4, alpha=8)
    randomised(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
