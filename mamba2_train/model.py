"""The Mamba2 language model: embeddings, a stack of mixer blocks, a norm and a head.

One block is ``x = x + mixer(norm(x))``; the mixer (Dao & Gu 2024, "Transformers are SSMs",
arXiv 2405.21060, section 7) is

    z, x, B, C, dt = split(in_proj(u))
    x, B, C        = silu(causal_conv1d(x, B, C))
    S_t            = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T         one (p, n) state per head
    y_t            = S_t C_t + D x_t
    out            = out_proj(rms_norm(y * silu(z)))              the norm is per group

Module paths are those of Hugging Face's checkpoints (``backbone.layers.0.mixer.in_proj``), so
adapters and weights travel. Nothing here knows of LoRA, quantization or parallelism: `in_proj`,
`out_proj`, `embeddings` and `lm_head` are always called as modules, so that whatever replaces
them is heard.

Shapes in comments: b batch, t position, h head, p headdim, g group, n d_state.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mamba2_kernels import MixerStep, causal_conv1d, gated_rms_norm, rms_norm, ssd_scan
from mamba2_train.loss import IGNORED, cross_entropy, shifted_labels

Reduction = Literal["mean", "sum", "none"]
Kept = Literal["all", "projections", "input"]
FEW_ROWS = 4  # with 8, both ways to multiply take as long


@dataclass(frozen=True)
class Mamba2Config:
    """Shape of a Mamba2 LM, in the paper's names. Defaults are state-spaces/mamba2-130m's."""

    d_model: int = 768
    n_layers: int = 24
    vocab_size: int = 50_288
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    n_groups: int = 1
    chunk_size: int = 256
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_layers", "vocab_size", "d_state", "d_conv", "expand", "headdim")
        for name in (*sizes, "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be a small positive number")
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim {self.headdim} does not divide d_inner = expand * d_model = "
                f"{self.d_inner}; choose a headdim that does"
            )
        if self.n_groups < 1 or self.n_heads % self.n_groups:
            raise ValueError(
                f"n_groups {self.n_groups} does not divide the {self.n_heads} heads; "
                f"choose one of its divisors"
            )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def d_conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of `in_proj`, in the order z, x, B, C, dt."""
        return self.d_inner + self.d_conv_channels + self.n_heads


PRESETS: dict[str, Mamba2Config] = {
    "mamba2-130m": Mamba2Config(d_model=768, n_layers=24),
    "mamba2-370m": Mamba2Config(d_model=1024, n_layers=48),
    "mamba2-780m": Mamba2Config(d_model=1536, n_layers=48),
    "mamba2-1.3b": Mamba2Config(d_model=2048, n_layers=48),
    "mamba2-2.7b": Mamba2Config(d_model=2560, n_layers=64),
    "mamba-codestral-7b": Mamba2Config(
        d_model=4096, n_layers=64, vocab_size=32_768, n_groups=8, tie_embeddings=False
    ),
    "tiny": Mamba2Config(
        d_model=192, n_layers=8, vocab_size=4_096, d_state=64, headdim=32, chunk_size=64
    ),
}


class LayerState(NamedTuple):
    """What one layer remembers of the past.

    conv: (b, d_conv - 1, channels), the last inputs of the convolution, oldest first.
    ssm: (b, h, p, n), at least float32.
    """

    conv: Tensor
    ssm: Tensor


@dataclass
class Mamba2State:
    """All that a later call needs to go on where an earlier one stopped.

    seq_idx: (b,) int32, the document that each row was in, -1 where it has seen nothing. A row
    whose next call begins with another document starts from zero.
    """

    layers: list[LayerState]
    seq_idx: Tensor


@dataclass
class Mamba2Output:
    """loss: fp32 (at least), mean or sum over `n_tokens`, or per token (b, t) for "none".

    logits (b, kept positions, vocab_size) when there are no labels or `logits_to_keep` asks.
    """

    loss: Tensor | None = None
    n_tokens: Tensor | None = None
    logits: Tensor | None = None
    state: Mamba2State | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32. With `group_size` and a gate: Mamba2's norm."""

    def __init__(self, width: int, eps: float, group_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.group_size = group_size or width

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return rms_norm(x, self.weight, eps=self.eps)
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, group_size=self.group_size)


class Mamba2Mixer(nn.Module):
    """(b, t, d_model) -> (b, t, d_model): what mixes information across positions."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        channels = config.d_conv_channels
        self.in_proj = nn.Linear(config.d_model, config.d_in_proj, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            channels, channels, config.d_conv, groups=channels, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(config.n_heads))
        self.A_log = nn.Parameter(torch.empty(config.n_heads))
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.norm = RMSNorm(config.d_inner, config.norm_eps, config.d_inner // config.n_groups)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=config.use_bias)

    def forward(
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        z, xBC, dt = self._split(self.in_proj(u))
        xBC, conv_state = self._conv(xBC, seq_idx, state, return_state)
        y, ssm_state = self._scan(xBC, dt, seq_idx, state, return_state)
        out = self.out_proj(self.norm(y.flatten(-2), gate=z))
        return out, LayerState(conv_state, ssm_state) if return_state else None

    def _conv(
        self, xBC: Tensor, seq_idx: Tensor | None, state: LayerState | None, return_state: bool
    ) -> tuple[Tensor, Any]:
        conv = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
        )
        return _output_and_state(conv, return_state)

    def _scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        seq_idx: Tensor | None,
        state: LayerState | None,
        return_state: bool,
    ) -> tuple[Tensor, Any]:
        c = self.config
        x, B, C = self._split_conv(xBC)
        scan = ssd_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=c.dt_limit,
            chunk_size=c.chunk_size,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.ssm,
            return_final_state=return_state,
        )
        return _output_and_state(scan, return_state)

    def step(self, u: Tensor, state: LayerState, prepared: MixerStep | None = None) -> Tensor:
        """One token (b, d_model) -> (b, d_model). `state` is updated in place; no gradient."""
        between = prepared or self.prepare_step()
        return _few_rows(self.out_proj, between(_few_rows(self.in_proj, u), *state))

    def prepare_step(self) -> MixerStep:
        """What lies between the projections, with the weights as they are now."""
        c = self.config
        return MixerStep(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self._A(),
            self.D,
            self.dt_bias,
            self.norm.weight,
            headdim=c.headdim,
            n_groups=c.n_groups,
            dt_limit=c.dt_limit,
            eps=c.norm_eps,
            norm=None if type(self.norm) is RMSNorm else self.norm,
        )

    def _A(self) -> Tensor:
        # at least fp32: in bf16 neighbouring decay rates collapse into one
        A_log = self.A_log
        return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())

    def _split(self, zxBCdt: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        return zxBCdt.split([c.d_inner, c.d_conv_channels, c.n_heads], dim=-1)

    def _split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        d_bc = c.n_groups * c.d_state
        x, B, C = xBC.split([c.d_inner, d_bc, d_bc], dim=-1)
        heads, groups = (c.n_heads, c.headdim), (c.n_groups, c.d_state)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)


class Mamba2Block(nn.Module):
    """x + mixer(norm(x)), the sum in the residual stream's dtype."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config)
        self.kept: Kept = "all"  # of the forward pass, for the backward

    def forward(
        self,
        x: Tensor,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        *,
        dtype: torch.dtype,
    ) -> tuple[Tensor, LayerState | None]:
        # narrowed before it is checkpointed: what is kept is then half of an fp32 residual stream
        with _uncached_autocast():
            out, state = self._computed(self._contexts(), x.to(dtype), seq_idx, state, return_state)
        return x + out, state

    def step(
        self, x: Tensor, state: LayerState, prepared: MixerStep | None, *, dtype: torch.dtype
    ) -> Tensor:
        return x + self.mixer.step(self.norm(x.to(dtype)), state, prepared)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of nn.Module, of all but what hooks on the block do: they gather and free weights."""
        self._computed = torch.compile(self._plain_computed, *args, **kwargs)  # type: ignore[method-assign]

    def _computed(self, *inputs: Any) -> tuple[Tensor, LayerState | None]:
        return self._plain_computed(*inputs)

    def _plain_computed(
        self, contexts: Callable[[], Any] | None, *inputs: Any
    ) -> tuple[Tensor, LayerState | None]:
        return self._checkpointed(contexts)(*inputs)

    def _normed_mixer(self, x: Tensor, *rest: Any) -> tuple[Tensor, LayerState | None]:
        return self.mixer(self.norm(x), *rest)

    def _checkpointed(
        self, contexts: Callable[[], Any] | None
    ) -> Callable[..., tuple[Tensor, LayerState | None]]:
        if self.kept == "all" or not torch.is_grad_enabled():
            return self._normed_mixer
        if contexts is None:
            return partial(checkpoint, self._normed_mixer, use_reentrant=False)
        return partial(checkpoint, self._normed_mixer, use_reentrant=False, context_fn=contexts)

    def _contexts(self) -> Callable[[], Any] | None:
        """Of a selective checkpoint; made outside of what is compiled, which takes it as it is."""
        if self.kept != "projections":
            return None
        # an adapted layer is a module of modules
        adapted = next(self.mixer.out_proj.children(), None) is not None
        return _keeping_projections(self.mixer.config.d_model, self.mixer.config.d_inner, adapted)


@cache
def _keeping_projections(d_model: int, d_inner: int, adapted: bool) -> Callable[[], Any]:
    """Keep the products of `in_proj` and, where an adapter follows on it, of `out_proj`.

    Nothing comes after a plain `out_proj`, so it is never repeated. A product along fewer than
    d_model numbers (an adapter's second) costs less than its room. One function for all blocks
    alike, which torch.compile then compiles once.
    """

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        if (product := _product(op, args)) is not None:
            inner, width = product
            is_last = (inner, width) == (d_inner, d_model) and not adapted
            if inner >= d_model and not is_last:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    return contexts


class Mamba2Backbone(nn.Module):
    """Token ids (b, t) -> hidden states (b, t, d_model) after the last norm."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.n_layers))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        seq_idx: Tensor | None,
        state: Mamba2State | None,
        return_state: bool,
    ) -> tuple[Tensor, list[LayerState]]:
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x, dtype = self._residual(x)
        states = []
        for i, layer in enumerate(self.layers):
            before = state.layers[i] if state else None
            x, layer_state = layer(x, seq_idx, before, return_state, dtype=dtype)
            states.append(layer_state)
        return self.norm_f(x.to(dtype)), states

    def step(
        self, input_ids: Tensor, state: Mamba2State, prepared: Sequence[MixerStep | None]
    ) -> Tensor:
        x, dtype = self._residual(self.embeddings(input_ids))
        for layer, layer_state, mixer in zip(self.layers, state.layers, prepared, strict=True):
            x = layer.step(x, layer_state, mixer, dtype=dtype)  # type: ignore[operator]
        return self.norm_f(x.to(dtype))

    def _residual(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """The residual stream, perhaps in fp32, and the dtype that the blocks compute in."""
        wide = self.config.residual_in_fp32 and x.dtype != torch.float64
        return x.float() if wide else x, x.dtype


class Mamba2LM(nn.Module):
    """A Mamba2 language model. `initialize` draws its weights; `load_pretrained` reads them."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Mamba2Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embeddings one parameter again, where the config says so.

        Needed after anything that replaces parameters, such as `to_empty` or a load that assigns.
        """
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def set_checkpointing(self, mode: str) -> None:
        """What is kept of a block for its backward; the rest is computed again there.

        "none" keeps every intermediate. "selective" keeps the block's input and the products of
        `in_proj` (and of an adapted `out_proj`), and repeats convolution, scan and norms. "full"
        keeps the block's input alone. "every_2" does so in every second block, "every_3" in every
        third, and so on, and keeps every intermediate of the others.

        Raises:
            ValueError: a mode that is none of these.
        """
        every = checkpointing_interval(mode)
        kept: Kept = {"none": "all", "selective": "projections"}.get(mode, "input")  # type: ignore[assignment]
        for i, block in enumerate(self.backbone.layers):
            block.kept = kept if i % every == 0 else "all"  # type: ignore[assignment]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Let torch.compile make one graph of each block, without a break; the first call of each
        kind of input takes the time to do so. Blocks that differ in nothing share a graph.

        Args:
            backend: of torch.compile.
        """
        # a graph each for training and not, first block and others, segments that begin in a state,
        # lengths; beyond its 8 torch would give up
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.backbone.layers:
            block.compile(backend=backend, fullgraph=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: Mamba2State | None = None,
        return_state: bool = False,
        logits_to_keep: int | Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Mamba2Output:
        """
        Args:
            input_ids: (b, t) int64; or `inputs_embeds` (b, t, d_model).
            labels: (b, t) int64, -100 ignored; shifted here, and the first token of each
                document is ignored when `seq_idx` is given, for nothing before it predicts it.
            shift_labels: (b, t), already aligned with the position that predicts them.
            attention_mask: (b, t), 0 marks padding; becomes `seq_idx`.
            seq_idx: (b, t) int32, the document that each token belongs to; -1 marks padding.
            state: where an earlier call on the same rows stopped.
            return_state: also return the state after the last token.
            logits_to_keep: number of last positions to return logits of, or their indices
                (b, k). Without labels: all.
            reduction: "mean" over the tokens that count, "sum", or "none": (b, t), 0 if ignored.

        Raises:
            ValueError: no input or two, or shapes that disagree.
        """
        self._check(input_ids, inputs_embeds, labels, shift_labels, attention_mask, seq_idx)
        if attention_mask is not None:
            if seq_idx is None:
                seq_idx = torch.zeros_like(attention_mask, dtype=torch.int32)
            seq_idx = seq_idx.masked_fill(attention_mask == 0, -1)
        if labels is not None:
            shift_labels = shifted_labels(labels, seq_idx)
        if state is not None:
            state = _continued(state, seq_idx)

        hidden, layers = self.backbone(input_ids, inputs_embeds, seq_idx, state, return_state)
        out = Mamba2Output()
        if return_state:
            out.state = Mamba2State(layers, _last_document(state, seq_idx, hidden))
        if shift_labels is not None:
            out.n_tokens = (shift_labels != IGNORED).sum()
            out.loss = cross_entropy(
                hidden, self.lm_head, shift_labels, per_token=reduction == "none"
            )
            if reduction == "mean":
                # a batch without a single label has loss 0 and gradient 0, not nan
                out.loss = out.loss / out.n_tokens.clamp(min=1)
        if shift_labels is None or logits_to_keep is not None:
            out.logits = self.lm_head(_kept(hidden, logits_to_keep))
        return out

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        state: Mamba2State,
        prepared: Sequence[MixerStep] | None = None,
    ) -> Tensor:
        """Logits (b, vocab_size) after one more token (b,); `state` is updated in place.

        Args:
            prepared: from `prepare_steps`, for many tokens by the same weights.
        """
        mixers: Sequence[MixerStep | None] = prepared or [None] * self.config.n_layers
        return _few_rows(self.lm_head, self.backbone.step(input_ids, state, mixers))

    @torch.no_grad()
    def prepare_steps(self) -> list[MixerStep]:
        """What `step` needs of the weights in a form of its own, as they are now."""
        return [layer.mixer.prepare_step() for layer in self.backbone.layers]  # type: ignore[operator, union-attr]

    def _check(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, *rest: Any) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, one of the two")
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:2]  # type: ignore[union-attr]
        names = ("labels", "shift_labels", "attention_mask", "seq_idx")
        for name, value in zip(names, rest, strict=True):
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, the input {tuple(shape)}; "
                    f"both must be (batch, seq_len)"
                )
        if rest[0] is not None and rest[1] is not None:
            raise ValueError("give labels (shifted here) or shift_labels (already), not both")


@torch.no_grad()
def initialize(model: Mamba2LM, *, seed: int = 0) -> Mamba2LM:
    """Fresh weights, as `initial_weights` draws them."""
    parameters = dict(model.named_parameters())
    first = model.lm_head.weight
    drawn = initial_weights(model.config, seed=seed, device=first.device, dtype=first.dtype)
    for name, weight in drawn:
        parameters[name].copy_(weight)
    return model


@torch.no_grad()
def initial_weights(
    config: Mamba2Config,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, one after the other, as the paper's code draws them
    (mamba_ssm: Mamba2, _init_weights).

    dt_bias such that softplus gives steps log-uniform in [0.001, 0.1]; A uniform in [1, 16];
    out_proj shrunk by sqrt(n_layers) so that the residual stream keeps its scale.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    uniform = partial(nn.init.uniform_, generator=generator)
    kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Mamba2LM(config).named_parameters()}

    def empty(name: str) -> Tensor:
        return torch.empty(shapes[name], device=device, dtype=dtype)

    name = "backbone.embeddings.weight"
    yield name, nn.init.normal_(empty(name), std=0.02, generator=generator)
    if not config.tie_embeddings:
        yield "lm_head.weight", kaiming(empty("lm_head.weight"))
    for i in range(config.n_layers):
        mixer = f"backbone.layers.{i}.mixer"
        yield f"{mixer}.in_proj.weight", kaiming(empty(f"{mixer}.in_proj.weight"))
        out_proj = kaiming(empty(f"{mixer}.out_proj.weight"))
        yield f"{mixer}.out_proj.weight", out_proj / math.sqrt(config.n_layers)
        bound = 1 / math.sqrt(config.d_conv)
        for name in (f"{mixer}.conv1d.weight", f"{mixer}.conv1d.bias"):
            if name in shapes:
                yield name, uniform(empty(name), -bound, bound)
        dt = torch.exp(uniform(empty(f"{mixer}.dt_bias"), math.log(1e-3), math.log(1e-1)))
        dt = dt.clamp(min=1e-4)
        yield f"{mixer}.dt_bias", dt + torch.log(-torch.expm1(-dt))  # softplus' inverse
        yield f"{mixer}.A_log", torch.log(uniform(empty(f"{mixer}.A_log"), 1.0, 16.0))
    for name in shapes:
        if "norm" in name or name.endswith(".D"):
            yield name, torch.ones_like(empty(name))
        elif name.endswith("_proj.bias"):
            yield name, torch.zeros_like(empty(name))


def flops_per_token(config: Mamba2Config) -> int:
    """Multiply-adds x 2 of one token's forward pass: projections, scan, convolution, head.

    The scan is counted as its recurrence (state update and read-out), the work that cannot be
    avoided; the tiles of the chunked form are an implementation's choice.
    """
    c = config
    projections = c.d_model * (c.d_in_proj + c.d_inner)
    scan = 3 * c.d_inner * c.d_state
    conv = c.d_conv * c.d_conv_channels
    return 2 * (c.n_layers * (projections + scan + conv) + c.d_model * c.vocab_size)


def checkpointing_interval(mode: str) -> int:
    """n where a mode of `set_checkpointing` concerns every n-th block.

    Raises:
        ValueError: a mode that does not exist.
    """
    every = re.fullmatch(r"every_([1-9]\d*)", mode)
    if every is None and mode not in ("none", "selective", "full"):
        raise ValueError(
            f"checkpointing is {mode!r}; choose none, selective, full or every_2, every_3, ..."
        )
    return int(every[1]) if every else 1


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Let autocast narrow each weight anew, and forget it.

    A block uses a weight once, so its cache saves nothing, holds a copy of all blocks until the
    forward pass is over, and makes a repeated block differ from the first run of it.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _product(op: Any, args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Features in and out, if this is a linear layer's product."""
    if op is torch.ops.aten.mm.default or op is torch.ops.aten.addmm.default:
        return tuple(args[-1].shape)
    if str(op) == "bitsandbytes.gemm_4bit.default":  # by name: few runs need the library
        width, inner = args[2]
        return inner, width
    return None


def _few_rows(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` for x (b, d_in). Of a plain projection in float32 on a CPU, one row or some take
    half the time as a batch of two products: MKL's product of a matrix and a vector reads from
    memory at half the speed that it has."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return module(x)
    weight = module.weight
    elsewhere = weight.dtype != torch.float32 or weight.device.type != "cpu"
    if elsewhere or len(x) > FEW_ROWS or len(weight) % 2:
        return module(x)
    # (2, d_out / 2, d_in) @ (2, d_in, b)
    y = torch.bmm(weight.view(2, -1, weight.shape[1]), x.T.expand(2, -1, -1))
    y = y.flatten(0, 1).T
    return y if module.bias is None else y + module.bias


def _output_and_state(result: Any, has_state: bool) -> tuple[Tensor, Any]:
    return result if has_state else (result, None)


def _kept(hidden: Tensor, logits_to_keep: int | Tensor | None) -> Tensor:
    if logits_to_keep is None:
        return hidden
    if isinstance(logits_to_keep, int):
        return hidden[:, max(hidden.shape[1] - logits_to_keep, 0) :]
    return hidden.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden.shape[-1]))


def _continued(state: Mamba2State, seq_idx: Tensor | None) -> Mamba2State:
    """`state`, zero in the rows whose next document is not the one they were in."""
    if seq_idx is None:
        return state
    valid = seq_idx >= 0
    first = seq_idx.gather(1, valid.int().argmax(1, keepdim=True)).squeeze(1)
    keep = (first == state.seq_idx) | ~valid.any(1)
    conv, ssm = keep[:, None, None], keep[:, None, None, None]
    layers = [s._replace(conv=s.conv * conv, ssm=s.ssm * ssm) for s in state.layers]
    return Mamba2State(layers, state.seq_idx)


def _last_document(state: Mamba2State | None, seq_idx: Tensor | None, hidden: Tensor) -> Tensor:
    """(b,) the document that each row ends in."""
    if seq_idx is None:
        if state is not None:
            return state.seq_idx
        return torch.zeros(hidden.shape[0], dtype=torch.int32, device=hidden.device)
    before = state.seq_idx if state is not None else seq_idx.new_full(seq_idx.shape[:1], -1)
    valid = seq_idx >= 0
    last = seq_idx.shape[1] - 1 - valid.flip(1).int().argmax(1, keepdim=True)
    return torch.where(valid.any(1), seq_idx.gather(1, last).squeeze(1), before)
