"""What a run will need of a GPU, told before a weight is read: memory, FLOPs, and what to change.

Nothing is fitted to a measurement. The model with its adapters is built on the meta device and
takes a training step on tensors without contents, while `memory.LiveMemory` counts what is alive
(`simulated`); its optimizer does the same (`optimizer_bytes`). Live bytes at a given moment of a
step are linear in the number of blocks, so two short models tell those of a long one, moment by
moment:

    forward    weights + optimizer + the last step's gradients + activations
    loss       the same + a chunk of logits
    head       weights + optimizer + activations + what the loss's backward holds
    top        weights + optimizer + activations + the backward of the last block
    bottom     weights + optimizer + gradients + the backward of the first block
    update     weights + optimizer + gradients + what the optimizer's update holds

The peak is the largest of them. Arithmetic adds what is not in the model:

    8-bit       two moments of a byte, and a float32 scale to 256 of each; of what is below 4096
                elements, two float32 ones. Paged ones may leave the GPU, all but their scales
    nf4, fp4    0.5 byte a weight + 1 byte to 64 + 4 bytes to 64 x 256 (scales, quantized too);
                int8: 1 byte + 4 a row. And one weight at a time as the product wants it
    ddp         the gradients once more, in buckets
    fsdp of n   weights, gradients and optimizer / n; + two blocks, embeddings and head whole
    fsdp_tp     tp's model, sharded as by fsdp over n / tensor
    tp of n     a model of d_inner / n: heads are divided; embeddings, head and residual stream
                are whole on each

    parallel    fsdp with the step of one part of each row, and the states that it exchanges
    exact       the step of one segment between two others: it begins in a state, ends in one, has
                the gradients of both, and finds those of the weights there; + for each other
                boundary, unless offloaded, n_layers x (n_heads x headdim x d_state float32 and
                d_conv - 1 inputs of the convolution)

Rows are taken as full and every token as labelled: the most that a batch can be.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_train.errors import UserError
from mamba2_train.long_context import zero_state
from mamba2_train.loss import cross_entropy_of_rows
from mamba2_train.memory import counted
from mamba2_train.model import (
    Mamba2Config,
    Mamba2LM,
    Mamba2State,
    checkpointing_interval,
    flops_per_token,
)
from mamba2_train.optim import build_optimizer
from mamba2_train.parallel.context_parallel import Ranks, awaited, parallelize
from mamba2_train.quantization import PROJECTIONS
from mamba2_train.schema import (
    AdamWConfig,
    ExactConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

GB = 2**30  # as the makers of GPUs count
CONTEXT = 0.6 * GB  # CUDA's context, its libraries and kernels
UNUSABLE = 0.05  # share of a GPU: the driver's, and holes between the allocator's blocks
BITS4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight, scales included
LEAST_8BIT = 4096  # elements; bitsandbytes keeps smaller moments in float32
LEAST_PAGED = 100_000  # elements; it keeps smaller moments on the GPU
PRECISIONS = {  # name of configs/precision -> its settings
    "fp32": {"weights": "float32", "autocast": None},
    "bf16-mixed": {"weights": "float32", "autocast": "bfloat16"},
    "bf16": {"weights": "bfloat16", "autocast": None},
}
SEGMENT_LEN = 8192  # of configs/long_context/exact
WHOLE = ("single", "ddp")  # strategies that have the whole model on each GPU
MODES = ("none", "selective", "full", "every_2")

Adapt = Callable[[Mamba2LM, TrainConfig], Any]


@dataclass(frozen=True)
class Moments:
    """Most bytes alive in each part of a training step; no optimizer in them."""

    weights: float
    gradients: float  # when all are there
    activations: float  # held from forward to backward
    forward: float
    loss: float
    head: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. Not all are there at once: `peak` says how many are, and `at` when."""

    strategy: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    peak: float
    at: str
    states: float = 0.0  # at the boundaries between segments, on the GPU
    on_host: float = 0.0  # the same, on the host

    def fits(self, gpu_gb: float) -> bool:
        return self.on_gpu <= gpu_gb * GB * (1 - UNUSABLE)

    @property
    def on_gpu(self) -> float:
        return self.peak + CONTEXT


class Plan:
    """The memory of one run, as configured.

    Args:
        adapt: puts the adapters on a model, and marks what is trained.
        gpu: plan for a GPU; False: for this machine's CPU.
        tensor: of fsdp_tp, the processes that share the heads.
    """

    def __init__(
        self,
        config: TrainConfig,
        shape: Mamba2Config,
        adapt: Adapt,
        *,
        gpu: bool = True,
        tensor: int = 2,
    ) -> None:
        self.config, self.shape, self.adapt, self.gpu = config, shape, adapt, gpu
        self.tensor = tensor
        self._moments: dict[tuple[Any, ...], Moments] = {}
        self._optimizers: dict[str, tuple[float, float]] = {}
        # what plans of one model have in common
        self._sliced: dict[int, Plan] = {}
        self._by_weights: dict[str, Plan] = {config.precision.weights: self}
        self.model = _built(self.config, self.shape, self.adapt)
        parameters = list(self.model.parameters())
        self.trained = [p for p in parameters if p.requires_grad]
        if not self.trained:
            raise UserError("nothing is trained: there is no step to plan; choose an adapter")
        self.n_parameters = sum(p.numel() for p in parameters)
        self.n_trained = sum(p.numel() for p in self.trained)

    def of(self, config: TrainConfig) -> "Plan":
        """The plan of another run, with what is known already of the same model."""
        if config.adapter != self.config.adapter:
            return Plan(config, self.shape, self.adapt, gpu=self.gpu, tensor=self.tensor)
        weights = config.precision.weights
        if weights not in self._by_weights:
            self._by_weights[weights] = Plan(
                config, self.shape, self.adapt, gpu=self.gpu, tensor=self.tensor
            )
            self._by_weights[weights]._by_weights = self._by_weights
        other = copy.copy(self._by_weights[weights])
        other.config = config
        return other

    def strategies(self, n: int) -> tuple[str, ...]:
        """In which `n` GPUs may share the run."""
        if n == 1:
            return ("single",)
        if isinstance(self.config.long_context, ParallelConfig):
            return (
                ("fsdp", "fsdp_tp") if n > self.tensor > 1 and n % self.tensor == 0 else ("fsdp",)
            )
        both = n > self.tensor > 1 and n % self.tensor == 0
        return ("ddp", "fsdp", "tp", "fsdp_tp") if both else ("ddp", "fsdp", "tp")

    def memory(self, strategy: str = "single", n: int = 1) -> Memory:
        """Of each of the `n` processes of a strategy: single, ddp, fsdp, tp or fsdp_tp.

        Raises:
            UserError: heads that cannot be divided over the processes, or what cannot be sharded.
        """
        if strategy not in WHOLE and (never := _never_sharded(self.config)):
            raise UserError(f"strategy={strategy} cannot shard {never}")
        if strategy in ("tp", "fsdp_tp"):
            ranks = n if strategy == "tp" else self.tensor
            if n % ranks:
                raise UserError(f"{n} GPUs are no multiple of the {ranks} that share the heads")
            sliced = self.sliced(ranks)
            memory = sliced.memory() if strategy == "tp" else sliced.memory("fsdp", n // ranks)
            return dataclasses.replace(memory, strategy=strategy)
        m = self._step(self.ranks_of_row(n) if strategy == "fsdp" else 1)
        on_gpu, on_host, beside = self._states()
        optimizer, update = self._of_optimizer()
        saved, product = self._quantized()
        peaks = {
            "forward": m.forward + beside + product,
            "loss": m.loss + beside,
            "head": m.head + beside,
            "top": m.top + beside + product,
            "bottom": m.bottom + beside + product,
            "update": m.weights + m.gradients + update,
        }
        weights = m.weights - saved
        peaks = {at: peak - saved + optimizer for at, peak in peaks.items()}
        gradients = m.gradients
        if strategy == "ddp":
            peaks = {at: peak + gradients for at, peak in peaks.items()}
        elif strategy == "fsdp":
            whole, away = self._gathered(), 1 - 1 / n
            for at in peaks:
                # at head and top few gradients are there yet: none are subtracted
                early = at in ("head", "top") and not self.is_cut
                present = 0 if early else gradients
                peaks[at] += whole - away * (weights + optimizer + present)
            peaks["update"] = (weights + gradients + optimizer + update) / n
            weights, gradients, optimizer = (b / n for b in (weights, gradients, optimizer))
        at = max(peaks, key=lambda name: peaks[name])
        logits = m.loss - m.weights - m.gradients - m.activations
        parts = weights, gradients, optimizer, m.activations, logits, peaks[at]
        return Memory(strategy, *parts, at, on_gpu, on_host)

    def sliced(self, ranks: int) -> "Plan":
        """Of the model that each of `ranks` computes with that share the heads.

        Raises:
            UserError: heads that cannot be shared so.
        """
        if ranks == 1:
            return self
        if ranks not in self._sliced:
            shape = _Sliced.of(self.shape, ranks)
            self._sliced[ranks] = Plan(self.config, shape, self.adapt, gpu=self.gpu)
        return self._sliced[ranks].of(self.config)

    def flops(self) -> tuple[float, float]:
        """Of one token: its forward pass, and its whole step with what is computed twice."""
        c = self.shape
        added = sum(p.numel() for name, p in self.model.named_parameters() if "lora_" in name)
        forward = flops_per_token(c) + 2 * added
        head = self.model.lm_head.weight if hasattr(self.model.lm_head, "weight") else None
        matrices = [
            p
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.dim() > 1 and ("embeddings" not in name or p is head)
        ]
        weights = 2 * sum(p.numel() for p in matrices)
        blocks = flops_per_token(dataclasses.replace(c, vocab_size=1))
        repeated = 0.0
        mode = self.config.model.checkpointing
        if mode == "selective":
            repeated = blocks - 2 * c.n_layers * c.d_model * (c.d_in_proj + c.d_inner)
        elif mode != "none":
            repeated = blocks / checkpointing_interval(mode)
        repeated += forward * (1 - 1 / self.n_segments)  # all but the last
        if isinstance(self.config.long_context, ParallelConfig):
            # the part's own state, apart from the scan: forward, and twice that backward
            once = 2 * c.n_layers * c.d_inner * c.d_state
            repeated += once * (3 if mode == "none" else 4)
        if self.config.objective.kind == "dpo":  # the reference
            repeated += flops_per_token(c)
        return forward, 2 * forward + weights + repeated

    @property
    def is_cut(self) -> bool:
        """Whether rows are computed segment by segment."""
        return self.n_segments > 1

    @property
    def n_segments(self) -> int:
        c = self.config.long_context
        return -(-self.config.data.seq_len // c.segment_len) if isinstance(c, ExactConfig) else 1

    def ranks_of_row(self, n: int) -> int:
        """How many of `n` processes that share the weights share each row."""
        c = self.config.long_context
        if not isinstance(c, ParallelConfig):
            return 1
        ranks = n if c.ranks == "auto" else c.ranks
        if n % ranks:
            raise UserError(
                f"{n} GPUs are no multiple of the long_context.ranks={ranks} that share a row"
            )
        return ranks

    def state(self) -> Mamba2State:
        """Between two segments, or parts of a row, on the meta device."""
        precision = self.config.precision
        dtype = getattr(torch, precision.autocast or precision.weights)
        with torch.device("meta"):
            return zero_state(self.shape, self.config.data.batch_size, dtype)

    def _states(self) -> tuple[float, float, float]:
        """Bytes of all states between segments on the GPU, on the host, and, on the GPU, of those
        that are none of the segment's that is computed."""
        c = self.config.long_context
        if not isinstance(c, ExactConfig) or not self.is_cut:
            return 0, 0, 0
        one = sum(t.nbytes for layer in self.state().layers for t in layer)
        n = self.n_segments - 1
        # when the gradients of the weights are there, the last segment's has gone
        return (0, one * n, 0) if c.offload else (one * n, 0, one * max(0, n - 2))

    def _step(self, context: int = 1) -> Moments:
        """The moments of all blocks from those of a few, where all blocks are alike."""
        mode = self.config.model.checkpointing
        period = checkpointing_interval(mode)
        n_layers = len(self.model.backbone.layers)
        alike = len({_signature(block) for block in self.model.backbone.layers}) == 1
        if n_layers <= 4 * period or n_layers % period or not alike:
            return self._of_first(n_layers, context)
        few, more = (self._of_first(n * period, context) for n in (3, 4))
        times = (n_layers - 3 * period) / period
        return Moments(
            *(
                a + times * (b - a)
                for a, b in zip(dataclasses.astuple(few), dataclasses.astuple(more), strict=True)
            )
        )

    def _of_first(self, n_layers: int, context: int) -> Moments:
        """The moments of a step of the first blocks, all others left out."""
        c = self.config
        seq_len = -(-c.data.seq_len // context)
        if isinstance(c.long_context, ExactConfig):
            seq_len = min(seq_len, c.long_context.segment_len)
        settings: dict[str, Any] = {
            "rows": c.data.batch_size,
            "seq_len": seq_len,
            "carries": self.is_cut,
            "context": context,
            "autocast": c.precision.autocast is not None,
            "checkpointing": c.model.checkpointing,
        }
        key = (n_layers, *settings.values())
        if key not in self._moments:
            model = _first(self.model, n_layers)
            self._moments[key] = simulated(model, **settings, gpu=self.gpu)
        return self._moments[key]

    def _of_optimizer(self) -> tuple[float, float]:
        """Bytes of its state, and what its update holds besides."""
        config = self.config.optimizer
        if config.kind not in self._optimizers:
            self._optimizers[config.kind] = optimizer_bytes(self.model, config, gpu=self.gpu)
        return self._optimizers[config.kind]

    def _quantized(self) -> tuple[float, float]:
        """Bytes that quantization saves of the weights, and those of one weight for a product."""
        kind = self.config.quantization.kind
        saved = product = 0.0
        for name, p in self.model.named_parameters():
            size = p.numel() * p.element_size()
            if (stored := stored_bytes(name, p, kind)) != size:
                saved += size - stored
                product = max(product, size)
        return saved, product

    def _gathered(self) -> float:
        """Bytes that FSDP holds whole: two blocks, a block's gradients, what is in no block."""
        kind, narrow = self.config.quantization.kind, self.config.precision.autocast is not None

        def gathered(name: str, p: nn.Parameter) -> float:
            return 2 * p.numel() if narrow else stored_bytes(name, p, kind)

        layers = self.model.backbone.layers
        block = list(layers[0].named_parameters())
        inside = {p for layer in layers for p in layer.parameters()}
        rest = [(name, p) for name, p in self.model.named_parameters() if p not in inside]
        return (
            2 * sum(gathered(name, p) for name, p in block)
            + sum(gathered(name, p) for name, p in block if p.requires_grad)
            + sum(gathered(name, p) for name, p in rest)
        )


def stored_bytes(name: str, p: nn.Parameter, quantization: str) -> float:
    """Of a parameter, quantized or not."""
    # a layer under an adapter is in its base_layer
    is_projection = name.replace(".base_layer", "").endswith(
        tuple(f"{projection}.weight" for projection in PROJECTIONS)
    )
    if quantization == "none" or not is_projection:
        return p.numel() * p.element_size()
    return p.numel() + 4 * p.shape[0] if quantization == "int8" else BITS4 * p.numel()


def variants(config: TrainConfig) -> Iterator[tuple[str, str, TrainConfig]]:
    """The run in every precision and checkpointing mode that it may have."""
    for precision, mode in itertools.product(PRECISIONS, MODES):
        values = config.model_dump()
        values["precision"] = PRECISIONS[precision]
        values["model"]["checkpointing"] = mode
        with contextlib.suppress(ValueError, UserError):
            yield precision, mode, type(config).model_validate(values)


def cure(
    plan: Plan,
    fits: Callable[[Memory], bool],
    strategy: str = "single",
    n: int = 1,
) -> tuple[dict[str, str], Memory] | None:
    """The cheapest flags with which a run fits, and what it then takes; None if none do."""
    candidates = [
        (flags, plan.of(changed))
        for flags, changed in smaller(plan.config)
        if strategy in WHOLE or not _never_sharded(changed)
    ]
    if not candidates:
        return None
    # none has fewer weights and moments than the last, which has every flag at its strongest
    last = candidates[-1][1].memory(strategy, n)
    if not fits(dataclasses.replace(last, peak=last.weights + last.optimizer)):
        return None
    found = ((flags, changed.memory(strategy, n)) for flags, changed in candidates)
    return next((flags, memory) for flags, memory in found if fits(memory))


def shortage(plan: Plan, free: int, strategy: str = "single", n: int = 1) -> str | None:
    """One line for a run that is likely to exceed the `free` bytes of a GPU, with the cure."""

    def fits(memory: Memory) -> bool:
        return memory.on_gpu <= free

    needed = plan.memory(strategy, n)
    if fits(needed):
        return None
    found = cure(plan, fits, strategy, n)
    instead = "no flags make it fit: take a larger GPU"
    if found is not None:
        instead = f"{shown(found[0])} would need {found[1].on_gpu / GB:.1f}"
    return (
        f"this run is likely to need {needed.on_gpu / GB:.1f} GB of a GPU that has "
        f"{free / GB:.1f} free; {instead}"
    )


def shown(flags: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in flags.items())


def simulated(
    model: Mamba2LM,
    *,
    rows: int,
    seq_len: int,
    carries: bool,
    context: int,
    autocast: bool,
    checkpointing: str,
    gpu: bool,
) -> Moments:
    """Take a training step on tensors without contents and count what is alive.

    Args:
        model: on the meta device; it is used up.
        carries: the rows are a segment between two others.
        context: ranks that share each row, of which this one has a part.
    """
    model.train()
    model.set_checkpointing(checkpointing)
    n_layers, period = len(model.backbone.layers), checkpointing_interval(checkpointing)
    peaks: list[int] = []  # of the backward: head, last blocks, those between, first blocks

    def mark(*_: Any) -> None:
        peaks.append(count.restart())

    def mark_backward(_module: Any, _inputs: Any, outputs: tuple[Tensor, Any]) -> None:
        if outputs[0].requires_grad:
            outputs[0].register_hook(mark)

    for i in {n_layers - 1, n_layers - period - 1, period - 1}:
        if 0 <= i < n_layers:
            model.backbone.layers[i].register_forward_hook(mark_backward)
    with counted(gpu=gpu) as count:
        trained = _materialized(model, gpu=gpu)
        weights = count.live
        for p in trained:
            p.grad = torch.empty_like(p)
        gradients = count.live - weights
        input_ids = torch.zeros(rows, seq_len, dtype=torch.int64)
        positions = torch.arange(rows * seq_len)
        state: Mamba2State | None = None
        seq_idx, handed_back = None, []
        if context > 1:
            parallelize(model, _Imagined(context))
            seq_idx = torch.zeros_like(input_ids, dtype=torch.int32)
            state = awaited(seq_idx[:, : model.config.d_conv], n_layers)
        if carries:
            config = dataclasses.replace(model.config, n_layers=n_layers)
            dtype = torch.bfloat16 if autocast else model.backbone.embeddings.weight.dtype
            state = zero_state(config, rows, dtype)
            for layer in state.layers:
                handed_back += [torch.empty_like(t.requires_grad_()) for t in layer]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden, states = model.backbone(input_ids, None, seq_idx, state, carries)
            activations = count.live - weights - gradients
            forward = count.restart()
            # by position, as the loss picks the labelled ones
            chosen = hidden.flatten(0, 1)[positions]
            loss = cross_entropy_of_rows(chosen, model.lm_head, input_ids.flatten())
        at_loss = count.restart()
        if not carries:  # else they are those of the segments behind it
            for p in trained:
                p.grad = None
        del hidden, chosen
        count.restart()
        ends = [t for layer in states for t in layer] if carries else []
        torch.autograd.backward([loss, *ends], [torch.ones_like(loss), *handed_back])
        mark()
    head, bottom = peaks[0], peaks[-1]
    # live bytes change evenly from block to block: those between are below the first or the last
    top = peaks[1] if len(peaks) == 4 else max(peaks)
    return Moments(weights, gradients, activations, forward, at_loss, head, top, bottom)


def optimizer_bytes(model: Mamba2LM, config: OptimizerConfig, *, gpu: bool) -> tuple[float, float]:
    """Of an optimizer's state, and of what its update holds besides.

    Args:
        model: on the meta device; it is left as it is.
    """
    if isinstance(config, AdamWConfig) and config.needs_bitsandbytes:
        paged = gpu and config.kind.startswith("paged")
        return _bytes_in_8_bits([p.numel() for p in model.parameters() if p.requires_grad], paged)
    model = copy.deepcopy(model)
    with counted(gpu=gpu) as count:
        for p in _materialized(model, gpu=gpu):
            p.grad = torch.empty_like(p)
        before = count.live
        optimizer = build_optimizer(model, config)
        optimizer.step()  # makes the state
        state = count.live - before
        count.restart()
        optimizer.step()
        return state, count.peak - count.live


def _bytes_in_8_bits(sizes: list[int], paged: bool) -> tuple[float, float]:
    """What bitsandbytes does in an update is in registers; what is paged comes in for it."""
    state = paged_in = 0.0
    for n in sizes:
        moments = 2.0 * n * (1 if n >= LEAST_8BIT else 4)
        if n >= LEAST_8BIT:
            state += 2 * 4 * -(-n // 256)
        if paged and n >= LEAST_PAGED:
            paged_in = max(paged_in, moments)
        else:
            state += moments
    return state, paged_in


def smaller(config: TrainConfig) -> Iterator[tuple[dict[str, str], TrainConfig]]:
    """Flags that save memory and the run that they make, the cheapest combination first.

    What they cost is time or digits: checkpointing repeats work, a small batch leaves a GPU idle,
    8 and 4 bits round.
    """
    modes, mode = ("none", "selective", "full"), config.model.checkpointing
    strength = modes.index(mode) if mode in modes else 1
    batch, accumulate = config.data.batch_size, config.trainer.accumulate
    context, exact = config.long_context, {"long_context": "exact"}
    on_host = {"long_context.offload": "true"}
    segments: list[tuple[float, dict[str, str]]] = []
    if isinstance(context, ExactConfig) and not context.offload:
        segments = [(0.5, on_host)]
    elif context.kind == "none" and config.data.seq_len > SEGMENT_LEN:
        segments = [(1.7, exact), (2.2, exact | on_host)]
    levers: list[list[tuple[float, dict[str, str]]]] = [
        segments,
        [(i - strength, {"model.checkpointing": m}) for i, m in enumerate(modes) if i > strength],
        [(1.2, {"precision": "bf16-mixed" if config.adapter.kind == "full" else "bf16"})],
        [
            (
                1.5 * i,
                {"data.batch_size": f"{batch >> i}", "trainer.accumulate": f"{accumulate << i}"},
            )
            for i in range(1, batch.bit_length())
        ],
        [(2, {"optimizer": "adamw_8bit"})] if config.optimizer.kind == "adamw" else [],
        [(3, {"quantization": "nf4"})],
    ]
    choices = itertools.product(*([(0.0, {}), *lever] for lever in levers))
    for chosen in sorted(choices, key=lambda options: sum(cost for cost, _ in options)):
        flags = {key: value for _, option in chosen for key, value in option.items()}
        if (changed := _changed(config, flags)) is not None:
            yield flags, changed


def _never_sharded(config: TrainConfig) -> str:
    """What of a run knows no shards, and what to take instead; empty if all does."""
    if config.optimizer.kind.endswith("8bit"):
        return f"what optimizer={config.optimizer.kind} keeps: use optimizer=adamw"
    return "quantization=int8: use quantization=nf4" if config.quantization.kind == "int8" else ""


def _changed(config: TrainConfig, flags: dict[str, str]) -> TrainConfig | None:
    """The run with these flags, or None if there is no such run."""
    values = config.model_dump()
    for key, value in flags.items():
        group, _, field = key.partition(".")
        if group == "precision":
            # what is narrow already gains nothing
            if values["precision"] in (PRECISIONS[value], PRECISIONS["bf16"]):
                return None
            values["precision"] = PRECISIONS[value]
        elif key == "long_context":
            values[group] = {"kind": value, "segment_len": SEGMENT_LEN}
        elif group in ("optimizer", "quantization"):
            if values[group]["kind"] != {"optimizer": "adamw", "quantization": "none"}[group]:
                return None
            values[group]["kind"] = value
        else:
            values[group][field] = value
    try:
        return type(config).model_validate(values)
    except (ValueError, UserError):
        return None


def _built(config: TrainConfig, shape: Mamba2Config, adapt: Adapt) -> Mamba2LM:
    """The model with its adapters, on the meta device, in the dtypes that a load would give it."""
    with torch.device("meta"):
        model = Mamba2LM(shape)
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] not in ("A_log", "D", "dt_bias"):
                p.data = p.data.to(getattr(torch, config.precision.weights))
        model.tie_weights()
        adapt(model, config)
    return model


def _first(model: Mamba2LM, n_layers: int) -> Mamba2LM:
    """A copy of the model with its first blocks alone."""
    layers = model.backbone.layers
    try:
        model.backbone.layers = layers[:n_layers]
        return copy.deepcopy(model)
    finally:
        model.backbone.layers = layers


def _materialized(model: nn.Module, *, gpu: bool) -> list[nn.Parameter]:
    """Give the parameters tensors that are counted, in place; returns those that are trained."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, t in store.items():
                if t is None:
                    continue
                if t not in made:
                    empty = torch.empty(t.shape, dtype=t.dtype)
                    made[t] = nn.Parameter(empty, t.requires_grad) if _is_weight(t) else empty
                store[name] = made[t]  # type: ignore[assignment]
        for name, child in module.named_children():
            if gpu and isinstance(child, nn.Dropout):
                setattr(module, name, _FusedDropout(child.p))
    return [p for p in made.values() if isinstance(p, nn.Parameter) and p.requires_grad]


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


class _FusedDropout(nn.Module):
    """Dropout as a GPU runs it: its mask has a byte to a number, on a CPU a number."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, train=True)[0] if self.p else x


class _Imagined(Ranks):
    """Ranks that send nothing; this one is in the middle."""

    def __init__(self, n: int) -> None:
        self.rank, self.n = n // 2, n

    def gathered(self, x: Tensor) -> list[Tensor]:
        return [torch.empty_like(x) for _ in range(self.n)]

    def shifted(self, x: Tensor, by: int) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class _Sliced(Mamba2Config):
    """What one of `ranks` holds under tensor parallelism: its share of the heads."""

    ranks: int = 1

    @classmethod
    def of(cls, shape: Mamba2Config, ranks: int) -> "_Sliced":
        if shape.n_heads % ranks or (shape.n_groups % ranks and ranks % shape.n_groups):
            raise UserError(
                f"{shape.n_heads} heads in {shape.n_groups} groups cannot be divided over {ranks} "
                f"GPUs; choose a number that divides the heads, and the groups or a multiple of "
                f"them"
            )
        fields = dataclasses.asdict(shape)
        # a group is never split: where there are fewer than ranks, each holds one
        return cls(**fields | {"n_groups": max(1, shape.n_groups // ranks), "ranks": ranks})

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model // self.ranks


def _signature(block: nn.Module) -> tuple[Any, ...]:
    return tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
