"""Next-token cross-entropy in which the logits of a whole batch never exist.

    loss_t = logsumexp_v(h_t . W_v) - h_t . W_{label_t}

Rows without a label are dropped first, the rest goes through the head a chunk of rows at a time.
A plain fp32 head takes torch's fused `linear_cross_entropy`. Any other head (adapted, quantized,
sharded, under autocast, or in bf16, for which the fused op returns the loss itself in bf16: off
by 8e-4) is called as a module, its logits recomputed in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_ROWS = 512  # 100 MB of fp32 logits at 50k entries; more is no faster


def shifted_labels(labels: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """Labels (b, t) aligned with the position that predicts them: position t holds label t + 1.

    The last position predicts nothing; nor, when `seq_idx` (b, t) is given, does the last token
    of a document or padding.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if seq_idx is not None:
        same = (seq_idx[:, 1:] == seq_idx[:, :-1]) & (seq_idx[:, 1:] >= 0)
        shifted = shifted.masked_fill(~F.pad(same, (0, 1)), IGNORED)
    return shifted


def aligned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`input_ids`, `shift_labels` and `seq_idx`: the labels where they are predicted, which a cut
    then leaves as they are."""
    labels = batch.get("shift_labels")
    if labels is None:
        labels = shifted_labels(batch["labels"], batch["seq_idx"])
    return {
        "input_ids": batch["input_ids"],
        "shift_labels": labels,
        "seq_idx": batch["seq_idx"],
    }


def cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, *, per_token: bool = False
) -> Tensor:
    """Sum of the cross-entropies of all labelled positions, at least fp32.

    Args:
        hidden: (b, t, d_model).
        head: maps (rows, d_model) to (rows, vocab_size).
        labels: (b, t) int64, aligned with `hidden`; -100 is ignored.
        per_token: return them one by one instead, (b, t), 0 where the label is ignored.
    """
    targets = labels.flatten()
    counted = (targets != IGNORED).nonzero().squeeze(1)  # a GPU's host waits here, once
    rows = hidden.flatten(0, 1).index_select(0, counted)
    reduction = "none" if per_token else "sum"
    loss = cross_entropy_of_rows(rows, head, targets[counted], reduction)
    if not per_token:
        return loss
    return loss.new_zeros(targets.shape).index_copy(0, counted, loss).view(labels.shape)


def cross_entropy_of_rows(
    rows: Tensor, head: nn.Module, targets: Tensor, reduction: str = "sum"
) -> Tensor:
    """The same of (n, d_model) rows that all have a label, "sum" or "none": one by one, (n,)."""
    if isinstance(head, nn.Linear) and _is_plain(head, rows):
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=CHUNK_ROWS, chunking_method=None
        )
        return F.linear_cross_entropy(
            rows, head.weight, targets, linear_bias=head.bias, reduction=reduction, options=options
        )
    chunks = [
        checkpoint(_chunk_loss, head, r, t, reduction, use_reentrant=False)
        for r, t in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    ]
    return torch.cat(chunks) if reduction == "none" else torch.stack(chunks).sum()


def _is_plain(head: nn.Linear, rows: Tensor) -> bool:
    return (
        type(head).forward is nn.Linear.forward
        and rows.dtype == head.weight.dtype
        and rows.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(rows.device.type)
    )


def _chunk_loss(head: nn.Module, rows: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if hasattr(head, "token_losses"):  # its vocabulary is split over ranks
        losses = head(rows, labels=targets)
        return losses if reduction == "none" else losses.sum()
    logits = head(rows)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction=reduction)
