"""How long a step takes on a cluster, in every layout of its GPUs, and which layout to take.

    micro-batch  = sum over blocks of max(computing + waiting, gathering) + what is in no block
    step         = micro-batches + what is reduced at its end + the optimizer's update

    computing    of a rank's share of the heads, `roofline.count` at the share of the roofline that
                 was measured on an H100, and no less than the host needs to ask for it
    waiting      for what is reduced over tensor ranks and gathered over context ranks: nothing else
                 can go on
    gathering    FSDP's, of the next block while this one computes; the scattering of gradients too

A collective of S bytes over n GPUs, g of them in each of N nodes, by rings:

    max(S (n - 1) / n / intra,  S (N - 1) / N / (g inter)) + (n - N) hops inside + (N - 1) between

twice that where all receive the sum. Its bytes are those of `parallel.wire`, which tests hold to
what processes call. Memory is `plan`'s. Of the speeds only the ops' share of the roofline has been
measured on a GPU; docs/planning.md says what the rest is taken from.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mamba2_train.errors import UserError
from mamba2_train.model import Mamba2LM, flops_per_token
from mamba2_train.parallel.sizes import DATA, TENSOR, Sizes
from mamba2_train.parallel.start import weightless
from mamba2_train.parallel.wire import Collective, Traffic, over_context, traffic
from mamba2_train.plan import GB, WHOLE, Memory, Plan
from mamba2_train.roofline import GPU, GPUS, REACHED, STREAMED, Step, count
from mamba2_train.schema import ClusterConfig, OrdinaryContextConfig, TrainConfig

MODES = ("none", "selective", "full")
MICRO = 1e-6
LEAST_CONTEXT = 1024  # tokens of a row that a context rank has at least


class Layout(NamedTuple):
    """How GPUs share a step: `data` x `context` x `tensor` of them."""

    strategy: str
    data: int
    context: int
    tensor: int
    mode: str  # of checkpointing
    rows: int  # of a micro-batch
    accumulate: int

    @property
    def flags(self) -> dict[str, str]:
        """Of `mamba2-train`."""
        found = {"strategy": self.strategy}
        if self.strategy == "fsdp_tp":
            found["strategy.data_size"] = f"{self.data}"
            found["strategy.tensor_size"] = f"{self.tensor}"
        if self.context > 1:
            found["long_context"] = "parallel"
            found["long_context.ranks"] = f"{self.context}"
        found["model.checkpointing"] = self.mode
        found["data.batch_size"] = f"{self.rows}"
        found["trainer.accumulate"] = f"{self.accumulate}"
        return found


@dataclass(frozen=True)
class Estimate:
    """Of a step in one layout. spent: seconds by what for; they add up to `seconds`."""

    layout: Layout
    spent: dict[str, float]
    tokens_per_second: float
    mfu: float
    memory: Memory

    @property
    def seconds(self) -> float:
        return sum(self.spent.values())


@dataclass(frozen=True)
class Cluster:
    """GPUs, and bytes per second and seconds per hop between those of a node and of two nodes."""

    gpus: int
    gpu: GPU
    node: int
    intra: float
    inter: float
    intra_hop: float
    inter_hop: float
    call: float  # seconds of the host for a call of PyTorch's dispatcher

    @classmethod
    def of(cls, c: ClusterConfig) -> "Cluster":
        """
        Raises:
            UserError: GPUs that do not fill their nodes.
        """
        assert c.gpus is not None
        if c.gpus > c.node and c.gpus % c.node:
            raise UserError(
                f"cluster.gpus={c.gpus} do not fill nodes of cluster.node={c.node}: choose "
                f"{c.gpus // c.node * c.node} or {-(-c.gpus // c.node) * c.node}, or another node"
            )
        gpu = GPUS[c.gpu]
        intra = gpu.link if c.intra_gb_s is None else c.intra_gb_s * 1e9
        hops = c.intra_us * MICRO, c.inter_us * MICRO
        return cls(
            c.gpus, gpu, c.node, intra, c.inter_gb_s * 1e9, *hops, c.host_us_per_call * MICRO
        )

    def seconds(self, collective: Collective, n: int, stride: int) -> float:
        """Of a collective over `n` ranks, each `stride` behind the one before."""
        if n == 1:
            return 0.0
        inside = min(n, max(1, self.node // stride))
        nodes = -(-n // inside)
        size = collective.nbytes
        moving = size * (n - 1) / n / self.intra if inside > 1 else 0.0
        if nodes > 1:
            moving = max(moving, size * (nodes - 1) / nodes / (inside * self.inter))
        hops = (n - nodes) * self.intra_hop + (nodes - 1) * self.inter_hop
        twice = 2 if collective.kind == "reduce" else 1
        return collective.times * twice * (moving + hops)


class Simulator:
    """Steps of `n_tokens` in all, of one run on one cluster.

    Raises:
        UserError: tokens that are no rows, or a run of which no such step can be told.
    """

    def __init__(self, plan: Plan, settings: ClusterConfig) -> None:
        c = plan.config
        if c.long_context.kind not in ("none", "parallel"):
            raise UserError(
                f"a cluster is planned for rows in one pass, not in segments: leave out "
                f"long_context={c.long_context.kind}"
            )
        # whether ranks share a row is for the layout to say
        whole_rows = {"long_context": OrdinaryContextConfig(kind="none")}
        self.plan, self.cluster = plan.of(c.model_copy(update=whole_rows)), Cluster.of(settings)
        self.seq_len = c.data.seq_len
        a_step = c.data.batch_size * c.trainer.accumulate * settings.gpus * self.seq_len  # type: ignore[operator]
        self.n_tokens = settings.tokens or a_step
        if self.n_tokens % self.seq_len:
            near = max(1, self.n_tokens // self.seq_len) * self.seq_len
            raise UserError(
                f"cluster.tokens={self.n_tokens} are no rows of data.seq_len={self.seq_len}: "
                f"choose {near}"
            )
        self.n_rows = self.n_tokens // self.seq_len
        self._steps: dict[tuple[int, int, str, int], Step] = {}
        self._sent: dict[int, Mamba2LM] = {}

    def best(self, most: int = 4) -> list[Estimate]:
        """The fastest checkpointing and micro-batch of each way to share the GPUs that fits them,
        the fastest way first.

        Raises:
            UserError: none fits, with the least that is needed.
        """
        found: list[tuple[float, Layout]] = []
        least: tuple[float, Layout] | None = None
        tensors: set[int] = set()  # of what fits
        for strategy, data, context, tensor in self._ways():
            if len(tensors) == 2 and tensor not in tensors:
                break  # to share the heads among more costs more, and nothing else asks for it
            times: list[tuple[float, Layout]] = []
            for mode in MODES:
                fitting, smallest = self._largest(strategy, data, context, tensor, mode)
                if fitting is None:
                    least = min(least or smallest, smallest)
                    continue
                times.append((sum(self._spent(fitting, quick=True).values()), fitting))
                if fitting.accumulate == 1:
                    break  # the next repeats more, for nothing
            if times:
                found.append(min(times))
                tensors.add(tensor)
        estimates: list[Estimate] = []
        for _, layout in sorted(found):
            memory = self.memory(layout)
            while not memory.fits(self.cluster.gpu.memory) and layout.rows > 1:
                layout = self._halved(layout)
                memory = self.memory(layout)
            if memory.fits(self.cluster.gpu.memory):
                estimates.append(self._estimate(layout, memory))
            if len(estimates) == most:
                break
        if not estimates:
            raise UserError(self._nothing_fits(least))
        return sorted(estimates, key=lambda e: e.seconds)

    def estimate(self, layout: Layout) -> Estimate:
        return self._estimate(layout, self.memory(layout))

    def memory(self, layout: Layout) -> Memory:
        """Of each process, as `plan` counts it."""
        plan = self._plan(layout.context, layout.mode, layout.rows)
        plan = copy.copy(plan)
        plan.tensor = layout.tensor
        n = layout.data * layout.context * (layout.tensor if "tp" in layout.strategy else 1)
        return plan.memory(layout.strategy, n)

    def sent(self, layout: Layout) -> Traffic:
        """What ranks send each other, but for those that share a row."""
        model = self._split(layout.tensor)
        c = self.plan.config
        weights = getattr(torch, c.precision.weights)
        products = torch.bfloat16 if c.precision.autocast else None
        return traffic(
            model,
            self.plan.shape,
            Sizes(layout.data * layout.context, layout.tensor),
            products=products,
            activation=products or weights,
            n_tokens=layout.rows * self.seq_len // layout.context,
            repeats=layout.mode != "none",
        )

    def _ways(self) -> Iterator[tuple[str, int, int, int]]:
        """Strategy, data, context and tensor ranks."""
        n, node = self.cluster.gpus, self.cluster.node
        for tensor in (t for t in _powers(min(n, node)) if n % t == 0):
            try:
                self.plan.sliced(tensor)
            except UserError:
                continue
            for context in _powers(n // tensor):
                data, rest = divmod(n // tensor, context)
                if rest or self.n_rows % data or self.seq_len % context:
                    continue
                if context > 1 and self.seq_len // context < LEAST_CONTEXT:
                    continue
                if n == 1:
                    yield "single", 1, 1, 1
                    continue
                if tensor == 1:
                    yield "fsdp", data, context, 1
                    if context == 1:
                        yield "ddp", data, 1, 1
                elif data * context == 1:
                    yield "tp", 1, 1, tensor
                else:
                    yield "fsdp_tp", data, context, tensor

    def _largest(
        self, strategy: str, data: int, context: int, tensor: int, mode: str
    ) -> tuple[Layout | None, tuple[float, Layout]]:
        """The most rows of a micro-batch that seem to fit, as activations grow with them; and the
        GB of one row."""
        per_rank = self.n_rows // data

        def layout(r: int) -> Layout:
            return Layout(strategy, data, context, tensor, mode, r, per_rank // r)

        try:
            one = self.memory(layout(1))
        except UserError:
            return None, (float("inf"), layout(1))

        def fits(r: int) -> bool:
            peak = one.peak + (r - 1) * one.activations
            return dataclasses.replace(one, peak=peak).fits(self.cluster.gpu.memory)

        fitting = [r for r in _powers(per_rank) if per_rank % r == 0 and fits(r)]
        return layout(fitting[-1]) if fitting else None, (one.on_gpu / GB, layout(1))

    def _halved(self, layout: Layout) -> Layout:
        return layout._replace(rows=layout.rows // 2, accumulate=layout.accumulate * 2)

    def _estimate(self, layout: Layout, memory: Memory) -> Estimate:
        spent = self._spent(layout)
        rate = self.n_tokens / sum(spent.values())
        precision, gpu = self.plan.config.precision, self.cluster.gpu
        narrow = "bfloat16" in (precision.weights, precision.autocast)
        peak = (gpu.bf16 if narrow else gpu.fp32) * self.cluster.gpus
        share = self.plan.n_trained / self.plan.n_parameters
        # as perf/mfu has it: what is computed again is no work
        mfu = rate * flops_per_token(self.plan.shape) * (2 + min(1.0, share)) / peak
        return Estimate(layout, spent, rate, mfu, memory)

    def _spent(self, layout: Layout, quick: bool = False) -> dict[str, float]:
        """Seconds of a step by what for; `quick` takes each row of a micro-batch for one alone."""
        cluster, l = self.cluster, layout
        gpu, n, n_layers = cluster.gpu, l.accumulate, self.plan.shape.n_layers
        step, more = self._counted(l, quick), l.rows if quick else 1
        sent = self.sent(l) if l.strategy not in WHOLE else Traffic([], [], n_layers, False)
        narrow = self.plan.config.precision.autocast or self.plan.config.precision.weights
        of_row = over_context(
            self.plan.sliced(l.tensor).shape,
            l.context,
            n_sequences=l.rows,
            activation=getattr(torch, narrow),
        )
        block = [*sent.block, *of_row]
        ranks = {  # and how far one is behind another
            "data": (l.data * l.context, l.tensor),
            "context": (l.context, l.tensor),
            "halo": (min(2, l.context), l.tensor),
            "tensor": (l.tensor, 1),
        }

        def waited(found: list[Collective], over: tuple[str, ...], *when: str) -> float:
            chosen = [c for c in found if c.over in over and c.when in when]
            return sum(cluster.seconds(c, *ranks[c.over]) for c in chosen)

        # each gathered byte is read and written once more, into its place
        copied = gpu.hbm * REACHED[STREAMED] / 2
        computing = waiting = across = first = last = 0.0
        for when in ("forward", "backward"):
            compute = more * step.seconds(gpu, when) / n_layers
            compute += sum(c.nbytes for c in block if c.over == "data" and c.when == when) / copied
            wait = waited(block, ("tensor",), when)
            cross = waited(block, ("context", "halo"), when)
            busy = compute + wait + cross
            gather = waited(block, ("data",), when)
            scatter = waited(block, ("data",), "last") if when == "backward" else 0.0
            first += max(0.0, gather - busy)  # of a micro-batch before the last of a step
            last += max(0.0, gather + scatter - busy)
            computing, waiting, across = computing + compute, waiting + wait, across + cross
        host = max(0.0, step.calls.block * cluster.call - computing - waiting - across)
        outside = sum(
            more * times * op.achieved(gpu) / (l.tensor if op.part == "head" else 1)
            for op, times in step.rest.items()
        )
        # nothing hides the first block's weights, nor those of embeddings and head
        bare = waited(block, ("data",), "forward") + waited(sent.rest, ("data",), "rest")
        at_end = waited(sent.rest, ("data",), "last", "end")
        if l.strategy == "ddp":
            gradients = Collective("reduce", "data", _gradient_bytes(self.plan), "end")
            hidden = more * step.seconds(gpu, "backward")  # of the last micro-batch
            at_end = max(0.0, cluster.seconds(gradients, l.data, 1) - hidden)
        sharing = 1 if l.strategy in WHOLE else l.data * l.context
        return {
            "blocks": n * n_layers * computing,
            "head": n * outside,
            "tensor": n * (n_layers * waiting + waited(sent.rest, ("tensor",), "rest")),
            "context": n * n_layers * across,
            "weights": n * bare + n_layers * ((n - 1) * first + last) + at_end,
            "host": n * n_layers * host,
            "update": step.seconds(gpu, "update") / sharing,
        }

    def _counted(self, l: Layout, quick: bool) -> Step:
        rows = 1 if quick else l.rows
        key = (l.tensor, l.context, l.mode, rows)
        if key not in self._steps:
            plan = self._plan(l.context, l.mode, rows).sliced(l.tensor)
            self._steps[key] = count(plan, self.cluster.gpu.arch)
        return self._steps[key]

    def _plan(self, context: int, mode: str, rows: int) -> Plan:
        config = self.plan.config
        changed = config.model_copy(
            update={
                "data": config.data.model_copy(
                    update={"batch_size": rows, "seq_len": self.seq_len // context}
                ),
                "model": config.model.model_copy(update={"checkpointing": mode}),
            }
        )
        return self.plan.of(changed)

    def _split(self, tensor: int) -> Mamba2LM:
        """The model of one block as the first of `tensor` ranks has it, on the meta device."""
        if tensor not in self._sent:
            plan, config = self.plan, self.plan.config
            update: dict[str, Any] = {}
            if getattr(config.adapter, "layers", None) is not None:
                update = {"layers": None}  # blocks are taken as alike
            alone = config.model_copy(update={"adapter": config.adapter.model_copy(update=update)})
            shape = dataclasses.replace(plan.shape, n_layers=1)
            self._sent[tensor] = _split_model(alone, shape, plan.adapt, tensor)
        return self._sent[tensor]

    def _nothing_fits(self, least: tuple[float, Layout] | None) -> str:
        c = self.cluster
        if least is None:
            return (
                f"a step of cluster.tokens={self.n_tokens} has {self.n_rows} rows, which cannot be "
                f"shared by {c.gpus} GPUs: choose a multiple of {c.gpus * self.seq_len}"
            )
        gb, layout = least
        return (
            f"no layout of {c.gpus} {c.gpu.name} fits; the smallest is strategy={layout.strategy} "
            f"model.checkpointing={layout.mode} with a row of {self.seq_len} tokens at {gb:.1f} of "
            f"{c.gpu.memory:g} GB: take more or larger GPUs, a shorter data.seq_len, "
            f"adapter=lora, or quantization=nf4"
        )


def _split_model(
    config: TrainConfig, shape: Any, adapt: Callable[..., Any], tensor: int
) -> Mamba2LM:
    """As `parallel.dry_run` builds it."""
    weights = getattr(torch, config.precision.weights)
    model = weightless(shape, weights, config.quantization.stored)
    adapt(model, config)
    model.to("meta")
    model.tie_weights()
    if tensor == 1:
        return model
    from mamba2_train.parallel.tensor_parallel import parallelize

    logging.getLogger("torch").setLevel(logging.ERROR)
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  which registers it

    dist.init_process_group("fake", rank=0, world_size=tensor)
    try:
        mesh = init_device_mesh("cpu", (1, tensor), mesh_dim_names=(DATA, TENSOR))
        parallelize(model, mesh[TENSOR])
    finally:
        dist.destroy_process_group()
    return model


def _gradient_bytes(plan: Plan) -> int:
    parameters: list[nn.Parameter] = plan.trained
    return sum(p.numel() * p.element_size() for p in parameters)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
