"""Embeddings, head and cross-entropy, each rank with its part of the vocabulary.

    embedding       E[token] on the rank that has the token, 0 on the others: summed
    cross-entropy   m = max_v l_v,  loss = m + log(sum_v exp(l_v - m)) - l_label

The maximum and the two sums are reduced over the ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from mamba2_train.parallel.collectives import copy_to_ranks, sum_over_ranks
from mamba2_train.parallel.layout import share


class VocabularyEmbedding(nn.Module):
    """Token ids (..., ) of the whole vocabulary -> (..., d_model). Around the layer's class."""

    mesh: DeviceMesh
    vocab_size: int

    def forward(self, input_ids: Tensor) -> Tensor:
        own, index = _own(input_ids, self.vocab_size, self.mesh)
        rows = super().forward(index)
        return sum_over_ranks(rows.masked_fill(~own[..., None], 0), self.mesh)


class VocabularyHead(nn.Module):
    """(..., d_model) -> logits (..., vocab_size); (rows, d_model) and labels -> losses (rows,), for
    which no rank has the logits of the whole vocabulary. As above."""

    mesh: DeviceMesh
    vocab_size: int

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        # both from here, so that what is hooked to the call is heard (FSDP's gathering)
        local = super().forward(copy_to_ranks(x, self.mesh))
        return self._whole(local) if labels is None else self.token_losses(local, labels)

    def _whole(self, local: Tensor) -> Tensor:
        shape = torch.Size((*local.shape[:-1], self.vocab_size))
        logits: Any = DTensor.from_local(
            local,
            self.mesh,
            [Shard(local.dim() - 1)],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return logits.full_tensor(grad_placements=[Replicate()])

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row, (rows,) of at least float32.

        Args:
            logits: (rows, this rank's part of the vocabulary).
            labels: (rows,) int64, of the whole vocabulary.
        """
        if logits.dtype != torch.float64:
            logits = logits.float()
        most = logits.detach().amax(-1)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.mesh.get_group())
        own, index = _own(labels, self.vocab_size, self.mesh)
        logits = logits - most[:, None]
        of_label = logits.gather(1, index[:, None]).squeeze(1).masked_fill(~own, 0)
        sums = torch.stack([logits.exp().sum(-1), of_label])
        total, of_label = sum_over_ranks(sums, self.mesh)
        return total.log() - of_label


def _own(ids: Tensor, vocab_size: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Which ids this rank has, and their rows here; 0 for the others."""
    mine = share(vocab_size, mesh)
    own = (ids >= mine.start) & (ids < mine.stop)
    return own, (ids - mine.start).masked_fill(~own, 0)
