"""Rows of several sources in fixed proportions.

Source k, of n_k rows and weight w_k, would last n_k / w_k by itself. The epoch lasts as long as the
shortest of them, or the longest, and takes w_k times that from each, from the beginning again where
this is more than n_k. The rows come in blocks, all with the same shares to within a row, so what
is mixed depends on the sources and weights alone, and any block can be read without the others.
"""

from typing import NamedTuple

from mamba2_train.data.cache import digest
from mamba2_train.data.config import DataConfig
from mamba2_train.data.sources import Rows


class Part(NamedTuple):
    """Some rows, and the settings that say what they mean."""

    rows: Rows
    config: DataConfig


class Mixture:
    """Blocks of at most `block_rows` rows (and one for each further source)."""

    def __init__(
        self, parts: list[Part], weights: tuple[float, ...], until: str, block_rows: int
    ) -> None:
        self.parts = parts
        sizes = [len(part.rows) for part in parts]
        lasts = [n / w for n, w in zip(sizes, weights, strict=True)]
        epoch = min(lasts) if until == "first_exhausted" else max(lasts)
        self.counts = [round(w * epoch) for w in weights]  # rows of each in an epoch
        self.block_rows = block_rows

    def __len__(self) -> int:
        """Blocks in an epoch."""
        return -(-self.n_rows // self.block_rows)

    @property
    def n_rows(self) -> int:
        return sum(self.counts)

    @property
    def skipped(self) -> int:
        return sum(part.rows.skipped for part in self.parts)

    def content(self) -> str:
        """A hash that tells these rows from others, without reading all of them."""
        tables = {id(t): t for part in self.parts for t, _ in part.rows.spans}
        return digest(*map(str, self.counts), *(table.content() for table in tables.values()))

    def block(self, index: int) -> list[Part]:
        """The rows of a block, not read yet, by source."""
        found = []
        for (rows, config), count in zip(self.parts, self.counts, strict=True):
            start = count * index // len(self)
            stop = count * (index + 1) // len(self)
            while start < stop:
                at = start % len(rows)
                n = min(stop - start, len(rows) - at)
                found.append(Part(rows[at : at + n], config))
                start += n
        return found
