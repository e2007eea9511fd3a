"""A recorded step against the model's own; the CUDA graph itself needs a GPU."""

import time

import pytest
import torch

from mamba2_train.assets import FOLDER
from mamba2_train.checkpoint import load_pretrained
from mamba2_train.generation import generate, read
from mamba2_train.generation.step import Decoder


@pytest.fixture
def model(random_model, small_config):
    return random_model(small_config()).eval()


def as_a_graph_would(run):
    """A recording that, like a CUDA graph's, first runs the step some times."""
    for _ in range(4):
        run()
    return run


def tokens(n=12):
    return torch.randint(0, 80, (3, n), generator=torch.Generator().manual_seed(0))


def test_a_recorded_step_gives_the_logits_of_the_model(model):
    ids = tokens()
    full = model(ids).logits
    decode = Decoder(model, read(model, ids[:, :4]).state, record=as_a_graph_would)
    for t in range(4, 12):
        assert (decode(ids[:, t]) - full[:, t]).abs().max() < 1e-5 * full.abs().max()


def test_a_recording_leaves_the_state_as_it_was_and_where_it_was(model):
    state = read(model, tokens()).state
    before = [(t.data_ptr(), t.clone()) for layer in state.layers for t in layer]
    Decoder(model, state, record=as_a_graph_would)
    for (where, value), tensor in zip(
        before, (t for layer in state.layers for t in layer), strict=True
    ):
        assert tensor.data_ptr() == where
        assert torch.equal(tensor, value)


def test_a_recording_reads_and_writes_the_same_memory_at_every_step(model):
    decode = Decoder(model, read(model, tokens()).state, record=as_a_graph_would)
    places = {(decode.token.data_ptr(), decode(torch.full((3,), t)).data_ptr()) for t in range(5)}
    assert len(places) == 1


def test_nothing_is_recorded_on_a_cpu(model):
    assert Decoder(model, read(model, tokens()).state).replay is None


@pytest.mark.slow
def test_a_token_takes_as_long_after_16k_as_after_one():
    """And as much memory: the least of the thread's own time, for other programs run beside it."""
    model = load_pretrained(FOLDER / "tiny_base", dtype=torch.float32).eval()
    decoders, seconds, sizes = [], [[], []], []
    for n in (1, 16_384):
        ids = torch.randint(0, 4096, (1, n), generator=torch.Generator().manual_seed(n))
        state = read(model, ids).state
        sizes.append([t.shape for layer in state.layers for t in layer])
        decoders.append(Decoder(model, state))
    token = torch.tensor([5])
    with torch.no_grad():
        for _ in range(300):
            for decode, times in zip(decoders, seconds, strict=True):
                start = time.thread_time()
                decode(token)
                times.append(time.thread_time() - start)
    first, last = map(min, seconds)
    assert last == pytest.approx(first, rel=0.1)
    assert sizes[0] == sizes[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_generates_what_is_generated_without_one(model, monkeypatch):
    ids = tokens()
    model = model.cuda()
    replayed = generate(model, ids.cuda(), max_new_tokens=40)
    decode = Decoder(model, read(model, ids.cuda()).state)
    assert decode.replay is not None
    monkeypatch.setattr("mamba2_train.generation.step.cuda_graph", lambda run: run)
    assert torch.equal(generate(model, ids.cuda(), max_new_tokens=40), replayed)
    assert torch.equal(generate(model.cpu(), ids, max_new_tokens=40), replayed.cpu())
