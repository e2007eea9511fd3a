"""Every layout in and out, against transformers holding the same tensors; every refusal.

The state-spaces and Mistral files are written here, key by key as their owners write them, and
never with our own exporter.
"""

import errno
import io
import json
import math
import os
import re
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers
from huggingface_hub import errors as hub
from peft import LoraConfig, get_peft_model

from mamba2_train import checkpoint
from mamba2_train.checkpoint import load_config, load_pretrained, save_pretrained
from mamba2_train.commands.generate import load_checkpoint
from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2Config

IDS = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(small_config, random_model):
    return random_model(small_config(n_groups=2, tie_embeddings=False))


@pytest.fixture
def tied(small_config, random_model):
    return random_model(small_config(tie_embeddings=True))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def edit(folder, file="config.json", **values):
    """Change a JSON file; None removes a key."""
    content = json.loads((folder / file).read_text()) | values
    content = {key: value for key, value in content.items() if value is not None}
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_transformers_wrote(
    tmp_path, small_config, random_model, transformers_model, tie, shard
):
    config = small_config(
        tie_embeddings=tie,
        n_groups=2,
        use_bias=True,
        dt_limit=(0.01, 0.5),
        norm_eps=1e-4,
        residual_in_fp32=False,
    )
    theirs = transformers_model(config, random_model(config).state_dict()).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    model = load_pretrained(tmp_path)
    assert model.config == config == load_config(str(tmp_path))
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tie
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "20KB", 10_000])
def test_transformers_reads_what_we_wrote(tmp_path, small_config, random_model, tie, shard):
    fields = {"n_groups": 4, "use_conv_bias": False, "dt_limit": (0.02, 0.4), "norm_eps": 1e-4}
    model = random_model(small_config(tie_embeddings=tie, **fields))
    save_pretrained(model, tmp_path / "a" / "b", max_shard_size=shard)
    files = sorted(p.name for p in (tmp_path / "a" / "b").iterdir())
    assert (len(files) == 2) == (shard == "5GB"), files
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a" / "b", output_loading_info=True
    )
    assert type(theirs) is transformers.Mamba2ForCausalLM
    assert not any(report.values()), report
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert same(load_pretrained(tmp_path / "a" / "b"), model)


def test_what_is_written_for_transformers(tmp_path, tied):
    save_pretrained(tied, tmp_path, token_ids={"eos": 0, "pad": 3})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 80,
        "state_size": 8,
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": 8,
        "num_heads": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "time_step_limit": [0.0, math.inf],
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_conv_bias": True,
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_act": "silu",
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 3,
    }
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert "lm_head.weight" not in set(file.keys())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (0, 3, None)
    assert theirs.dtype == torch.float32
    assert tuple(theirs.time_step_limit) == (0.0, math.inf)
    with pytest.raises(ValueError, match="its names are bos, eos and pad"):
        save_pretrained(tied, tmp_path, token_ids={"eos_token_id": 0})


def test_reads_pytorch_bin_single_sharded_and_legacy(tmp_path, model):
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = model.state_dict()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same(load_pretrained(tmp_path), model)
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(load_pretrained(tmp_path), model)
    (tmp_path / "pytorch_model.bin").unlink()
    index = {name: f"pytorch_model-{len(name) % 2}.bin" for name in tensors}
    for file in set(index.values()):
        torch.save({n: tensors[n] for n in tensors if index[n] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(load_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "limit",
    [
        "[0.0, Infinity]",
        '[0.0, "Infinity"]',
        '[0, "inf"]',
        '[0.0, {"__float__": "Infinity"}]',
        None,
    ],
)
def test_every_way_to_say_that_dt_has_no_limit(tmp_path, model, limit):
    save_pretrained(model, tmp_path)
    edit(tmp_path, time_step_limit=None)
    if limit is not None:
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text[:-1] + f', "time_step_limit": {limit}}}')
    assert load_config(tmp_path).dt_limit == (0.0, math.inf)


def test_what_an_hf_config_leaves_out_is_transformers_default(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mamba2", "hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 9}'
    )
    theirs = transformers.Mamba2Config(hidden_size=256, num_heads=8, num_hidden_layers=1)
    ours = load_config(tmp_path)
    assert ours.n_groups == theirs.n_groups == 8
    assert ours.tie_embeddings == theirs.tie_word_embeddings == False  # noqa: E712
    assert (ours.d_state, ours.d_conv, ours.expand) == (128, 4, 2)
    assert (ours.chunk_size, ours.norm_eps) == (theirs.chunk_size, theirs.layer_norm_epsilon)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_on_load(tmp_path, model, stored, dtype):
    save_pretrained(model.to(stored), tmp_path)
    loaded = load_pretrained(tmp_path, dtype=dtype, device="cpu")
    want = dtype or stored
    for name, parameter in loaded.named_parameters():
        small = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        expected = torch.promote_types(want, torch.float32) if small else want
        assert parameter.dtype == expected, name
        assert parameter.is_contiguous()
        assert parameter.data_ptr() % 64 == 0, f"{name} is not aligned"
        torch.testing.assert_close(parameter, model.get_parameter(name).to(parameter.dtype))


def test_mixed_dtypes_survive_a_round_trip(tmp_path, model):
    model.to(torch.bfloat16)
    for layer in model.backbone.layers:
        for name in ("A_log", "D", "dt_bias"):
            parameter = getattr(layer.mixer, name)
            parameter.data = torch.randn(parameter.shape)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_pretrained(tmp_path)
    assert same(loaded, model)
    assert loaded.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_a_loaded_model_does_not_depend_on_its_files(tmp_path, model):
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)  # in place: a mapping would see it
    assert same(loaded, model)


NORMAL = torch.Generator().manual_seed(1)


def draw(*shape, about=0.0, scale=0.3):
    return about + scale * torch.randn(*shape, generator=NORMAL)


def published_tensors(vocab_size, n_groups, prefix, *, conv_bias=True):
    """d_model 64, 2 layers, 2 heads of 64, d_state 128: what the defaults make of them."""
    channels = 128 + 2 * n_groups * 128
    tensors = {f"{prefix}backbone.embedding.weight": draw(vocab_size, 64)}
    for i in (0, 1):
        layer = f"{prefix}backbone.layers.{i}."
        tensors[layer + "norm.weight"] = draw(64, about=1.0)
        tensors[layer + "mixer.dt_bias"] = draw(2, about=-2.0)
        tensors[layer + "mixer.A_log"] = draw(2)
        tensors[layer + "mixer.D"] = draw(2, about=1.0)
        tensors[layer + "mixer.in_proj.weight"] = draw(128 + channels + 2, 64, scale=0.1)
        tensors[layer + "mixer.conv1d.weight"] = draw(channels, 1, 4)
        if conv_bias:
            tensors[layer + "mixer.conv1d.bias"] = draw(channels)
        tensors[layer + "mixer.norm.weight"] = draw(128, about=1.0)
        tensors[layer + "mixer.out_proj.weight"] = draw(64, 128, scale=0.1)
    tensors[f"{prefix}backbone.norm_f.weight"] = draw(64, about=1.0)
    return tensors


def truth(tensors, prefix, **config):
    """transformers' logits of the same tensors."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 64}
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shape, **config))
    renamed = {}
    for name, tensor in tensors.items():
        name = name[len(prefix) :]
        if name == "backbone.embedding.weight":
            name = "backbone.embeddings.weight"
        renamed[name] = tensor
    theirs.load_state_dict(renamed)
    return theirs.eval()(IDS).logits


STATE_SPACES = {
    "d_model": 64,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 53,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


@pytest.fixture
def state_spaces(tmp_path):
    """A folder as mamba_ssm's save_pretrained writes it, and its tensors."""
    tensors = published_tensors(64, 1, "")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(STATE_SPACES))
    return tmp_path, tensors


def test_reads_state_spaces(state_spaces):
    folder, tensors = state_spaces
    model = load_pretrained(folder)
    assert model.config == Mamba2Config(d_model=64, n_layers=2, vocab_size=64, tie_embeddings=True)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    expected = truth(tensors, "", vocab_size=64, n_groups=1, tie_word_embeddings=True)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_reads_state_spaces_overrides(tmp_path):
    tensors = published_tensors(56, 2, "", conv_bias=False)
    tensors["lm_head.weight"] = draw(56, 64)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    ssm_cfg = {"layer": "Mamba2", "ngroups": 2, "chunk_size": 8, "conv_bias": False}
    ssm_cfg |= {"dt_limit": [0.05, 0.3], "A_init_range": [1, 16], "use_mem_eff_path": True}
    config = STATE_SPACES | {"ssm_cfg": ssm_cfg, "tie_embeddings": False}
    del config["pad_vocab_size_multiple"]  # mamba_ssm's default is 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path)
    expected = truth(
        tensors,
        "",
        vocab_size=56,
        n_groups=2,
        chunk_size=8,
        use_conv_bias=False,
        time_step_limit=(0.05, 0.3),
        tie_word_embeddings=False,
    )
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "multiple", "built"), [(50_277, 16, 50_288), (50_280, 8, 50_280)])
def test_state_spaces_vocabulary_is_padded(tmp_path, size, multiple, built):
    config = STATE_SPACES | {"vocab_size": size, "pad_vocab_size_multiple": multiple}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).vocab_size == built


MISTRAL = {
    "dim": 64,
    "n_layers": 2,
    "n_groups": 2,
    "vocab_size": 64,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
}


@pytest.fixture
def mistral(tmp_path):
    tensors = published_tensors(64, 2, "model.")
    tensors["model.lm_head.weight"] = draw(64, 64)
    safetensors.torch.save_file(tensors, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL))
    return tmp_path, tensors


def test_reads_mistral(mistral):
    folder, tensors = mistral
    model = load_pretrained(folder, dtype=torch.float32)
    assert model.config == Mamba2Config(
        d_model=64, n_layers=2, vocab_size=64, n_groups=2, tie_embeddings=False
    )
    expected = truth(tensors, "model.", vocab_size=64, n_groups=2, tie_word_embeddings=False)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_mistral_folder_brings_its_tokenizer(mistral):
    """As it is downloaded: weights, params.json and a SentencePiece model."""
    folder, _ = mistral
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat", "that hat", "a hot tea"] * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=30,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model.v3").write_bytes(written.getvalue())
    truth = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    model, tokenizer, _ = load_checkpoint(str(folder))
    assert model.config.vocab_size == 64
    assert tokenizer.encode("that tea") == [truth.bos_id(), *truth.encode("that tea")]
    assert tokenizer.eos_token_id == truth.eos_id()


def test_a_folder_with_two_layouts_reads_the_one_whose_weights_are_there(mistral, model):
    folder, _ = mistral
    save_pretrained(model, folder / "other")
    shutil.copy(folder / "other" / "config.json", folder)
    assert load_pretrained(folder).config.d_model == 64  # params.json and consolidated
    shutil.copy(folder / "other" / "model.safetensors", folder)
    assert same(load_pretrained(folder), model)


@pytest.mark.parametrize("tie", [True, False])
def test_writes_state_spaces(tmp_path, small_config, random_model, tie):
    config = small_config(tie_embeddings=tie, n_groups=2, dt_limit=(0.01, 0.5))
    model = random_model(config)
    save_pretrained(model, tmp_path, layout="state-spaces")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert json.loads((tmp_path / "config.json").read_text()) == STATE_SPACES | {
        "d_model": 32,
        "vocab_size": 80,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": tie,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": 8,
            "headdim": 8,
            "ngroups": 2,
            "chunk_size": 16,
            "dt_limit": [0.01, 0.5],
        },
    }
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(tensors) == set(published_tensors(8, 1, "")) | {"lm_head.weight"}
    assert torch.equal(tensors["backbone.embedding.weight"], model.backbone.embeddings.weight)
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    assert same(load_pretrained(tmp_path), model)


def test_a_setting_that_state_spaces_cannot_say_is_not_lost(tmp_path, small_config, random_model):
    with pytest.raises(UserError, match=r"cannot say norm_eps=0\.001; save as huggingface"):
        save_pretrained(random_model(small_config(norm_eps=1e-3)), tmp_path, "state-spaces")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]: a hybrid with attention"),
        ({"d_intermediate": 128}, "d_intermediate is 128: a hybrid with MLP"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer is None: these are Mamba1 layers"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer is 'Mamba1': these are Mamba1"),
        ({"ssm_cfg": None}, "ssm_cfg.layer is None: these are Mamba1 layers"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim is True: a variant"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "ssm_cfg.d_ssm is 64"),
        ({"ssm_cfg": {"layer": "Mamba2", "warp": 9}}, "ssm_cfg.warp is set: a variant"),
        ({"ssm_cfg": {"layer": "Mamba2", "ngroups": 3}}, "n_groups 3 does not divide the 2 heads"),
        ({"rms_norm": False}, "rms_norm is False: LayerNorm is not built"),
        ({"d_model": None, "ssm_cfg": {"layer": "Mamba2"}}, "d_model is missing"),
        ({"d_model": "64"}, "d_model is '64'; it should be of type int"),
        ({"n_layer": 2.5}, "n_layer is 2.5; it should be of type int"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
    ],
)
def test_state_spaces_refusals(state_spaces, change, message):
    folder, _ = state_spaces
    edit(folder, **change)
    for read in (load_config, load_pretrained):
        with pytest.raises(UserError, match=message) as error:
            read(folder)
        assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba': only Mamba2 is built, no Mamba1"),
        ({"model_type": "llama"}, "model_type is 'llama': only Mamba2"),
        ({"model_type": "bamba"}, "model_type is 'bamba': only Mamba2"),
        ({"model_type": None}, "describes no Mamba2 model: it has neither model_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only silu"),
        ({"quantization_config": {"load_in_4bit": True}}, "load the original weights"),
        ({"num_heads": 7}, "num_heads is 7, but expand .* is 8"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"head_dim": 24}, "headdim 24 does not divide"),
        ({"time_step_limit": [0.1]}, r"time_step_limit is \[0.1\]; it should be two numbers"),
        ({"time_step_limit": [0.5, 0.1]}, "it should be 0 <= low <= high"),
        ({"time_step_limit": [0.0, "NaN"]}, "it should be 0 <= low <= high"),
        ({"use_bias": 1}, "use_bias is 1; it should be of type bool"),
    ],
)
def test_hf_refusals(tmp_path, model, change, message):
    save_pretrained(model, tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "transformer"}, "model_type is 'transformer': only Mamba2"),
        ({"n_heads": 8}, "n_heads is 8: attention heads"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"n_groups": None}, "n_groups is missing"),
    ],
)
def test_mistral_refusals(mistral, change, message):
    folder, _ = mistral
    edit(folder, "params.json", **change)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_weights_that_do_not_fit_are_named(tmp_path, model):
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for layer in (0, 1):
        for name in ("A_log", "D"):
            del tensors[f"backbone.layers.{layer}.mixer.{name}"]
    tensors["backbone.layers.0.mixer.dt_bias"] = torch.zeros(9)
    tensors["model.extra"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, file)
    message = (
        r"do not fit the config: 4 missing: backbone\.layers\.0\.mixer\.A_log, .* and 1 more; "
        r"1 unexpected: extra; 1 mis-shaped: backbone\.layers\.0\.mixer\.dt_bias \(9,\) instead of "
        r"\(8,\); check that both belong to the same model"
    )
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_an_untied_model_needs_its_head(tmp_path, tied):
    save_pretrained(tied, tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"1 missing: lm_head\.weight"):
        load_pretrained(tmp_path)


def test_a_tied_head_must_equal_the_embeddings(tmp_path, model):
    save_pretrained(model, tmp_path)  # untied, with a head of its own
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(
        UserError, match=r"ties lm_head.weight to the embeddings, but the two differ"
    ):
        load_pretrained(tmp_path)


def test_damaged_files_are_named(tmp_path, model):
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"not weights at all"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged, cut off") as error:
            load_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="git-lfs pointer; run `git lfs pull`"):
        load_pretrained(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_damaged_and_dangerous_pickles_are_refused(state_spaces):
    folder, tensors = state_spaces
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"not weights at all"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged, cut off") as error:
            load_pretrained(folder)
        assert "\n" not in str(error.value)
    torch.save({"backbone.embedding.weight": Evil()}, file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged, cut off or no file of"):
        load_pretrained(folder)
    for other in (list(tensors.values()), {"model": tensors}):
        torch.save(other, file)
        with pytest.raises(UserError, match="no dictionary of tensors"):
            load_pretrained(folder)


def test_missing_shard_is_named(tmp_path, model):
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    shard = max(tmp_path.glob("model-*"))
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {re.escape(shard.name)}"):
        load_pretrained(tmp_path)


def test_what_is_no_checkpoint(tmp_path, monkeypatch, model):
    with pytest.raises(UserError, match=r"holds neither config.json nor params.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": ')
    with pytest.raises(UserError, match=r"config\.json is not readable JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a JSON list, not an object"):
        load_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_pretrained(tmp_path / "config.json")
    save_pretrained(model, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights; expected one of model\.safetensors, "):
        load_pretrained(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for path in ("./nothing/here", "/nowhere/at/all", "nothing", "a/b/c", "../x"):
        with pytest.raises(UserError, match=r"no folder .*give one that exists, or owner/name"):
            load_pretrained(path)
    save_pretrained(model, tmp_path / "home" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert same(load_pretrained("~/b"), model)


def test_an_id_that_is_neither_here_nor_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"'someone/some-model' is neither a folder nor in the hub's cache.*`hf download"
    with pytest.raises(UserError, match=message):
        load_pretrained("someone/some-model")
    with pytest.raises(UserError, match="'someone/some-model' at revision 'v2' is neither"):
        load_config("someone/some-model", revision="v2")
    with pytest.raises(UserError, match="revision 'v2' is for models on the hub"):
        load_pretrained(tmp_path, revision="v2")


def test_reads_the_hub_cache_offline_at_the_revision_asked(tmp_path, monkeypatch, model, tied):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--some-model"
    for reference, commit, weights in (("main", "a" * 40, model), ("v2", "b" * 40, tied)):
        save_pretrained(weights, repository / "snapshots" / commit, max_shard_size="20KB")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    assert same(load_pretrained("someone/some-model"), model)
    assert same(load_pretrained("someone/some-model", revision="v2"), tied)
    assert load_config("someone/some-model", revision="b" * 40) == tied.config


def fake_hub(monkeypatch, snapshots, remote):
    """`snapshot_download` from the folder `remote`; returns the calls it saw."""
    calls = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        snapshots.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                shutil.copy(file, snapshots)
        return str(snapshots)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_downloads_only_what_it_needs_and_from_one_commit(tmp_path, monkeypatch, model):
    save_pretrained(model, tmp_path / "remote", max_shard_size="20KB")
    torch.save({}, tmp_path / "remote" / "pytorch_model.bin")
    (tmp_path / "remote" / "README.md").write_text("hello")
    snapshots = tmp_path / ("c" * 40)
    calls = fake_hub(monkeypatch, snapshots, tmp_path / "remote")
    load_config("a/b", revision="main")
    assert [p.name for p in snapshots.iterdir()] == ["config.json"]
    assert same(load_pretrained("a/b", revision="main"), model)
    assert not {"README.md", "pytorch_model.bin"} & {p.name for p in snapshots.iterdir()}
    assert [call[1] for call in calls[:2]] == ["main", "main"]
    assert {call[1] for call in calls[2:]} == {"c" * 40}


def test_a_model_that_is_not_built_is_refused_before_its_weights_download(
    tmp_path, monkeypatch, model
):
    save_pretrained(model, tmp_path / "remote")
    edit(tmp_path / "remote", model_type="llama")
    snapshots = tmp_path / ("c" * 40)
    fake_hub(monkeypatch, snapshots, tmp_path / "remote")
    with pytest.raises(UserError, match="model_type is 'llama'"):
        load_pretrained("a/b")
    assert [p.name for p in snapshots.iterdir()] == ["config.json"]


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub.GatedRepoError), "'a/b' may be downloaded with consent only"),
        (hub_error(hub.RepositoryNotFoundError), "'a/b' is neither a folder nor on the hub"),
        (hub_error(hub.RevisionNotFoundError), "'a/b' at revision 'v' does not exist on the hub"),
        (OSError(errno.ENOSPC, "No space left on device"), "could not be downloaded: .*No space"),
        (hub_error(hub.HfHubHTTPError), "could not be downloaded: first line$"),
    ],
)
def test_hub_errors_are_one_line_with_a_cure(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        load_pretrained("a/b", revision=None if "'v'" not in message else "v")


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_checkpoint_is_replaced_and_its_other_files_stay(tmp_path, model, tied):
    path = tmp_path / "model"
    save_pretrained(model, path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "runs").mkdir()
    (path / "runs" / "config.json").write_text("mine")
    (path / "link").symlink_to("tokenizer.json")
    save_pretrained(tied, path)
    assert same(load_pretrained(path), tied)
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*")) == [
        "config.json",
        "link",
        "model.safetensors",
        "runs",
        "runs/config.json",
        "tokenizer.json",
    ]
    assert (path / "runs" / "config.json").read_text() == "mine"
    assert (path / "link").is_symlink()
    save_pretrained(model, path, "state-spaces")
    assert same(load_pretrained(path), model)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # nothing left beside it


def test_saving_over_the_folder_that_a_model_came_from(tmp_path, model):
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    loaded.lm_head.weight.data.add_(1.0)
    save_pretrained(loaded, tmp_path / "model")
    assert same(load_pretrained(tmp_path / "model"), loaded)


def test_through_a_link_and_with_ordinary_permissions(tmp_path, model):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_pretrained(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(load_pretrained(tmp_path / "real"), model)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_of_something_else_is_refused(tmp_path, model):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match=r"holds something else \(thesis\.tex\)"):
        save_pretrained(model, tmp_path)
    with pytest.raises(UserError, match="is a file; choose a folder"):
        save_pretrained(model, tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("layout", ["huggingface", "state-spaces"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_disk_that_refuses_leaves_everything_as_it_was(
    tmp_path, model, tied, layout, existing, monkeypatch
):
    path = tmp_path / "model"
    if existing:
        save_pretrained(tied, path)
        (path / "tokenizer.json").write_text("{}")
    before = tree(tmp_path)
    # the kernel itself refuses to write past this size, with an error as a full disk's
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*model: .*File too large.*GB free"
        ) as error:
            save_pretrained(model, path, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["model"] if existing else [])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_pretrained(model, path, layout)
    assert tree(tmp_path) == before


def test_an_interrupted_save_leaves_everything_as_it_was(tmp_path, model, tied, monkeypatch):
    save_pretrained(tied, tmp_path / "model")
    before = tree(tmp_path)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, tmp_path / "model")
    assert tree(tmp_path) == before


def test_a_swap_that_fails_puts_the_old_checkpoint_back(tmp_path, model, tied, monkeypatch):
    save_pretrained(tied, tmp_path / "model")
    before, rename = tree(tmp_path), Path.rename

    def fail(self, target):
        if ".new-" in self.name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="busy"):
        save_pretrained(model, tmp_path / "model")
    assert tree(tmp_path) == before


def test_what_cannot_be_saved(tmp_path, model, tied):
    with pytest.raises(UserError, match=r"layout 'hugingface' cannot be written.*'huggingface'"):
        save_pretrained(model, tmp_path, "hugingface")
    with pytest.raises(UserError, match="choose huggingface or state-spaces"):
        save_pretrained(model, tmp_path, "mistral")
    with pytest.raises(UserError, match="max_shard_size is 'big'; give bytes"):
        save_pretrained(model, tmp_path, max_shard_size="big")
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight + 1)
    with pytest.raises(UserError, match="ties lm_head to the embeddings, but they are two"):
        save_pretrained(tied, tmp_path)
    adapted = get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
    for wrapped in (adapted, adapted.base_model.model):
        with pytest.raises(UserError, match=r"not a plain Mamba2 model .*merge the adapter"):
            save_pretrained(wrapped, tmp_path)
    assert not any(tmp_path.iterdir())
    save_pretrained(adapted.merge_and_unload(), tmp_path)
    assert same(load_pretrained(tmp_path), model)
