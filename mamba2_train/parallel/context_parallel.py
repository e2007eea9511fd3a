"""Context parallelism: each rank computes with its part of every row.

All that part r needs of the parts before it is each layer's conv tail, the last d_conv - 1 inputs
of the convolution on the rank before, and the SSM state S_r that it begins in:

    S_{r+1} = a_r S_r + own_r                                                        S_0 = 0

    own_r   = sum_t  exp(sum_{s > t} dt_s A) dt_t x_t B_t^T      the state after it, begun from 0
    a_r     = exp(sum_t dt_t A)                                  what it leaves of the one before

A rank finds own and a before its scan, from nothing but its part, all ranks exchange them in one
all-gather, and each works its S_r out. Then it scans once, from S_r, as it would alone. Backward
is the same from the last part to the first, in one all-gather of the gradients of S:

    g_r     = dS_{r+1} + a_{r+1} g_{r+1}                                             g_last = 0
    d own_r = g_r        d a_r = <g_r, S_r>

So a layer sends, each way, one state per row, one decay per head, and d_conv - 1 inputs to one
neighbour, whatever the length. A state goes on only within a document: a_r is 0 where part r begins
or holds a new one, and S_r is cleared where its first token does.

The model's own code runs unchanged: a split batch comes with a state that is `Awaited`, and the
mixers, subclasses of themselves, put in its place what the other ranks send.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2_kernels.precision import compute_dtype
from mamba2_train.errors import UserError
from mamba2_train.loss import IGNORED, aligned
from mamba2_train.model import LayerState, Mamba2LM, Mamba2State
from mamba2_train.parallel.layout import specialize

FILL = {"input_ids": 0, "shift_labels": IGNORED, "seq_idx": -1}
POSITIONS_AT_ONCE = 4096  # of x, in float32: 4 GB of a 7B model's 131,072 would be alive otherwise

Batch = dict[str, Tensor]


class Ranks:
    """Those that share rows, in the order of the parts, and what they exchange."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.n = group, group.rank(), group.size()

    def gathered(self, x: Tensor) -> list[Tensor]:
        """Of all ranks."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.n)]
        dist.all_gather(parts, x, group=self.group)
        return parts

    def shifted(self, x: Tensor, by: int) -> Tensor:
        """Of the rank that is `by` before this one; zeros where there is none."""
        x, received = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
        transfers = []
        if 0 <= self.rank + by < self.n:
            peer = self.rank + by
            transfers.append(dist.P2POp(dist.isend, x, group=self.group, group_peer=peer))
        if 0 <= self.rank - by < self.n:
            peer = self.rank - by
            transfers.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=peer))
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        return received


def parallelize(model: Mamba2LM, ranks: Ranks) -> None:
    """Let a model's mixers take what comes before a row's part from the other ranks, in place.

    Adapters, quantization and tensor parallelism come before this.
    Rows that are not split, as in generation, are computed as ever.
    """
    for layer in model.backbone.layers:
        mixer: Any = layer.mixer
        specialize(mixer, SplitMixer)
        mixer.ranks = ranks


def own_part(batch: Batch, rank: int, n_ranks: int, d_conv: int) -> Batch:
    """One rank's part of a batch: as many positions on each, the rows padded at their end to that.

    Labels are aligned before the cut, so that the last token of a part predicts the first of the
    next.

    Args:
        batch: `input_ids`, `labels` (or `shift_labels`) and `seq_idx`, each (b, t), on the host.

    Returns:
        `input_ids`, `shift_labels`, `seq_idx`, and `past` (b, d_conv): the documents of the
        positions right before the part, -1 where there is none.

    Raises:
        UserError: padding between the tokens of a row.
    """
    whole = aligned(batch)
    _check_padding(whole["seq_idx"])
    length = whole["seq_idx"].shape[1]
    # the tail of a part must not reach into the one before
    width = max(-(-length // n_ranks), d_conv - 1)
    added, start = n_ranks * width - length, rank * width
    parts = {
        name: F.pad(tensor, (0, added), value=FILL[name])[:, start : start + width].contiguous()
        for name, tensor in whole.items()
    }
    before = F.pad(whole["seq_idx"], (d_conv, added), value=-1)
    return parts | {"past": before[:, start : start + d_conv].contiguous()}


class Awaited(LayerState):
    """In the place of the state that other ranks have: which of it is of the document that the part
    begins in.

    conv: (b, d_conv - 1, 1) bool. ssm: (b, 1, 1, 1) bool.
    """


def awaited(past: Tensor, n_layers: int) -> Mamba2State:
    """What the model is given as the state of rows whose part has `past` (b, d_conv) before it."""
    last = past[:, -1:]
    conv = ((past == last) & (past >= 0))[:, 1:, None]
    ssm = torch.ones_like(last, dtype=torch.bool)[..., None, None]
    return Mamba2State([Awaited(conv, ssm)] * n_layers, past[:, -1])


class SplitMixer(nn.Module):
    """Around a mixer that may have to wait for the state that its part of the rows begins in."""

    ranks: Ranks

    def _conv(
        self, xBC: Tensor, seq_idx: Tensor, state: LayerState | None, return_state: bool
    ) -> tuple[Tensor, Any]:
        if isinstance(state, Awaited):
            start = xBC.shape[1] - state.conv.shape[1]
            tail = _FromPrevious.apply(xBC[:, start:], self.ranks)
            state = LayerState(tail * state.conv, state.ssm)
        return super()._conv(xBC, seq_idx, state, return_state)  # type: ignore[misc]

    def _scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        seq_idx: Tensor,
        state: LayerState | None,
        return_state: bool,
    ) -> tuple[Tensor, Any]:
        if isinstance(state, Awaited):
            own, left = self._own_state(xBC, dt, seq_idx, state)
            before = _StateBefore.apply(own, left, self.ranks)
            state = LayerState(state.conv, before * state.ssm)
        return super()._scan(xBC, dt, seq_idx, state, return_state)  # type: ignore[misc]

    def _own_state(
        self, xBC: Tensor, dt: Tensor, seq_idx: Tensor, state: Awaited
    ) -> tuple[Tensor, Tensor]:
        """What the part adds to the state (b, h, p, n), and leaves of the one before (b, h)."""
        mixer: Any = self
        x, B, _ = mixer._split_conv(xBC)
        wide = compute_dtype(x)
        valid = seq_idx >= 0
        in_last = (seq_idx == seq_idx.amax(1, keepdim=True)) & valid
        is_one = (in_last | ~valid).all(1, keepdim=True) & state.ssm[..., 0, 0]
        # autocast would narrow what is float32 on purpose
        with torch.autocast(x.device.type, enabled=False):
            dt = F.softplus(dt.to(wide) + mixer.dt_bias.to(wide)).clamp(*mixer.config.dt_limit)
            dt = dt.masked_fill(~in_last[..., None], 0)
            decay = dt * mixer._A()
            # summed from the end: what has hardly decayed then has the smallest error
            after = decay.flip(1).cumsum(1).flip(1)
            weights = F.pad(after[:, 1:], (0, 0, 0, 1)).exp() * dt
            left = after[:, 0].exp() * is_one
            return _WeightedSum.apply(x, weights, B), left


class _FromPrevious(torch.autograd.Function):
    """The tensor of the rank before; zeros on the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.shifted(x, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.shifted(gradients[0], -1), None


class _StateBefore(torch.autograd.Function):
    """S_r of own_r (b, h, p, n) and a_r (b, h)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, left: Tensor, ranks: Ranks) -> Tensor:
        sent = torch.cat([own.flatten(2), left[..., None]], -1)  # (b, h, p * n + 1)
        parts = ranks.gathered(sent)
        lefts = torch.stack([part[..., -1] for part in parts])
        before = torch.zeros_like(own)
        for r in range(ranks.rank):
            before = lefts[r, ..., None, None] * before + parts[r][..., :-1].view_as(own)
        ctx.ranks = ranks
        ctx.save_for_backward(before, lefts)
        return before

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        before, lefts = ctx.saved_tensors
        parts = ctx.ranks.gathered(gradients[0])
        after = torch.zeros_like(before)
        for r in range(len(parts) - 1, ctx.ranks.rank, -1):
            after = parts[r] + lefts[r, ..., None, None] * after
        return after, (after * before).sum((2, 3)), None


class _WeightedSum(torch.autograd.Function):
    """sum_t w_t x_t B_t^T (b, h, p, n) in w's dtype, of which the weighted x is not kept.

    x (b, t, h, p), w (b, t, h), B (b, t, g, n); k: the heads of a group and their headdim.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, B)
        n_groups = B.shape[2]
        total: Any = 0
        for x_, w_, B_ in _pieces(x, w, B):
            weighted = (x_ * w_[..., None]).unflatten(2, (n_groups, -1)).flatten(3)
            total = total + torch.einsum("btgk,btgn->bgkn", weighted, B_.to(w.dtype))
        return total.unflatten(2, (-1, x.shape[3])).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w, B = ctx.saved_tensors
        n_groups = B.shape[2]
        g = gradients[0].unflatten(1, (n_groups, -1)).flatten(2, 3)  # (b, g, k, n)
        found = []
        with torch.autocast(x.device.type, enabled=False):
            for x_, w_, B_ in _pieces(x, w, B):
                weighted = (x_ * w_[..., None]).unflatten(2, (n_groups, -1)).flatten(3)
                dB = torch.einsum("bgkn,btgk->btgn", g, weighted)
                d_weighted = torch.einsum("bgkn,btgn->btgk", g, B_.to(w.dtype))
                d_weighted = d_weighted.unflatten(3, (-1, x.shape[3])).flatten(2, 3)
                dx, dw = d_weighted * w_[..., None], (d_weighted * x_).sum(-1)
                found.append((dx.to(x.dtype), dw, dB.to(B.dtype)))
        dx, dw, dB = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return dx, dw, dB


def _pieces(*tensors: Tensor) -> Any:
    return zip(*(t.split(POSITIONS_AT_ONCE, dim=1) for t in tensors), strict=True)


def _check_padding(seq_idx: Tensor) -> None:
    """On the host, where looking at values keeps no device waiting."""
    valid = F.pad(seq_idx >= 0, (1, 0), value=False)
    begins = valid[:, 1:] & ~valid[:, :-1]
    wrong = (begins.sum(1) > 1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        at = int(begins[row].nonzero()[1])
        raise UserError(
            f"row {row} of a batch has padding (seq_idx -1) between tokens, before position {at}: "
            "a row that long_context=parallel splits has it at its ends: move it there, or use "
            "long_context=exact"
        )
