"""How seq_idx is read."""

import torch

from mamba2_kernels import ssd_scan
from mamba2_kernels.packing import documents
from mamba2_kernels.testing import random_ssd_inputs


def test_documents_are_numbered_in_order_of_appearance():
    seq_idx = torch.tensor(
        [
            [5, 5, 2, 2, 5, 5],
            [-1, 7, -1, 7, -1, 8],
            [0, -1, -1, 1, 1, -1],
            [-1, -1, -1, -1, -1, -1],
        ],
        dtype=torch.int32,
    )
    valid, document = documents(seq_idx)
    assert torch.equal(valid, seq_idx >= 0)
    assert document.tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ]


def test_a_number_that_comes_back_is_a_new_document():
    inputs = random_ssd_inputs(1, 6, 2, 8, 1, 8)
    outputs = [
        ssd_scan(**inputs, seq_idx=torch.tensor([ids], dtype=torch.int32), backend=backend)
        for ids in ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])
        for backend in ("torch", "reference")
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
