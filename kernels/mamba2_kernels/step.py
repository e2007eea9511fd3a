"""One token at a time: the scan and the convolution of decoding, for inference only.

They compute what `ssd_scan` and `causal_conv1d` compute for a sequence of one token, and update the
state in place. `MixerStep` is both and the gated norm, prepared once for many tokens: a step of a
small model on a CPU is some hundred operations of a few microseconds each, and checking arguments
and passing the dispatcher at every one would take longer than they do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_kernels import norm_torch, reference
from mamba2_kernels.backend import resolve_backend, triton_path
from mamba2_kernels.checks import ArgumentCheck, check_activation, check_dt_limit, check_values
from mamba2_kernels.launch import no_mixer_kernel
from mamba2_kernels.norm import gated_rms_norm
from mamba2_kernels.precision import compute_dtype, widen

INFINITY = float("inf")


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
    backend: str = "auto",
) -> Tensor:
    """Advance every head's state by one token and return y.

    Args:
        x: (batch, n_heads, headdim), any float dtype.
        dt: (batch, n_heads), any float dtype.
        A, D, dt_bias: (n_heads,).
        B, C: (batch, n_groups, d_state) in x's dtype.
        state: (batch, n_heads, headdim, d_state), updated in place; float32 keeps what a final
            state of `ssd_scan` holds, other dtypes round it at every token.
        dt_softplus, dt_limit, backend: as in `ssd_scan`.

    Returns:
        y (batch, n_heads, headdim) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or a backend that cannot
            run here.
    """
    op = "ssd_step"
    check = ArgumentCheck(op)
    check.tensor("x", x, "batch, n_heads, headdim", dense=True)
    check.tensor("dt", dt, "batch, n_heads")
    check.tensor("A", A, "n_heads")
    for name, tensor in (("B", B), ("C", C)):
        dimensions = "batch, n_groups, d_state"
        check.tensor(name, tensor, dimensions, dtypes=(x.dtype,), dtype_of="x", dense=True)
    check.tensor("state", state, "batch, n_heads, headdim, d_state", dense=True)
    check.tensor("D", D, "n_heads")
    check.tensor("dt_bias", dt_bias, "n_heads")
    check.divides("n_groups", "n_heads")
    check.no_gradient("state", state)
    dt_min, dt_max = check_dt_limit(op, dt_limit)
    check_values(op, A=A)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x))
    with torch.no_grad():
        if backend != "reference":
            return _ssd_step(
                x, dt, A, B, C, state, D, dt_bias, dt_softplus, dt_min, dt_max, backend
            )
        wide = widen(compute_dtype(x), x, dt, A, B, C, state, D, dt_bias)
        y, new_state = reference.ssd_step(
            *wide[:6],
            D=wide[6],
            dt_bias=wide[7],
            dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max),
        )
        state.copy_(new_state)
        return y.to(x.dtype)


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """Convolve one token with the inputs before it, which `state` holds, and return y.

    Args:
        x: (batch, channels), any float dtype.
        state: (batch, d_conv - 1, channels), the last inputs, oldest first; updated in place.
        weight: (channels, d_conv).
        bias: (channels,).
        activation: "silu" or None.
        backend: as in `causal_conv1d`.

    Returns:
        y (batch, channels) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, an unknown activation, or a
            backend that cannot run here.
    """
    op = "causal_conv1d_step"
    check = ArgumentCheck(op)
    check.tensor("x", x, "batch, channels", dense=True)
    check.tensor("weight", weight, "channels, d_conv")
    check.at_least_one("d_conv")
    check.sizes["d_conv - 1"] = (check.size("d_conv") - 1, "weight")
    check.tensor("state", state, "batch, d_conv - 1, channels", dense=True)
    check.tensor("bias", bias, "channels")
    check.no_gradient("state", state)
    check_activation(op, activation)
    backend = resolve_backend(op, backend, x.device, no_mixer_kernel(x, d_conv=weight.shape[1]))
    with torch.no_grad():
        if backend != "reference":
            return _causal_conv1d_step(x, state, weight, bias, activation or "", backend)
        wide = widen(compute_dtype(x), x, state, weight, bias)
        y, new_state = reference.causal_conv1d_step(*wide, activation=activation)
        state.copy_(new_state)
        return y.to(x.dtype)


class MixerStep:
    """A mixer's token, from what `in_proj` gives to what `out_proj` takes, any number of times.

        y = gated_rms_norm(ssd_step(x, dt, A, B, C), z)     x, B, C = causal_conv1d_step(xBC)

    Weights are checked and laid out here, once; where they change, prepare it anew.

    Args:
        conv_weight: (channels, d_conv), of x, B and C together; conv_bias (channels,).
        A, D, dt_bias: (n_heads,), A negative.
        norm_weight: (d_inner,), with d_inner = n_heads * headdim.
        dt_limit, backend: as in `ssd_scan`; dt goes through softplus.
        norm: what takes (y, z) instead of the gated norm, where its sums go over ranks.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """

    def __init__(
        self,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        *,
        headdim: int,
        n_groups: int,
        dt_limit: tuple[float, float] = (0.0, INFINITY),
        eps: float = 1e-5,
        norm: Callable[[Tensor, Tensor], Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        op = "MixerStep"
        check = ArgumentCheck(op)
        check.tensor("conv_weight", conv_weight, "channels, d_conv")
        check.tensor("conv_bias", conv_bias, "channels")
        for name, value in (("A", A), ("D", D), ("dt_bias", dt_bias)):
            check.tensor(name, value, "n_heads")
        check.tensor("norm_weight", norm_weight, "d_inner")
        check.sizes["n_groups"] = (n_groups, "n_groups")
        check.divides("n_groups", "n_heads")
        check_values(op, A=A)
        channels, d_conv = conv_weight.shape
        n_heads, d_inner = len(A), len(A) * headdim
        d_bc = (channels - d_inner) // 2  # B or C, of all groups
        if len(norm_weight) != d_inner or d_bc < n_groups or (channels - d_inner) % (2 * n_groups):
            raise ValueError(
                f"{op}: {n_heads} heads of {headdim} and {n_groups} groups do not fit "
                f"{len(norm_weight)} channels of norm_weight and {channels} of conv_weight: give "
                "(n_heads * headdim,) and (n_heads * headdim + 2 * n_groups * d_state, d_conv)"
            )
        self.sizes, self.conv_sizes = [d_inner, channels, n_heads], [d_inner, d_bc, d_bc]
        self.heads, self.groups = (n_heads, headdim), (n_groups, d_bc // n_groups)
        self.conv_shape, self.ssm_shape = (d_conv - 1, channels), (*self.heads, self.groups[1])
        self.eps, self.dt_limit = eps, check_dt_limit(op, dt_limit)
        self.limited = self.dt_limit != (0.0, INFINITY)  # a softplus is never below 0
        self.backend = backend
        self.plain = resolve_backend(op, backend, A.device, None) == "torch"
        self.dtype = compute_dtype(conv_weight)
        self.conv_weight = conv_weight.detach()
        self.taps = self.conv_weight.to(self.dtype).T.contiguous()
        self.conv_bias = None if conv_bias is None else conv_bias.detach().to(self.dtype)
        self.A, self.D, self.dt_bias = widen(self.dtype, A.detach(), D.detach(), dt_bias.detach())
        self.norm_weight, self.norm = norm_weight.detach(), norm

    @torch.no_grad()
    def __call__(self, zxBCdt: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """
        Args:
            zxBCdt: (batch, d_inner + channels + n_heads), any float dtype.
            conv_state: (batch, d_conv - 1, channels) and ssm_state (batch, n_heads, headdim,
                d_state), dense; both are updated in place.

        Returns:
            (batch, d_inner) in zxBCdt's dtype.
        """
        batch = len(zxBCdt)
        if (
            zxBCdt.shape != (batch, sum(self.sizes))
            or conv_state.shape != (batch, *self.conv_shape)
            or ssm_state.shape != (batch, *self.ssm_shape)
        ):
            raise ValueError(
                f"MixerStep: zxBCdt has shape {tuple(zxBCdt.shape)}, conv_state "
                f"{tuple(conv_state.shape)}, ssm_state {tuple(ssm_state.shape)}: they must be "
                f"(batch, {sum(self.sizes)}), (batch, *{self.conv_shape}), (batch, "
                f"*{self.ssm_shape})"
            )
        z, xBC, dt = zxBCdt.split(self.sizes, -1)
        if not self.plain or ssm_state.dtype != self.dtype or not ssm_state.is_contiguous():
            return self._by_ops(z, xBC, dt, conv_state, ssm_state)
        # the same operations as below and in norm_torch, without what surrounds them
        window = torch.cat([conv_state.to(xBC.dtype), xBC[:, None]], 1)
        conv_state.copy_(window[:, 1:])
        conv = (window * self.taps).sum(1)
        if self.conv_bias is not None:
            conv += self.conv_bias
        conv = F.silu(conv, inplace=True).to(zxBCdt.dtype).to(self.dtype)
        x, B, C = conv.split(self.conv_sizes, -1)
        dt = F.softplus(dt + self.dt_bias)
        if self.limited:
            dt = dt.clamp(*self.dt_limit)
        (n_heads, headdim), (n_groups, d_state) = self.heads, self.groups
        of_groups = (batch, n_groups, -1, d_state)  # (b, g, r p, n), r heads to a group
        x = x.reshape(batch, n_heads, headdim)
        update = dt[..., None] * x
        ssm_state *= torch.exp(dt * self.A)[..., None, None]
        ssm_state.view(of_groups).addcmul_(
            update.reshape(batch, n_groups, -1, 1), B.reshape(batch, n_groups, 1, d_state)
        )
        # (b g, 1, n) @ (b g, n, r p): state @ C would take eight times as long for a batch, in MKL
        y = torch.bmm(C.reshape(-1, 1, d_state), ssm_state.view(batch * n_groups, -1, d_state).mT)
        y = y.view(x.shape).addcmul_(self.D[:, None], x).view(z.shape).to(zxBCdt.dtype)
        if self.norm is not None:
            return self.norm(y, z)
        return norm_torch.gated_rms_norm(y, z, self.norm_weight, self.eps, len(z[0]) // n_groups)

    def _by_ops(
        self, z: Tensor, xBC: Tensor, dt: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> Tensor:
        xBC = causal_conv1d_step(
            xBC, conv_state, self.conv_weight, self.conv_bias, backend=self.backend
        )
        x, B, C = xBC.split(self.conv_sizes, -1)
        y = ssd_step(
            x.unflatten(-1, self.heads),
            dt,
            self.A,
            B.unflatten(-1, self.groups),
            C.unflatten(-1, self.groups),
            ssm_state,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            backend=self.backend,
        )
        if self.norm is not None:
            return self.norm(y.flatten(1), z)
        group_size = self.sizes[0] // self.groups[0]
        return gated_rms_norm(
            y.flatten(1), z, self.norm_weight, eps=self.eps, group_size=group_size,
            backend=self.backend,
        )  # fmt: skip


@torch.library.custom_op("mamba2_kernels::ssd_step", mutates_args=("state",))
def _ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> Tensor:
    if backend == "triton":
        return triton_path("ssd_step").ssd_step(
            x, dt, A, B, C, state, D, dt_bias, dt_softplus, dt_min, dt_max
        )
    dtype = compute_dtype(x)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(dt_min, dt_max)
    n_groups = B.shape[1]
    decay = torch.exp(dt * A.to(dtype))
    update = (dt[..., None] * x).unflatten(1, (n_groups, -1))
    # (b, g, r, p, n), the caller's own memory where it has the dtype of the computation
    wide_state = state.to(dtype).unflatten(1, (n_groups, -1))
    wide_state.mul_(decay.unflatten(1, (n_groups, -1))[..., None, None])
    wide_state.addcmul_(update[..., None], B.to(dtype)[:, :, None, None, :])
    # (b, g, r p, n) @ (b, g, n, 1) -> (b, g, r p, 1)
    y = (wide_state.flatten(2, 3) @ C.to(dtype)[..., None]).view(x.shape)
    if state.dtype != dtype:
        state.copy_(wide_state.flatten(1, 2))
    if D is not None:
        y.addcmul_(D.to(dtype)[:, None], x.to(dtype))
    return y.to(x.dtype)


@_ssd_step.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2_kernels::causal_conv1d_step", mutates_args=("state",))
def _causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    if backend == "triton":
        return triton_path("causal_conv1d_step").causal_conv1d_step(
            x, state, weight, bias, activation
        )
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)
    dtype = compute_dtype(x)
    y = (window.to(dtype) * weight.to(dtype).T).sum(dim=1)
    if bias is not None:
        y += bias.to(dtype)
    if activation == "silu":
        F.silu(y, inplace=True)
    state.copy_(window[:, 1:])
    return y.to(x.dtype)


@_causal_conv1d_step.register_fake
def _(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)
