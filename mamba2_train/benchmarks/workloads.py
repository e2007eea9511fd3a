"""What is measured: a model, how it is trained, on which rows."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

QUOTES_COMPARED = 24  # whose loss is compared where the batches of the two sides differ


@dataclass(frozen=True)
class Workload:
    """One comparison. Both sides read the same weights, the same first adapter and the same rows.

    tolerance: most that the losses of any step may differ, in nats per token; where they do, no
    time is reported.
    """

    name: str
    title: str
    shape: Literal["tiny", "mamba2-130m"] = "mamba2-130m"
    trained: Literal["lora", "full"] = "lora"
    precision: Literal["fp32", "bf16-mixed", "nf4"] = "fp32"
    seq_len: int = 512
    batch_size: int = 2
    checkpointing: bool = False
    rows: Literal["whole", "quotes"] = "whole"  # filled rows, or one short document to each
    steps: int = 3  # measured in each repetition, after a first that is not
    repetitions: int = 1  # with new processes; more by repetitions=
    tolerance: float = 1e-3

    @property
    def lr(self) -> float:
        return 2e-3 if self.trained == "lora" else 1e-4  # the recipe's; a full fine-tune's


# bfloat16 has 8 bits: sums in another order differ in the third digit of the loss
BF16 = {"precision": "bf16-mixed", "tolerance": 2e-2}
LORA_TINY = Workload("lora-tiny-512", "LoRA recipe, tiny, 2 x 512", "tiny", steps=6, repetitions=2)
LORA = Workload("lora-130m-512", "LoRA recipe, 130M, 2 x 512")
FULL = Workload(
    "full-130m", "full, 130M, 1 x 1,024", trained="full", seq_len=1024, batch_size=1, steps=2
)


def _long(w: Workload, **changes: object) -> Workload:
    return replace(
        w,
        name=w.name.replace("-512", "-2048"),
        title=w.title.replace("2 x 512", "1 x 2,048"),
        seq_len=2048,
        batch_size=1,
        **changes,  # type: ignore[arg-type]
    )


def _bf16(w: Workload) -> Workload:
    return replace(w, name=f"{w.name}-bf16", title=f"{w.title}, bf16", **BF16)  # type: ignore[arg-type]


# without checkpointing the peer would need more memory here than most machines have
LORA_LONG = replace(
    _long(LORA, checkpointing=True, steps=2), title="LoRA recipe, 130M, 1 x 2,048, checkpointed"
)
WORKLOADS = {
    w.name: w
    for w in (
        LORA_TINY,
        _bf16(LORA_TINY),
        _long(LORA_TINY, steps=4),
        _bf16(_long(LORA_TINY, steps=4)),
        LORA,
        _bf16(LORA),
        LORA_LONG,
        _bf16(LORA_LONG),
        FULL,
        _bf16(FULL),
        Workload("qlora-130m", "QLoRA nf4, 130M, 2 x 512", precision="nf4", tolerance=2e-2),
        Workload(
            "quotes-130m",
            "LoRA on quotes, 130M: packed, TRL's defaults",
            precision="bf16-mixed",
            seq_len=384,  # holds eight quotes, TRL's batch
            batch_size=1,
            rows="quotes",
            tolerance=2e-2,
        ),
    )
}


def read(rows: str | Path) -> list[list[int]]:
    """Token ids of each row."""
    with Path(rows).open() as lines:
        return [json.loads(line)["input_ids"] for line in lines]
