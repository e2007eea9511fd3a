"""What a run may be configured to do: one pydantic model per group, and the checks across groups.

Hydra composes, this decides. Everything here runs before a weight or a row is read, so a misspelt
key or a wrong type costs a second and not a queue. Each field's meaning stands once, in its
description; `configs/` holds the defaults.
"""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mamba2_train.data.config import DataConfig
from mamba2_train.errors import UserError, nearest
from mamba2_train.hardware import products_in_bfloat16
from mamba2_train.model import PRESETS, checkpointing_interval
from mamba2_train.quantization import Quantization, bitsandbytes

logger = logging.getLogger(__name__)

LORA_TARGETS = ("in_proj", "out_proj", "embeddings", "lm_head")
NOT_FOR_LORA = ("conv1d", "dt_bias", "A_log", "D", "norm")
Fraction = Annotated[float, Field(ge=0, le=1)]


def _expanded(layers: Any) -> list[int]:
    """[0, "4-6"] -> [0, 4, 5, 6]"""
    numbers: set[int] = set()
    for part in layers if isinstance(layers, list) else [layers]:
        if not re.fullmatch(r"\d+(-\d+)?", str(part)):
            raise ValueError(f"{part!r} is no block: give numbers and ranges, such as [0, 4-7]")
        first, _, last = str(part).partition("-")
        if last and int(last) < int(first):
            raise ValueError(f"{part} counts down: write {last}-{first}")
        numbers |= set(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError("is empty: name at least one block, or set it to null")
    return sorted(numbers)


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
    return pattern


Layers = Annotated[list[int], BeforeValidator(_expanded)]
Pattern = Annotated[str, AfterValidator(_expression)]


class Group(BaseModel):
    """A group of settings: every key is known, every value has its type, nothing is coerced
    from a string that happens to look like a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelConfig(Group):
    """Where the weights come from, and how the blocks are kept in memory."""

    source: str | None = Field(description="'embedded', a folder or a hub id; null: from scratch")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    preset: str | None = Field(default=None, description="shape of a model from scratch")
    tokenizer: str | None = Field(default=None, description="folder or hub id; null: the model's")
    checkpointing: str = Field(
        default="none",
        description="what a block keeps for its backward: none (all), selective (its projections), "
        "full (its input), every_N (full in every N-th block)",
    )
    compile: bool = Field(default=False, description="torch.compile each block, which takes g++")

    @field_validator("checkpointing")
    @classmethod
    def _known_checkpointing(cls, mode: str) -> str:
        checkpointing_interval(mode)
        return mode

    @field_validator("compile")
    @classmethod
    def _can_compile(cls, asked: bool) -> bool:
        compiler = os.environ.get("CXX", "g++")
        if asked and shutil.which(compiler) is None:
            raise ValueError(
                f"true needs the C++ compiler {compiler}, which is not there: install it, or set "
                "model.compile=false"
            )
        return asked

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        if (self.source is None) == (self.preset is None):
            raise ValueError("set source (weights to start from) or preset (from scratch), one")
        if self.preset is not None and self.preset not in PRESETS:
            hint = nearest(self.preset, PRESETS)
            raise ValueError(
                f"preset {self.preset!r} is unknown.{hint} Known: {', '.join(PRESETS)}"
            )
        if self.preset is not None and self.tokenizer is None:
            raise ValueError("a model from scratch has no tokenizer of its own: set tokenizer")
        return self


class LoraConfig(Group):
    """Low-rank adapters: W + alpha / r * B A.

    A target or the key of a pattern is a name, or a regular expression of how a module's path
    ends, in whole names: `layers\\.[0-3]\\.mixer\\.in_proj`.
    """

    kind: Literal["lora"]
    r: PositiveInt = Field(description="rank")
    alpha: PositiveFloat = Field(description="the update is scaled by alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of a target's inputs that the adapter does not see"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(r) instead")
    dora: bool = Field(default=False, description="train the weights' magnitudes apart (DoRA)")
    init: Annotated[
        str, Field(pattern=r"^(default|gaussian|orthogonal|pissa|pissa_niter_\d+|olora)$")
    ] = Field(
        default="default",
        description="pissa, olora: the adapter begins as the main part of the weights; "
        "pissa_niter_4 finds it much faster, nearly; gaussian, orthogonal: how A is drawn",
    )
    targets: list[Pattern] | Literal["all-linear"] = Field(
        description="modules to adapt; all-linear: in_proj and out_proj"
    )
    layers: Layers | None = Field(
        default=None, description="of the blocks, adapt these: [0, 4-7]; null: all"
    )
    rank_pattern: dict[Pattern, PositiveInt] | None = Field(
        default=None, description="r of some modules: {out_proj: 8}; the first that matches counts"
    )
    alpha_pattern: dict[Pattern, PositiveFloat] | None = Field(
        default=None, description="alpha of some modules"
    )
    train: list[Literal["conv1d", "dt_bias", "A_log", "D", "norm"]] = Field(
        default=[], description="trained in full beside LoRA, and saved beside the adapter"
    )
    lora_plus_ratio: Annotated[float, Field(ge=1)] = Field(
        default=1.0, description="learning rate of B over that of A (LoRA+)"
    )

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: list[str] | str) -> list[str] | str:
        if not targets:
            raise ValueError("is empty: name at least one module, or set adapter=full")
        for target in targets if isinstance(targets, list) else ():
            if target in NOT_FOR_LORA:
                raise ValueError(
                    f"'{target}' has no matrix that LoRA could adapt: train it in full with "
                    f"adapter.train=[{target}]"
                )
            if re.fullmatch(r"[\w-]+", target) and target not in LORA_TARGETS:
                raise ValueError(
                    f"'{target}' is no module to adapt.{nearest(target, LORA_TARGETS)} "
                    f"Known: {', '.join(LORA_TARGETS)}, or all-linear"
                )
        return targets

    @property
    def target_names(self) -> list[str]:
        # peft's own all-linear would take lm_head too
        if self.targets == "all-linear":
            return ["in_proj", "out_proj"]
        return list(dict.fromkeys(self.targets))

    @property
    def patterns(self) -> list[str]:
        return [*(self.rank_pattern or {}), *(self.alpha_pattern or {})]

    @model_validator(mode="after")
    def _one_variant(self) -> "LoraConfig":
        if self.dora and self.init.startswith(("pissa", "olora")):
            raise ValueError(
                f"init={self.init} cannot be saved with dora=true, whose magnitudes belong to the "
                "changed base: set dora=false or init=default"
            )
        return self


class ContinueConfig(Group):
    """Go on training a saved adapter: its rank, alpha, dropout, targets and what it trains in full
    are its own."""

    kind: Literal["continue"]
    source: Path = Field(description="folder of the adapter, or of the run that made it")
    lora_plus_ratio: Annotated[float, Field(ge=1)] = Field(
        default=1.0, description="learning rate of B over that of A (LoRA+)"
    )


class FullConfig(Group):
    """Every parameter is trained, but for what is frozen."""

    kind: Literal["full"]
    freeze: list[Pattern] = Field(
        default=[],
        description="kinds (embeddings, in_proj, norm, ...), or regular expressions of how the "
        "path of a parameter or of a module around it ends",
    )
    freeze_layers: Layers | None = Field(default=None, description="whole blocks: [0-11]")

    @property
    def lora_plus_ratio(self) -> float:
        return 1.0


class QuantizationConfig(Group):
    """How in_proj and out_proj are stored, frozen under adapters."""

    kind: Literal["none", Quantization]

    @property
    def stored(self) -> Quantization | None:
        return None if self.kind == "none" else self.kind


class AdamWConfig(Group):
    """AdamW. Decay leaves out A_log, D, dt_bias, norms and biases, as with all the others."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
    lr: PositiveFloat = Field(description="highest rate of the schedule")
    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat

    @property
    def needs_bitsandbytes(self) -> bool:
        return self.kind != "adamw"


class AdafactorConfig(Group):
    """Adafactor at the schedule's rates, not at its own relative ones."""

    kind: Literal["adafactor"]
    lr: PositiveFloat
    clip_threshold: PositiveFloat = Field(description="largest root mean square of an update")
    weight_decay: NonNegativeFloat


class MuonConfig(Group):
    """Muon for matrices, scaled to AdamW's steps, so that one rate fits both."""

    kind: Literal["muon"]
    lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(description="of the matrices")
    betas: tuple[Fraction, Fraction] = Field(description="of the rest")
    eps: PositiveFloat = Field(description="of the rest")
    weight_decay: NonNegativeFloat


OptimizerConfig = AdamWConfig | AdafactorConfig | MuonConfig


class SchedulerConfig(Group):
    """Learning rate over the run: linear warm-up, then a shape, down to `min_lr_fraction`."""

    kind: Literal["constant", "linear", "cosine", "wsd"]
    warmup_fraction: Fraction = Field(description="share of all steps spent warming up")
    min_lr_fraction: Fraction = Field(default=0.0, description="last rate over highest rate")
    decay_fraction: Fraction = Field(default=0.2, description="wsd: share of steps spent decaying")

    @model_validator(mode="after")
    def _fits(self) -> "SchedulerConfig":
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + decay_fraction "
                f"{self.decay_fraction} exceed the whole run; lower one"
            )
        return self


class StrategyConfig(Group):
    """Where the run computes, through Lightning."""

    kind: Literal["auto", "single", "ddp", "fsdp", "tp", "fsdp_tp"]
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt | Literal["auto"] = "auto"
    num_nodes: PositiveInt = 1
    timeout_minutes: PositiveFloat = Field(
        default=30, description="a rank that keeps the others waiting for so long ends the job"
    )
    data_size: PositiveInt | Literal["auto"] = Field(
        default="auto", description="ranks that share the rows, and the weights (FSDP2)"
    )
    tensor_size: PositiveInt | Literal["auto"] = Field(
        default="auto", description="ranks that share each layer's heads; they see the same rows"
    )
    cpu_offload: bool = Field(
        default=False, description="weights, gradients and optimizer stay in the host's memory"
    )
    reduce_each_batch: bool = Field(
        default=False,
        description="reduce gradients after each micro-batch and not after the last of a step: "
        "less memory, for no rank then holds all gradients, and more traffic",
    )
    dry_run: bool = Field(
        default=False, description="print what each rank would hold and send, and stop"
    )

    @property
    def shards(self) -> bool:
        """Whether a parameter is spread over the ranks."""
        return self.kind not in ("auto", "single", "ddp")

    @model_validator(mode="after")
    def _only_sharded(self) -> "StrategyConfig":
        asked = {
            "data_size": self.data_size != "auto",
            "tensor_size": self.tensor_size != "auto",
            "cpu_offload": self.cpu_offload,
            "reduce_each_batch": self.reduce_each_batch,
            "dry_run": self.dry_run,
        }
        chosen = [name for name, is_set in asked.items() if is_set]
        if chosen and not self.shards:
            raise ValueError(
                f"{chosen[0]} is of strategies that shard, and strategy={self.kind} does not: use "
                "strategy=fsdp, tp or fsdp_tp"
            )
        return self


class PrecisionConfig(Group):
    """dtype of the weights as loaded, and of the products. A_log, D, dt_bias, the scan's state, the
    statistics of norms and LoRA's weights are always float32. "auto" becomes bfloat16 where the
    hardware multiplies in it, null elsewhere."""

    weights: Literal["float32", "bfloat16"] = Field(description="as they are loaded")
    autocast: Literal["bfloat16", "auto"] | None = Field(
        description="dtype of products; null: the weights'"
    )


class OrdinaryContextConfig(Group):
    """Each row in one pass."""

    kind: Literal["none"]


class ExactConfig(Group):
    """Rows of any length in the memory of one segment; the gradients of one pass."""

    kind: Literal["exact"]
    segment_len: PositiveInt = Field(description="positions that are computed at a time")
    offload: bool = Field(
        default=False, description="keep the states between segments in the host's memory"
    )


class TruncatedConfig(Group):
    """A batch goes on in the states that the last one left, without gradient to it: needs
    data.packing=continued. data.seq_len is how far gradients reach; trainer.accumulate, how many
    such stretches make an optimizer step."""

    kind: Literal["truncated"]


class ParallelConfig(Group):
    """Each row split over ranks, which exchange its states: needs a strategy that shards."""

    kind: Literal["parallel"]
    ranks: PositiveInt | Literal["auto"] = Field(
        default="auto", description="that share a row; auto: all but those that share the heads"
    )


LongContextConfig = OrdinaryContextConfig | ExactConfig | TruncatedConfig | ParallelConfig


class SftConfig(Group):
    """The tokens of each document are to be predicted."""

    kind: Literal["sft"]


class DpoConfig(Group):
    """Of two answers to a prompt the chosen one is to gain on the rejected one, measured against
    the base under the adapter (direct preference optimization)."""

    kind: Literal["dpo"]
    beta: PositiveFloat = Field(
        description="how much a lead over the reference counts; ipo aims at a lead of 1 / (2 beta)"
    )
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="sigmoid: share of the pairs that may be the wrong way round"
    )

    @model_validator(mode="after")
    def _smoothed(self) -> "DpoConfig":
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is of loss_type=sigmoid, and loss_type is "
                f"{self.loss_type}: set it to 0, or loss_type=sigmoid"
            )
        return self


class SavingConfig(Group):
    """A checkpoint is written after each validation, and as often as is asked for here."""

    every_steps: PositiveInt | None = Field(default=None, description="optimizer steps")
    every_minutes: PositiveFloat | None = Field(default=None, description="of the first rank")
    keep: PositiveInt = Field(description="best checkpoints kept, by val/loss; the two newest stay")
    asynchronous: bool = Field(
        default=False,
        description="train on while a checkpoint is written, from a copy in the host's memory",
    )


class EarlyStoppingConfig(Group):
    patience: PositiveInt = Field(description="validations without a better val/loss")


class SamplesConfig(Group):
    prompts: list[str] = Field(description="continued before and after training")
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    every_validation: bool = Field(
        default=True, description="continue them after each validation too"
    )


class HealthConfig(Group):
    """What tells how the model and the machine are: norms by kind, dt and decay by layer."""

    every_steps: PositiveInt = Field(description="optimizer steps between two looks")


class CallbacksConfig(Group):
    saving: SavingConfig
    early_stopping: EarlyStoppingConfig | None
    samples: SamplesConfig
    health: HealthConfig | None = Field(default=None, description="null: not watched")


class LoggerConfig(Group):
    """CSV is always written: the report is made from it."""

    wandb: Literal["auto", "offline", "online"] | None = Field(
        description="auto: online where a key is set and its server answers, else offline"
    )
    tensorboard: bool = False
    trackio: bool = False
    mlflow: bool = False
    project: str
    tags: list[str] = []

    @property
    def trackers(self) -> list[str]:
        """Where figures go beside the CSV."""
        chosen = ("tensorboard", "trackio", "mlflow")
        return ["wandb"] * (self.wandb is not None) + [t for t in chosen if getattr(self, t)]


class TrainerConfig(Group):
    max_epochs: PositiveInt | None = Field(description="the earlier of the two ends the run")
    max_steps: PositiveInt | None = Field(description="optimizer steps")
    accumulate: PositiveInt = Field(description="micro-batches per optimizer step")
    clip_norm: PositiveFloat | None = Field(description="largest norm of the gradient")
    validate_every: PositiveInt | Fraction = Field(
        description="optimizer steps, or a share of an epoch"
    )
    log_every: PositiveInt = Field(description="optimizer steps between logged points")
    progress_bar: bool = True
    on_nan: Literal["stop", "skip"] = Field(
        default="stop", description="what to do with a step whose loss or gradient is not finite"
    )
    max_skipped: PositiveInt = Field(
        default=10, description="steps of the run that on_nan=skip leaves out before it stops"
    )

    @model_validator(mode="after")
    def _ends(self) -> "TrainerConfig":
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("the run would never end: set max_epochs or max_steps")
        return self


class TrainConfig(Group):
    """A whole run of `mamba2-train`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = Field(description="of the run's folder")
    seed: NonNegativeInt = Field(description="equal seeds give equal bits")
    run_dir: Path = Field(description="all that the run writes")
    resume: str | None = Field(
        default=None,
        description="auto: go on with run_dir or the newest run of this name, if there is one; or "
        "a checkpoint or run folder to go on from",
    )
    debug: bool = Field(description="show tracebacks")
    model: ModelConfig
    adapter: Annotated[LoraConfig | ContinueConfig | FullConfig, Field(discriminator="kind")]
    data: DataConfig
    quantization: QuantizationConfig
    objective: Annotated[SftConfig | DpoConfig, Field(discriminator="kind")] = SftConfig(kind="sft")
    optimizer: Annotated[OptimizerConfig, Field(discriminator="kind")]
    scheduler: SchedulerConfig
    strategy: StrategyConfig
    precision: PrecisionConfig
    long_context: Annotated[LongContextConfig, Field(discriminator="kind")] = OrdinaryContextConfig(
        kind="none"
    )
    callbacks: CallbacksConfig
    logger: LoggerConfig
    trainer: TrainerConfig

    @model_validator(mode="before")
    @classmethod
    def _of_pairs(cls, values: Any) -> Any:
        """What the objective makes of the data is a setting of theirs: the cache goes by it."""
        objective, data = (values.get(group) for group in ("objective", "data"))
        if not isinstance(objective, dict) or not isinstance(data, dict):
            return values
        if objective.get("kind") == "dpo" and data.get("loss_on") is None:
            return values | {"data": data | {"loss_on": "pairs"}}
        return values

    @field_validator("precision")
    @classmethod
    def _found_precision(cls, precision: PrecisionConfig, info: ValidationInfo) -> PrecisionConfig:
        """What is kept of `auto`, and resumed with, is what it has become."""
        if precision.autocast != "auto" or "strategy" not in info.data:
            return precision
        fast, why = products_in_bfloat16(info.data["strategy"].accelerator)
        kind = "bf16-mixed" if fast else "fp32"
        logger.info("precision=auto takes %s: %s", kind, why)
        return precision.model_copy(update={"autocast": "bfloat16" if fast else None})

    @model_validator(mode="after")
    def _across_groups(self) -> "TrainConfig":
        if self.adapter.kind == "full" and self.precision.weights == "bfloat16":
            raise ValueError(
                "adapter=full trains the weights themselves, and in bfloat16 small updates are "
                "lost: use precision=bf16-mixed, or adapter=lora"
            )
        if self.quantization.stored is not None:
            self._check_quantization()
        if self.strategy.shards:
            self._check_shards()
        if self.objective.kind == "dpo":
            self._check_preference()
        elif self.data.loss_on == "pairs":
            raise ValueError("data.loss_on=pairs is what objective=dpo learns: set it, or null")
        if isinstance(self.optimizer, AdamWConfig) and self.optimizer.needs_bitsandbytes:
            bitsandbytes()
        if self.adapter.kind != "full" and self.model.source is None:
            raise ValueError(
                f"adapter={self.adapter.kind} needs weights to adapt: set model.source or "
                "adapter=full"
            )
        if (self.long_context.kind == "truncated") != (self.data.packing == "continued"):
            raise ValueError(
                f"long_context={self.long_context.kind} with data.packing={self.data.packing}: a "
                "row goes on where the last one stopped only if its state does: use "
                "long_context=truncated and data.packing=continued, or neither"
            )
        if self.long_context.kind == "parallel" and not self.strategy.shards:
            raise ValueError(
                f"long_context=parallel with strategy={self.strategy.kind}: the ranks that share a "
                "row share the weights too: use strategy=fsdp or fsdp_tp, or long_context=exact"
            )
        t = self.trainer
        unbounded = t.max_steps is None or isinstance(t.validate_every, float)
        if self.data.streaming and not self.data.preview and unbounded:
            raise ValueError(
                f"trainer.max_steps={t.max_steps} and trainer.validate_every={t.validate_every}, "
                "but how many steps an epoch of streamed data has is not known before its end: set "
                "both to numbers of steps"
            )
        return self

    def _check_preference(self) -> None:
        lora, data = self.adapter, self.data
        if data.loss_on != "pairs":
            raise ValueError(
                f"data.loss_on={data.loss_on} learns one answer, and objective=dpo compares two: "
                "set data.loss_on=null, or objective=sft"
            )
        if data.packing not in ("bfd", "none"):
            raise ValueError(
                f"data.packing={data.packing} may cut a document, and the two of a pair stay whole "
                "in one row: use data.packing=bfd or none"
            )
        if self.long_context.kind != "none":
            raise ValueError(
                f"long_context={self.long_context.kind} cuts a row, and objective=dpo compares two "
                "whole answers in it: use long_context=none and model.checkpointing=full"
            )
        if lora.kind == "full":
            raise ValueError(
                "objective=dpo compares with the base under the adapter, and adapter=full has "
                "none: use adapter=lora"
            )
        if lora.kind == "continue":
            raise ValueError(
                "objective=dpo compares with the base under the adapter, which is not what the "
                f"adapter {lora.source} has made of it: merge that first (mamba2-export "
                f"checkpoint={lora.source} out=FOLDER), then model.source=FOLDER adapter=lora"
            )
        if lora.init.startswith(("pissa", "olora")):
            raise ValueError(
                f"adapter.init={lora.init} takes a part out of the base, which objective=dpo "
                "compares with: use adapter.init=default"
            )
        if lora.train and self.strategy.shards:
            raise ValueError(
                f"adapter.train={lora.train} changes the base that objective=dpo compares with, "
                f"and strategy={self.strategy.kind} cannot keep a copy of it: set "
                "adapter.train=[], or strategy=ddp"
            )

    def _check_shards(self) -> None:
        chosen = f"strategy={self.strategy.kind}"
        if self.optimizer.kind != "adamw":
            raise ValueError(
                f"optimizer={self.optimizer.kind} cannot keep its state of sharded parameters, as "
                f"{chosen} has: use optimizer=adamw, whose state is sharded, or strategy=ddp"
            )
        if self.adapter.kind == "lora":
            needs = "adapter.dora=true" if self.adapter.dora else None
            if self.adapter.init.startswith(("pissa", "olora")):
                needs = f"adapter.init={self.adapter.init}"
            if needs is not None:
                raise ValueError(
                    f"{needs} begins with the whole of a weight, of which a rank has a part under "
                    f"{chosen}: use a plain LoRA, or strategy=ddp"
                )

    def _check_quantization(self) -> None:
        chosen = f"quantization={self.quantization.kind}"
        if self.adapter.kind == "full":
            raise ValueError(
                f"{chosen} freezes the weights, and adapter=full trains them: use adapter=lora, or "
                "quantization=none"
            )
        if self.adapter.kind == "lora" and self.adapter.init.startswith(("pissa", "olora")):
            raise ValueError(
                f"adapter.init={self.adapter.init} begins with the weights' own decomposition, "
                f"which {chosen} does not have: use adapter.init=default, or quantization=none"
            )
        if self.precision.autocast is not None:
            raise ValueError(
                f"{chosen} computes in one dtype: use precision=bf16 or precision=fp32, not mixed"
            )
        if self.quantization.kind == "int8" and self.strategy.shards:
            raise ValueError(
                f"{chosen} cannot be sharded, as strategy={self.strategy.kind} does: use "
                "quantization=nf4, or strategy=ddp"
            )
        bitsandbytes()


class PlanSettings(Group):
    """What `mamba2-plan` plans for."""

    gpus: PositiveInt = Field(default=1, description="GPUs that share the run")
    tensor: PositiveInt = Field(default=2, description="GPUs that share the heads in fsdp_tp")
    sizes: list[Annotated[float, Field(gt=0, le=1000)]] = Field(
        default=[24, 40, 80], min_length=1, description="memory of one GPU, GB"
    )
    out: Path | None = Field(default=None, description="a JSON file for other tools")


class ClusterConfig(Group):
    """What `mamba2-plan` chooses a layout for; nothing unless it has GPUs."""

    gpus: PositiveInt | None = Field(default=None, le=65_536, description="in all nodes together")
    gpu: Literal["h100", "h200", "a100", "l40s", "4090"] = "h100"
    node: PositiveInt = Field(default=8, description="GPUs of a node")
    intra_gb_s: PositiveFloat | None = Field(
        default=None, description="GB/s from one GPU of a node to the others; null: its data sheet"
    )
    inter_gb_s: PositiveFloat = Field(default=50, description="GB/s from one GPU to other nodes")
    intra_us: float = Field(default=2, ge=0, description="microseconds of a hop in a node")
    inter_us: float = Field(default=5, ge=0, description="microseconds of a hop between nodes")
    host_us_per_call: float = Field(
        default=15, ge=0, description="microseconds of the host for a call of PyTorch's dispatcher"
    )
    tokens: PositiveInt | None = Field(
        default=None,
        description="of a step, of all GPUs; null: data.batch_size x trainer.accumulate rows each",
    )


class PlanConfig(TrainConfig):
    """A run of `mamba2-plan`: that of `mamba2-train`, not started."""

    plan: PlanSettings = PlanSettings()
    cluster: ClusterConfig = ClusterConfig()


class GenerateConfig(Group):
    """A run of `mamba2-generate`."""

    checkpoint: str | list[str] = Field(
        description="'embedded', a folder, a hub id, an adapter or a run; several adapters of one "
        "base: their sum"
    )
    merge: bool = Field(
        description="adapters into the weights first: faster, and in bfloat16 rounded once more"
    )
    quantization: QuantizationConfig
    prompt: str | None = Field(description="the text to continue; with chat, the user's message")
    prompt_file: Path | None = Field(description="a file that holds the prompt")
    prompts: Path | None = Field(
        description="many: one to a line, or .jsonl with `prompt` or `messages`"
    )
    out: Path | None = Field(description="of many prompts: a .jsonl to write; null: the terminal")
    batch_size: PositiveInt = Field(description="prompts that are continued together")
    chat: bool = Field(
        description="through the tokenizer's chat template; without a prompt, a conversation"
    )
    system: str | None = Field(description="with chat: the system message")
    state: Path | None = Field(description="go on from this saved state")
    save_state: Path | None = Field(description="save the state after the prompt here")
    max_prompt_tokens: PositiveInt | None = Field(description="refuse a longer prompt")
    max_new_tokens: NonNegativeInt
    temperature: NonNegativeFloat = Field(description="0: always the likeliest token")
    top_k: PositiveInt | None = Field(description="among so many of the likeliest tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        description="among the likeliest tokens that have this much of the probability together"
    )
    min_p: Fraction = Field(description="none less likely than this share of the likeliest")
    repetition_penalty: PositiveFloat = Field(description="above 1: fewer tokens that were there")
    stop: list[str] = Field(description="strings that end the text")
    seed: NonNegativeInt = Field(description="of the first prompt; the next has one more")
    debug: bool

    @model_validator(mode="after")
    def _one_task(self) -> "GenerateConfig":
        given = [n for n in ("prompt", "prompt_file", "prompts") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are set: set one of them")
        if not given and not self.chat:
            raise ValueError(
                "there is nothing to continue: set prompt, prompt_file or prompts, or chat=true "
                "for a conversation"
            )
        if self.prompts is None and self.out is not None:
            raise ValueError(f"out={self.out} is for many prompts: set prompts, or remove out")
        if self.system is not None and not self.chat:
            raise ValueError("system is a message of a chat: set chat=true, or remove system")
        if self.chat and (self.state is not None or self.save_state is not None):
            raise ValueError("a chat begins anew: remove state and save_state, or set chat=false")
        if self.save_state is not None and self.prompts is not None:
            raise ValueError("save_state keeps one prompt: set prompt or prompt_file, not prompts")
        if self.max_new_tokens == 0 and self.save_state is None:
            raise ValueError("max_new_tokens is 0: ask for at least 1, or set save_state")
        if self.quantization.stored is not None:
            bitsandbytes()
        return self


class ExportConfig(Group):
    """A run of `mamba2-export`."""

    checkpoint: str | list[str] = Field(
        description="as of mamba2-generate; or a checkpoint of a run, RUN/checkpoints/step-N"
    )
    out: Path = Field(description="folder to write")
    quantization: QuantizationConfig = Field(
        description="of the base that the adapter was trained over: its values are merged into"
    )
    merge: bool = Field(description="into the base; false: the adapter as it is, over its base")
    layout: Literal["huggingface", "state-spaces"]
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMGT]B$")] = Field(
        description="200KB, 5GB: a larger model is split into several files"
    )
    force: bool = Field(description="write into a folder that is not empty, over what it holds")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        description="of the weights written; null: as they are stored"
    )
    debug: bool

    @model_validator(mode="after")
    def _usable(self) -> "ExportConfig":
        several = not isinstance(self.checkpoint, str)
        if not self.merge and (several or self.dtype or self.layout != "huggingface"):
            raise ValueError(
                "merge=false copies one adapter as it is: remove dtype and layout, give one "
                "checkpoint, or set merge=true"
            )
        if self.quantization.stored is not None:
            bitsandbytes()
        return self


class EvaluateConfig(Group):
    """A run of `mamba2-eval`."""

    checkpoint: str | list[str] = Field(description="as of mamba2-generate")
    quantization: QuantizationConfig = Field(description="of all that is measured")
    strategy: StrategyConfig
    against: str | None = Field(
        description="what stands beside it: base (of an adapter, its base), or another checkpoint"
    )
    data: DataConfig
    dtype: Literal["float32"] | None = Field(
        description="float32: widen the weights, as training does; null: as they are stored"
    )
    part: Literal["held_out", "all"] = Field(
        description="held_out: what a training run on these data holds out; all: that and what it "
        "trains on"
    )
    segment_len: PositiveInt = Field(description="most tokens of a document in one pass")
    batch_tokens: PositiveInt = Field(description="most tokens of all documents in one pass")
    tasks: list[str] = Field(description="tasks of the lm-evaluation-harness, instead of the data")
    task_path: Path | None = Field(description="a folder with tasks of your own")
    num_fewshot: NonNegativeInt | None
    limit: PositiveInt | None = Field(description="questions of each task")
    batch_size: PositiveInt = Field(description="of the tasks")
    out: Path | None = Field(description="a .json to write")
    plot: Path | None = Field(description="loss by position: a .png, .svg or .pdf")
    debug: bool

    @model_validator(mode="after")
    def _usable(self) -> "EvaluateConfig":
        if self.plot is not None and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"plot={self.plot} is of no kind that is drawn: .png, .svg or .pdf")
        if self.plot is not None and self.tasks:
            raise ValueError("tasks have no loss by position: remove plot, or tasks")
        if self.data.loss_on == "pairs":
            raise ValueError(
                "data.loss_on=pairs is measured while it is trained: set data.loss_on=null and "
                "data.completion_column=chosen (or data.messages_column) to measure one answer"
            )
        if self.quantization.stored is not None:
            bitsandbytes()
        return self


class ReportConfig(Group):
    """A run of `mamba2-report`."""

    runs: str | list[str] = Field(
        description="run folders, folders of runs, globs, or names in runs/", min_length=1
    )
    out: Path | None = Field(
        description="the page; null: report.html, or of one run the one in its folder"
    )
    debug: bool


class DoctorConfig(Group):
    """A run of `mamba2-doctor`."""

    run_dir: Path = Field(description="where runs would be written")
    timeout: PositiveFloat = Field(description="seconds that a server has to answer")
    as_json: bool = Field(alias="json", description="one JSON object instead of lines")
    debug: bool


def validated(schema: type[Group], values: dict[str, Any]) -> Any:
    """`values` as a `schema`, or a UserError that names the path of each fault and the cure."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults: dict[str, str] = {}
        for fault in error.errors():
            # a union fails once for each of its types; the first is the likeliest
            where, what = _fault(schema, fault)
            faults.setdefault(where, what)
        message = "; ".join(f"{where}: {what}" for where, what in faults.items())
        raise UserError(message) from error


def _fault(schema: type[BaseModel], error: Any) -> tuple[str, str]:
    """Where, as the user writes it, and what."""
    path, known = _walk(schema, error["loc"])
    where = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        return where, f"unknown key.{nearest(path[-1], known)} Known: {', '.join(known)}"
    if error["type"] == "missing":
        return where, "needs a value"
    if error["type"] == "value_error":
        return where, str(error["ctx"]["error"])
    return where, f"{error['msg']} (got {error['input']!r})"


def _walk(schema: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """The keys in `loc`, without what pydantic puts between them to tell the members of a union
    apart, and the keys that exist where the last one stands."""
    path: list[str] = []
    groups: list[Any] = [schema]  # that the keys so far may lead to
    beside = groups
    for part in loc:
        chosen = [group for group in groups if part in _kinds(group)]
        if chosen:
            groups = chosen
        elif isinstance(part, int) or (part.isidentifier() and part not in ("int", "float", "str")):
            path.append(str(part))
            beside, groups = groups, [inner for group in groups for inner in _inside(group, part)]
    return path, sorted({name for group in beside for name in group.model_fields})


def _kinds(group: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(group.model_fields["kind"].annotation) if "kind" in group.model_fields else ()


def _inside(group: type[BaseModel], key: str | int) -> list[type[BaseModel]]:
    annotation = group.model_fields[key].annotation if key in group.model_fields else None
    members = get_args(annotation) or (annotation,)
    return [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
