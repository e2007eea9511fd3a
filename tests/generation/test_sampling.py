"""Sampling rules against transformers' processors, and draws against their distribution."""

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mamba2_train.generation.sampling import Sampling, Uniform, drawn, penalized, row_seeds

VOCAB = 1000


def random_logits(rows=64, seed=0, scale=3.0):
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": VOCAB},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_what_is_left_is_what_transformers_leaves(settings, scale):
    logits = random_logits(scale=scale)
    expected = logits
    for name, warper in WARPERS.items():  # in the order of transformers' generate
        if name in settings:
            expected = warper(settings[name])(None, expected)
    assert torch.equal(Sampling(**({"temperature": 1.0} | settings)).filtered(logits), expected)


def test_the_order_is_that_of_transformers():
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.2
    )
    model = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=8, num_heads=2, head_dim=8, state_size=4, num_hidden_layers=1, n_groups=1
        )
    )
    order = model._get_logits_processor(config, input_ids_seq_length=3)
    assert [type(p) for p in order] == [RepetitionPenaltyLogitsProcessor, *WARPERS.values()]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits = random_logits()
    ids = torch.randint(0, VOCAB, (64, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(64, VOCAB, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalized(logits, seen, penalty), expected)
    assert torch.equal(
        Sampling(repetition_penalty=penalty).choose(logits, seen, None), expected.argmax(-1)
    )


def test_a_number_picks_the_token_that_holds_it():
    logits = torch.tensor([0.1, 0.0, 0.2, 0.7, 0.0]).log().expand(6, -1)
    u = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 1 - 2**-52], dtype=torch.float64)
    assert drawn(logits, u).tolist() == [0, 0, 2, 2, 3, 3]


def test_what_was_filtered_out_is_never_drawn():
    logits = random_logits(rows=4000, scale=1.0)
    left = Sampling(temperature=1.0, top_k=3).filtered(logits)
    u = torch.linspace(0, 1 - 2**-52, 4000, dtype=torch.float64)
    assert left.gather(1, drawn(left, u)[:, None]).isfinite().all()


def test_draws_have_the_probabilities_of_the_softmax():
    logits = random_logits(rows=1, scale=1.0)[:, :20]
    draw = Uniform(range(20_000))
    counts = torch.bincount(drawn(logits.expand(20_000, -1), draw(logits.device)), minlength=20)
    expected = 20_000 * logits[0].double().softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 43.8  # 19 degrees of freedom, one in a thousand


def test_streams_of_rows_are_their_own():
    both, second = Uniform([7, 8]), Uniform([8])
    cpu = torch.device("cpu")
    for _ in range(5):
        assert both(cpu)[1] == second(cpu)[0]
    assert Uniform([7])(cpu)[0] == np.random.default_rng(7).random()


def test_seeds_of_rows():
    assert row_seeds(5, 3) == [5, 6, 7]
    assert row_seeds([3, 1], 2) == [3, 1]
    torch.manual_seed(0)
    drawn_seeds = row_seeds(None, 2)
    assert len(set(drawn_seeds)) == 2
    torch.manual_seed(0)
    assert row_seeds(None, 2) == drawn_seeds
