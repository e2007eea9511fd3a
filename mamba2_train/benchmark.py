"""What each checkpointing mode holds for the backward: `python -m mamba2_train.benchmark`.

Real tensors of the 130M shape (24 layers, 256 tokens; a small vocabulary, which no block sees),
counted storage by storage between forward and backward.
"""

import torch
from rich.table import Table
from torch import Tensor

from mamba2_train.commands import console
from mamba2_train.memory import LiveMemory
from mamba2_train.model import Mamba2Config, Mamba2LM, initialize

SHAPE = Mamba2Config(vocab_size=512)  # mamba2-130m but for its vocabulary
MODES = ("none", "selective", "full", "every_2")


def held(model: Mamba2LM, mode: str, input_ids: Tensor) -> int:
    """Bytes that a forward pass leaves for its backward."""
    model.set_checkpointing(mode)
    with LiveMemory() as count:
        count.add(*model.parameters(), input_ids)
        before = count.live
        hidden, _ = model.backbone(input_ids, None, None, None, False)
        total = count.live - before
    del hidden
    return total


def main() -> None:
    table = Table("dtype", "checkpointing", "MB", "of none", "bytes/token", box=None)
    input_ids = torch.randint(SHAPE.vocab_size, (1, 256))
    for dtype in (torch.float32, torch.bfloat16):
        model = initialize(Mamba2LM(SHAPE)).to(dtype)
        none = held(model, "none", input_ids)
        for mode in MODES:
            size = held(model, mode, input_ids)
            figures = f"{size / 1e6:.1f}", f"{size / none:.1%}", f"{size / 256:,.0f}"
            table.add_row(str(dtype).removeprefix("torch."), mode, *figures)
    console.print("held for the backward, mamba2-130m's blocks, 256 tokens, all weights trained")
    console.print(table)


if __name__ == "__main__":
    main()
