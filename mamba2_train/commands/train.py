"""mamba2-train: fine-tune (or pre-train) a Mamba2 language model.

mamba2-train                                       the embedded model on the embedded quotes
mamba2-train model.source=FOLDER data.source=FILE.jsonl adapter.r=32
torchrun --nproc-per-node 8 -m mamba2_train ...    the same on eight GPUs
mamba2-train ... resume=auto                       go on where the last one was cut off
"""

import contextlib
import logging
import math
import os
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from peft import PeftModel

from mamba2_train.adapters import (
    add_lora,
    find_frozen,
    find_targets,
    folder_of,
    load_adapter,
    read_config,
    read_in_full,
)
from mamba2_train.assets import resolve
from mamba2_train.callbacks import build_callbacks, validate_every
from mamba2_train.checkpoint import StoredWeights, load_config, load_pretrained
from mamba2_train.commands import command, console
from mamba2_train.data.datamodule import TextDataModule
from mamba2_train.data.preview import preview
from mamba2_train.data.sources import load_rows
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.errors import UserError
from mamba2_train.loggers import build_loggers, check_loggers
from mamba2_train.model import PRESETS, Mamba2Config, Mamba2LM, initialize
from mamba2_train.module import Mamba2Module
from mamba2_train.nonfinite import NonFinite
from mamba2_train.parallel.dry_run import dry_run
from mamba2_train.parallel.sizes import Sizes, mesh_sizes
from mamba2_train.parallel.start import Sharding, drawn, sharded_model, stored, weightless
from mamba2_train.parallel.strategy import MeshStrategy, row_ranks
from mamba2_train.plan import Plan, shortage
from mamba2_train.preference import PreferenceModule
from mamba2_train.processes import check_launcher, open_log, own
from mamba2_train.resume import identity, locate
from mamba2_train.run import Run, base_name
from mamba2_train.saving import CHECKPOINTS, RECENT, Checkpoints, WholeOrNot
from mamba2_train.schema import ParallelConfig, StrategyConfig, TrainConfig
from mamba2_train.tracking import check_space, count_rows
from mamba2_train.watch import Watch

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@command(TrainConfig, "train")
def main(config: TrainConfig) -> None:
    started = datetime.now()
    check_launcher()
    wandb = "offline" if config.data.preview else check_loggers(config.logger)
    config, resumed = locate(config)
    if not config.data.preview:
        own(config.run_dir)
        open_log(config.run_dir)
    L.seed_everything(config.seed, workers=True, verbose=False)

    # what fails fast comes first: the data are read and checked before a weight is
    shape = model_shape(config)
    strategy = choose_strategy(config, shape)
    check_adapter(config, shape)
    if isinstance(strategy, Sizes):
        announce_dry_run(config, shape, strategy)
        return
    tokenizer = load_tokenizer(
        resolve(config.model.tokenizer or config.model.source or ""),
        revision=config.model.revision if config.model.tokenizer is None else None,
        vocab_size=shape.vocab_size,
    )
    data = TextDataModule(config.data, tokenizer, seed=config.seed)
    if config.data.preview:
        if os.environ.get("RANK", "0") == "0":
            for one in config.data.each:
                preview(load_rows(one)[0], tokenizer, one, console)
        return
    data.prepare_data()
    data.setup()
    warn_of_memory(config, shape)
    c = config.long_context
    if c.kind == "exact" and config.data.seq_len <= c.segment_len:
        logger.info(
            "long_context=exact changes nothing: rows of data.seq_len=%d are no longer than one "
            "segment of %d",
            *(config.data.seq_len, c.segment_len),
        )

    saver = Checkpoints(
        config.run_dir / CHECKPOINTS,
        config.callbacks.saving,
        seed=config.seed,
        csv_rows=lambda: count_rows(config.run_dir),
        timeout=_pg_timeout(config.strategy),
    )
    t = config.trainer
    nonfinite = NonFinite(t.on_nan, t.max_skipped, saver, config.run_dir)
    if isinstance(strategy, MeshStrategy):
        strategy.background = saver.background
    loggers = build_loggers(config.logger, config.name, config.run_dir, wandb)
    trainer = build_trainer(config, saver, nonfinite, strategy, loggers)
    model, adapter = build(config, shape, strategy)
    if config.model.compile:
        model.compile_blocks()
    check_space(config.run_dir, _bytes_written(model, config.callbacks.saving.keep))
    saver.run = identity(config, model, data.fingerprint(), row_ranks(trainer), resumed)
    data.trainer = trainer
    total_steps = count_steps(config, data)
    module = build_module(config, model, total_steps, nonfinite)
    run = Run(
        *(config, trainer, module, data, tokenizer, adapter, saver, started, resumed),
        in_one_piece=partial(in_one_piece, config, shape),
    )
    run.announce()
    run.evaluate_base()
    run.fit()
    run.conclude()
    # a rank that leaves while another still talks to it aborts the job at its very end
    trainer.strategy.barrier()


def build_module(
    config: TrainConfig, model: Mamba2LM, total_steps: int, nonfinite: NonFinite
) -> Mamba2Module:
    """What a step of training is, by the objective."""
    settings = (config.optimizer, config.scheduler, total_steps, config.adapter.lora_plus_ratio)
    if config.objective.kind == "dpo":
        return PreferenceModule(model, *settings, nonfinite, objective=config.objective)
    return Mamba2Module(model, *settings, nonfinite, config.long_context)


def model_shape(config: TrainConfig) -> Mamba2Config:
    """Read or chosen; a checkpoint that is no Mamba2 is refused here."""
    if config.model.source is not None:
        return load_config(resolve(config.model.source), revision=config.model.revision)
    assert config.model.preset is not None
    return PRESETS[config.model.preset]


def choose_strategy(config: TrainConfig, shape: Mamba2Config) -> str | MeshStrategy | Sizes:
    """Lightning's name of a strategy, or ours, with sizes that processes and model allow.

    Of a dry run the sizes alone."""
    s = config.strategy
    if not s.shards:
        return "ddp" if s.kind == "ddp" else "auto"
    devices, num_nodes = _processes(s)
    asked = (s.data_size, s.tensor_size)
    c = config.long_context
    context = c.ranks if isinstance(c, ParallelConfig) else 1
    if s.dry_run and devices == "auto" and "auto" not in (*asked, context):
        devices = asked[0] * asked[1] * context  # type: ignore[operator]
    if devices == "auto":
        cuda = torch.cuda.is_available() and s.accelerator != "cpu"
        devices = torch.cuda.device_count() if cuda else 1
    assert isinstance(devices, int)
    sizes = mesh_sizes(s, shape, devices * num_nodes, devices, context)
    announce_split(config, sizes)
    if sizes.tensor > 1:
        from mamba2_train.parallel.tensor_parallel import check_divisible

        check_divisible(shape, sizes.tensor, in_4bit=config.quantization.stored is not None)
    if s.dry_run:
        return sizes
    return MeshStrategy(sizes, reduce_each_batch=s.reduce_each_batch, cpu_offload=s.cpu_offload)


def announce_split(config: TrainConfig, sizes: Sizes) -> None:
    """What splitting the rows over ranks does not do as it was asked."""
    seq_len, n = config.data.seq_len, sizes.context
    if config.long_context.kind == "parallel" and n == 1:
        logger.info("long_context=parallel changes nothing: no other rank shares a row")
    if seq_len % n and config.data.packing != "none":
        logger.info(
            "rows of data.seq_len=%d are padded to %d, a multiple of the %d ranks that share them",
            *(seq_len, -(-seq_len // n) * n, n),
        )


def announce_dry_run(config: TrainConfig, shape: Mamba2Config, sizes: Sizes) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    table, lines = dry_run(
        shape,
        sizes,
        partial(adapt, config=config),
        dtype=DTYPES[config.precision.weights],
        quantization=config.quantization.stored,
        products=torch.bfloat16 if config.precision.autocast else None,
        n_rows=config.data.batch_size,
        n_tokens=config.data.batch_size * -(-config.data.seq_len // sizes.context),
        accumulate=config.trainer.accumulate,
        reduce_each_batch=config.strategy.reduce_each_batch,
    )
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)


def build(
    config: TrainConfig, shape: Mamba2Config, strategy: str | MeshStrategy
) -> tuple[Mamba2LM, PeftModel | None]:
    """The model with its adapters, on the mesh if the strategy has one."""
    if not isinstance(strategy, MeshStrategy):
        model = build_model(config)
        return model, adapt(model, config)
    settings = config.model
    if settings.source is not None:
        source = stored(StoredWeights(resolve(settings.source), settings.revision))
    else:
        source = drawn(shape, config.seed)
    model, adapter = sharded_model(
        shape,
        source,
        partial(adapt, config=config),
        Sharding(
            strategy.start(),
            products=torch.bfloat16 if config.precision.autocast else None,
            cpu_offload=strategy.cpu_offload,
            context=strategy.context,
        ),
        dtype=DTYPES[config.precision.weights],
        quantization=config.quantization.stored,
        beside=_trained_beside(config),
    )
    model.set_checkpointing(settings.checkpointing)
    return model, adapter


def in_one_piece(
    config: TrainConfig, shape: Mamba2Config, tensors: dict[str, torch.Tensor]
) -> Mamba2LM | PeftModel:
    """What is saved of a run: the model that `tensors` are all of, or an adapter on weights that
    are not there."""
    model = weightless(shape, DTYPES[config.precision.weights], config.quantization.stored)
    adapter = adapt(model, config)
    unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown
    model.tie_weights()
    return model if adapter is None else adapter


def _trained_beside(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Weights that an adapter to go on with has trained in full."""
    lora = config.adapter
    return read_in_full(folder_of(lora.source)) if lora.kind == "continue" else {}


def build_model(config: TrainConfig) -> Mamba2LM:
    """The weights to start from, read or drawn."""
    settings = config.model
    if settings.source is not None:
        model = load_pretrained(
            resolve(settings.source),
            revision=settings.revision,
            dtype=DTYPES[config.precision.weights],
            quantization=config.quantization.stored,
            device=_quantizing_device(config),
        )
    else:
        model = initialize(Mamba2LM(model_shape(config)), seed=config.seed)
    model.set_checkpointing(settings.checkpointing)
    return model


def _quantizing_device(config: TrainConfig) -> str | None:
    """This process's GPU, which quantizes a 7B model in seconds where a CPU takes minutes; None
    where there is nothing to quantize: Lightning moves the model."""
    cuda = torch.cuda.is_available() and config.strategy.accelerator != "cpu"
    if config.quantization.stored is None or not cuda:
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or 0}"


def check_adapter(config: TrainConfig, shape: Mamba2Config) -> None:
    """Names that match nothing in a model of this shape, or an adapter of another base."""
    adapter = config.adapter
    if adapter.kind == "continue":
        base = read_config(folder_of(adapter.source)).base_model_name_or_path
        own = base_name(config)
        if base != own:
            raise UserError(
                f"{adapter.source} was trained on {base}, but model.source is {own}: set "
                f"model.source={base}, or correct the adapter_config.json if it has moved"
            )
        return
    with torch.device("meta"):
        model = Mamba2LM(shape)
    if adapter.kind == "lora":
        find_targets(model, adapter.target_names, adapter.layers, adapter.patterns)
    else:
        find_frozen(model, adapter.freeze, adapter.freeze_layers)


def adapt(model: Mamba2LM, config: TrainConfig) -> PeftModel | None:
    """Put the adapters on the model, in place; None where its own weights are trained."""
    lora = config.adapter
    if lora.kind == "full":
        for parameter in find_frozen(model, lora.freeze, lora.freeze_layers):
            parameter.requires_grad_(False)
        return None
    if lora.kind == "continue":
        return load_adapter(model, folder_of(lora.source), trainable=True)
    return add_lora(
        model,
        lora.target_names,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        rslora=lora.rslora,
        dora=lora.dora,
        init=lora.init,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        layers=lora.layers,
        in_full=lora.train,
        seed=config.seed,
    )


def warn_of_memory(config: TrainConfig, shape: Mamba2Config) -> None:
    """Say so before the weights are read if the GPU's free memory is not going to be enough."""
    on_gpu = config.strategy.accelerator != "cpu" and torch.cuda.is_available()
    if not on_gpu or os.environ.get("RANK", "0") != "0":
        return
    free, _ = torch.cuda.mem_get_info()
    devices, n_nodes = _processes(config.strategy)
    n = n_nodes * (devices if isinstance(devices, int) else torch.cuda.device_count())
    kind = config.strategy.kind
    strategy = ("ddp" if n > 1 else "single") if kind == "auto" else kind
    with contextlib.suppress(UserError):  # what cannot be planned is the strategy's to refuse
        if (line := shortage(Plan(config, shape, adapt), free, strategy, n)) is not None:
            logger.warning(line)


def count_steps(config: TrainConfig, data: TextDataModule) -> int:
    """Optimizer steps of the whole run."""
    t, batches = config.trainer, data.batches_per_epoch()
    if t.max_epochs is None or batches is None:
        assert t.max_steps is not None
        return t.max_steps
    steps = math.ceil(batches / t.accumulate) * t.max_epochs
    return steps if t.max_steps is None else min(steps, t.max_steps)


def build_trainer(
    config: TrainConfig,
    saver: Checkpoints,
    nonfinite: NonFinite,
    strategy: str | MeshStrategy,
    loggers: list[Logger],
) -> L.Trainer:
    t, s = config.trainer, config.strategy
    trainer = L.Trainer(
        **placement(s),
        strategy=strategy,
        precision="bf16-mixed" if config.precision.autocast else "32-true",
        max_epochs=t.max_epochs if t.max_epochs is not None else -1,
        max_steps=t.max_steps if t.max_steps is not None else -1,
        accumulate_grad_batches=t.accumulate,
        gradient_clip_val=t.clip_norm,
        log_every_n_steps=t.log_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=t.progress_bar,
        logger=loggers,
        # last: what it saves holds the state of the others
        callbacks=[
            *build_callbacks(config),
            Watch(timedelta(minutes=s.timeout_minutes), config.run_dir),
            nonfinite,
            saver,
        ],
        enable_checkpointing=False,  # Lightning's own
        # FSDP2 keeps what it gathers, and a backward cannot use a tensor of inference mode
        inference_mode=not isinstance(strategy, MeshStrategy),
        plugins=[WholeOrNot(saver.background)],
    )
    validate_every(trainer, t.validate_every)
    if hasattr(trainer.strategy, "_timeout"):  # those of several processes have one
        trainer.strategy._timeout = _pg_timeout(s)
    return trainer


def _pg_timeout(strategy: StrategyConfig) -> timedelta:
    """Of collectives: they end without a name, so the watch comes first."""
    return timedelta(minutes=1.5 * strategy.timeout_minutes + 0.5)


def placement(strategy: StrategyConfig) -> dict[str, Any]:
    """What Lightning's Trainer and Fabric are told of where to compute."""
    devices, num_nodes = _processes(strategy)
    accelerator = strategy.accelerator
    if accelerator == "auto":  # Lightning's would take a Mac's GPU, which lacks the scan's float64
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}


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


def _bytes_written(model: Mamba2LM, keep: int) -> int:
    """Each checkpoint holds what is trained and AdamW's two moments; one more is being written."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return (keep + RECENT + 1) * 3 * trained + trained + 20_000_000
