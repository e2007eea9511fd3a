"""What tells how a model and its machine are, every so many steps: in between nothing is computed
and no device is waited for, and no number of the training depends on any of it.

    grad_norm/in_proj_lora_A   of all layers together, before clipping
    lora_norm/in_proj          ||alpha / r B A||, all layers together (Frobenius)
    lora_share/in_proj         the same over ||W||
    dt/layer_00_p50            quantiles over positions and heads of softplus(dt + dt_bias)
    decay/layer_00_p50         ... of exp(dt A), what a state keeps from a token to the next
    system/rss_gib             ... of the process that has most

A decay that is 1 at its 5% quantile forgets nothing any more, and one that is 0 at its 95% quantile
remembers nothing: both are signs of a dt_bias or an A_log that has run away.
"""

from collections import defaultdict
from typing import Any

import lightning as L
import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_train.adapters import kind_of
from mamba2_train.model import Mamba2LM
from mamba2_train.parallel.layout import plain_name
from mamba2_train.parallel.shards import local, mesh_of, total_norm, whole_tensors
from mamba2_train.quantization import dequantized, is_quantized_layer

GIB = 1024**3
N_POSITIONS = 256  # of a rank's batch, for the quantiles
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


class Health(Callback):
    """Logs all of the above after every `every_steps` optimizer steps, over all ranks."""

    def __init__(self, every_steps: int) -> None:
        self.every = every_steps
        self.due = False  # the step that is being taken is looked at
        self.gradients: dict[str, Tensor] = {}
        self.dt: list[Tensor] = []  # of each layer (positions, h), nan where there are fewer
        self.hooks: list[Any] = []
        self.base_norms: dict[str, float] | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.on_gradients = self._see_gradients  # type: ignore[assignment]
        psutil.cpu_percent()  # from here on

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if not begins or (trainer.global_step + 1) % self.every:
            return
        self.due = True
        self._listen(module.model, batch["seq_idx"])  # type: ignore[arg-type]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.due:
            return
        self._stop_listening()
        if trainer.fit_loop._should_accumulate():
            return
        model: Mamba2LM = module.model  # type: ignore[assignment]
        if self.base_norms is None:
            self.base_norms = base_norms(model)
        values = {f"grad_norm/{kind}": float(norm) for kind, norm in self.gradients.items()}
        values |= lora_norms(model, self.base_norms)
        values |= dt_statistics(model, self.dt)
        values |= system(module.device)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as Lightning counts metrics
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        self.due, self.gradients, self.dt = False, {}, []

    def _see_gradients(self, model: nn.Module) -> None:
        if self.due:
            self.gradients = gradient_norms(model)

    def _listen(self, model: Mamba2LM, seq_idx: Tensor) -> None:
        """To what `in_proj` gives in the next pass, once: checkpointing repeats it."""
        self.dt, positions = [], None

        def hear(index: int, mixer: Any, output: Tensor) -> None:
            nonlocal positions
            if len(self.dt) != index:
                return
            with torch.no_grad():
                if positions is None:  # the first segment of a row in segments
                    real = (seq_idx[:, : output.shape[1]] >= 0).flatten().nonzero().flatten()
                    spread = torch.linspace(0, len(real) - 1, N_POSITIONS, device=real.device)
                    positions = real[spread.long().unique()] if len(real) else real
                raw = mixer._split(output.detach())[2].flatten(0, 1)[positions].float()
                self.dt.append(F.pad(raw, (0, 0, 0, N_POSITIONS - len(raw)), value=torch.nan))

        for index, layer in enumerate(model.backbone.layers):
            mixer: Any = layer.mixer
            self.hooks.append(
                mixer.in_proj.register_forward_hook(
                    lambda _, __, output, index=index, mixer=mixer: hear(index, mixer, output)
                )
            )

    def _stop_listening(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Euclidean norms of the gradients by kind of parameter, not read from the device; every rank
    must call this."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[_kind_and_factor(name)].append(p.grad)
    return {kind: total_norm(found[kind]) for kind in sorted(found)}


def lora_norms(model: nn.Module, base: dict[str, float]) -> dict[str, float]:
    """Frobenius norms of the adapters' updates by kind, and their share of the weights' `base`.

    ||B A||^2 = sum of (B^T B) * (A A^T), elementwise: the update itself is never made. Every rank
    must call this.
    """
    squares: dict[str, float] = defaultdict(float)
    tuned: dict[str, Any] = dict(model.named_modules())
    scales = {n: tuned[n].scaling for n, m in tuned.items() if isinstance(m, BaseTunerLayer)}
    first: dict[tuple[str, str], Tensor] = {}
    for name, tensor in whole_tensors(model, lambda p: p.detach() if p.requires_grad else None):
        if ".lora_" not in name or "magnitude" in name:
            continue
        layer, _, rest = name.partition(".lora_")
        adapter = rest.split(".")[1]
        key, matrix = (layer, adapter), tensor.double()
        gram = matrix @ matrix.T if "A." in rest else matrix.T @ matrix
        if key not in first:
            first[key] = gram
            continue
        norm = float((first.pop(key) * gram).sum()) * scales[layer][adapter] ** 2
        squares[kind_of(layer)] += max(norm, 0.0)  # rounding may leave less than nothing
    values = {f"lora_norm/{kind}": square**0.5 for kind, square in squares.items()}
    for kind, square in squares.items():
        if base.get(kind):
            values[f"lora_share/{kind}"] = square**0.5 / base[kind]
    return values


def base_norms(model: nn.Module) -> dict[str, float]:
    """Frobenius norms of the weights below adapters, by kind; without those that are quantized and
    cut over ranks. Every rank must call this."""
    plain: dict[str, list[Tensor]] = defaultdict(list)
    squares: dict[str, float] = defaultdict(float)
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        if not is_quantized_layer(base):
            weights = (p for n, p in base.named_parameters() if _is_weight(n))
            plain[kind_of(name)] += [p.detach() for p in weights]
        elif mesh_of(model) is None:
            squares[kind_of(name)] += float(dequantized(base).double().norm()) ** 2
    for kind in sorted(plain):
        squares[kind] += float(total_norm([p.double() for p in plain[kind]])) ** 2
    return {kind: square**0.5 for kind, square in squares.items()}


def dt_statistics(model: Mamba2LM, raw: list[Tensor]) -> dict[str, float]:
    """Quantiles of dt and of the decay by layer. `raw`: of each layer (positions, h), before the
    bias, this rank's rows and heads; every rank must call this."""
    values: dict[str, float] = {}
    c, pairs = model.config, []
    for layer, dt in zip(model.backbone.layers, raw, strict=True):
        mixer: Any = layer.mixer
        dt = F.softplus(dt + local(mixer.dt_bias.detach()).float()).clamp(*c.dt_limit)
        pairs.append(torch.stack([dt, torch.exp(dt * -torch.exp(_A_log(mixer)))]).flatten(1))
    if not pairs:
        return values
    own = torch.stack(pairs)  # [layer, dt or decay, positions x h]
    if dist.is_initialized():
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own.contiguous())
        own = torch.cat(every, -1)
    wanted = torch.tensor(list(QUANTILES.values()), device=own.device)
    found = own.nanquantile(wanted, dim=-1).permute(1, 2, 0).tolist()
    for index, of_layer in enumerate(found):
        for what, numbers in zip(("dt", "decay"), of_layer, strict=True):
            for name, number in zip(QUANTILES, numbers, strict=True):
                values[f"{what}/layer_{index:02}_{name}"] = number
    return values


def system(device: torch.device) -> dict[str, float]:
    """Of this host and process, or of whichever rank has most; every rank must call this."""
    values = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/rss_gib": psutil.Process().memory_info().rss / GIB,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        values["system/gpu_mem_gib"] = (total - free) / GIB
        values["system/gpu_percent"] = _gpu_percent(device)
    if dist.is_initialized():
        highest = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        values = dict(zip(values, highest.tolist(), strict=True))
    return values


def _gpu_percent(device: torch.device) -> float:
    """nan where the driver's library for Python is missing."""
    try:
        return float(torch.cuda.utilization(device))
    except (ImportError, RuntimeError):
        return float("nan")


def _A_log(mixer: Any) -> Tensor:
    return local(mixer.A_log.detach()).float()


def _is_weight(name: str) -> bool:
    return plain_name(name).rpartition(".")[2] == "weight"


def _kind_and_factor(name: str) -> str:
    kind, plain = kind_of(name), plain_name(name)
    if ".lora_" not in plain:
        return kind
    factor = plain.partition(".lora_")[2].split(".")[0].removeprefix("embedding_")
    return f"{kind}_lora_{factor.removesuffix('_vector')}"
