"""The scan alone, forward and backward, beside transformers': checked, then timed in turn."""

from typing import Any

import torch

from mamba2_kernels.benchmark import SHAPES, check, measure, transformers_scan


def measured(repeats: int = 15) -> list[dict[str, Any]]:
    """Median seconds of ours and theirs by shape and pass, fp32, or why there are none."""
    torch.manual_seed(0)
    peer = transformers_scan()
    found: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        if (failure := check(shape, peer)) is not None:
            found.append({"shape": name, "failure": failure})
            continue
        for row, (ours, _, *theirs) in measure(shape, peer, repeats).items():
            found.append({"shape": name, "pass": row, "ours": ours, "peer": theirs[0]})
    return found
