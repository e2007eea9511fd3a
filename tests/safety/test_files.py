"""Damaged files of weights: an error of one line, or the model as it was.

Truth is the model as it was before the damage, and the file as the libraries that own its format
write it. Each damage is read in a forked child, so that a crash of the interpreter would be seen.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mamba2_train.adapters import load_adapter
from mamba2_train.checkpoint import load_pretrained, save_pretrained
from mamba2_train.commands.export import load_run_checkpoint
from mamba2_train.errors import UserError

SAMPLE, ALL = 6, 100  # damages of each kind of file; ten kinds


@pytest.fixture(scope="module")
def model(small_config, random_model):
    return random_model(small_config(vocab_size=64, tie_embeddings=False))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()} | {
        f"config.{k}": v for k, v in vars(model.config).items()
    }


def read_folder(folder):
    return weights(load_pretrained(folder))


def make(kind, folder, model, finished, sharded):
    """Files of `kind` in `folder`, and how they are read."""
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    if kind in ("adapter", "ckpt", "dcp"):
        if kind == "adapter":
            shutil.copytree(finished / "adapter", folder)
            for file in folder.glob("token*"):
                file.unlink()
            base = load_pretrained(finished.parent / "base").state_dict()

            def read(path):
                fresh = load_pretrained(finished.parent / "base")
                assert fresh.state_dict().keys() == base.keys()
                return weights(load_adapter(fresh, path).get_base_model())

            return read
        source = finished / "checkpoints/step-00000004.ckpt"
        source = source if kind == "ckpt" else sharded / "checkpoints/step-00000004"
        folder.mkdir()
        copied = folder / source.name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copied)
        return lambda path: weights(load_run_checkpoint(next(path.iterdir()))[1])
    layout = "state-spaces" if kind == "our .bin" else "huggingface"
    save_pretrained(model, folder, layout, max_shard_size="20KB" if kind == "our shards" else "5GB")
    if kind in ("safetensors", "bin", "old bin", "bin shards", "mistral"):  # by others
        (folder / "model.safetensors").unlink()
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    if kind == "old bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    if kind == "bin shards":
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, folder / name)
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return read_folder


# of these a checksum covers every tensor: what we write, and torch's format since 1.6
COVERED = (
    *("our safetensors", "our shards", "our .bin", "adapter", "ckpt", "dcp"),
    *("bin", "bin shards"),
)
KINDS = (*COVERED, "safetensors", "old bin")


def damage(folder: Path, rng: random.Random) -> str:
    """Do one thing to one file in `folder`; returns what."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    file = rng.choice(files)
    raw = bytearray(file.read_bytes())
    at = rng.randrange(len(raw))
    if rng.random() < 0.5:  # where structure is
        at = rng.choice([rng.randrange(min(len(raw), 600)), -1 - rng.randrange(min(len(raw), 600))])
        at %= len(raw)
    span = min(rng.choice([1, 4, 64, 1000]), len(raw) - at)
    what = rng.choice(
        ["cut", "flip", "noise", "zero", "insert", "delete", "append", "huge", "swap", "digits"]
    )
    if what == "cut":
        del raw[at:]
    elif what == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif what == "noise":
        raw[at : at + span] = rng.randbytes(span)
    elif what == "zero":
        raw[at : at + span] = bytes(span)
    elif what == "insert":
        raw[at:at] = rng.randbytes(span)
    elif what == "delete":
        del raw[at : at + span]
    elif what == "append":
        raw += rng.randbytes(span)
    elif what == "huge":  # a length, where safetensors has that of its header
        raw[:8] = rng.choice([2**63, 2**64 - 1, 10**8 - 8, len(raw), 2**31]).to_bytes(8, "little")
    elif what == "swap":  # two pieces of it
        other = rng.randrange(len(raw) - span + 1)
        one, two = bytes(raw[at : at + span]), bytes(raw[other : other + span])
        raw[at : at + span], raw[other : other + span] = two, one
    else:  # a number in the header, or in JSON, becomes another
        places = [i for i, c in enumerate(raw[:3000]) if 48 <= c <= 57]
        if places:
            place = rng.choice(places)
            raw[place : place + 1] = rng.choice([b"9", b"0", b"99999999999", b"-1", b"1e999"])
    file.write_bytes(raw)
    return f"{file.name}: {what} at {at}, {span}"


def judge(folder, read, truth, caplog):
    """equal, refused, or what else happened."""
    caplog.clear()
    try:
        found = read(folder)
    except UserError as error:
        line = str(error)
        return "refused" if line and "\n" not in line and len(line) < 2000 else f"untidy: {line}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    if found.keys() == truth.keys() and all(
        torch.equal(v, truth[k]) and v.dtype == truth[k].dtype
        if isinstance(v, torch.Tensor)
        else v == truth[k]
        for k, v in found.items()
    ):
        return "equal"
    return "told" if "since" in caplog.text else "another model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "count", [SAMPLE, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_damage_is_refused_or_harmless(
    tmp_path, caplog, safe, model, finished, sharded, kind, count
):
    read = make(kind, tmp_path / "whole", model, finished, sharded)
    truth = read(tmp_path / "whole")

    def damaged():
        outcomes = []
        for seed in range(count):
            folder = tmp_path / "damaged"
            shutil.copytree(tmp_path / "whole", folder)
            what = damage(folder, random.Random(f"{kind} {seed}"))
            outcomes.append((judge(folder, read, truth, caplog), seed, what))
            shutil.rmtree(folder)
        return outcomes

    outcomes = safe.forked(damaged, timeout=1500)
    for outcome, seed, what in outcomes:
        allowed = ["refused", "equal", "told"]
        # without a checksum one number is as good as another
        if kind not in COVERED or (what.startswith("config.json") and "bin" in kind):
            allowed.append("another model")
        assert outcome in allowed, (seed, what)
    assert Counter(o[0] for o in outcomes)["refused"] >= count // 3
