"""Our side: `mamba2-train` itself, with one callback that stops it after each step.

python -m mamba2_train.benchmarks.ours '{"workload": {...}, "weights": FOLDER, "rows": FILE}'
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mamba2_train.benchmarks.side import Steps
from mamba2_train.benchmarks.workloads import QUOTES_COMPARED, Workload, read
from mamba2_train.commands import train
from mamba2_train.model import Mamba2LM


class AfterEachStep(Callback):
    def __init__(self, steps: Steps, quotes: Path | None) -> None:
        self.steps, self.quotes = steps, quotes

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.quotes is not None:
            with trainer.precision_plugin.forward_context():
                self.steps.tell(quotes=_loss_of(module.model, self.quotes))  # type: ignore[arg-type]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        labels, document = batch["labels"][:, 1:], batch["seq_idx"]
        # a document's first token is predicted by nothing
        learned = (labels >= 0) & (document[:, 1:] == document[:, :-1])
        loss = float(trainer.callback_metrics["train/loss"])
        weights = module.model.parameters()  # type: ignore[union-attr]
        self.steps.ended(loss, int(learned.sum()), weights, trainer.optimizers[0])


@torch.no_grad()
def _loss_of(model: Mamba2LM, quotes: Path) -> float:
    """Of the first quotes, packed into one row as training packs them."""
    documents = read(quotes)[:QUOTES_COMPARED]
    ids = torch.tensor([[token for document in documents for token in document]])
    index = [[i for i, document in enumerate(documents) for _ in document]]
    return float(model(ids, labels=ids, seq_idx=torch.tensor(index, dtype=torch.int32)).loss)


def arguments(w: Workload, weights: str, rows: str, adapter: str | None, run: Path) -> list[str]:
    """Of `mamba2-train`."""
    packing = "bfd" if w.rows == "quotes" else "none"
    chosen = ["adapter=full"]
    if adapter is not None:
        chosen = ["adapter=continue", f"adapter.source={adapter}"]
    if w.precision == "nf4":
        chosen += ["quantization=nf4", "precision=bf16"]
    else:
        chosen += [f"precision={w.precision}"]
    return [
        *chosen,
        *(f"model.source={weights}", "model.tokenizer=embedded"),
        f"model.checkpointing={'full' if w.checkpointing else 'none'}",
        *("data=local", f"data.source={rows}", f"data.validation_source={rows}"),
        *("data.validation_split='train[:1]'", f"data.packing={packing}", "data.shuffle=false"),
        *(f"data.seq_len={w.seq_len}", f"data.batch_size={w.batch_size}"),
        *(f"optimizer.lr={w.lr}", "optimizer.betas=[0.9,0.999]", "scheduler=constant"),
        *("scheduler.warmup_fraction=0", "trainer.log_every=1", "trainer.progress_bar=false"),
        *("trainer.max_steps=1000", "trainer.validate_every=1000", "trainer.max_epochs=null"),
        *("logger=csv", "callbacks.samples.prompts=[]", f"run_dir={run}"),
    ]


def main() -> None:
    request = json.loads(sys.argv[1])
    w = Workload(**request["workload"])
    steps = Steps()
    quotes = Path(request["rows"]) if w.rows == "quotes" else None
    build = train.build_callbacks
    train.build_callbacks = lambda config: [*build(config), AfterEachStep(steps, quotes)]
    with tempfile.TemporaryDirectory() as folder:
        made = request["weights"], request["rows"], request.get("adapter")
        sys.argv[1:] = arguments(w, *made, Path(folder))
        train.main()


if __name__ == "__main__":
    main()
