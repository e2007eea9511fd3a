"""Names in what is read lead nowhere else: shard indexes, links, run names, data names."""

import json
import shutil

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.checkpoint import load_pretrained, save_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.data.config import DataConfig
from mamba2_train.data.sources import load_rows
from mamba2_train.errors import UserError
from mamba2_train.schema import TrainConfig, validated


@pytest.fixture
def shards(tmp_path, small_config, random_model):
    model = random_model(small_config(vocab_size=64))
    save_pretrained(model, tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def rename(shards, new):
    """Let the index call the first shard `new`."""
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {k: new if v == first else v for k, v in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    return shards / first


@pytest.mark.parametrize("name", ["../x.safetensors", "ABSOLUTE", "a/../../x.safetensors", ".."])
def test_an_index_names_files_beside_it(tmp_path, shards, name):
    name = str(tmp_path / "x.safetensors") if name == "ABSOLUTE" else name
    (shards / "a").mkdir()
    shutil.move(rename(shards, name), tmp_path / "x.safetensors")  # it would be found
    with pytest.raises(UserError, match="the files of a model are beside its index"):
        load_pretrained(shards)


@pytest.mark.parametrize("names", [["x"], {"w": 1}, None, {"w": ["x"]}])
def test_an_index_that_is_no_index(shards, names):
    file = shards / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="has no weight_map of tensors to files"):
        load_pretrained(shards)


def test_links_to_elsewhere_but_not_those_of_the_hubs_cache(tmp_path, shards):
    shard = shards / "model-00001-of-00002.safetensors"
    shard = min(shards.glob("model-*.safetensors")) if not shard.exists() else shard
    moved = tmp_path / "elsewhere.safetensors"
    shutil.move(shard, moved)
    shard.symlink_to(moved)
    with pytest.raises(UserError, match=r"is a link to .*elsewhere.* outside of the"):
        load_pretrained(shards)
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    shard.unlink()
    shutil.move(moved, cache / "blobs" / "0123")
    shutil.move(shards, cache / "snapshots" / "abc")
    (cache / "snapshots" / "abc" / shard.name).symlink_to("../../blobs/0123")
    load_pretrained(cache / "snapshots" / "abc")


def test_a_tensor_in_two_shards(shards):
    first, *_, last = sorted(shards.glob("model-*.safetensors"))
    before = load_pretrained(shards).state_dict()
    shutil.move(first, shards / "aside")
    shutil.move(last, first)
    shutil.move(shards / "aside", last)
    after = load_pretrained(shards).state_dict()  # exchanged, they hold the same tensors
    assert all(before[k].equal(after[k]) for k in before)
    shutil.copy(first, last)
    with pytest.raises(UserError, match=r"is in .* and as .* in "):
        load_pretrained(shards)


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", ".hidden", "-x", "a\n"])
def test_the_name_of_a_run_is_one_folder(name):
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        values = OmegaConf.to_container(compose("train"), resolve=True)
    with pytest.raises(UserError, match="name: String should match"):
        validated(TrainConfig, values | {"name": name})


@pytest.mark.parametrize("name", ["../../secrets", "..", "a/../b", "....//x", "embedded:../../x"])
def test_the_name_of_a_data_set(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load_rows(DataConfig(source=name))
