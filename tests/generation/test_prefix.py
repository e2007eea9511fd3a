"""What a prompt leaves: continued, kept in a file, refused where it does not belong."""

import errno

import pytest
import torch

from mamba2_train.adapters import add_lora
from mamba2_train.errors import UserError
from mamba2_train.generation import generate, load_prefix, read, save_prefix
from mamba2_train.generation import prefix as prefix_module

HOW = {"max_new_tokens": 15, "temperature": 1.2, "seed": 3, "repetition_penalty": 1.4}


@pytest.fixture
def model(random_model, small_config):
    return random_model(small_config()).eval()


def tokens(shape, seed=0):
    return torch.randint(0, 80, shape, generator=torch.Generator().manual_seed(seed))


def test_continued_any_number_of_times_equals_the_whole(model, tmp_path):
    head = tokens((1, 37))
    save_prefix(read(model, head), tmp_path / "state", model)
    prefix = load_prefix(tmp_path / "state", model)
    for seed in range(3):
        tails = tokens((4, 6), seed)
        whole = generate(model, torch.cat([head.expand(4, -1), tails], 1), **HOW)
        assert torch.equal(generate(model, tails, after=prefix, **HOW), whole[:, 37:])
    bare = generate(model, after=prefix, **HOW)
    assert torch.equal(bare, generate(model, head, **HOW)[:, 37:])
    assert torch.equal(bare, generate(model, after=prefix, **HOW))


def test_padded_tails_of_one_head(model):
    head, tails = tokens((1, 20)), [tokens((1, n), n) for n in (2, 7)]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7)
    for i, tail in enumerate(tails):
        ids[i, : tail.shape[1]], mask[i, : tail.shape[1]] = tail[0], 1
    together = generate(model, ids, mask, after=read(model, head), **HOW)[:, 7:]
    for i, tail in enumerate(tails):
        alone = generate(model, torch.cat([head, tail], 1), **(HOW | {"seed": 3 + i}))
        assert torch.equal(together[i], alone[0, 20 + tail.shape[1] :])


def test_rows_that_are_neither_one_nor_as_many_are_refused(model):
    with pytest.raises(ValueError, match="prefix has 2 rows and the prompt 3"):
        generate(model, tokens((3, 4)), after=read(model, tokens((2, 4))), max_new_tokens=1)


def test_the_state_of_another_model_is_refused(model, random_model, small_config, tmp_path):
    file = tmp_path / "state"
    save_prefix(read(model, tokens((1, 5))), file, model)
    others = {
        "weights": random_model(small_config(), seed=1),
        "shape": random_model(small_config(n_layers=3)),
        "dtype": random_model(small_config()).bfloat16(),
    }
    adapted = random_model(small_config())
    add_lora(adapted, ["in_proj"], r=2, alpha=4)
    for other in (*others.values(), adapted):
        with pytest.raises(UserError, match="another model, adapter or precision"):
            load_prefix(file, other)
    load_prefix(file, random_model(small_config()))


def test_what_is_no_state_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="there is no state"):
        load_prefix(tmp_path / "nothing", model)
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(UserError, match="no saved state"):
        load_prefix(tmp_path / "text", model)


def test_a_full_disk_leaves_what_was_there(model, tmp_path, monkeypatch):
    file = tmp_path / "state"
    save_prefix(read(model, tokens((1, 5))), file, model)
    before = file.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_module, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written.*No space left.*MB free"):
        save_prefix(read(model, tokens((1, 9))), file, model)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
