"""Quantized projections against bitsandbytes' own functions, and against the ordinary model that
holds the weights which those give."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import peft.tuners.lora as peft_lora
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mamba2_train import adapters, quantization
from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained, save_pretrained
from mamba2_train.commands.generate import load_checkpoint
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.model import Mamba2Config, Mamba2LM
from mamba2_train.quantization import count_parameters, dequantize, quantize_4bit, quantize_int8
from mamba2_train.resume import _fingerprint

KINDS = ["nf4", "fp4", "int8"]
TARGETS = ["in_proj", "out_proj", "embeddings", "lm_head"]


def through(weight, kind):
    """What bitsandbytes makes of a weight, there and back."""
    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(codes, scales)
    return bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    )


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(use_bias=True, tie_embeddings=False, vocab_size=96)


@pytest.fixture(scope="module")
def folder(config, random_model, tmp_path_factory):
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_pretrained(random_model(config), folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def ordinary(config, folder, kind):
    """The model with the weights that bitsandbytes would multiply by, in ordinary layers."""
    model = Mamba2LM(config)
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    for name, weight in weights.items():
        if name.endswith(("in_proj.weight", "out_proj.weight")):
            weights[name] = through(weight, kind)
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def adapted(model):
    peft_model = adapters.add_lora(model, TARGETS, r=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return peft_model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (2, 19), generator=torch.Generator().manual_seed(0))


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["in_proj", "out_proj"])
def test_a_layer_is_the_dequantized_one(folder, config, kind, projection):
    """Product, gradient of the input and bias in fp64; one row and many; training and not."""
    weight = load_pretrained(folder).backbone.layers[1].mixer.get_submodule(projection)
    layer = load_pretrained(folder, quantization=kind).backbone.layers[1].mixer
    layer = layer.get_submodule(projection)
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    reference = through(weight.weight.data, kind).double()
    # 4 and 8 bits lose something, and not too much
    assert 1e-3 < difference(reference, weight.weight.double()) < {"int8": 0.01}.get(kind, 0.25)
    for training in (True, False):
        layer.train(training)
        for shape in ((1,), (2, 5)):
            x = torch.randn(*shape, weight.in_features, requires_grad=True)
            y = layer(x)
            y.square().sum().backward()
            z = x.detach().double().requires_grad_()
            truth = torch.nn.functional.linear(z, reference, weight.bias.double())
            truth.square().sum().backward()
            assert difference(y.double(), truth) < 1e-6
            assert difference(x.grad.double(), z.grad) < 1e-6
            with torch.no_grad():  # as in generation
                assert difference(layer(x.detach()).double(), truth) < 1e-6


@pytest.mark.parametrize("shape", [(200, 70), (33, 78), (1, 130), (5000, 80)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(shape, kind):
    """In blocks that end within a row, a last one that is short, more than is done at once."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, kind, dtype=torch.float32, device=None)
    theirs, their_state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    assert torch.equal(packed, theirs)
    assert torch.equal(bnb.dequantize_4bit(packed, state), bnb.dequantize_4bit(theirs, their_state))


def test_eight_bits_are_those_of_bitsandbytes():
    weight = torch.randn(5000, 80, generator=torch.Generator().manual_seed(0))
    theirs = bnb.int8_vectorwise_quant(weight.half())[:2]
    assert all(map(torch.equal, quantize_int8(weight, device=None), theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_the_ordinary_model(folder, config, ids, kind):
    """Of every adapter, in each checkpointing mode; peft took its layers for these weights."""
    plain = ordinary(config, folder, kind)
    assert difference(load_pretrained(folder, quantization=kind)(ids).logits, plain(ids).logits) < (
        1e-5
    )
    adapted(plain)
    plain(ids, labels=ids).loss.backward()
    truth = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for mode in ("none", "selective", "full"):
        model = load_pretrained(folder, quantization=kind)
        adapted(model)
        model.set_checkpointing(mode)
        expected = peft_lora.Linear8bitLt if kind == "int8" else peft_lora.Linear4bit
        for block in model.backbone.layers:
            assert type(block.mixer.in_proj) is type(block.mixer.out_proj) is expected
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert gradients.keys() == truth.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0
            assert difference(gradient, truth[name]) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_adapted(folder, ids, tmp_path, kind, dtype):
    model = load_pretrained(folder, quantization=kind, dtype=dtype)
    peft_model = adapted(model)
    model.eval()
    before = model(ids).logits.float()
    dequantize(model)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    # the same weights to the bit, still with their adapters; peft's layers for bf16 round elsewhere
    assert difference(model(ids).logits.float(), before) <= (dtype == torch.bfloat16) * 2e-2
    merged = peft_model.merge_and_unload()
    assert {type(m.mixer.out_proj) for m in merged.backbone.layers} == {torch.nn.Linear}
    assert difference(merged(ids).logits.float(), before) < tolerance
    save_pretrained(merged, tmp_path / "merged")
    again = load_pretrained(tmp_path / "merged")
    assert difference(again(ids).logits.float(), before) < tolerance


def test_dora_is_dequantized_too(folder, ids):
    for kind in KINDS:
        model = load_pretrained(folder, quantization=kind)
        options = {"target_modules": ["in_proj", "out_proj"], "use_dora": True}
        peft_model = get_peft_model(model, LoraConfig(r=4, **options))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name or "magnitude" in name:
                    p.add_(0.1 * torch.randn_like(p))
        model.eval()
        before = model(ids).logits
        dequantize(model)
        assert difference(peft_model.merge_and_unload()(ids).logits, before) < 1e-5


def test_bfloat16_under_float32_adapters(folder, ids):
    for kind in KINDS:
        model = load_pretrained(folder, quantization=kind, dtype=torch.bfloat16)
        adapted(model)
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        assert trained == {torch.float32}
        out = model(ids, labels=ids, logits_to_keep=3)
        assert (out.loss.dtype, out.logits.dtype) == (torch.float32, torch.bfloat16)
        model.eval()
        with torch.no_grad():  # generation takes no other path than training
            assert torch.equal(model(ids, logits_to_keep=3).logits, out.logits)
        out.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_step_by_step(folder, config, ids, kind):
    with torch.no_grad():
        quantized = load_pretrained(folder, quantization=kind).eval()
        tokens = generate(quantized, ids, max_new_tokens=6)
        logits = quantized(tokens[:, :-1]).logits[:, -6:]
    assert torch.equal(logits.argmax(-1), tokens[:, -6:])
    assert torch.equal(generate(ordinary(config, folder, kind), ids, max_new_tokens=6), tokens)


@pytest.mark.parametrize("layout", ["state-spaces", "mistral"])
def test_other_layouts(random_model, ids, tmp_path, layout):
    # what Mistral's config cannot say stays at its default
    shape = Mamba2Config(d_model=64, n_layers=2, vocab_size=96, n_groups=2, tie_embeddings=False)
    model = random_model(shape)
    save_pretrained(model, tmp_path / "hf")
    if layout == "state-spaces":
        save_pretrained(model, tmp_path / "other", layout=layout)
    else:
        (tmp_path / "other").mkdir()
        params = {"dim": 64, "n_layers": 2, "n_groups": 2, "vocab_size": 96}
        params |= {"tie_embeddings": False, "residual_in_fp32": True}
        (tmp_path / "other" / "params.json").write_text(json.dumps(params))
        weights = {
            "model." + name.replace("embeddings", "embedding"): weight.detach().clone()
            for name, weight in model.state_dict().items()
        }
        save_file(weights, tmp_path / "other" / "consolidated.safetensors")
    loaded = load_pretrained(tmp_path / "other", quantization="nf4")
    assert loaded.backbone.layers[0].mixer.out_proj.weight.dtype == torch.uint8
    assert difference(loaded(ids).logits, ordinary(shape, tmp_path / "hf", "nf4")(ids).logits) < (
        1e-5
    )


def test_an_adapter_finds_its_base_quantized(folder, ids, tmp_path):
    model = load_pretrained(folder, quantization="int8")
    adapters.save_adapter(adapted(model), tmp_path / "adapter", base=str(folder))
    again = load_pretrained(folder, quantization="int8")
    adapters.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)
    model, *_ = load_checkpoint(str(FOLDER / "tiny_base"), quantization="nf4")
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_the_scales_stay_wide(folder, kind):
    model = load_pretrained(folder, quantization=kind).to(torch.bfloat16)
    layer = model.backbone.layers[0].mixer.in_proj
    scales = layer.state.SCB if kind == "int8" else layer.weight.quant_state.state2.absmax
    assert scales.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(folder, ids, kind):
    """Moved there, and quantized there: as on the CPU."""
    truth = load_pretrained(folder, quantization=kind)(ids).logits
    for model in (
        load_pretrained(folder, quantization=kind).cuda(),
        load_pretrained(folder, quantization=kind, device="cuda"),
    ):
        assert difference(model(ids.cuda()).logits.cpu(), truth) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_checksums(folder, kind):
    """4 bits hide half of the parameters; a checksum of the codes alone misses the scales."""
    plain, model = load_pretrained(folder), load_pretrained(folder, quantization=kind)
    assert count_parameters(model) == sum(p.numel() for p in plain.parameters())
    model.requires_grad_(False)
    assert _fingerprint(load_pretrained(folder, quantization=kind).requires_grad_(False)) == (
        before := _fingerprint(model)
    )
    layer = model.backbone.layers[0].mixer.in_proj
    (layer.state.SCB if kind == "int8" else layer.weight.quant_state.state2.absmax)[0] *= 2
    assert _fingerprint(model) != before


PEAK = """
import sys, torch
from mamba2_train.checkpoint import load_pretrained

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])

load_pretrained(sys.argv[2], quantization=sys.argv[3])  # imports, and torch's own buffers
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmHWM")
model = load_pretrained(sys.argv[1], quantization=sys.argv[3], dtype=torch.bfloat16)
peak = memory("VmHWM") - before
print(peak, sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak as Linux counts it")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loading_peaks_at_the_quantized_size_and_one_file(folder, kind, tmp_path_factory):
    """mamba2-130m's projections, half its layers, a small vocabulary: 186 MB in float32."""
    large = tmp_path_factory.getbasetemp() / "large"
    if not large.exists():
        torch.manual_seed(0)
        model = Mamba2LM(Mamba2Config(n_layers=12, vocab_size=512))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02 if p.dim() > 1 else 0.1)
        save_pretrained(model, large, max_shard_size="20MB")
    files = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(files) > 8
    done = subprocess.run(
        [sys.executable, "-c", PEAK, large, folder, kind],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,  # where there is a folder called kernels
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stderr == ""
    peak, size = map(int, done.stdout.split())
    assert size < (0.55 if kind == "nf4" else 1.05) * sum(files) / 4
    assert peak <= 1.3 * size + max(files), f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB"


def test_what_cannot_be_done_says_so(folder, monkeypatch):
    with pytest.raises(UserError, match=r"quantization=nf5 is unknown\. Did you mean 'nf4'"):
        load_pretrained(folder, quantization="nf5")
    with pytest.raises(UserError, match="float64"):
        load_pretrained(folder, quantization="nf4", dtype=torch.float64)
    with pytest.raises(UserError, match="undo the quantization"):
        save_pretrained(load_pretrained(folder, quantization="nf4"), folder.parent / "out")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'bitsandbytes.*quantization=none"):
        load_pretrained(folder, quantization="nf4")


def test_a_library_without_code_for_this_machine(monkeypatch):
    from bitsandbytes import cextension

    broken = cextension.ErrorHandlerMockBNBNativeLibrary("no such file")
    monkeypatch.setattr(cextension, "lib", broken)
    with pytest.raises(UserError, match="has no library for this CPU"):
        quantization.bitsandbytes()


def test_one_warning_is_not_shown(caplog):
    """That of bitsandbytes about a package called kernels; others are."""
    theirs = logging.getLogger("bitsandbytes.backends.cpu.ops")
    theirs.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "x")
    theirs.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
