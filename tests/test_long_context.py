"""Sequences cut into segments: the numbers of one pass, in the memory of one segment.

The truth is the ordinary model on the whole sequence; where random numbers are drawn, a single
graph of all segments; and, for truncated gradients, the whole lane in one pass.
"""

import contextlib

import pytest
import torch

from mamba2_train.adapters import add_lora
from mamba2_train.long_context import ExactStep, aligned, continued, cut, evaluated, zero_state
from mamba2_train.quantization import is_quantized, quantize
from mamba2_train.saving import rng_state

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def rows(kind: str, length: int = 70) -> dict[str, torch.Tensor]:
    """Two rows. packed: documents that cross every cut, and some that end at one; padded: padding
    at either end, in the middle, and over whole segments; prompt: the first labels come late."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 80, (2, length), generator=generator)
    seq_idx = torch.zeros(2, length, dtype=torch.int32)
    labels = ids.clone()
    if kind == "packed":
        for row, ends in enumerate(((16, 29, 48), (5, 32, 64))):
            for end in ends:
                seq_idx[row, end:] += 1
    if kind == "padded":
        seq_idx[0, :3] = seq_idx[0, 20:41] = seq_idx[1, 17:] = -1
        labels[seq_idx < 0] = -100
    if kind == "prompt":
        labels[:, :40] = -100
    return {"input_ids": ids, "labels": labels, "seq_idx": seq_idx}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def in_segments(model, batch, segment_len, scale=1.0, **options):
    step = ExactStep(model, batch, segment_len, **options)
    loss, n_tokens = step.forward()
    step.backward(loss * scale)
    return loss.detach(), n_tokens, gradients(model)


def whole(model, batch, scale=1.0):
    out = model(
        batch["input_ids"], labels=batch["labels"], seq_idx=batch["seq_idx"], reduction="sum"
    )
    (out.loss * scale).backward()
    return out.loss.detach(), out.n_tokens, gradients(model)


def assert_equal(found, truth, dtype):
    (loss, n_tokens, grads), (true_loss, true_n, true_grads) = found, truth
    assert n_tokens == true_n
    assert abs(loss - true_loss) <= TOLERANCE[dtype] * true_loss
    assert grads.keys() == true_grads.keys()
    for name, gradient in true_grads.items():
        error = (grads[name] - gradient).norm() / gradient.norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "prompt"])
@pytest.mark.parametrize("segment_len", [2, 7, 16, 69, 100])
def test_loss_and_gradients_of_one_pass(small_config, random_model, kind, segment_len):
    model = random_model(small_config(n_groups=2), dtype=torch.float64)
    batch = rows(kind)
    found = in_segments(model, batch, segment_len, 0.3)
    assert_equal(found, whole(model, batch, 0.3), torch.float64)


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "every_2"])
def test_in_float32_and_under_checkpointing(small_config, random_model, kind, checkpointing):
    model = random_model(small_config())
    batch = rows(kind)
    truth = whole(model, batch)
    model.set_checkpointing(checkpointing)
    assert_equal(in_segments(model, batch, 16), truth, torch.float32)


def with_lora(model, targets=("in_proj", "out_proj", "embeddings"), dropout=0.0):
    add_lora(model, list(targets), r=4, alpha=8, dropout=dropout)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:  # B begins at zero, and with it A's gradient
                p.copy_(
                    0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    return model.train()


@pytest.mark.parametrize("targets", [("in_proj", "out_proj", "embeddings"), ("out_proj",)], ids=str)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_lora_over_a_frozen_base(small_config, random_model, targets, quantization):
    model = random_model(small_config(d_model=64))
    for name, p in list(model.named_parameters()):
        if quantization and is_quantized(name):
            quantize(model, name, p.detach(), quantization, dtype=torch.float32)
    with_lora(model, targets)
    batch = rows("packed")
    assert_equal(in_segments(model, batch, 16), whole(model, batch), torch.float32)


def one_graph(model, batch):
    """Of all segments, each computed once."""
    losses, n_tokens, state = [], 0, None
    for segment in cut(batch, 16):
        out = model(**segment, state=state, return_state=True, reduction="sum")
        losses.append(out.loss)
        n_tokens, state = n_tokens + out.n_tokens, out.state
    return sum(losses), n_tokens


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_dropout_is_replayed(small_config, random_model, checkpointing):
    """The truth is one graph, which draws each mask once."""
    model = with_lora(random_model(small_config(), dtype=torch.float64), dropout=0.1)
    model.double()
    batch = rows("packed")
    torch.manual_seed(5)
    loss, n_tokens = one_graph(model, batch)
    loss.backward()
    truth = loss.detach(), n_tokens, gradients(model)
    after = rng_state(torch.device("cpu"))["cpu"]

    model.set_checkpointing(checkpointing)
    torch.manual_seed(5)
    assert_equal(in_segments(model, batch, 16), truth, torch.float64)
    assert torch.equal(rng_state(torch.device("cpu"))["cpu"], after)
    torch.manual_seed(6)
    with pytest.raises(AssertionError):
        assert_equal(in_segments(model, batch, 16), truth, torch.float64)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_segments_are_computed_again_under_autocast(small_config, random_model, checkpointing):
    """The truth is one graph, whose products are in bfloat16 too; float32 ones are far off."""
    model = with_lora(random_model(small_config()))
    batch = rows("packed")

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        loss, n_tokens = one_graph(model, batch)
    loss.backward()
    truth = loss.detach(), n_tokens, gradients(model)
    model.set_checkpointing(checkpointing)
    for context in (autocast, contextlib.nullcontext):
        step = ExactStep(model, batch, 16, context=context)
        with autocast():
            loss, n_tokens = step.forward()
        step.backward(loss)
        found = loss.detach(), n_tokens, gradients(model)
        if context is autocast:
            assert_equal(found, truth, torch.float32)
        else:
            with pytest.raises(AssertionError):
                assert_equal(found, truth, torch.float32)


def test_offloaded_states_are_the_same_bits(small_config, random_model):
    model = random_model(small_config())
    batch = rows("packed")
    here, there = (in_segments(model, batch, 16, offload=offload) for offload in (False, True))
    assert torch.equal(here[0], there[0])
    assert all(torch.equal(gradient, there[2][name]) for name, gradient in here[2].items())


def test_gradients_are_added(small_config, random_model):
    model = random_model(small_config(), dtype=torch.float64)
    first, second = rows("packed"), rows("padded")
    for batch in (first, second):
        step = ExactStep(model, batch, 16)
        step.backward(step.forward()[0] / 2)
    found = gradients(model)
    a, b = (whole(model, batch, 0.5)[2] for batch in (first, second))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, a[name] + b[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("segment_len", [7, 16, 100])
def test_evaluation(small_config, random_model, kind, segment_len):
    model = random_model(small_config(), dtype=torch.float64)
    batch = rows(kind)
    loss, n_tokens = evaluated(model, batch, segment_len)
    truth = whole(model, batch)
    assert not loss.requires_grad
    assert n_tokens == truth[1]
    torch.testing.assert_close(loss, truth[0], rtol=1e-12, atol=0)


def test_memory_is_that_of_one_segment(small_config, random_model):
    """Eight segments hold what two do, and six more states; so does an evaluation."""
    model = random_model(small_config(d_model=64, d_state=4))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def peak(length: int, work) -> int:
        """By PyTorch's allocator."""
        batch = rows("plain", length)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            work(batch)
        live = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        return highest

    def train(batch):
        step = ExactStep(model, batch, 256)
        step.backward(step.forward()[0])

    state = sum(t.nbytes for layer in state_of(model).layers for t in layer)
    assert peak(8 * 256, train) <= 1.02 * (peak(2 * 256, train) + 6 * state)
    assert peak(8 * 256, train) < 0.35 * peak(8 * 256, lambda batch: whole(model, batch))

    def evaluate(batch):
        evaluated(model, batch, 256)

    assert peak(8 * 256, evaluate) <= 1.02 * peak(2 * 256, evaluate)


def state_of(model):
    batch = rows("plain", 8)
    with torch.no_grad():
        return model(batch["input_ids"], return_state=True, logits_to_keep=1).state


def test_truncated_carries_states_and_no_gradient(small_config, random_model):
    """Losses are those of one pass; gradients, those of rows whose past is a constant."""
    model = random_model(small_config(), dtype=torch.float64)
    batch = rows("packed")
    truth = whole(model, batch)
    state, losses = None, 0
    for segment in cut(batch, 16):
        loss, _, state = continued(model, segment, state)
        loss.backward()
        losses += loss.detach()
        assert not any(t.requires_grad for layer in state.layers for t in layer)
    torch.testing.assert_close(losses, truth[0], rtol=1e-12, atol=0)
    found = gradients(model)
    # the truth: the state by a pass over all that came before, of which nothing is differentiated
    for i, segment in enumerate(cut(batch, 16)):
        past = {name: t[:, : 16 * i] for name, t in aligned(batch).items()}
        before = None
        if i:
            with torch.no_grad():
                before = model(**past, return_state=True).state
        model(**segment, state=before, reduction="sum").loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-11)
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert (found[name] - truth[2][name]).norm() > 1e-3 * truth[2][name].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_state_is_as_a_model_returns_it(small_config, random_model, dtype):
    config = small_config(n_groups=2, n_layers=3)
    made = state_of(random_model(config, dtype=dtype))
    for layer, expected in zip(zero_state(config, 2, dtype).layers, made.layers, strict=True):
        for ours, theirs in zip(layer, expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
