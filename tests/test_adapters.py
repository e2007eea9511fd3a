"""LoRA: the identity at first, a gradient on every target, saved and loaded in peft's format,
merged to the same logits; what is trained beside it, and what is frozen."""

import io
import json

import lightning as L
import peft.tuners.tuners_utils
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from safetensors.torch import load_file

from mamba2_train.adapters import (
    add_lora,
    find_frozen,
    find_targets,
    load_adapter,
    only_merged,
    save_adapter,
)
from mamba2_train.audit import check_gradients, coverage
from mamba2_train.checkpoint import load_pretrained, save_pretrained
from mamba2_train.commands.generate import load_checkpoint
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.merge import merge_adapters
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.optim import build_optimizer
from mamba2_train.schema import AdamWConfig, SchedulerConfig

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
                draw = 0.1 * torch.randn(p.shape, generator=generator)
                # a magnitude is near that of its weights, the rest near zero
                p.copy_(p * (1 + draw) if "magnitude" in name else draw)
    return model


def distance(a, b):
    """Largest difference, relative to the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora and rslora": {"dora": True, "rslora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "pissa_niter_8": {"init": "pissa_niter_8"},
    "olora": {"init": "olora"},
}


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_starts_as_the_identity(ids, variant):
    plain, model = base(tie_embeddings=False), base(tie_embeddings=False)
    add_lora(model, TARGETS, r=4, alpha=8, **VARIANTS[variant])
    assert distance(model(ids).logits, plain(ids).logits) < 1e-5


def test_pissa_takes_the_largest_singular_values():
    plain, model = base(), base()
    add_lora(model, ["in_proj"], r=4, alpha=8, init="pissa")
    for block, original in zip(model.backbone.layers, plain.backbone.layers, strict=True):
        kept = torch.linalg.svdvals(block.mixer.in_proj.base_layer.weight)
        whole = torch.linalg.svdvals(original.mixer.in_proj.weight)
        torch.testing.assert_close(kept[:-4], whole[4:], rtol=1e-3, atol=1e-5)


MERGED = [
    (variant, targets, tied)
    for variant in ("lora", "rslora", "dora", "pissa")
    for targets in (*([t] for t in TARGETS), TARGETS)
    for tied in (True, False)
    if not (variant == "pissa" and tied and "lm_head" in targets)  # refused, see below
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("variant", "targets", "tied"),
    MERGED,
    ids=[f"{v}-{'+'.join(t)}-{'tied' if tied else 'untied'}" for v, t, tied in MERGED],
)
def test_merged_equals_adapter(ids, variant, targets, tied, dtype):
    model = base(tie_embeddings=tied)
    peft_model = add_lora(model, targets, r=4, alpha=8, **VARIANTS[variant])
    randomised(model.to(dtype)).eval()
    expected, generated = model(ids).logits, generate(model, ids, max_new_tokens=4)
    assert distance(expected, base(tie_embeddings=tied).to(dtype)(ids).logits) > 1e-3
    merged = merge_adapters(peft_model)
    assert distance(merged(ids).logits, expected) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(generate(merged, ids, max_new_tokens=4), generated)
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "base" in name]
    assert merged.config.tie_embeddings == (tied and targets in (["in_proj"], ["out_proj"]))
    with pytest.raises(UserError, match="merged already"):
        merge_adapters(peft_model)


def test_a_quantized_weight_is_not_merged_into():
    model = base()
    peft_model = add_lora(model, ["in_proj"], r=4, alpha=8)
    below = model.backbone.layers[1].mixer.in_proj.get_base_layer()
    below.weight = torch.nn.Parameter(below.weight.to(torch.uint8), requires_grad=False)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(UserError, match="dequantize them first"):
        merge_adapters(peft_model)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_merged_weights_by_the_papers_formulas(variant):
    plain, model = base().double(), base().double()
    peft_model = add_lora(model, ["out_proj"], r=4, alpha=6, **VARIANTS[variant])
    layer = randomised(model).backbone.layers[1].mixer.out_proj
    a, b = layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()
    scale = 6 / 2 if variant == "rslora" else 6 / 4
    expected = plain.backbone.layers[1].mixer.out_proj.weight + scale * b @ a
    if variant == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight.clone()
        expected = magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    merged = merge_adapters(peft_model).backbone.layers[1].mixer.out_proj.weight
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", ["lora", "dora", "olora"])
def test_transformers_reads_what_was_merged(ids, tmp_path, variant, tied):
    model = base(tie_embeddings=tied)
    targets = TARGETS[:3]
    in_full = ["conv1d", "A_log", "D", "dt_bias", "norm"]
    peft_model = add_lora(model, targets, r=4, alpha=8, in_full=in_full, **VARIANTS[variant])
    randomised(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.mul_(1.1).add_(0.01)
    expected = model(ids).logits
    save_pretrained(merge_adapters(peft_model), tmp_path)
    stock = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert distance(stock(ids).logits, expected) < 1e-5
    assert distance(load_pretrained(tmp_path)(ids).logits, expected) < 1e-5


def test_bfloat16_is_rounded_once(ids):
    """Merged in bf16 = merged in fp32 from the same weights, then rounded."""
    model, exact = base().bfloat16(), base().bfloat16().float()
    adapters = [add_lora(m, TARGETS, r=4, alpha=8) for m in (model, exact)]
    for m in (model, exact):
        randomised(m)
    merged, wide = (merge_adapters(p).state_dict() for p in adapters)
    assert all(torch.equal(w.bfloat16(), merged[name].bfloat16()) for name, w in wide.items())
    assert merged["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["pissa", "olora", "pissa_niter_8"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_an_adapter_taken_out_of_the_base_is_saved_for_the_base(ids, tmp_path, variant, rslora):
    """The truth: our model, whose base has changed; read on the base as it was, by peft too."""
    model = base(tie_embeddings=False)
    save_pretrained(model, tmp_path / "base")
    peft_model = add_lora(
        model,
        ["in_proj", "embeddings"],
        r=4,
        alpha=8,
        rslora=rslora,
        rank_pattern={r"layers\.1\.mixer\.in_proj": 6},
        alpha_pattern={r"layers\.0\.mixer\.in_proj": 5, "embeddings": 3},
        **VARIANTS[variant],
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    expected = model(ids).logits
    save_adapter(peft_model, tmp_path / "adapter", base=str(tmp_path / "base"))
    again = base(tie_embeddings=False)
    load_adapter(again, tmp_path / "adapter")
    assert distance(again(ids).logits, expected) < 1e-5
    stock = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    assert distance(stock(ids).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"targets": ["lm_head"]}, "tied"),
        ({}, {"targets": ["in_proj"], "r": 33}, "at most 32"),
        ({}, {"targets": ["in_proj"], "rank_pattern": {"in_proj": 40}}, "cannot take rank 40"),
    ],
)
def test_what_pissa_cannot_decompose_is_refused(change, options, message):
    with pytest.raises(UserError, match=message):
        add_lora(base(**change), init="pissa", alpha=8, **({"r": 4} | options))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_stock_peft_reads_out_proj_too_once_its_guard_is_lifted(
    ids, tmp_path, variant, monkeypatch
):
    model = base(tie_embeddings=False)
    save_pretrained(model, tmp_path / "base")
    peft_model = add_lora(model, TARGETS, r=4, alpha=8, **VARIANTS[variant])
    randomised(model)
    save_adapter(peft_model, tmp_path / "adapter", base=str(tmp_path / "base"))
    stock = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="out_proj"):
        PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert "out_proj" in only_merged(peft_model)[0]
    monkeypatch.setattr(
        peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None
    )
    stock = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    assert distance(stock(ids).logits, model(ids).logits) < 1e-5


def test_layers_and_patterns_choose_modules_ranks_and_scales(ids):
    model = base(n_layers=4)
    add_lora(
        model,
        ["embeddings", "out_proj", r"layers\.[0-2]\.mixer\.in_proj"],
        r=4,
        alpha=8,
        layers=[1, 2, 3],
        rank_pattern={r"layers\.2\.mixer\.\w+": 2},
        alpha_pattern={"out_proj": 5},
    )
    got = {
        name.removeprefix("backbone."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert got == {
        "embeddings": (4, 2),
        "layers.1.mixer.in_proj": (4, 2),
        "layers.2.mixer.in_proj": (2, 4),
        "layers.1.mixer.out_proj": (4, 1.25),
        "layers.2.mixer.out_proj": (2, 2.5),
        "layers.3.mixer.out_proj": (4, 1.25),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": [r"layers\.7\.mixer\.in_proj"]}, r"matches no module.*layers.*in_proj"),
        ({"targets": ["conv1d"]}, "'conv1d' matches no module"),
        ({"targets": ["proj"]}, "'proj' matches no module.*in_proj"),
        ({"targets": ["in_proj"], "layers": [0, 2]}, "layer 2 does not exist.*0 to 1"),
        ({"targets": ["in_proj"], "patterns": ["out_proj"]}, "'out_proj' matches no adapted"),
    ],
)
def test_what_matches_nothing_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        find_targets(base(), **options)


IN_FULL = ["conv1d", "A_log", "D", "dt_bias", "norm"]


def test_what_is_trained_in_full_is_saved_beside_the_adapter(ids, tmp_path):
    model = base().bfloat16()
    peft_model = add_lora(model, ["in_proj"], r=4, alpha=8, in_full=IN_FULL)
    randomised(model)
    model(ids, labels=ids).loss.backward()
    full = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert len(full) == 2 * 7 + 1  # two of conv1d, two norms, and the last one
    assert {p.dtype for p in full.values()} == {torch.float32}  # a small update must not be lost
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    save_adapter(peft_model, tmp_path, base="x")
    stored = load_file(tmp_path / "trained_in_full.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in full.items())
    assert stored.keys() == full.keys()
    assert stored.keys() <= base().state_dict().keys()  # which are transformers'
    assert any("trained_in_full" in reason for reason in only_merged(peft_model))
    again = base().bfloat16()
    load_adapter(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        generate(again, ids, max_new_tokens=3), generate(model, ids, max_new_tokens=3)
    )


def test_training_goes_on_from_a_saved_adapter(ids, tmp_path):
    """The same steps as without the pause: everything that was trained is trained again."""

    def step(model):
        for p in model.parameters():
            p.grad = None
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.sub_(0.1 * p.grad)

    model = base()
    peft_model = add_lora(model, TARGETS, r=4, alpha=8, in_full=["norm", "A_log"])
    step(model)
    save_adapter(peft_model, tmp_path, base="x")
    again = base()
    load_adapter(again, tmp_path, trainable=True)
    for m in (model, again):
        step(m)
    assert torch.equal(again(ids).logits, model(ids).logits)
    before = load_file(tmp_path / "adapter_model.safetensors")
    save_adapter(peft_model, tmp_path / "later", base="x")
    after = load_file(tmp_path / "later" / "adapter_model.safetensors")
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_several_adapters_are_added(ids, tmp_path):
    """Each layer's output is the base's plus what each adapter alone adds to it."""
    save_pretrained(base(tie_embeddings=False), tmp_path / "base")
    alone = []
    for i, variant in enumerate(["lora", "rslora"]):
        model = base(tie_embeddings=False)
        peft_model = add_lora(model, TARGETS[: 3 + i], r=2 + i, alpha=8, **VARIANTS[variant])
        randomised(model, seed=i)
        save_adapter(peft_model, tmp_path / str(i), base=str(tmp_path / "base"))
        alone.append(merge_adapters(peft_model).double().state_dict())
    plain = load_pretrained(tmp_path / "base", dtype=torch.float64)
    summed = {name: alone[0][name] + alone[1][name] - w for name, w in plain.state_dict().items()}
    expected = torch.func.functional_call(plain, summed, (ids,)).logits

    model = base(tie_embeddings=False)
    peft_model = load_adapter(model, tmp_path / "0", tmp_path / "1")
    assert distance(model(ids).logits.double(), expected) < 1e-5
    assert distance(merge_adapters(peft_model)(ids).logits.double(), expected) < 1e-5


def test_only_adapters_of_one_base_have_a_sum(tmp_path):
    for name, shown in (("a", "x"), ("b", "y")):
        save_adapter(add_lora(base(), ["in_proj"], r=2, alpha=4), tmp_path / name, base=shown)
    with pytest.raises(UserError, match="these adapters are of x and y"):
        load_checkpoint([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(UserError, match="is no adapter"):
        load_checkpoint([str(tmp_path / "a"), str(tmp_path)])
    save_adapter(add_lora(base(), ["in_proj"], r=2, alpha=4, dora=True), tmp_path / "a", base="y")
    with pytest.raises(UserError, match="is DoRA"):
        load_adapter(base(), tmp_path / "b", tmp_path / "a")
    for name in ("a", "b"):
        peft_model = add_lora(base(), ["in_proj"], r=2, alpha=4, in_full=["D"])
        save_adapter(peft_model, tmp_path / name, base="x")
    with pytest.raises(UserError, match=r"each trained backbone.layers.0.mixer.D in full"):
        load_adapter(base(), tmp_path / "a", tmp_path / "b")


def test_frozen_parts_stay():
    model = base(tie_embeddings=False)
    frozen = find_frozen(model, ["embeddings", "norm", r"layers\.1\.mixer\.in_proj"], [0])
    names = {n for n, p in model.named_parameters() if any(p is f for f in frozen)}
    expected = {n for n, _ in model.named_parameters() if n.startswith("backbone.layers.0.")}
    expected |= {
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        "backbone.layers.1.norm.weight",
        "backbone.layers.1.mixer.norm.weight",
        "backbone.layers.1.mixer.in_proj.weight",
    }
    assert names == expected


@pytest.mark.parametrize(
    ("names", "layers", "message"),
    [
        (["embedings"], None, r"'embedings' matches no parameter. Did you mean 'embeddings'\?"),
        ([], [2], "layer 2 does not exist"),
        (["backbone", "lm_head"], None, "nothing to train"),
    ],
)
def test_faults_of_freezing(names, layers, message):
    with pytest.raises(UserError, match=message):
        find_frozen(base(), names, layers)


def test_a_tied_head_is_frozen_by_either_name():
    model = base()
    assert find_frozen(model, ["lm_head"])[0] is model.backbone.embeddings.weight


def test_the_audit_counts_what_is_trained():
    model = base()
    add_lora(model, ["in_proj"], r=4, alpha=8, layers=[1], in_full=["norm"])
    text = io.StringIO()
    Console(width=120, file=text).print(coverage(model))
    rows = {line.split()[0]: line for line in text.getvalue().splitlines()}
    assert f"{4 * (32 + CONFIG.d_in_proj):,}" in rows["in_proj"]
    assert "LoRA, r 4" in rows["in_proj"]
    assert "1 of 2" in rows["in_proj"]
    everything = sum(p.numel() for p in model.parameters())
    assert f"{4 * (32 + CONFIG.d_in_proj) / everything:.2%}" in rows["in_proj"]
    assert "frozen" in rows["out_proj"]
    assert "0 of 2" in rows["out_proj"]
    assert "in full" in rows["norm"]
    assert f"{2 * (32 + 64) + 32}" in rows["norm"]


def test_every_tensor_must_get_a_gradient(ids):
    model = base(tie_embeddings=False)
    add_lora(model, TARGETS, r=4, alpha=8, in_full=IN_FULL)
    model(ids, labels=ids).loss.backward()
    check_gradients(model)  # A, whose B is still zero, is excused

    # what fused kernels do: they read the weight and never call the module
    layer = model.backbone.layers[1].mixer.out_proj
    layer.forward = lambda x: F.linear(x, layer.base_layer.weight)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match=r"2 of \d+ .*layers\.1\.mixer\.out_proj\.lora_"):
        check_gradients(model)


def test_a_gradient_of_zero_is_found_once_nothing_excuses_it(ids):
    model = base()
    add_lora(model, ["in_proj"], r=4, alpha=8)
    randomised(model)
    model(ids, labels=ids).loss.backward()
    check_gradients(model)
    model.backbone.layers[0].mixer.in_proj.lora_A["default"].weight.grad.zero_()
    with pytest.raises(UserError, match=r"1 of 4.*in_proj\.lora_A"):
        check_gradients(model)


def test_lora_plus_gives_b_its_own_rate():
    """As peft's optimizer does; the embeddings, for which it has a setting apart, stay with A."""
    model = base(tie_embeddings=False)
    peft_model = add_lora(model, TARGETS, r=4, alpha=8)
    config = AdamWConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    ours = build_optimizer(model, config, lora_plus_ratio=16)
    theirs = create_loraplus_optimizer(
        peft_model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16,
        loraplus_lr_embedding=1e-3,
    )

    def rates(optimizer):
        return {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}

    assert rates(ours) == rates(theirs)
    assert len(set(rates(ours).values())) == 2
    assert ours.param_groups[0]["lr"] == 1e-3  # the one that is logged


def test_a_run_stops_in_its_first_step_where_a_target_is_read_past(ids):
    model = base()
    add_lora(model, ["in_proj", "out_proj"], r=4, alpha=8)
    layer = model.backbone.layers[0].mixer.out_proj
    layer.forward = lambda x: F.linear(x, layer.base_layer.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = AdamWConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    scheduler = SchedulerConfig(kind="constant", warmup_fraction=0.0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = [{"input_ids": ids, "labels": ids, "seq_idx": torch.zeros_like(ids).int()}] * 2
    with pytest.raises(UserError, match=r"2 of 8 .*layers\.0\.mixer\.out_proj"):
        trainer.fit(
            Mamba2Module(model, optimizer, scheduler, total_steps=2),
            torch.utils.data.DataLoader(rows, batch_size=None),
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_draws_the_same_bits(variant):
    """The base too, of which PiSSA and OLoRA take their part: a run that resumes needs it."""
    first, second = base(tie_embeddings=False), base(tie_embeddings=False)
    add_lora(first, TARGETS, r=4, alpha=8, seed=1, **VARIANTS[variant])
    torch.rand(7)
    add_lora(second, TARGETS, r=4, alpha=8, seed=1, **VARIANTS[variant])
    state = second.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in first.state_dict().items())
