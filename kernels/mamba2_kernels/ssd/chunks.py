"""One scan cut into chunks, as the PyTorch path wants them: tensors, decays and masks.

Shapes in comments: b batch, l seq_len, c chunk, q position in a chunk (i the later, j the earlier),
h head, g group, r head of a group, p headdim, n d_state. cs is the cumulative sum of dt A from the
start of a chunk.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mamba2_kernels.packing import documents

CHUNK_SIZE = 64  # tokens; shorter makes the products cheaper, longer the passing of states


@dataclass
class Chunk:
    """One chunk in the dtype of the computation; x, B, C and dy are zero at padding."""

    tokens: slice
    x: Tensor  # (b, q, h, p)
    B: Tensor  # (b, g, q, n)
    C: Tensor  # (b, g, q, n)
    dy: Tensor | None  # (b, q, h, p)
    cs: Tensor  # (b, h, q) float64
    factor: Tensor  # (b, h, q) dt
    same_document: Tensor | None  # (b, 1, i, j), None where no document begins
    from_start: Tensor  # (b, q, h) exp(cs_i), what y_i sees of the state at the start
    to_end: Tensor  # (b, q, h) exp(cs_end - cs_j) dt_j, what the state at the end sees of x_j
    keep: Tensor  # (b, h) exp(cs_end), what the state at the end sees of the one at the start

    def by_group(self, per_head: Tensor) -> Tensor:
        """(b, q, h, p) to (b, g, q, r p)."""
        return per_head.unflatten(2, (self.B.shape[1], -1)).transpose(1, 2).flatten(3)

    def by_head(self, per_group: Tensor) -> Tensor:
        """(b, g, q, r p) to (b, q, h, p)."""
        headdim = self.x.shape[3]
        return per_group.unflatten(3, (-1, headdim)).transpose(1, 2).flatten(2, 3)

    def pair_decay(self) -> Tensor:
        """exp(cs_i - cs_j) dt_j for j <= i: (b, h, i, j)."""
        difference = (self.cs[..., :, None] - self.cs[..., None, :]).to(self.x.dtype)
        # tril before exp: above the diagonal exp could overflow.
        return difference.tril_().exp_().mul_(self.factor[:, :, None])

    def carry(self, state: Tensor, update: Tensor) -> Tensor:
        """Add to `update`, in place, what is left of `state` across the chunk: (b, g, n, r p)."""
        heads = (-1, self.x.shape[3])
        keep = self.keep.unflatten(1, (self.B.shape[1], 1, -1, 1))
        update.unflatten(3, heads).addcmul_(state.unflatten(3, heads), keep)
        return update

    def sum_by_head(self, per_state: Tensor) -> Tensor:
        """(b, g, n, r p) to (b, h)."""
        return per_state.sum(dim=2).unflatten(2, (-1, self.x.shape[3])).sum(dim=3).flatten(1)

    def scores(self) -> Tensor:
        """C_i . B_j within a document, 0 for j > i: (b, g, i, j)."""
        return self.causal(self.C @ self.B.transpose(-1, -2))

    def causal(self, pairs: Tensor) -> Tensor:
        """Set to 0, in place, the pairs (b, g, i, j) that must not see each other."""
        pairs.tril_()
        return pairs if self.same_document is None else pairs.mul_(self.same_document)


class Chunks:
    """All chunks of a scan. A chunk's tensors are made when it is asked for."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        seq_idx: Tensor | None,
        dy: Tensor | None = None,
        *,
        dt_factor: Tensor | None = None,
    ) -> None:
        """Compute the decays of every chunk, which are small beside x.

        Args:
            dt: (b, l, h) step sizes after bias, softplus and limits, in the dtype of the
                computation, 0 at padding.
            dt_factor: stands for dt where dt multiplies x, `dt` itself when left out.
        """
        self.tensors = (x, B, C, dy)
        self.dtype = dt.dtype
        self.seq_len = x.shape[1]
        self.n_chunks = -(-self.seq_len // CHUNK_SIZE)
        factor = self.split(dt if dt_factor is None else dt_factor)
        # float64 until differences are taken: behind a strong decay, float32 would have lost the
        # weak ones that follow.
        cs = (self.split(dt).double() * A.double()).cumsum(dim=2)
        end = cs[:, :, -1:]
        self.cs_by_head = cs.transpose(2, 3).contiguous()  # (b, c, h, q)
        self.factor_by_head = factor.transpose(2, 3).contiguous()
        self.from_start = cs.exp().to(self.dtype)
        self.to_end = (end - cs).exp().to(self.dtype) * factor
        self.keep = end[:, :, 0].exp().to(self.dtype)
        self.padding: Tensor | None = None
        if seq_idx is not None:
            self._separate_documents(seq_idx)

    def split(self, per_token: Tensor) -> Tensor:
        """(b, l, ...) to (b, c, q, ...), the last chunk filled up with zeros."""
        missing = self.n_chunks * CHUNK_SIZE - self.seq_len
        filled = F.pad(per_token, (0, 0) * (per_token.dim() - 2) + (0, missing))
        return filled.unflatten(1, (self.n_chunks, CHUNK_SIZE))

    def join(self, per_chunk: Tensor) -> Tensor:
        """(b, c, q, ...) to (b, l, ...)."""
        return per_chunk.flatten(1, 2)[:, : self.seq_len]

    def _separate_documents(self, seq_idx: Tensor) -> None:
        """Let no state pass from one document into the next."""
        valid, document = documents(seq_idx)
        self.padding = ~valid
        # Nothing happens in the filled part of the last chunk: it belongs to the last document.
        self.document = self.split(document - document[:, -1:]) + document[:, -1:, None]
        at_end = self.document[:, :, -1:]
        at_start = F.pad(at_end[:, :-1], (0, 0, 1, 0))  # the initial state is of document 0
        self.from_start *= (self.document == at_start)[..., None]
        self.to_end *= (self.document == at_end)[..., None]
        self.keep *= at_start == at_end
        if seq_idx.is_cpu:
            self.has_padding = self.split(self.padding).any(dim=2).any(dim=0).tolist()
            self.has_boundary = (at_start != at_end)[..., 0].any(dim=0).tolist()
        else:  # not worth waiting for the device
            self.has_padding = self.has_boundary = [True] * self.n_chunks

    def __getitem__(self, index: int) -> Chunk:
        tokens = slice(index * CHUNK_SIZE, min((index + 1) * CHUNK_SIZE, self.seq_len))
        size = tokens.stop - tokens.start
        x, B, C, dy = (None if t is None else t[:, tokens].to(self.dtype) for t in self.tensors)
        same_document = None
        if self.padding is not None:
            if self.has_padding[index]:
                # Whatever padding holds, even NaN, it must not reach a product.
                padding = self.padding[:, tokens, None, None]
                x, B, C, dy = (
                    None if t is None else t.masked_fill(padding, 0) for t in (x, B, C, dy)
                )
            if self.has_boundary[index]:
                document = self.document[:, index, :size]
                same_document = (document[:, :, None] == document[:, None, :])[:, None]
        assert x is not None
        assert B is not None
        assert C is not None
        return Chunk(
            tokens=tokens,
            x=x,
            B=B.transpose(1, 2),
            C=C.transpose(1, 2),
            dy=dy,
            cs=self.cs_by_head[:, index, :, :size],
            factor=self.factor_by_head[:, index, :, :size],
            same_document=same_document,
            from_start=self.from_start[:, index, :size],
            to_end=self.to_end[:, index, :size],
            keep=self.keep[:, index],
        )
