"""A row becomes token ids, and which of them are to be learned."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamba2_train.data.config import DataConfig
from mamba2_train.data.formats import Segment, segments
from mamba2_train.data.sources import Row


class Encoded(NamedTuple):
    """One document before it is cut to `seq_len`, or why its row is skipped."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    fault: str | None = None


def encode(rows: list[Row], tokenizer: Any, config: DataConfig) -> list[Encoded]:
    """Ids and their learned mask for each row; both empty for a row without anything to learn."""
    found = [segments(row, config) for row in rows]
    first = iter(_ids([s[0] for s in found if s], tokenizer, special=True))
    later = iter(_ids([x for s in found for x in s[1:]], tokenizer, special=False))
    encoded = []
    for parts in found:
        ids: list[int] = []
        learn: list[bool] = []
        for i, part in enumerate(parts):
            new = next(later if i else first)
            ids += new
            learn += [part.learned] * len(new)
        if ids and config.append_eos and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            learn.append(True)
        encoded.append(Encoded(np.array(ids, dtype=np.int32), np.array(learn, dtype=np.bool_)))
    return encoded


def _ids(parts: list[Segment], tokenizer: Any, special: bool) -> list[list[int]]:
    """Token ids; `special` puts in front what the tokenizer begins every text with, such as bos."""
    if not parts:
        return []
    return tokenizer(
        [part.text for part in parts],
        add_special_tokens=special,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
