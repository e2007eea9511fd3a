"""Generation against the full forward, and the sampling rules against their definitions."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

from mamba2_train.generation import generate, read
from mamba2_train.generation.step import Decoder
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize


@pytest.fixture(scope="module")
def model():
    config = Mamba2Config(
        d_model=32, n_layers=2, vocab_size=64, d_state=16, headdim=16, dt_limit=(0.0, 0.05)
    )
    model = initialize(Mamba2LM(config), seed=0)
    with torch.no_grad():  # sharper than at the start, so that greedy has clear winners
        model.backbone.embeddings.weight.mul_(20)
    return model.eval()


def random_ids(shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_greedy_equals_the_full_forward(model):
    out = generate(model, random_ids((2, 7)), max_new_tokens=12)
    for t in range(7, 19):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gets_the_tokens_it_gets_alone(model, side):
    rows = [random_ids((1, n), seed=n) for n in (3, 9, 1)]
    width = 9
    ids, mask = torch.full((3, width), 5), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    together = generate(model, ids, mask, max_new_tokens=10)[:, width:]
    for i, row in enumerate(rows):
        alone = generate(model, row, max_new_tokens=10)[:, row.shape[1] :]
        assert torch.equal(together[i], alone[0])


def test_cached_logits_are_those_of_the_full_forward(model):
    """And so dt_limit, which cuts nearly every step here, is honoured by the step too."""
    ids = random_ids((2, 30))
    full = model(ids).logits
    free = Mamba2LM(replace(model.config, dt_limit=(0.0, math.inf)))
    free.load_state_dict(model.state_dict())
    assert (free(ids).logits - full).abs().max() > 0.1
    prefix = read(model, ids[:, :9])
    decode = Decoder(model, prefix.state)
    assert (prefix.logits - full[:, 8]).abs().max() < 1e-5 * full.abs().max()
    for t in range(9, 30):
        assert (decode(ids[:, t]) - full[:, t]).abs().max() < 1e-5 * full.abs().max()


def test_greedy_tokens_are_those_of_transformers(random_model, small_config, transformers_model):
    model = random_model(small_config(n_groups=2, tie_embeddings=False), seed=3).eval()
    ids = random_ids((3, 21))
    theirs = transformers_model(model.config, model.state_dict()).eval()
    theirs.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)
    assert len(set(expected[0, 21:].tolist())) > 3
    assert torch.equal(generate(model, ids, max_new_tokens=40), expected)
    theirs.generation_config.repetition_penalty = 1.5
    penalized = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)
    assert not torch.equal(penalized, expected)
    ours = generate(model, ids, max_new_tokens=40, repetition_penalty=1.5)
    assert torch.equal(ours, penalized)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sampled_row_depends_neither_on_its_batch_nor_on_padding(model, side):
    rows = [random_ids((1, n), seed=n) for n in (3, 9, 1, 9)]
    ids, mask = torch.full((4, 9), 5), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - row.shape[1], 9) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    how = {"max_new_tokens": 30, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3}
    together = generate(model, ids, mask, seed=40, **how)[:, 9:]
    for i, row in enumerate(rows):
        alone = generate(model, row, seed=40 + i, **how)[:, row.shape[1] :]
        assert torch.equal(together[i], alone[0])
    other = generate(model, ids, mask, seed=[9, 41, 8, 43], **how)[:, 9:]
    assert torch.equal(other[[1, 3]], together[[1, 3]])
    assert not torch.equal(other[0], together[0])


def test_one_prompt_with_consecutive_seeds_gives_different_texts(model):
    ids = random_ids((1, 5)).expand(8, -1)
    # hot: at 1 this model has 0.4 nats a token, and equal texts would be no wonder
    out = generate(model, ids, max_new_tokens=12, temperature=3.0, seed=0)
    assert len({tuple(row) for row in out.tolist()}) == 8


@pytest.mark.parametrize("segment", [1, 4, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_read_in_segments_leaves_what_it_leaves_whole(model, segment, side):
    rows = [random_ids((n,), seed=n) for n in (17, 2, 9)]
    ids, mask = torch.full((3, 17), 5), torch.zeros(3, 17, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(17 - len(row), 17) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    prefix = read(model, ids, mask, segment=3 * segment)
    assert prefix.n_tokens.tolist() == [17, 2, 9]
    for i, row in enumerate(rows):
        out = model(row[None], return_state=True, logits_to_keep=1)
        torch.testing.assert_close(prefix.logits[i], out.logits[0, 0], rtol=0, atol=2e-5)
        for ours, theirs in zip(prefix.state.layers, out.state.layers, strict=True):
            torch.testing.assert_close(ours.conv[i], theirs.conv[0], rtol=0, atol=2e-5)
            torch.testing.assert_close(ours.ssm[i], theirs.ssm[0], rtol=0, atol=2e-5)
        assert prefix.seen[i].nonzero().flatten().tolist() == sorted(set(row.tolist()))
        assert prefix.last[i] == row[-8:].tolist()


def test_a_long_prompt_is_read_a_segment_at_a_time(model, monkeypatch):
    widths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **k: (widths.append(ids.numel()), forward(ids, **k))[1]
    )
    read(model, random_ids((2, 10_000)))
    assert max(widths) <= 8192
    assert sum(widths) == 20_000


def test_generating_keeps_nothing_but_the_state(model, monkeypatch):
    """Every step is given the same tensors, of the same size as after one token."""
    seen = set()
    step = model.step

    def watched(token, state, prepared):
        seen.add(tuple(t.data_ptr() for layer in state.layers for t in layer))
        return step(token, state, prepared)

    monkeypatch.setattr(model, "step", watched)
    generate(model, random_ids((1, 300)), max_new_tokens=50)
    assert len(seen) == 1
    one, many = (read(model, random_ids((1, n))) for n in (1, 300))
    for a, b in zip(one.state.layers, many.state.layers, strict=True):
        assert [t.shape for t in a] == [t.shape for t in b]


def test_a_seed_repeats_and_another_differs(model):
    ids = random_ids((2, 5))
    first, same, other = (
        generate(model, ids, max_new_tokens=20, temperature=1.0, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_top_k_one_and_a_tiny_top_p_are_greedy(model):
    ids = random_ids((3, 5))
    greedy = generate(model, ids, max_new_tokens=8)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        sampled = generate(model, ids, max_new_tokens=8, temperature=2.0, seed=0, **limits)
        assert torch.equal(sampled, greedy)


def test_after_the_end_a_row_is_filled_and_all_ended_stops(model):
    ids = random_ids((2, 5))
    free = generate(model, ids, max_new_tokens=10)
    eos = int(free[0, 7])  # the first row's third new token
    out = generate(model, ids, max_new_tokens=10, eos_token_id=eos, pad_token_id=63)
    end = 5 + free[0, 5:].tolist().index(eos)
    assert torch.equal(out[0, : end + 1], free[0, : end + 1])
    assert (out[0, end + 1 :] == 63).all()
    alone = generate(model, ids[:1], max_new_tokens=10, eos_token_id=eos)
    assert alone.shape[1] == end + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
        ({"input_ids": torch.tensor([[3, 64]])}, "holds 64, and the model's tokens are 0 to 63"),
        ({"input_ids": torch.tensor([[-1, 6]])}, "holds -1"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": None}, "nothing to continue"),
        ({"attention_mask": torch.zeros(1, 5)}, "no token at all"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
    ],
)
def test_bad_settings(model, settings, message):
    defaults = {"input_ids": random_ids((1, 5)), "max_new_tokens": 1, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        generate(model, **(defaults | settings))
