"""What each op means: the plain sequential definition, in the dtype it is given.

Nothing here is fast. These functions are the truth every other path is tested against: run them in
float64 and differentiate them by ordinary autograd. They take what the public ops take and do no
checks.

Sources: the recurrence, Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060), sections 2 and 3;
the discretisation and the causal convolution, Gu and Dao, "Mamba" (arXiv:2312.00752), section 3;
RMSNorm, Zhang and Sennrich (arXiv:1910.07467).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INFINITY = float("inf")


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of one state-space layer, token after token.

    With dt_t the step size after bias, softplus and limits, for every head:

        state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T      (headdim, d_state)
        y_t     = state_t C_t + D x_t                           (headdim,)

    Returns:
        y (batch, seq_len, n_heads, headdim) and the state after the last token
        (batch, n_heads, headdim, d_state).
    """
    batch, seq_len, n_heads, headdim = x.shape
    step_size = _step_size(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (t.repeat_interleave(n_heads // t.shape[2], dim=2) for t in (B, C))
    if initial_state is None:
        state = x.new_zeros(batch, n_heads, headdim, B.shape[-1])
    else:
        state = initial_state
    valid, starts = _boundaries(x, seq_idx)
    outputs = []
    for t in range(seq_len):
        before = torch.where(starts[t][:, None, None, None], 0, state)
        decay = torch.exp(step_size[:, t] * A)[..., None, None]
        update = (step_size[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        is_token = valid[t][:, None, None, None]
        # Padding leaves the state as it was, so a document may continue behind it.
        state = torch.where(is_token, decay * before + update, state)
        y = (state * C[:, t, :, None, :]).sum(dim=-1)
        if D is not None:
            y = y + D[:, None] * x[:, t]
        outputs.append(torch.where(is_token[..., 0], y, 0))
    return torch.stack(outputs, dim=1), state


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
) -> tuple[Tensor, Tensor]:
    """One token of `ssd_scan`; returns y and the new state, leaving `state` as it was."""
    y, new_state = ssd_scan(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=state,
    )
    return y[:, 0], new_state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each channel's weighted sum of its last d_conv inputs, then the activation.

        y_t = activation(bias + sum_k weight[:, k] x_{t - d_conv + 1 + k})

    Returns:
        y (batch, seq_len, channels) and the last d_conv - 1 inputs of the current document
        (batch, d_conv - 1, channels), oldest first.
    """
    batch, seq_len, channels = x.shape
    n_past = weight.shape[1] - 1
    past = x.new_zeros(batch, n_past, channels) if initial_state is None else initial_state
    valid, starts = _boundaries(x, seq_idx)
    outputs = []
    for t in range(seq_len):
        before = torch.where(starts[t][:, None, None], 0, past)
        window = torch.cat([before, x[:, t : t + 1]], dim=1)
        y = (window * weight.T).sum(dim=1)
        if bias is not None:
            y = y + bias
        if activation == "silu":
            y = F.silu(y)
        is_token = valid[t][:, None]
        past = torch.where(is_token[..., None], window[:, 1:], past)
        outputs.append(torch.where(is_token, y, 0))
    return torch.stack(outputs, dim=1), past


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`; returns y and the new state, leaving `state` as it was."""
    y, new_state = causal_conv1d(
        x[:, None], weight, bias, activation=activation, initial_state=state
    )
    return y[:, 0], new_state


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps))


def gated_square_sum(x: Tensor, z: Tensor, *, group_size: int) -> Tensor:
    """The sum of (x silu(z))^2 over each group of channels: (..., n_groups)."""
    return (x * F.silu(z)).unflatten(-1, (-1, group_size)).square().sum(dim=-1)


def gated_scale(
    x: Tensor,
    z: Tensor,
    square_sum: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int,
    count: int,
) -> Tensor:
    """x silu(z) / sqrt(square_sum / count + eps) * weight, each group with its own sum."""
    gated = (x * F.silu(z)).unflatten(-1, (-1, group_size))
    return weight * (gated * torch.rsqrt(square_sum / count + eps)[..., None]).flatten(-2)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, eps: float = 1e-5, group_size: int
) -> Tensor:
    """The norm of x silu(z), group by group: the gate comes before the norm."""
    square_sum = gated_square_sum(x, z, group_size=group_size)
    return gated_scale(x, z, square_sum, weight, eps=eps, group_size=group_size, count=group_size)


def _step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]
) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


def _boundaries(x: Tensor, seq_idx: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """For each position, (batch,) masks: is it a token, and does it start a new document."""
    batch, seq_len = x.shape[:2]
    if seq_idx is None:
        yes = torch.ones(batch, dtype=torch.bool, device=x.device)
        return [yes] * seq_len, [~yes] * seq_len
    valid, starts = [], []
    latest = torch.full_like(seq_idx[:, 0], -1)  # the document of the last token, -1 before any
    for t in range(seq_len):
        is_token = seq_idx[:, t] >= 0
        starts.append(is_token & (latest >= 0) & (seq_idx[:, t] != latest))
        valid.append(is_token)
        latest = torch.where(is_token, seq_idx[:, t], latest)
    return valid, starts
