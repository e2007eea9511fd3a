"""Nothing that is read runs code: pickles, configs, chat templates, data sets, tokenizers.

Each payload would leave a file; the test is that it is not there. `Payload` is first shown to do so
where it is allowed to.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module

from mamba2_train.adapters import load_adapter, read_config
from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.commands import extend_hydra
from mamba2_train.commands.export import load_run_checkpoint
from mamba2_train.data.chat import encode_chats
from mamba2_train.data.config import DataConfig
from mamba2_train.data.formats import Chat
from mamba2_train.data.sources import load_rows
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation.chat import rendered
from mamba2_train.parallel.checkpoint import META, _checksums, load_whole

ROOT = Path(__file__).parents[2]


class Payload:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path):
    """Where a payload leaves its mark; each test ends with its absence."""
    path = tmp_path / "the payload ran"
    yield path
    assert not path.exists()


def test_the_payload_runs_where_it_may(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()


def test_pickles_of_weights(tmp_path, proof, folder):
    shutil.copytree(folder / "base", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    file = tmp_path / "model" / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save({"w": Payload(proof)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged, cut off or no file"):
            load_pretrained(tmp_path / "model")
    file.write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged"):
        load_pretrained(tmp_path / "model")


def test_pickles_of_adapters(tmp_path, proof, finished):
    folder = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"w": Payload(proof)}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is damaged, cut off or no file"):
        load_adapter(load_pretrained(finished.parent / "base"), folder)


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "callbacks"])
def test_pickles_of_a_run(tmp_path, proof, finished, safe, part):
    """A payload in the weights, in the optimizer's state, or elsewhere, where resume meets it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for file in sorted((run / "checkpoints").glob("*.ckpt")):
        content = torch.load(file, weights_only=True)
        content[part] = {"x": Payload(proof)} if part != "optimizer_states" else [Payload(proof)]
        torch.save(content, file)
    with pytest.raises(UserError, match="is damaged"):
        load_run_checkpoint(file)
    if part == "optimizer_states":  # the whole command
        code, said = safe.run(finished.parent, "train", f"run_dir={run}", f"resume={file}")
        assert code == 1
        assert "damaged or no checkpoint of mamba2-train" in safe.one_line(said)


def test_pickles_of_a_folder(tmp_path, proof, sharded):
    """`.metadata` is a pickle that torch runs; its maker also makes the checksums."""
    path = tmp_path / "step-00000004"
    shutil.copytree(sharded / "checkpoints" / "step-00000004", path)
    assert load_whole(path)["state_dict"]

    def swap(metadata):
        (path / ".metadata").write_bytes(metadata)
        meta = torch.load(path / META, weights_only=True)  # not mapped, to write over it
        torch.save(meta | {"files": _checksums(path)}, path / META)

    good = (path / ".metadata").read_bytes()
    swap(pickle.dumps(Payload(proof)))
    with pytest.raises(UserError, match=r"names posix\.mkdir, which is not run"):
        load_whole(path)
    for outside in ("../other", "/etc/passwd"):
        metadata = pickle.loads(good)
        for stored in metadata.storage_data.values():
            stored.relative_path = outside
        swap(pickle.dumps(metadata))
        with pytest.raises(UserError, match=rf"names {outside}, which is not beside it"):
            load_whole(path)
    data = next(path.glob("*.distcp"))
    buffer = io.BytesIO()
    torch.save(Payload(proof), buffer)
    data.write_bytes(buffer.getvalue())
    metadata = pickle.loads(good)
    for stored in metadata.storage_data.values():
        stored.offset, stored.length = 0, len(buffer.getvalue())
    swap(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"is damaged or no checkpoint.*Weights only"):
        load_whole(path)


def test_torch_is_told_so_each_time():
    """No file of ours reads a pickle in another way."""
    for file in [*(ROOT / "mamba2_train").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        text = file.read_text()
        loads = text.count("torch.load(")
        assert text.count("weights_only=True") >= loads, file
        assert "pickle.load" not in text, file
        assert "allow_pickle" not in text, file
        assert "yaml.load(" not in text, file
        assert "trust_remote_code=True" not in text, file


def command_of(*overrides, directory=None, name="train"):
    extend_hydra()
    if directory is not None:
        with initialize_config_dir(str(directory), version_base="1.3"):
            return compose(name, list(overrides), return_hydra_config=True)
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


CALLS = [
    "+_target_=os.system",
    "+model._target_=os.system",
    "+adapter._target_=torch.nn.Linear",
    "+data.sources=[{source: a, weight: 1, _target_: os.system}]",
    "+hydra.callbacks.x={_target_: os.system, command: ls}",
    "+hydra.callbacks.x={_target_: mamba2_train.checkpoint.os.system, command: ls}",
    "+hydra.callbacks.x={_target_: hydra_plugins.hydra_x.launcher.subprocess.Popen}",
    "+hydra.callbacks.x={_target_: hydra.utils.call, config: {_target_: os.system}}",
    "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=os.system",
    "+hydra.sweeper.custom_search_space=os.system",
    "+hydra.job_logging.handlers.x={class: subprocess.Popen, args: [ls]}",
    "+hydra.hydra_logging.handlers.x={class: logging.StreamHandler, stream: 'ext://os.environ'}",
    "+hydra.callbacks.x='${oc.create:{_target_: os.system}}'",
]


@pytest.mark.parametrize("override", CALLS)
def test_a_config_names_no_code(override):
    with pytest.raises(UserError, match=r"names code|may make what runs"):
        command_of(override)


def test_a_config_names_no_code_through_another(tmp_path):
    inner = {"mine": {"a": "_target_", "b": "os.system"}, "defaults": ["train", "_self_"]}
    made = "${oc.decode:'{${mine.a}: ${mine.b}}'}"
    for name, value in {
        "made": {"callbacks": {"z": made}},
        "missing": {"callbacks": {"x": made, "y": "${nowhere}"}},
        "logs": {"job_logging": {"formatters": {"x": {"()": "os.system", "command": "ls"}}}},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(inner | {"hydra": value}))
        with pytest.raises(UserError, match=r"names code|may make what runs"):
            command_of(directory=tmp_path, name=name)


def test_what_hydra_brings_is_allowed():
    composed = command_of("hydra.sweeper.max_batch_size=3")
    assert composed.hydra.launcher._target_.endswith("BasicLauncher")


def test_a_recipe_with_a_callback_is_refused_before_it_runs(tmp_path, proof, folder, safe):
    recipe = {
        "defaults": ["train", "_self_"],
        "hydra": {"callbacks": {"x": {"_target_": "os.mkdir", "path": str(proof)}}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    where = (f"--config-dir={tmp_path}", "--config-name=mine")
    code, said = safe.run(folder, "train", *where)
    assert code == 1
    assert "hydra.callbacks.x._target_: os.mkdir names code" in safe.one_line(said)
    (tmp_path / "mine.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{proof}']\n")
    code, said = safe.run(folder, "train", *where)
    assert code == 1
    assert "is not YAML" in safe.one_line(said)


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.mkdir('PROOF') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "{{ lipsum.__globals__['os'].mkdir('PROOF') }}",
    "{{ messages.append(1) }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_are_in_a_sandbox(proof, template):
    tokenizer = load_tokenizer(FOLDER / "tiny_base")
    tokenizer.chat_template = template.replace("PROOF", str(proof))
    messages = [{"role": "user", "content": "hi"}]
    (encoded,) = encode_chats([Chat([], messages, None)], tokenizer, None)
    assert isinstance(encoded, Exception)
    with pytest.raises(UserError, match="chat template refuses"):
        rendered(messages, tokenizer)


def test_a_tokenizer_brings_no_code(tmp_path, proof, safe):
    """`auto_map` names a class in a file beside it: transformers would ask, and wait."""
    shutil.copytree(FOLDER / "tiny_base", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(values))

    def load():
        try:
            return type(load_tokenizer(tmp_path / "tokenizer")).__name__
        except UserError as error:
            return str(error)

    said = safe.forked(load, timeout=12)
    assert "cannot be read" in said or "Tokenizer" in said


def test_an_adapter_imports_no_module(tmp_path, proof, finished, monkeypatch):
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    (tmp_path / "evil_megatron.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    values |= {"megatron_config": {"x": 1}, "megatron_core": "evil_megatron"}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is for Megatron"):
        read_config(tmp_path / "adapter")


def test_a_folder_of_data_runs_no_script(tmp_path, proof):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    with pytest.raises(UserError, match="holds no data"):
        load_rows(DataConfig(source=str(tmp_path / "data")))
    with pytest.raises(UserError, match="of no kind that can be read"):
        load_rows(DataConfig(source=str(tmp_path / "data" / "data.py")))
