"""mamba2-train: fine-tune (or pre-train) a Mamba2 language model.

mamba2-train                                       the embedded model on the embedded quotes
mamba2-train model.source=FOLDER data.source=FILE.jsonl adapter.r=32
torchrun --nproc-per-node 8 -m mamba2_train ...    the same on eight GPUs
"""

import json
import math
import os
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerStatus
from peft import PeftModel
from rich.table import Table

from mamba2_train.adapters import add_lora, save_adapter
from mamba2_train.assets import resolve
from mamba2_train.callbacks import CHECKPOINTS, build_callbacks
from mamba2_train.checkpoint import load_config, load_pretrained, save_pretrained
from mamba2_train.commands import command, console
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.preview import preview
from mamba2_train.data.sources import load_rows
from mamba2_train.data.tokenizer import load_tokenizer, save_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.generation import generate
from mamba2_train.model import PRESETS, Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.report import write_report
from mamba2_train.schema import SamplesConfig, StrategyConfig, TrainConfig
from mamba2_train.tracking import (
    CSV_FOLDER,
    build_loggers,
    check_space,
    environment,
    write_json,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@command(TrainConfig, "train")
def main(config: TrainConfig) -> None:
    started = datetime.now()
    L.seed_everything(config.seed, workers=True, verbose=False)

    # what fails fast comes first: the data are read and checked before a weight is
    shape = model_shape(config)
    tokenizer = load_tokenizer(
        resolve(config.model.tokenizer or config.model.source or ""),
        revision=config.model.revision if config.model.tokenizer is None else None,
        vocab_size=shape.vocab_size,
    )
    data = TextDataModule(config.data, tokenizer, seed=config.seed)
    if config.data.preview:
        for one in config.data.each:
            preview(load_rows(one)[0], tokenizer, one, console)
        return
    data.prepare_data()
    data.setup()
    model = build_model(config)
    adapter = adapt(model, config)
    check_space(config.run_dir, _bytes_written(model, config.callbacks.saving.keep))

    module = Mamba2Module(model, config.optimizer, config.scheduler)
    trainer = build_trainer(config)
    run = Run(config, trainer, module, data, tokenizer, adapter, started)
    run.announce()
    run.evaluate_base()
    run.fit()
    run.conclude()
    if torch.distributed.is_initialized():
        # a rank that leaves while another still talks to it aborts the job at its very end
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def model_shape(config: TrainConfig) -> Mamba2Config:
    """Read or chosen; a checkpoint that is no Mamba2 is refused here."""
    if config.model.source is not None:
        return load_config(resolve(config.model.source), revision=config.model.revision)
    assert config.model.preset is not None
    return PRESETS[config.model.preset]


def build_model(config: TrainConfig) -> Mamba2LM:
    """The weights to start from, read or drawn."""
    settings = config.model
    if settings.source is not None:
        model = load_pretrained(
            resolve(settings.source),
            revision=settings.revision,
            dtype=DTYPES[config.precision.weights],
        )
    else:
        model = initialize(Mamba2LM(model_shape(config)), seed=config.seed)
    model.set_checkpointing(settings.checkpointing)
    return model


def adapt(model: Mamba2LM, config: TrainConfig) -> PeftModel | None:
    """Put the adapters on the model, in place; None where all of it is trained."""
    lora = config.adapter
    if lora.kind == "full":
        return None
    return add_lora(
        model,
        lora.target_names,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        rslora=lora.rslora,
        seed=config.seed,
    )


def build_trainer(config: TrainConfig) -> L.Trainer:
    t, s = config.trainer, config.strategy
    steps = isinstance(t.validate_every, int)
    devices, num_nodes = _processes(s)
    accelerator = s.accelerator
    if accelerator == "auto":  # Lightning's would take a Mac's GPU, which lacks the scan's float64
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy={"auto": "auto", "single": "auto", "ddp": "ddp"}[s.kind],
        precision="bf16-mixed" if config.precision.autocast else "32-true",
        max_epochs=t.max_epochs if t.max_epochs is not None else -1,
        max_steps=t.max_steps if t.max_steps is not None else -1,
        accumulate_grad_batches=t.accumulate,
        gradient_clip_val=t.clip_norm,
        # Lightning counts micro-batches here
        val_check_interval=t.validate_every * t.accumulate if steps else t.validate_every,
        check_val_every_n_epoch=None if steps else 1,
        log_every_n_steps=t.log_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=t.progress_bar,
        logger=build_loggers(config.logger, config.name, config.run_dir),
        callbacks=build_callbacks(config),
    )


def _processes(strategy: StrategyConfig) -> tuple[int | str, int]:
    """Devices per node, and nodes; torchrun has counted both when it is the launcher."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env:
        return strategy.devices, strategy.num_nodes
    local, world = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"])
    if strategy.devices not in ("auto", local) or (strategy.kind == "single" and world > 1):
        raise UserError(
            f"torchrun started {local} processes on this node, but strategy={strategy.kind} has "
            f"devices={strategy.devices}: leave strategy.devices at auto and use strategy=ddp"
        )
    return local, world // local


class Run:
    """One run, told from its announcement to its summary; only rank 0 speaks and writes."""

    def __init__(
        self,
        config: TrainConfig,
        trainer: L.Trainer,
        module: Mamba2Module,
        data: TextDataModule,
        tokenizer: Any,
        adapter: PeftModel | None,
        started: datetime,
    ) -> None:
        self.config, self.trainer, self.module = config, trainer, module
        self.data, self.tokenizer, self.adapter = data, tokenizer, adapter
        self.folder = config.run_dir
        self.clock = time.perf_counter()
        parameters = list(module.model.parameters())
        self.result: dict[str, Any] = {
            "name": config.name,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": started.isoformat(timespec="seconds"),
            "model": {
                "source": config.model.source or config.model.preset,
                "parameters": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "data": data.counts(),
            "versions": environment(),
        }
        if trainer.is_global_zero:
            settings = config.model_dump(mode="json")
            (self.folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))

    def announce(self) -> None:
        if not self.trainer.is_global_zero:
            return
        model, data = self.result["model"], self.result["data"]
        adapter = self.config.adapter
        how = "in full" if adapter.kind == "full" else "LoRA on " + ", ".join(adapter.target_names)
        console.print(
            f"[bold]{model['source']}[/]  {model['parameters']:,} parameters, "
            f"{model['trainable']:,} trained ({how})",
            soft_wrap=True,
        )
        console.print(
            f"[bold]{self.config.data.title}[/]  {data['train_documents']:,} documents, "
            f"{data['train_tokens']:,} tokens; held out {data['val_documents']:,}"
        )
        console.print(f"[dim]{self.folder}[/]")

    def evaluate_base(self) -> None:
        """The held-out loss and the samples that training is to improve."""
        self.result["base"] = self._evaluate()
        self.before = self._samples()

    def fit(self) -> None:
        try:
            self.trainer.fit(self.module, datamodule=self.data)
        except SystemExit:  # Lightning's answer to Ctrl-C: what was learned is still written
            if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
        finished = self.trainer.state.status == TrainerStatus.FINISHED
        self.result["status"] = "finished" if finished else "interrupted"

    def conclude(self) -> None:
        """Take the best weights by val/loss, write what was made, report, and say what is next."""
        final = self._take_best()
        samples = [
            {"prompt": p, "before": b, "after": a}
            for p, b, a in zip(
                self.config.callbacks.samples.prompts, self.before, self._samples(), strict=True
            )
        ]
        if not self.trainer.is_global_zero:
            return
        kind = "model" if self.adapter is None else "adapter"
        target = self.folder / kind
        if self.adapter is None:
            special = ("bos", "eos", "pad")
            ids = {name: getattr(self.tokenizer, f"{name}_token_id") for name in special}
            save_pretrained(self.module.model, target, token_ids=ids)
        else:
            save_adapter(self.adapter, target, base=_base_name(self.config))
        save_tokenizer(self.tokenizer, target)
        prompt = next(iter(self.config.callbacks.samples.prompts), "")
        self.result |= {
            "final": final,
            "seconds": round(time.perf_counter() - self.clock, 1),
            "steps": self.trainer.global_step,
            "device": self.module.device.type,
            "outputs": {
                kind: kind,
                "checkpoint": f"{CHECKPOINTS}/last.ckpt",
                "metrics": f"{CSV_FOLDER}/metrics.csv",
            },
            "next": shlex.join(["mamba2-generate", f"checkpoint={target}", f"prompt={prompt}"]),
        }
        write_json(self.folder / "result.json", self.result)
        lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
        (self.folder / "samples.jsonl").write_text(lines)
        report = write_report(self.folder)
        self._print_summary(samples, target, report)

    def _evaluate(self) -> dict[str, float]:
        metrics = self.trainer.validate(self.module, datamodule=self.data, verbose=False)[0]
        return {k: float(v) for k, v in metrics.items() if k.startswith("val/")}

    def _samples(self) -> list[str]:
        """Continuations of the prompts, with a seed of their own: before and after differ by the
        weights alone."""
        settings = self.config.callbacks.samples
        if not self.trainer.is_global_zero or not settings.prompts:
            return [""] * len(settings.prompts)
        return continuations(self.module.model, self.tokenizer, settings, seed=self.config.seed)

    def _take_best(self) -> dict[str, float]:
        """Leave the best weights in the model; returns their held-out metrics."""
        if self.module.validated_step == self.trainer.global_step:
            now = float(self.trainer.callback_metrics["val/loss"])
        else:
            now = self._evaluate()["val/loss"]
        saver = self.trainer.checkpoint_callback
        assert isinstance(saver, ModelCheckpoint)
        best = saver.best_model_score
        if best is not None and float(best) < now:
            checkpoint = torch.load(saver.best_model_path, map_location="cpu", weights_only=True)
            self.module.load_state_dict(checkpoint["state_dict"], strict=False)
            self.result["best_step"] = checkpoint["global_step"]
            now = float(best)
        return {"val/loss": now, "val/perplexity": math.exp(now)}

    def _print_summary(self, samples: list[dict[str, str]], target: Path, report: Path) -> None:
        base, final = self.result["base"], self.result["final"]
        change = final["val/perplexity"] / base["val/perplexity"] - 1
        console.print(
            f"\nheld-out perplexity  [bold]{base['val/perplexity']:.2f} -> "
            f"{final['val/perplexity']:.2f}[/]  ({change:+.0%})  after {self.result['steps']} "
            f"steps, {self.result['seconds']:.0f} s\n"
        )
        table = Table("prompt", "before", "after", box=None, padding=(0, 2, 1, 0))
        for s in samples:
            table.add_row(s["prompt"], f"[dim]{_plain(s['before'])}[/]", _plain(s["after"]))
        console.print(table)
        for label, path in ((target.name, target), ("report", report)):
            console.print(f"{label:10}{path}")
        console.print(f"{'next':10}{self.result['next']}", soft_wrap=True)


def continuations(model: Mamba2LM, tokenizer: Any, settings: SamplesConfig, seed: int) -> list[str]:
    texts = []
    model.eval()
    for i, prompt in enumerate(settings.prompts):
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.lm_head.weight.device)
        out = generate(
            model,
            ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            eos_token_id=tokenizer.eos_token_id,
            seed=seed + i,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    model.train()
    return texts


def _base_name(config: TrainConfig) -> str:
    source = config.model.source or ""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _bytes_written(model: Mamba2LM, keep: int) -> int:
    """Each checkpoint holds what is trained and AdamW's two moments; there are keep + 2."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return (keep + 2) * 3 * trained + trained + 20_000_000


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("[", r"\[")
