"""A model trained through the kernels follows the same losses as through plain PyTorch."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

from mamba2_kernels.interpreter import repaired  # noqa: E402
from mamba2_kernels.launch import launches  # noqa: E402
from mamba2_train.model import Mamba2Config, Mamba2LM  # noqa: E402

STEPS = 20
KERNELS = {
    "scan_kernel",
    "across_kernel",
    "conv_kernel",
    "conv_backward_kernel",
    "norm_kernel",
    "norm_backward_kernel",
}


def losses(random_model: object) -> list[float]:
    config = Mamba2Config(
        d_model=32, n_layers=1, vocab_size=40, d_state=16, headdim=32, chunk_size=32
    )
    model: Mamba2LM = random_model(config)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 40, (2, 24), generator=generator)
    seq_idx = torch.tensor([[0] * 10 + [1] * 14, [-1] * 4 + [0] * 20], dtype=torch.int32)
    labels = input_ids.masked_fill(seq_idx < 0, -100)
    found = []
    for _ in range(STEPS):
        loss = model(input_ids, labels=labels, seq_idx=seq_idx).loss
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def test_training_follows_the_torch_path(
    interpreter: None, random_model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(random_model)
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    before = launches.copy()
    with repaired():
        found = losses(random_model)
    counted = launches - before
    assert set(counted) >= KERNELS
    assert counted["scan_kernel"] == counted["across_kernel"] == STEPS
    assert expected[-1] < 0.7 * expected[0]
    assert found == pytest.approx(expected, rel=1e-4)
