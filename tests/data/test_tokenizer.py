import copy
import json
import random
import shutil

import pytest

from mamba2_train.assets import FOLDER
from mamba2_train.data.tokenizer import check_template, load_tokenizer, pad_id, save_tokenizer
from mamba2_train.errors import UserError

TINY = FOLDER / "tiny_base"


def copied(tmp_path, **changes):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_embedded_tokenizer(tokenizer):
    assert (len(tokenizer), tokenizer.eos_token_id, pad_id(tokenizer)) == (4096, 0, 1)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.unk_token_id is None
    assert sum(f.stat().st_size for f in TINY.glob("tokenizer*")) < 400_000
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer.get_vocab()) == 4096


@pytest.mark.parametrize("seed", range(50))
def test_any_text_comes_back(tokenizer, seed):
    rng = random.Random(seed)
    alphabets = [
        lambda: chr(rng.randrange(32, 127)),
        lambda: rng.choice(" \n\t\r  "),
        lambda: chr(rng.choice([rng.randrange(0xA0, 0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: chr(rng.randrange(0x1F300, 0x1FAFF)),
        lambda: chr(rng.randrange(0, 32)),
    ]
    text = "".join(rng.choice(alphabets)() for _ in range(rng.randrange(1, 300)))
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_saved_beside_the_weights_it_is_the_same(tokenizer, tmp_path):
    # a checkpoint's config.json need not be one that transformers knows
    (tmp_path / "config.json").write_text('{"d_model": 128}')
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path), vocab_size=4096)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token_id, again.pad_token_id) == (0, 1)
    assert again.encode("Love is blind.\n") == tokenizer.encode("Love is blind.\n")


def test_padding_falls_back_on_eos(tmp_path):
    assert pad_id(load_tokenizer(copied(tmp_path, pad_token=None))) == 0


def test_a_model_may_have_more_rows_than_tokens():
    assert len(load_tokenizer(TINY, vocab_size=4160)) == 4096


def error(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_more_tokens_than_the_model_has_is_told():
    assert error(TINY, vocab_size=4000) == (
        f"the tokenizer of {TINY} has 4096 tokens and the model only 4000: set model.tokenizer to "
        "the tokenizer that the model was trained with"
    )


def test_no_eos_is_told(tmp_path):
    folder = copied(tmp_path, eos_token=None)
    assert error(folder) == (
        f"the tokenizer of {folder} has no eos token, so a document could not end: set "
        '"eos_token" in its tokenizer_config.json'
    )
    (folder / "tokenizer_config.json").unlink()
    assert "has no eos token" in error(folder)


def test_no_tokenizer_is_told(tmp_path):
    assert error(tmp_path) == (
        f"{tmp_path} holds no tokenizer.json and no SentencePiece model: copy the tokenizer's "
        "files there, or set model.tokenizer to a folder or hub id that has them"
    )
    folder = copied(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert f"the tokenizer in {folder} cannot be read" in error(folder)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_a_template_that_writes_a_token_which_is_not_there(tokenizer, name):
    template = "{{ messages[0]['content'] + " + name + " }}"
    lacking = copy.copy(tokenizer)
    setattr(lacking, name, None)
    with pytest.raises(UserError) as caught:
        check_template(template, lacking)
    assert str(caught.value) == (
        f"the chat template writes {name}, and the tokenizer has none: set "
        f'"{name}" in its tokenizer_config.json, or use another template'
    )
    check_template("{% if " + name + " is defined %}" + template + "{% endif %}", lacking)
    check_template("{{ messages[0]['content'] }}", lacking)
    setattr(lacking, name, "the")
    check_template(template, lacking)


def test_a_hub_that_cannot_be_reached_is_told():
    message = error("no-such-owner/no-such-model")
    assert message.startswith("no-such-owner/no-such-model is no folder here, and the hub gave no")
