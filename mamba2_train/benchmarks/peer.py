"""The other side: transformers' model, peft's adapter, TRL's SFTTrainer, with one callback.

    python -m mamba2_train.benchmarks.peer '{"workload": {...}, "weights": FOLDER, "rows": FILE}'

peft's guard on `out_proj` is lifted: on a CPU transformers calls the module, so the adapter works.
"""

import json
import sys
import tempfile
from typing import Any

import peft.tuners.tuners_utils
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, Mamba2ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from mamba2_train.assets import resolve
from mamba2_train.benchmarks.side import Steps
from mamba2_train.benchmarks.workloads import QUOTES_COMPARED, Workload, read


class AfterEachStep(TrainerCallback):
    def __init__(self, steps: Steps, model: torch.nn.Module) -> None:
        self.steps, self.model = steps, model
        self.tokens = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        if "loss" in logs:
            optimizer = objects["optimizer"]
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
            self.steps.ended(logs["loss"], self.tokens, self.model.parameters(), optimizer)
            self.tokens = 0


class CountedTrainer(SFTTrainer):
    """Knows how many tokens it has learned from."""

    after: AfterEachStep

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.after.tokens += int((inputs["labels"][:, 1:] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def load(w: Workload, weights: str, adapter: str | None) -> torch.nn.Module:
    guard = "_check_lora_target_modules_mamba"
    assert hasattr(peft.tuners.tuners_utils, guard)
    setattr(peft.tuners.tuners_utils, guard, lambda *_: None)
    options: dict[str, Any] = {"dtype": torch.float32}
    if w.precision == "nf4":
        options = {
            "dtype": torch.bfloat16,
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=["lm_head"],
            ),
        }
    model = Mamba2ForCausalLM.from_pretrained(weights, **options)
    if adapter is None:
        return model
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def settings(w: Workload, folder: str) -> SFTConfig:
    """TRL's defaults but for what must be the same on both sides; of the quotes, its batch,
    its checkpointing and its precision are the default ones."""
    chosen: dict[str, Any] = {}
    if w.rows == "whole":
        chosen = {
            "per_device_train_batch_size": w.batch_size,
            "gradient_checkpointing": w.checkpointing,
            "bf16": w.precision != "fp32",
            "max_length": w.seq_len,
        }
    return SFTConfig(
        output_dir=folder,
        learning_rate=w.lr,
        lr_scheduler_type="constant",
        max_steps=1000,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        use_cpu=True,
        **chosen,
    )


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: list[list[int]]) -> float:
    """Of the quotes one by one, each token weighing the same."""
    total, n = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
        n += len(row) - 1
    return total / n


def main() -> None:
    request = json.loads(sys.argv[1])
    w = Workload(**request["workload"])
    steps = Steps()
    rows = read(request["rows"])
    model = load(w, request["weights"], request.get("adapter"))
    after = AfterEachStep(steps, model)
    if w.rows == "quotes":
        with torch.autocast("cpu", torch.bfloat16):
            steps.tell(quotes=loss_of(model, rows[:QUOTES_COMPARED]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountedTrainer(
            model,  # type: ignore[arg-type, unused-ignore]  # unused where trl is missing
            args=settings(w, folder),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=AutoTokenizer.from_pretrained(resolve("embedded")),
            callbacks=[after],
        )
        trainer.after = after
        trainer.train()


if __name__ == "__main__":
    main()
