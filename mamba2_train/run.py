"""One run, told from its announcement to its summary."""

import json
import math
import shlex
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.trainer.states import TrainerStatus
from peft import PeftModel
from rich.table import Table

from mamba2_train.adapters import only_merged, save_adapter
from mamba2_train.audit import coverage
from mamba2_train.checkpoint import save_pretrained
from mamba2_train.commands import console
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.tokenizer import save_tokenizer
from mamba2_train.generation import generate
from mamba2_train.loggers import trackers_of
from mamba2_train.model import Mamba2LM
from mamba2_train.module import Mamba2Module
from mamba2_train.parallel.checkpoint import load_weights
from mamba2_train.parallel.shards import mesh_of, whole_tensors
from mamba2_train.quantization import count_parameters
from mamba2_train.report import write_report
from mamba2_train.resume import START, Resumed, inherit, read_start
from mamba2_train.saving import CHECKPOINTS, HEARD, Checkpoints, Stopped
from mamba2_train.schema import SamplesConfig, TrainConfig
from mamba2_train.tracking import (
    CSV_FOLDER,
    continue_metrics,
    environment,
    read_points,
    write_json,
)

SAMPLES_BY_STEP = "samples_by_step.jsonl"  # in the run folder: those after each validation


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
        saver: Checkpoints,
        started: datetime,
        resumed: Resumed | None,
        in_one_piece: Callable[[dict[str, torch.Tensor]], Mamba2LM | PeftModel],
    ) -> None:
        self.config, self.trainer, self.module = config, trainer, module
        self.data, self.tokenizer, self.adapter = data, tokenizer, adapter
        self.saver, self.resumed, self.in_one_piece = saver, resumed, in_one_piece
        self.folder = config.run_dir
        self.trackers = trackers_of(trainer.loggers)
        parameters = list(module.model.parameters())
        if config.callbacks.samples.every_validation:
            # in front of what saves, so that a run goes on behind its samples
            trainer.callbacks.insert(0, LambdaCallback(on_validation_end=self._sample_again))  # type: ignore[attr-defined]
        self.result: dict[str, Any] = {
            "name": config.name,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": started.isoformat(timespec="seconds"),
            "model": {
                "source": config.model.source or config.model.preset,
                "parameters": count_parameters(module.model),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "data": data.counts(),
            "versions": environment(),
        }
        if resumed is not None:
            self.result["resumed"] = resumed.step
        if trainer.is_global_zero:
            if resumed is not None:
                inherit(resumed, self.folder)
                forget_samples(self.folder / SAMPLES_BY_STEP, behind=resumed.step)
                continue_metrics(self.folder, trainer.loggers[0], resumed.csv_rows)
            settings = config.model_dump(mode="json")
            (self.folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
            write_json(self.folder / "environment.json", self.result["versions"])
            if self.trackers is not None:
                about = {"environment": self.result["versions"], "model": self.result["model"]}
                self.trackers.begin({**settings, "run": about}, goes_on=resumed is not None)
                if resumed is not None:
                    self.trackers.replay(read_points(self.folder), samples_so_far(self.folder))

    def announce(self) -> None:
        if not self.trainer.is_global_zero:
            return
        model, data = self.result["model"], self.result["data"]
        share = model["trainable"] / model["parameters"]
        over = ""
        if (stored := self.config.quantization.stored) is not None:
            over = f", over {stored}"
        console.print(
            f"[bold]{model['source']}[/]  {model['parameters']:,} parameters, "
            f"{model['trainable']:,} trained, {share:.1%}{over}",
            soft_wrap=True,
        )
        console.print(coverage(self.module.model))
        if self.data.streamed:
            what = (
                f"{data['train_source_rows']:,} rows, streamed in {data['train_blocks']:,} blocks"
            )
        else:
            unit = "documents" if self.config.objective.kind == "sft" else "pairs"
            what = (
                f"{data['train_documents']:,} {unit}, {data['train_tokens']:,} tokens, "
                f"{data['train_documents_per_row']:.3g} to a row, "
                f"{data['train_packing_efficiency']:.1%} of it filled"
            )
        console.print(
            f"[bold]{self.config.data.title}[/]  {what}; held out {data['val_documents']:,}",
            soft_wrap=True,
        )
        console.print(f"[dim]{self.folder}[/]")

    def evaluate_base(self) -> None:
        """The held-out loss and the samples that training is to improve; of the first process of
        the run, and kept for those that go on with it."""
        start = read_start(self.folder) if self.resumed is not None else {}
        # of rank 0: another may see the folder late
        start = self.trainer.strategy.broadcast(start)
        if not {"started", "base", "before"} <= set(start):
            start = {
                "started": self.result["started"],
                "base": self._evaluate(),
                "before": self._samples(),
                "prompts": self.config.callbacks.samples.prompts,
            }
            if self.trainer.is_global_zero:
                write_json(self.folder / START, start)
            if self.trackers is not None:
                self.trackers.log_samples(_rows(start["prompts"], start["before"]), 0)
        self.result |= {"started": start["started"], "base": start["base"]}
        known = dict(zip(start["prompts"], start["before"], strict=True))
        self.before = [known.get(p, "") for p in self.config.callbacks.samples.prompts]

    def fit(self) -> None:
        """Train; after Ctrl-C, what was learned is still written."""
        checkpoint = self.resumed.checkpoint if self.resumed is not None else None
        try:
            self.trainer.fit(
                self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True
            )
        except Stopped as stopped:
            if stopped.number != signal.SIGINT:
                self._leave(stopped.number)
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
        self.saver.stop_listening()
        finished = self.trainer.state.status == TrainerStatus.FINISHED
        self.result["status"] = "finished" if finished else "interrupted"

    def conclude(self) -> None:
        """Take the best weights by val/loss, write what was made, report, and say what is next."""
        final = self._take_best()
        made = self._gathered()
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
        if isinstance(made, PeftModel):
            save_adapter(made, target, base_name(self.config), self.config.model.revision)
        else:
            special = ("bos", "eos", "pad")
            ids = {name: getattr(self.tokenizer, f"{name}_token_id") for name in special}
            save_pretrained(made, target, token_ids=ids)
        save_tokenizer(self.tokenizer, target)
        prompt = next(iter(self.config.callbacks.samples.prompts), "")
        self.result |= {
            "final": final,
            "seconds": round(self.saver.seconds, 1),
            "steps": self.trainer.global_step,
            "device": self.module.device.type,
            "outputs": {
                kind: kind,
                "checkpoints": CHECKPOINTS,
                "metrics": f"{CSV_FOLDER}/metrics.csv",
            },
            "next": shlex.join(["mamba2-generate", f"checkpoint={target}", f"prompt={prompt}"]),
        }
        if (stored := self.config.quantization.stored) is not None:
            self.result["next"] += f" quantization={stored}"
        write_json(self.folder / "result.json", self.result)
        lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
        (self.folder / "samples.jsonl").write_text(lines)
        report = write_report(self.folder)
        if self.trackers is not None:
            self.trackers.close(self.result["status"] == "finished")
        self._print_summary(samples, target, report)

    def _evaluate(self) -> dict[str, float]:
        metrics = self.trainer.validate(self.module, datamodule=self.data, verbose=False)[0]
        return {k: float(v) for k, v in metrics.items() if k.startswith("val/")}

    def _samples(self) -> list[str]:
        """Continuations of the prompts, with a seed of their own: before and after differ by the
        weights alone."""
        settings = self.config.callbacks.samples
        alone = mesh_of(self.module.model) is None  # else all of them are needed
        if not settings.prompts or (alone and not self.trainer.is_global_zero):
            return [""] * len(settings.prompts)
        # blocks spread over ranks are gathered in autocast's dtype
        autocast = nullcontext() if alone else self.trainer.precision_plugin.forward_context()
        with autocast:
            return continuations(self.module.model, self.tokenizer, settings, seed=self.config.seed)

    def _sample_again(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After a validation within the training."""
        if trainer.state.fn != "fit":
            return
        texts = self._samples()
        if not trainer.is_global_zero:
            return
        rows = _rows(self.config.callbacks.samples.prompts, texts)
        with (self.folder / SAMPLES_BY_STEP).open("a") as file:
            for row in rows:
                file.write(json.dumps({"step": trainer.global_step, **row}) + "\n")
        if self.trackers is not None:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as the validation's metrics
            self.trackers.log_samples(rows, step)

    def _gathered(self) -> Mamba2LM | PeftModel:
        """What has been made, on the first rank in one piece."""
        model = self.module.model
        if mesh_of(model) is None:
            return model if self.adapter is None else self.adapter
        tensors = {}
        for name, tensor in whole_tensors(model, self._made):
            if self.trainer.is_global_zero:
                tensors[name] = tensor.cpu()
        if not self.trainer.is_global_zero:
            return model
        return self.in_one_piece(tensors)

    def _made(self, p: torch.nn.Parameter) -> torch.Tensor | None:
        """An adapter is what is trained; a model all there is."""
        return p.detach() if p.requires_grad or self.adapter is None else None

    def _take_best(self) -> dict[str, float]:
        """Leave the best weights in the model; returns their held-out loss and perplexity, or, of
        preference pairs, all that is measured of them."""
        scores = self.saver.scores
        now = scores.get(self.trainer.global_step)
        if now is None:
            now = self._evaluate()["val/loss"]
        best = self.trainer.strategy.broadcast(self.saver.best_step)
        if best is not None and not now <= scores[best]:  # nan neither
            path = self.trainer.strategy.broadcast(self.saver.path(best))
            assert path is not None
            load_weights(path, self.module)
            self.result["best_step"] = best
            now = scores[best]
        if self.config.objective.kind == "dpo":
            return self._evaluate()
        return {"val/loss": now, "val/perplexity": math.exp(now)}

    def _leave(self, number: int) -> None:
        """The machine is wanted back: all that matters is on the disk."""
        if self.trainer.is_global_zero:
            console.print(
                f"stopped by {signal.Signals(number).name}; saved at step {self.saver.at.step}, "
                "resume=auto goes on"
            )
        for heard in HEARD:  # the launcher may ask again until the very end
            signal.signal(heard, signal.SIG_IGN)
        self.trainer.strategy.barrier()
        # what a shell and a scheduler expect of it: 0 would say that the run is finished
        sys.exit(128 + number)

    def _print_summary(self, samples: list[dict[str, str]], target: Path, report: Path) -> None:
        base, final = self.result["base"], self.result["final"]
        if self.config.objective.kind == "dpo":
            found = (
                f"held-out loss  [bold]{base['val/loss']:.4f} -> {final['val/loss']:.4f}[/], the "
                f"chosen answer ahead in [bold]{final['val/rewards/accuracy']:.0%}[/] of the pairs"
            )
        else:
            change = final["val/perplexity"] / base["val/perplexity"] - 1
            found = (
                f"held-out perplexity  [bold]{base['val/perplexity']:.2f} -> "
                f"{final['val/perplexity']:.2f}[/]  ({change:+.0%})"
            )
        console.print(
            f"\n{found}  after {self.result['steps']} steps, {self.result['seconds']:.0f} s\n"
        )
        table = Table("prompt", "before", "after", box=None, padding=(0, 2, 1, 0))
        for s in samples:
            table.add_row(s["prompt"], f"[dim]{_plain(s['before'])}[/]", _plain(s["after"]))
        console.print(table)
        for label, path in ((target.name, target), ("report", report)):
            console.print(f"{label:10}{path}")
        console.print(f"{'next':10}{self.result['next']}", soft_wrap=True)
        if self.adapter is not None:
            command = shlex.join(["mamba2-export", f"checkpoint={target}", "out=FOLDER"])
            why = "; ".join(only_merged(self.adapter))
            console.print(
                f"{'merge':10}{command}" + (f"  [dim](for other tools: {why})[/]" if why else ""),
                soft_wrap=True,
            )


def continuations(model: Mamba2LM, tokenizer: Any, settings: SamplesConfig, seed: int) -> list[str]:
    texts = []
    model.eval()
    device = next(p for p in model.parameters() if p.dim() == 1).device
    for i, prompt in enumerate(settings.prompts):
        ids = torch.tensor([tokenizer.encode(prompt)], device=device)
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


def base_name(config: TrainConfig) -> str:
    """What an adapter calls the weights below it; it may be used from another folder."""
    source = config.model.source or ""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def forget_samples(path: Path, behind: int) -> None:
    """Those of steps that will be taken again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= behind]
        path.write_text("".join(kept))


def samples_so_far(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By the step that their validation is logged at; of the base model at 0."""
    start, by_step = read_start(folder), defaultdict(list)
    if "before" in start:
        by_step[0] = _rows(start["prompts"], start["before"])
    path = folder / SAMPLES_BY_STEP
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        by_step[row.pop("step") - 1].append(row)
    return by_step


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off in the middle
        return math.inf


def _rows(prompts: list[str], texts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("[", r"\[")
