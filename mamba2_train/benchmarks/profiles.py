"""Where a step's time goes, on both sides, by kind of operation.

    python -m mamba2_train.benchmarks.profiles ours|peer '{"workload": {...}, ...}'

Forward and backward of one batch, after one that is not counted. PyTorch's profiler gives each
operation the time that it spends outside of others: matrix products, what moves numbers without
computing, what computes them one by one, sums.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mamba2_train.benchmarks.workloads import Workload, read

KINDS = {
    "projections": ("aten::mm", "aten::addmm", "aten::linear", "bitsandbytes::"),
    "products in the scan": ("aten::bmm", "aten::baddbmm", "aten::einsum"),
    "copies": (
        *("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "aten::stack"),
        *("aten::constant_pad_nd", "aten::slice_backward", "aten::select_backward", "aten::index"),
    ),
    "sums": ("aten::sum", "aten::cumsum", "aten::mean", "aten::linalg_vector_norm", "aten::norm"),
    "convolution": ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::slow_conv"),
    "loss": (
        *("aten::_log_softmax", "aten::nll_loss", "aten::logsumexp", "aten::linear_cross_entropy"),
        *("aten::_softmax", "aten::argmax", "aten::gather"),
    ),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach"),
}
ELSE = "one by one"  # mul, add, exp, silu, tril, ...


def kind(name: str) -> str:
    """Of an operation; the rest computes number by number."""
    return next((k for k, starts in KINDS.items() if name.startswith(starts)), ELSE)


def measure(w: Workload, made: dict[str, str]) -> dict[str, dict[str, float]]:
    """Seconds by kind, of both sides."""
    found = {}
    for side in ("ours", "peer"):
        request = json.dumps({"workload": asdict(w), **made})
        done = subprocess.run(
            [sys.executable, "-m", "mamba2_train.benchmarks.profiles", side, request],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
            env={"HF_HUB_OFFLINE": "1", **os.environ},
        )
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _model(side: str, w: Workload, request: dict[str, Any]) -> torch.nn.Module:
    if side == "peer":
        from mamba2_train.benchmarks.peer import load

        model = load(w, request["weights"], request.get("adapter"))
        return model.train()
    from mamba2_train.adapters import load_adapter
    from mamba2_train.checkpoint import load_pretrained

    ours = load_pretrained(request["weights"], dtype=torch.float32)
    if "adapter" in request:
        load_adapter(ours, Path(request["adapter"]), trainable=True)
    return ours.train()


def main() -> None:
    side, request = sys.argv[1], json.loads(sys.argv[2])
    w = Workload(**request["workload"])
    model = _model(side, w, request)
    ids = torch.tensor(read(request["rows"])[: w.batch_size])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=w.lr, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=w.precision == "bf16-mixed"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = dict.fromkeys([*KINDS, ELSE], 0.0)
    for event in profile.key_averages():
        found[kind(event.key)] += event.self_cpu_time_total / 1e6
    print(json.dumps(found))


if __name__ == "__main__":
    main()
