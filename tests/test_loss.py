"""The chunked loss against F.cross_entropy on whole logits, with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba2_train import loss as loss_module
from mamba2_train.loss import IGNORED, cross_entropy, shifted_labels


def problem(dtype=torch.float64, *, b=2, t=50, d=16, v=70, keep=0.7):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(b, t, d, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(d, v, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(v, d, generator=generator))
    labels = torch.randint(v, (b, t), generator=generator)
    labels[torch.rand(b, t, generator=generator) > keep] = IGNORED
    return hidden, head.to(dtype), labels


class Wrapped(nn.Module):
    """A head that is not nn.Linear, as an adapted or quantized one is not."""

    def __init__(self, head):
        super().__init__()
        self.inner, self.calls = head, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def whole(hidden, head, labels, reduction):
    logits = F.linear(hidden, head.weight, head.bias)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 16)  # 70 rows: several, and a ragged last one


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("per_token", [False, True])
def test_equals_cross_entropy_on_whole_logits(dtype, wrapped, bias, per_token):
    hidden, head, labels = problem(dtype)
    if bias:
        head.bias = nn.Parameter(torch.randn(70, dtype=dtype))
    parameters = [hidden, *head.parameters()]
    weights = torch.rand(labels.shape, dtype=dtype) if per_token else torch.ones((), dtype=dtype)
    reduction = "none" if per_token else "sum"
    expected = whole(hidden, head, labels, reduction).reshape(weights.shape)
    expected_grads = torch.autograd.grad((expected * weights).sum(), parameters)
    got = cross_entropy(hidden, Wrapped(head) if wrapped else head, labels, per_token=per_token)
    grads = torch.autograd.grad((got * weights).sum(), parameters)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(grads, expected_grads, **tolerance)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_without_a_single_label_loss_and_gradients_are_zero(wrapped, per_token):
    hidden, head, labels = problem(torch.float32)
    module = Wrapped(head) if wrapped else head
    got = cross_entropy(hidden, module, labels.fill_(IGNORED), per_token=per_token)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.zeros(labels.shape if per_token else ()))
    got.sum().backward()
    for tensor in (hidden, head.weight):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_is_computed_in_fp32(per_token):
    hidden, head, labels = problem(torch.bfloat16)
    got = cross_entropy(hidden, head, labels, per_token=per_token)
    assert got.dtype == torch.float32
    # the price of bf16 is one rounding of each logit; the loss itself is not rounded
    logits = F.linear(hidden, head.weight).float().flatten(0, 1)
    expected = F.cross_entropy(
        logits, labels.flatten(), reduction="none" if per_token else "sum"
    ).reshape(got.shape)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    exact = whole(hidden.double(), head.double(), labels, "sum")
    assert abs(got.sum().double() - exact) / exact < 1e-3
    head.to(torch.bfloat16)
    grads = torch.autograd.grad(
        cross_entropy(hidden, head, labels), [hidden, head.weight], materialize_grads=True
    )
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_under_autocast_the_head_runs_in_bf16_and_the_loss_in_fp32():
    hidden, head, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = cross_entropy(hidden, head, labels)
    assert got.dtype == torch.float32
    expected = whole(hidden, head, labels, "sum")
    assert 0 < abs(got - expected) / expected < 1e-2  # not equal: the head did run in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_whole_logits_never_exist(wrapped, dtype):
    """The largest tensor kept or made is a chunk's logits or the head's weight."""
    hidden, head, labels = problem(dtype, t=400, v=64, keep=1.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        cross_entropy(hidden, Wrapped(head) if wrapped else head, labels).backward()
    assert largest <= hidden.numel() < labels.numel() * 64


def test_an_ignored_position_changes_nothing():
    hidden, head, labels = problem()
    other = hidden.detach().clone()
    other[labels == IGNORED] = torch.nan
    assert torch.equal(cross_entropy(other, head, labels), cross_entropy(hidden, head, labels))


def test_labels_are_shifted_and_cut_at_documents_and_padding():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    assert shifted_labels(labels).tolist() == [[2, 3, 4, 5, 6, 7, IGNORED]]
    seq_idx = torch.tensor([[-1, -1, 0, 0, 1, 1, -1]])
    i = IGNORED
    assert shifted_labels(labels, seq_idx).tolist() == [[i, i, 4, i, 6, i, i]]
    assert shifted_labels(labels[:, :1]).tolist() == [[i]]
    assert labels.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
