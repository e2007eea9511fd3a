"""Generation against the full forward, and the sampling rules against their definitions."""

import pytest
import torch

from mamba2_train.generation import generate
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


def test_top_p_draws_from_the_nucleus_in_the_right_proportions(model):
    ids = random_ids((1, 5))
    probabilities = model(ids).logits[0, -1].float().softmax(-1)
    ordered, index = probabilities.sort(descending=True)
    size = int((ordered.cumsum(0) < 0.6).sum()) + 1
    expected = torch.zeros(64)
    expected[index[:size]] = ordered[:size] / ordered[:size].sum()
    draws = generate(
        model, ids.expand(20_000, -1), max_new_tokens=1, temperature=1.0, top_p=0.6, seed=0
    )[:, -1]
    seen = torch.bincount(draws, minlength=64) / 20_000
    assert set(seen.nonzero().flatten().tolist()) <= set(index[:size].tolist())
    assert (seen - expected).abs().max() < 0.02


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
        ({"attention_mask": torch.zeros(1, 5)}, "no token at all"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, random_ids((1, 5)), **({"max_new_tokens": 1} | settings))
