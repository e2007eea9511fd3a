"""One model, the same numbers on every path; the truth is transformers' Mamba2ForCausalLM.

transformers runs its plain torch path here. Its own rounding to fp32 is lifted for the tightest
comparison (`exact_transformers`), which also sees what fp32 hides, such as an epsilon out of place.
"""

import contextlib
import copy
import dataclasses
import math
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba2 import modeling_mamba2

from mamba2_train.adapters import add_lora
from mamba2_train.model import (
    PRESETS,
    LayerState,
    Mamba2Config,
    Mamba2LM,
    Mamba2State,
    _few_rows,
    flops_per_token,
    initialize,
)
from mamba2_train.quantization import is_quantized, quantize

MAX_ERROR = 1e-5  # in fp32, norm of the difference over norm of the truth, per tensor


def error(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def tokens(b, t, *, v=80, seed=0):
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(seed))


def gradients(loss, model):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(got, expected, limit=MAX_ERROR):
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], expected[name]) for name in got}
    assert max(errors.values()) <= limit, max(errors.items(), key=lambda item: item[1])


@pytest.fixture
def pair(small_config, random_model, transformers_model):
    """Our model and transformers', with equal weights."""

    def make(dtype=torch.float32, **fields):
        config = small_config(**fields)
        ours = random_model(config, dtype=dtype)
        return ours, transformers_model(config, ours.state_dict())

    return make


@contextlib.contextmanager
def exact_transformers():
    """transformers without its casts to fp32, so that a model in fp64 is fp64 throughout."""
    wide = types.SimpleNamespace(**vars(torch))
    wide.float32 = torch.float64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mamba2, "torch", wide)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


SHAPES = {
    "one group, tied": ({}, 2, 37),
    "two groups, untied": ({"n_groups": 2, "tie_embeddings": False}, 2, 37),
    "eight groups": ({"n_groups": 8}, 2, 41),
    "eight groups of two heads": ({"n_groups": 8, "d_model": 64}, 1, 23),
    "biases": ({"use_bias": True, "n_groups": 2}, 2, 29),
    "no conv bias": ({"use_conv_bias": False}, 2, 29),
    "biases, no conv bias, untied": (
        {"use_bias": True, "use_conv_bias": False, "tie_embeddings": False},
        1,
        19,
    ),
    "residual in its own dtype": ({"residual_in_fp32": False}, 2, 21),
    "limited dt": ({"dt_limit": (0.05, 0.3)}, 2, 37),
    "large epsilon": ({"norm_eps": 1e-2, "n_groups": 2}, 2, 21),
    "one token": ({"n_groups": 2}, 3, 1),
    "shorter than the convolution": ({}, 2, 3),
    "one chunk exactly": ({}, 2, 16),
    "one past a chunk": ({"n_groups": 2}, 2, 17),
    "many chunks": ({}, 1, 133),
    "odd sizes": ({"d_model": 36, "headdim": 6, "n_groups": 3, "d_state": 5, "d_conv": 3}, 2, 31),
    "convolution of two": ({"d_conv": 2}, 2, 20),
    "expand one": ({"expand": 1}, 2, 20),
}


@pytest.mark.parametrize(("fields", "b", "t"), SHAPES.values(), ids=SHAPES)
def test_logits_and_every_gradient_equal_transformers(pair, fields, b, t):
    ours, theirs = pair(**fields)
    ids = tokens(b, t)
    weights = torch.randn(b, t, 80, generator=torch.Generator().manual_seed(1))
    got, expected = ours(ids).logits, theirs(ids).logits
    assert error(got, expected) <= MAX_ERROR
    assert_same_gradients(
        gradients((got * weights).sum(), ours), gradients((expected * weights).sum(), theirs)
    )


@pytest.mark.parametrize(("fields", "b", "t"), SHAPES.values(), ids=SHAPES)
def test_exactly_in_fp64(pair, fields, b, t):
    ours, theirs = pair(torch.float64, **fields)
    ids = tokens(b, t)
    weights = torch.randn(b, t, 80, dtype=torch.float64)
    with exact_transformers():
        expected = theirs(ids).logits
        expected_gradients = gradients((expected * weights).sum(), theirs)
    got = ours(ids).logits
    assert got.dtype == torch.float64
    assert error(got, expected) <= 1e-12
    assert_same_gradients(gradients((got * weights).sum(), ours), expected_gradients, limit=1e-11)


@pytest.mark.parametrize("tie", [True, False])
def test_loss_and_every_gradient_equal_transformers(pair, tie):
    ours, theirs = pair(tie_embeddings=tie, n_groups=2)
    ids = tokens(2, 37)
    labels = ids.clone()
    labels[0, :9] = -100
    labels[1, 30:] = -100
    out, expected = ours(ids, labels=labels), theirs(ids, labels=labels).loss
    assert out.logits is None
    assert out.n_tokens == (labels[:, 1:] != -100).sum()
    assert error(out.loss, expected) <= MAX_ERROR
    assert_same_gradients(gradients(out.loss, ours), gradients(expected, theirs))


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bf16_is_as_close_to_the_truth_as_transformers(pair, residual_in_fp32):
    exact, _ = pair(n_groups=2, residual_in_fp32=residual_in_fp32)
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.bfloat16())
    ours = copy.deepcopy(exact).bfloat16()
    _, theirs = pair(n_groups=2, residual_in_fp32=residual_in_fp32)
    theirs.load_state_dict(exact.state_dict())
    theirs.bfloat16()
    streams = []
    for layer in ours.backbone.layers:
        layer.register_forward_hook(lambda _, __, out: streams.append(out[0].dtype))
    ids = tokens(4, 37)
    truth = exact(ids).logits
    got = ours(ids).logits
    assert got.dtype == torch.bfloat16
    assert streams == [torch.float32 if residual_in_fp32 else torch.bfloat16] * 2
    assert error(got, truth) <= min(0.05, 1.5 * error(theirs(ids).logits, truth))


def test_left_padding_equals_transformers_on_each_row_alone(pair):
    ours, theirs = pair(n_groups=2)
    lengths = (37, 20, 1)
    ids = tokens(3, 37)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 37 - length :] = 1
    weights = torch.randn(3, 37, 80) * mask[..., None]
    got = ours(ids, attention_mask=mask).logits
    expected = torch.zeros_like(got)
    for row, length in enumerate(lengths):
        expected[row, 37 - length :] = theirs(ids[row : row + 1, 37 - length :]).logits[0]
    assert error(got * mask[..., None], expected) <= MAX_ERROR
    assert_same_gradients(
        gradients((got * weights).sum(), ours), gradients((expected * weights).sum(), theirs)
    )


LENGTHS = (5, 17, 1, 16, 9, 2)
SEQ_IDX = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))[None].int()


@pytest.fixture
def model(small_config, random_model):
    return random_model(small_config(n_groups=2), dtype=torch.float64)


def test_packed_documents_equal_each_alone(model):
    ids = tokens(1, 50)
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(model(ids, seq_idx=SEQ_IDX).logits, alone, rtol=0, atol=1e-12)
    assert error(model(ids).logits, alone) > 1e-2  # the control: without seq_idx they leak

    packed = model(ids, labels=ids, seq_idx=SEQ_IDX, reduction="sum")
    assert packed.n_tokens == sum(length - 1 for length in LENGTHS)
    got = gradients(packed.loss, model)
    parts = [p for p in ids.split(LENGTHS, dim=1) if p.shape[1] > 1]
    separate = torch.stack([model(p, labels=p, reduction="sum").loss for p in parts]).sum()
    torch.testing.assert_close(packed.loss, separate)
    assert_same_gradients(got, gradients(separate, model), limit=1e-11)


def padded(ids, lengths, side):
    """Rows cut to `lengths` and pushed to the other side, with the mask."""
    out, mask = torch.full_like(ids, 7), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(ids.shape[1] - length, None) if side == "left" else slice(length)
        out[row, where], mask[row, where] = ids[row, :length], 1
    return out, mask


def test_left_padded_equals_right_padded_equals_unpadded(model):
    ids, lengths = tokens(4, 40), (40, 23, 16, 2)
    results = {}
    for side in ("left", "right"):
        x, mask = padded(ids, lengths, side)
        labels = x.masked_fill(mask == 0, -100)
        out = model(
            x,
            attention_mask=mask,
            labels=labels,
            return_state=True,
            logits_to_keep=40,
            reduction="sum",
        )
        logits = torch.cat([out.logits[row][mask[row] == 1] for row in range(4)])
        results[side] = logits, out.loss, out.state, gradients(out.loss, model)
    outs = [model(ids[r : r + 1, :n], return_state=True) for r, n in enumerate(lengths)]
    logits = torch.cat([out.logits[0] for out in outs])
    losses = [
        model(ids[r : r + 1, :n], labels=ids[r : r + 1, :n], reduction="sum").loss
        for r, n in enumerate(lengths)
    ]
    loss = torch.stack(losses).sum()
    grads = gradients(loss, model)
    for side_logits, side_loss, state, side_grads in results.values():
        assert state.seq_idx.tolist() == [0, 0, 0, 0]  # the document, not the padding behind it
        torch.testing.assert_close(side_logits, logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(side_loss, loss)
        assert_same_gradients(side_grads, grads, limit=1e-11)
        for i, layer in enumerate(state.layers):
            ssm = torch.cat([out.state.layers[i].ssm for out in outs])
            conv = torch.cat([out.state.layers[i].conv for out in outs])
            torch.testing.assert_close(layer.ssm, ssm, rtol=0, atol=1e-12)
            torch.testing.assert_close(layer.conv, conv, rtol=0, atol=1e-12)


def test_labels_on_padding_do_not_count(model):
    ids, mask = padded(tokens(2, 20), (20, 11), "right")
    out = model(ids, attention_mask=mask, labels=ids)
    assert out.n_tokens == 19 + 10
    only = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert torch.equal(out.loss, only.loss)


@pytest.mark.parametrize("sizes", [(20, 30), (1, 1, 48), (16, 16, 18), (3, 2, 1, 44), (49, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_split_with_carried_state_equals_whole(model, sizes, packed):
    ids = tokens(2, 50)
    seq_idx = SEQ_IDX.expand(2, -1) if packed else None
    weights = torch.randn(2, 50, 80, dtype=torch.float64)
    whole = model(ids, seq_idx=seq_idx, return_state=True)
    expected = gradients((whole.logits * weights).sum(), model)
    state, logits, start = None, [], 0
    for size in sizes:
        at = slice(start, start + size)
        out = model(
            ids[:, at],
            seq_idx=None if seq_idx is None else seq_idx[:, at],
            state=state,
            return_state=True,
        )
        state, start = out.state, start + size
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-12)
    for got, want in zip(state.layers, whole.state.layers, strict=True):
        torch.testing.assert_close(got.ssm, want.ssm, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.conv, want.conv, rtol=0, atol=1e-12)
    assert state.seq_idx.tolist() == whole.state.seq_idx.tolist() == ([5, 5] if packed else [0, 0])
    # the graph runs through the state: the gradient is exact across the cuts
    assert_same_gradients(gradients((logits * weights).sum(), model), expected, limit=1e-11)


@pytest.mark.parametrize(
    "fields", [{}, {"n_groups": 8, "use_bias": True}, {"dt_limit": (0.1, 0.2)}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_step_equals_forward(small_config, random_model, fields, dtype):
    model = random_model(small_config(**fields), dtype=dtype)
    ids = tokens(2, 30)
    tolerance = (
        {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    )
    with torch.no_grad():
        expected = model(ids).logits
        for prompt in (1, 2, 17):
            state = model(ids[:, :prompt], return_state=True).state
            for t in range(prompt, 30):
                logits = model.step(ids[:, t], state)
                assert logits.shape == (2, 80)
                torch.testing.assert_close(logits, expected[:, t], **tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_step_after_a_padded_prompt(model, side):
    ids, lengths = tokens(3, 30), (20, 7, 1)
    prompt, mask = padded(ids[:, :20], lengths, side)
    with torch.no_grad():
        state = model(prompt, attention_mask=mask, return_state=True).state
        for step in range(5):
            following = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])
            logits = model.step(following, state)
            for row, length in enumerate(lengths):
                alone = model(ids[row : row + 1, : length + step + 1]).logits[0, -1]
                torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-12)


def test_a_row_whose_next_document_differs_starts_from_zero(model):
    ids, more = tokens(3, 20), tokens(3, 9, seed=1)
    first = torch.tensor([0, 4, 2]).int()[:, None]
    state = model(ids, seq_idx=first.expand(3, 20), return_state=True).state
    assert state.seq_idx.tolist() == [0, 4, 2]
    following = torch.tensor([0, 5, 2]).int()[:, None].expand(3, 9).clone()
    following[2, :3] = -1  # padding first: the document is the first real token's
    out = model(more, seq_idx=following, state=state, return_state=True)
    carried = model(torch.cat([ids, more], dim=1)).logits[:, 20:]
    torch.testing.assert_close(out.logits[0], carried[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.logits[1], model(more).logits[1], rtol=0, atol=1e-12)
    row = torch.cat([ids[2:], more[2:, 3:]], dim=1)
    torch.testing.assert_close(out.logits[2, 3:], model(row).logits[0, 20:], rtol=0, atol=1e-12)
    assert out.state.seq_idx.tolist() == [0, 5, 2]


def test_a_row_of_padding_passes_its_state_on(model):
    ids = tokens(2, 12)
    seq_idx = torch.tensor([[3] * 12, [6] * 12]).int()
    state = model(ids, seq_idx=seq_idx, return_state=True).state
    padding = torch.tensor([[3] * 5, [-1] * 5]).int()
    after = model(tokens(2, 5), seq_idx=padding, state=state, return_state=True).state
    assert after.seq_idx.tolist() == [3, 6]
    for before, now in zip(state.layers, after.layers, strict=True):
        assert torch.equal(before.ssm[1], now.ssm[1])
        assert torch.equal(before.conv[1], now.conv[1])
        assert not torch.equal(before.ssm[0], now.ssm[0])
    nothing = model(ids, attention_mask=torch.zeros_like(ids), return_state=True, labels=ids)
    assert nothing.state.seq_idx.tolist() == [-1, -1]
    assert all(not layer.ssm.any() and not layer.conv.any() for layer in nothing.state.layers)
    assert nothing.loss == 0


def test_state_is_not_changed_by_forward_and_is_at_least_fp32(small_config, random_model):
    model = random_model(small_config(), dtype=torch.bfloat16)
    state = model(tokens(2, 20), return_state=True).state
    assert isinstance(state, Mamba2State)
    assert {layer.ssm.dtype for layer in state.layers} == {torch.float32}
    before = [LayerState(layer.conv.clone(), layer.ssm.clone()) for layer in state.layers]
    model(tokens(2, 20), state=state, return_state=True)
    for old, now in zip(before, state.layers, strict=True):
        assert torch.equal(old.conv, now.conv)
        assert torch.equal(old.ssm, now.ssm)


class Count(TorchDispatchMode):
    """Number of calls of each op while active."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))

    def products(self):
        return sum(
            n for name, n in self.calls.items() if name.startswith(("aten.mm", "aten.addmm"))
        )

    def scans(self):
        return sum(n for name, n in self.calls.items() if "mamba2_kernels" in name)


MODES = ("none", "selective", "full", "every_2", "every_3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "fields", [{}, {"use_bias": True, "tie_embeddings": False}, {"n_layers": 5, "n_groups": 4}]
)
def test_checkpointing_changes_no_number(small_config, random_model, fields, dtype):
    model = random_model(small_config(**fields), dtype=dtype)
    ids = tokens(1, 50)
    results = {}
    for mode in MODES:
        model.set_checkpointing(mode)
        loss = model(ids, labels=ids, seq_idx=SEQ_IDX).loss
        results[mode] = loss.detach(), gradients(loss, model)
    for loss, grads in results.values():
        assert torch.equal(loss, results["none"][0])
        for name, grad in grads.items():
            assert torch.equal(grad, results["none"][1][name]), name


@pytest.mark.parametrize(
    ("autocast", "quantization"), [(False, None), (True, None), (False, "nf4"), (False, "int8")]
)
def test_checkpointing_changes_no_number_of_lora_with_dropout(
    small_config, random_model, autocast, quantization
):
    """The same draws are made again for what is computed again."""
    model = random_model(small_config(n_layers=3), dtype=torch.float32)
    for name, p in list(model.named_parameters()):
        if quantization and is_quantized(name):
            quantize(model, name, p.detach(), quantization, dtype=torch.float32)
    add_lora(model, ["in_proj", "out_proj", "embeddings"], r=4, alpha=8, dropout=0.3)
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        # beside a zero, the other factor would have no gradient
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    model.train()
    ids = tokens(1, 50)
    results = {}
    for mode in MODES:
        model.set_checkpointing(mode)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, seq_idx=SEQ_IDX).loss
        model.zero_grad()
        loss.backward()
        draws_after = torch.rand(3)
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results[mode] = loss.detach(), draws_after, grads
    assert all(g.any() for g in results["none"][2].values())
    for loss, draws_after, grads in results.values():
        assert torch.equal(loss, results["none"][0])
        assert torch.equal(draws_after, results["none"][1])
        for name, grad in grads.items():
            assert torch.equal(grad, results["none"][2][name]), name


@pytest.mark.parametrize("mode", MODES[1:])
def test_checkpointing_with_two_passes_under_one_autocast(model, mode):
    """The second finds no weight that the first has narrowed: it could not be repeated."""
    ids = tokens(2, 20)
    model = model.float()
    results = []
    for now in ("none", mode):
        model.set_checkpointing(now)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss + model(ids[:1], labels=ids[:1]).loss
        results.append(gradients(loss, model))
    for name, grad in results[1].items():
        assert torch.equal(grad, results[0][name]), name


@pytest.mark.parametrize("mode", ["some", "every_0", "every_", "every_2.5", ""])
def test_checkpointing_modes_that_do_not_exist(model, mode):
    with pytest.raises(ValueError, match=f"is '{mode}'; choose none, selective, full or every_2"):
        model.set_checkpointing(mode)


def test_what_checkpointing_recomputes(small_config, random_model):
    """full repeats projections and ops in the backward, selective the ops alone, and every_2 what
    full does in half the blocks."""
    model = random_model(small_config(n_layers=4))
    ids = tokens(2, 40)
    products, scans = {}, {}
    for mode in ("none", "selective", "full", "every_2"):
        model.set_checkpointing(mode)
        loss = model(ids).logits.sum()
        with Count() as count:
            loss.backward()
        products[mode], scans[mode] = count.products(), count.scans()
    assert products["selective"] == products["none"]
    # in_proj at least: what follows the last tensor that is needed is not repeated
    assert products["full"] >= products["none"] + 4
    assert 2 * products["every_2"] == products["full"] + products["none"]
    assert 2 * scans["every_2"] == scans["full"] + scans["none"]
    assert scans["full"] > scans["none"] > 0
    assert scans["selective"] > scans["none"]


@pytest.mark.parametrize("mode", ["selective", "full", "every_2"])
def test_checkpointing_with_carried_state(model, mode):
    ids = tokens(2, 30)
    results = []
    for now in ("none", mode):
        model.set_checkpointing(now)
        first = model(ids[:, :11], return_state=True)
        second = model(ids[:, 11:], state=first.state)
        results.append(gradients((first.logits.sum() + second.logits.square().sum()), model))
    assert_same_gradients(results[1], results[0], limit=1e-12)


def test_without_gradients_nothing_is_checkpointed(model, monkeypatch):
    model.set_checkpointing("full")
    monkeypatch.setattr("mamba2_train.model.checkpoint", None)
    with torch.no_grad():
        model(tokens(1, 4))


def test_labels_shift_labels_and_reductions_agree(model):
    ids = tokens(2, 20)
    labels = ids.clone()
    labels[0, 3:8] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = model(ids).logits
    each = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="none").view(2, 20)
    n = (shifted != -100).sum()
    for given in ({"labels": labels}, {"shift_labels": shifted}):
        for reduction, expected in (("none", each), ("sum", each.sum()), ("mean", each.sum() / n)):
            out = model(ids, **given, reduction=reduction)
            torch.testing.assert_close(out.loss, expected)
            assert out.n_tokens == n
            assert out.logits is None


def test_shift_labels_may_point_beyond_the_segment(model):
    ids = tokens(1, 21)
    whole = model(ids, labels=ids, reduction="sum")
    first = model(ids[:, :9], shift_labels=ids[:, 1:10], reduction="sum", return_state=True)
    second = model(ids[:, 9:20], shift_labels=ids[:, 10:], reduction="sum", state=first.state)
    torch.testing.assert_close(first.loss + second.loss, whole.loss)
    assert first.n_tokens + second.n_tokens == whole.n_tokens == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_label_loss_and_gradients_are_zero(small_config, random_model, dtype):
    model = random_model(small_config(tie_embeddings=False), dtype=dtype)
    ids = tokens(2, 9)
    out = model(ids, labels=torch.full_like(ids, -100))
    assert out.loss == 0
    assert out.loss.dtype == torch.float32
    assert out.n_tokens == 0
    for name, grad in gradients(out.loss, model).items():
        assert grad is None or not grad.any(), name
    one = model(ids[:, :1], labels=ids[:, :1])  # a single token predicts nothing
    assert (one.loss, one.n_tokens) == (0, 0)


def test_bf16_loss_is_fp32(small_config, random_model):
    model = random_model(small_config())
    ids = tokens(2, 30)
    expected = model(ids, labels=ids).loss
    got = model.bfloat16()(ids, labels=ids).loss
    assert got.dtype == torch.float32
    assert error(got, expected) < 0.02
    whole = F.cross_entropy(model(ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    assert error(got, whole) < 1e-6


def test_logits_to_keep(model):
    ids = tokens(2, 20)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert torch.equal(model(ids, logits_to_keep=50).logits, logits)
    assert model(ids, logits_to_keep=0).logits.shape == (2, 0, 80)
    at = torch.tensor([[3, 19], [0, 7]])
    kept = model(ids, logits_to_keep=at).logits
    torch.testing.assert_close(kept, logits[torch.arange(2)[:, None], at])
    both = model(ids, labels=ids, logits_to_keep=2)
    torch.testing.assert_close(both.logits, logits[:, -2:])
    assert both.loss is not None
    assert model(ids, return_state=True, logits_to_keep=1).state is not None
    assert model(ids).state is None


def test_inputs_embeds(model):
    ids = tokens(2, 20)
    embeds = model.backbone.embeddings(ids).detach().requires_grad_()
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    assert embeds.grad.abs().sum() > 0


def test_inputs_that_disagree(model):
    ids = tokens(2, 20)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 20, 32))
    with pytest.raises(ValueError, match=r"give labels .* or shift_labels .*, not both"):
        model(ids, labels=ids, shift_labels=ids)
    for name in ("labels", "shift_labels", "attention_mask", "seq_idx"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 19\), the input \(2, 20\)"):
            model(ids, **{name: ids[:, 1:]})


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype_and_with_seq_idx(model, mask_dtype):
    ids, mask = padded(tokens(2, 20), (20, 11), "left")
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(mask_dtype)).logits, expected)
    documents = torch.zeros_like(ids).int()
    documents[:, 15:] = 1
    both = model(ids, attention_mask=mask.to(mask_dtype), seq_idx=documents).logits
    merged = documents.masked_fill(mask == 0, -1)
    assert torch.equal(both, model(ids, seq_idx=merged).logits)


PROJECTIONS = ["embeddings", "in_proj", "out_proj", "lm_head"]


@pytest.mark.parametrize("tie", [False, True])
def test_lora_on_every_projection_is_heard(small_config, random_model, tie):
    model = random_model(small_config(tie_embeddings=tie))
    ids = tokens(2, 30)
    before = model(ids, labels=ids).loss
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=PROJECTIONS))
    torch.testing.assert_close(adapted(ids, labels=ids).loss, before)  # starts as the identity
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)
    got = adapted(ids, labels=ids).loss
    assert abs(got - before) > 1e-3
    got.backward()
    lora = {name: p for name, p in adapted.named_parameters() if "lora" in name}
    assert len(lora) == 2 * (2 * 2 + 2)
    for name, p in lora.items():
        assert p.grad.abs().sum() > 0, f"{name} gets no gradient"
    # the same weights by hand, in a model without adapters
    plain = Mamba2LM(dataclasses.replace(model.config, tie_embeddings=False))
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = module.weight.detach() + module.get_delta_weight("default")
    weights |= {name: p for name, p in model.named_parameters() if "lora" not in name}
    weights = {name.replace(".base_layer", ""): p for name, p in reversed(weights.items())}
    plain.load_state_dict(weights)
    assert error(plain(ids, labels=ids).loss, got) <= MAX_ERROR


def test_projections_are_called_as_modules(model):
    called = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    layers = [f"backbone.layers.{i}.mixer.{p}" for i in (0, 1) for p in ("in_proj", "out_proj")]
    expected = ["backbone.embeddings", *layers, "lm_head"]
    with torch.no_grad():
        state = model(tokens(1, 5), return_state=True).state
    assert called == expected
    called.clear()
    with torch.no_grad():
        model.step(tokens(1, 1)[0], state)
    assert called == expected


PARAMETERS = {
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "mamba-codestral-7b": 7_285_403_648,
    "tiny": 2_796_512,
}


def by_formula(c):
    d_inner, n_heads = c.expand * c.d_model, c.expand * c.d_model // c.headdim
    channels = d_inner + 2 * c.n_groups * c.d_state
    in_proj = c.d_model * (d_inner + channels + n_heads)
    mixer = in_proj + channels * (c.d_conv + 1) + 3 * n_heads + d_inner + d_inner * c.d_model
    tables = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    return tables + c.n_layers * (mixer + c.d_model) + c.d_model


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    config = PRESETS[name]
    with torch.device("meta"):
        ours = Mamba2LM(config)
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layers,
                num_heads=config.n_heads,
                head_dim=config.headdim,
                state_size=config.d_state,
                vocab_size=config.vocab_size,
                n_groups=config.n_groups,
                tie_word_embeddings=config.tie_embeddings,
            )
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == PARAMETERS[name] == by_formula(config)
    shapes = {n: p.shape for n, p in ours.named_parameters()}
    assert shapes == {n: p.shape for n, p in theirs.named_parameters()}


def test_flops_are_two_per_weight_and_token_and_the_scan():
    c = PRESETS["mamba2-2.7b"]
    products = by_formula(c)  # tied: the embeddings' weights are the head's
    assert 1.0 < flops_per_token(c) / (2 * products) < 1.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"d_state": 0}, "d_state is 0"),
        ({"d_conv": 0}, "d_conv is 0"),
        ({"headdim": 0}, "headdim is 0"),
        ({"expand": 0}, "expand is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"headdim": 100}, "headdim 100 does not divide d_inner = expand \\* d_model = 1536"),
        ({"n_groups": 5}, "n_groups 5 does not divide the 24 heads"),
        ({"n_groups": 0}, "n_groups 0 does not divide the 24 heads"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**fields)


def test_config_is_no_transformers_config_to_peft():
    assert not hasattr(Mamba2Config(), "model_type")


@pytest.mark.parametrize("tie", [True, False])
def test_fresh_weights(tie):
    config = Mamba2Config(d_model=256, n_layers=4, vocab_size=512, headdim=8, tie_embeddings=tie)
    model = initialize(Mamba2LM(config), seed=3)
    mixers = [layer.mixer for layer in model.backbone.layers]
    dt = F.softplus(torch.cat([mixer.dt_bias for mixer in mixers]))
    A = torch.cat([mixer.A_log for mixer in mixers]).exp()
    for drawn, low, high in ((dt.log(), math.log(1e-3), math.log(1e-1)), (A, 1.0, 16.0)):
        assert low - 1e-3 <= drawn.min() <= drawn.max() <= high + 1e-3
        quarters = torch.histc(drawn.detach(), 4, low, high) / 256
        assert (quarters - 0.25).abs().max() < 0.08, "not uniform"
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert torch.equal(mixer.D, torch.ones(64))
        for norm in (layer.norm, mixer.norm):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        # kaiming_uniform with a = sqrt(5) is uniform in 1/sqrt(fan_in)
        bound = {"in_proj": 1 / math.sqrt(256), "out_proj": 1 / math.sqrt(512) / math.sqrt(4)}
        for name, limit in bound.items():
            weight = getattr(mixer, name).weight
            assert weight.abs().max() <= limit
            assert error(weight.std(), torch.tensor(limit / math.sqrt(3))) < 0.02
        assert 0.45 < mixer.conv1d.weight.abs().max() <= 0.5
    embeddings = model.backbone.embeddings.weight
    assert error(embeddings.std(), torch.tensor(0.02)) < 0.02
    assert (model.lm_head.weight is embeddings) == tie
    again = initialize(Mamba2LM(config), seed=3)
    other = initialize(Mamba2LM(config), seed=4)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(embeddings, other.backbone.embeddings.weight)


def test_fresh_weights_cover_everything_and_start_near_chance(small_config):
    model = Mamba2LM(small_config(use_bias=True, tie_embeddings=False))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    initialize(model)
    assert all(p.isfinite().all() for p in model.parameters())
    ids = tokens(4, 60)
    assert abs(model(ids, labels=ids).loss - math.log(80)) < 0.3


def test_weights_stay_tied_through_meta_and_copies(small_config):
    config = small_config()
    with torch.device("meta"):
        model = Mamba2LM(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    initialize(model)
    for tied in (model, copy.deepcopy(model), model.double()):
        assert tied.lm_head.weight is tied.backbone.embeddings.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("d_out", [6, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_through_a_projection(rows, d_out, bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(11, d_out, bias=bias), torch.randn(rows, 11)
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with torch.no_grad():
        assert (_few_rows(linear, x) - expected).abs().max() < 1e-6


def test_few_rows_call_what_is_no_plain_projection():
    """A module in its place, and hooks on it, are heard."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, seen = torch.randn(1, 4), []
    doubled, hooked = Doubled(4, 4), torch.nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(_few_rows(doubled, x), doubled(x))
    assert torch.equal(_few_rows(hooked, x), seen[0])
