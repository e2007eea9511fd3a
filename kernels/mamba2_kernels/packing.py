"""What `seq_idx` says: which tokens are padding, and which document each token belongs to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def documents(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Number the documents of each row in order of appearance.

    A document begins at a token whose seq_idx differs from that of the token before it, padding
    (-1) left out. A row's first document is number 0 and continues the initial state.

    Args:
        seq_idx: (batch, seq_len) int32.

    Returns:
        valid: (batch, seq_len) bool, False at padding.
        document: (batch, seq_len) int64, non-decreasing; padding has the number of the token
            before it.
    """
    valid = seq_idx >= 0
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    latest = torch.where(valid, position, -1).cummax(dim=1).values
    previous = F.pad(latest[:, :-1], (1, 0), value=-1)
    changes = seq_idx != seq_idx.gather(1, previous.clamp(min=0))
    return valid, (valid & changes & (previous >= 0)).cumsum(dim=1)
