"""mamba2-plan: what a run will need of a GPU, before anything is read, and what to change.

mamba2-plan model.source=state-spaces/mamba2-2.7b precision=bf16 data.seq_len=2048
mamba2-plan model.source=mistralai/Mamba-Codestral-7B-v0.1 adapter=full plan.gpus=8
mamba2-plan model.source=state-spaces/mamba2-2.7b adapter=full precision=bf16-mixed cluster.gpus=64
mamba2-plan --config-name RECIPE +plan.gpus=8 +plan.out=plan.json
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.table import Table

from mamba2_train.assets import resolve
from mamba2_train.commands import command, console, extend_hydra
from mamba2_train.commands.train import adapt, check_adapter, model_shape
from mamba2_train.errors import UserError
from mamba2_train.model import PRESETS, Mamba2Config
from mamba2_train.plan import CONTEXT, GB, UNUSABLE, Memory, Plan, cure, shown, variants
from mamba2_train.schema import PlanConfig, validated


@command(PlanConfig, "plan")
def main(config: PlanConfig) -> None:
    shape, n = known_shape(config), config.plan.gpus
    check_adapter(config, shape)
    if config.cluster.gpus is not None:
        layouts(config, shape)
        return
    plan = Plan(config, shape, adapt, tensor=config.plan.tensor)
    rows, refused = possible(plan, n)
    forward, step = plan.flops()
    rows_x_tokens = f"{config.data.batch_size} x {config.data.seq_len:,}"
    console.print(
        f"[bold]{config.model.source or config.model.preset}[/]  {plan.n_parameters:,} parameters, "
        f"{plan.n_trained:,} trained ({plan.n_trained / plan.n_parameters:.2%}); rows x tokens "
        f"{rows_x_tokens} on {_where(plan, n)}\n"
        f"FLOPs per token: {forward / 1e9:.3g} G forward, {step / 1e9:.3g} G a training step\n",
        soft_wrap=True,
    )
    console.print(_breakdown(rows))
    if plan.is_cut:
        console.print(segments(plan, rows), soft_wrap=True)
    for reason in dict.fromkeys(refused):
        console.print(f"[yellow]{reason}[/]", soft_wrap=True)
    console.print()
    table, cells = _variants(plan, n)
    console.print(table)
    answers = [_answer(plan, n, size, rows) for size in config.plan.sizes]
    for answer in answers:
        console.print(answer, soft_wrap=True)
    console.print(
        f"[dim]GB are GiB. On the GPU: the peak, {CONTEXT / GB:.1f} for CUDA itself, and "
        f"{UNUSABLE:.0%} left to the driver and the allocator's holes.[/]",
        soft_wrap=True,
    )
    if config.plan.out is not None:
        _write(
            config.plan.out,
            {
                "parameters": plan.n_parameters,
                "trained": plan.n_trained,
                "flops_per_token": {"forward": forward, "step": step},
                "bytes_per_gpu": [dataclasses.asdict(m) | {"on_gpu": m.on_gpu} for m in rows],
                "bytes_on_gpu": cells,
                "answers": answers,
            },
        )


def layouts(config: PlanConfig, shape: Mamba2Config) -> None:
    """Ways to share the GPUs of a cluster, the fastest first, and the flags of that."""
    from mamba2_train.cluster import Simulator  # which imports what a plan of one GPU does without

    simulator = Simulator(Plan(config, shape, adapt), config.cluster)
    cluster, plan = simulator.cluster, simulator.plan
    console.print(
        f"[bold]{config.model.source or config.model.preset}[/]  {plan.n_parameters:,} parameters, "
        f"{plan.n_trained:,} trained; a step of {simulator.n_tokens:,} tokens in rows of "
        f"{config.data.seq_len:,} on {cluster.gpus} {cluster.gpu.name}, {cluster.node} to a node; "
        f"GB/s {cluster.intra / 1e9:g} inside, {cluster.inter / 1e9:g} between\n",
        soft_wrap=True,
    )
    estimates = simulator.best()
    kinds = [k for k in estimates[0].spent if any(e.spent[k] > 0 for e in estimates)]
    columns = ("data", "tensor", "rows", "acc", "checkpointing", "GB", "step s", "tokens/s", "MFU")
    table = Table("strategy", *columns, *kinds, box=None, padding=(0, 1, 0, 0))
    for e in estimates:
        l = e.layout
        data = f"{l.data}" if l.context == 1 else f"{l.data}x{l.context}"
        speed = f"{e.seconds:.3g}", f"{e.tokens_per_second:,.0f}", f"{e.mfu:.1%}"
        cells = [data, f"{l.tensor}", f"{l.rows}", f"{l.accumulate}", l.mode]
        cells += [f"{e.memory.on_gpu / GB:.1f}", *speed]
        cells += [f"{e.spent[k] / e.seconds:.0%}" for k in kinds]
        table.add_row(l.strategy, *cells)
    console.print(table)
    flags = shown(estimates[0].layout.flags)
    console.print(f"\ntake  [bold]{flags}[/]", soft_wrap=True)
    console.print(
        "[dim]Modelled: bytes and operations are counted, their speeds taken from an H100 and data "
        "sheets (docs/planning.md).[/]",
        soft_wrap=True,
    )
    if config.plan.out is not None:
        rows = [
            e.layout._asdict()
            | {"seconds": e.seconds, "spent": e.spent, "mfu": e.mfu, "on_gpu": e.memory.on_gpu}
            | {"tokens_per_second": e.tokens_per_second, "flags": e.layout.flags}
            for e in estimates
        ]
        _write(config.plan.out, {"layouts": rows})


def planned_run(overrides: list[str], shape: Mamba2Config) -> Plan:
    """The plan of a run of this shape, with settings as on the command line."""
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose("plan", overrides=overrides), resolve=True)
    return Plan(validated(PlanConfig, composed), shape, adapt)


def known_shape(config: PlanConfig) -> Mamba2Config:
    """As `mamba2-train` finds it; an official model's needs neither files nor a hub."""
    source = config.model.source
    if source is not None and not Path(resolve(source)).is_dir():
        name = source.rpartition("/")[2].lower()
        for preset, shape in PRESETS.items():
            if name.startswith(preset):
                return shape
    return model_shape(config)


def possible(plan: Plan, n: int) -> tuple[list[Memory], list[str]]:
    """Of every strategy that can divide the run (of one GPU: `single`), and why others cannot."""
    found, refused = [], []
    for strategy in plan.strategies(n):
        try:
            found.append(plan.memory(strategy, n))
        except UserError as error:
            refused.append(str(error))
    return found, refused


def segments(plan: Plan, rows: list[Memory]) -> str:
    """The arithmetic behind long_context=exact."""
    c, batch = plan.shape, plan.config.data.batch_size
    layers = plan.state().layers
    conv, ssm = layers[0]
    one = sum(t.nbytes for layer in layers for t in layer)
    where = "GPU" if rows[0].states else "host"
    sums = ", ".join(f"{m.strategy} {(m.states or m.on_host) / GB:.2f} GB" for m in rows)
    return (
        f"{plan.n_segments} segments of {plan.config.long_context.segment_len:,} tokens, each "  # type: ignore[union-attr]
        f"computed in the memory of one. Between two: {c.n_layers} layers x {batch} rows x "
        f"({c.n_heads} heads x {c.headdim} x {c.d_state} x {ssm.itemsize} bytes + {c.d_conv - 1} x "
        f"{c.d_conv_channels:,} channels x {conv.itemsize}) = {one / GB:.3f} GB; x "
        f"{plan.n_segments - 1} on each {where}: {sums}. The FLOPs hold a second "
        f"forward pass of all but the last"
    )


def _where(plan: Plan, n: int) -> str:
    """What has a batch of its own, and of rows that are split how much of one a GPU has."""
    ranks = plan.ranks_of_row(n)
    if ranks == 1:
        return f"each of {n} GPU{'s' * (n > 1)}"
    part = -(-plan.config.data.seq_len // ranks)
    one = sum(t.nbytes for t in plan.state().layers[0])
    return (
        f"each {ranks} of {n} GPUs, {part:,} tokens of a row on one; a layer sends "
        f"{one / 2**20:.3g} MB each way, whatever the length"
    )


def _breakdown(rows: list[Memory]) -> Table:
    states = ("states",) if any(m.states for m in rows) else ()
    columns = (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        *states,
        "logits",
        "peak",
        "on_gpu",
    )
    table = Table("GB", *columns[:-1], "at", "on GPU", box=None, padding=(0, 1, 0, 0))
    for m in rows:
        *parts, on_gpu = (f"{getattr(m, name) / GB:.2f}" for name in columns)
        table.add_row(m.strategy, *parts, m.at, f"[bold]{on_gpu}[/]")
    return table


def _variants(plan: Plan, n: int) -> tuple[Table, dict[str, dict[str, float]]]:
    """GB on the GPU for each precision and checkpointing mode."""
    cells: dict[str, dict[str, float]] = {}
    table = Table("precision", "checkpointing", *plan.strategies(n), box=None, padding=(0, 2, 0, 0))
    for precision, mode, changed in variants(plan.config):
        found = {m.strategy: m.on_gpu for m in possible(plan.of(changed), n)[0]}
        cells[f"{precision}, {mode}"] = found
        figures = (f"{found[s] / GB:.2f}" if s in found else "-" for s in plan.strategies(n))
        table.add_row(precision, mode, *figures)
    return table, cells


def _answer(plan: Plan, n: int, size: float, rows: list[Memory]) -> str:
    fitting = [m for m in rows if m.fits(size)]
    if fitting:
        ways = ", ".join(f"{m.strategy} {m.on_gpu / GB:.1f}" for m in fitting)
        return f"{size:g} GB: yes ({ways})"
    for strategy in plan.strategies(n):
        with contextlib.suppress(UserError):
            if found := cure(plan, lambda m: m.fits(size), strategy, n):
                flags, memory = found
                return f"{size:g} GB: no; {strategy} with {shown(flags)} ({memory.on_gpu / GB:.1f})"
    return f"{size:g} GB: no, with no flags"


def _write(file: Path, figures: dict[str, object]) -> None:
    try:
        file.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"plan.out={file} cannot be written: {error.strerror}") from error
