"""The first examples of a run and what is learned of them: `mamba2-train ... data.preview=3`.

Learned tokens are green, the others dim, special ones underlined. Where colours cannot be shown,
as in a file, what is learned stands between ⟦ and ⟧.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mamba2_train.data.config import DataConfig
from mamba2_train.data.encoding import Encoded, encode, encode_pairs
from mamba2_train.data.formats import detect, learned_column
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError

FIRST_ROWS = 1000  # examples are looked for in these
ROWS_AT_ONCE = 16


def preview(rows: Iterable[Row], tokenizer: Any, config: DataConfig, console: Console) -> None:
    """Print the first `config.preview` of `rows` that leave something to learn.

    A document is shown up to `seq_len` tokens. Rows are not packed here.
    """
    first = list(islice(rows, FIRST_ROWS))
    config = detect(first, config)
    n = config.preview * config.together
    examples = list(islice(_examples(first, tokenizer, config), n))
    if not examples:
        raise UserError(
            f"{first[0].file}: none of its first {len(first)} rows leaves anything to learn under "
            f"data.loss_on={config.loss_on}; check that {learned_column(config)!r} is the right "
            "column and not empty"
        )
    how = "green" if console.color_system else "between ⟦ and ⟧"
    console.print(f"format {config.format}; what is learned ({config.loss_on}) is {how}")
    for title, example in examples:
        n_tokens, n_learned = len(example.tokens), int(example.learned.sum())
        long = ""
        if n_tokens > config.seq_len:
            long = f", shown up to data.seq_len={config.seq_len} (long_documents: "
            long += f"{config.long_documents})"
        counts = f"  {n_tokens:,} tokens, {n_learned:,} learned ({n_learned / n_tokens:.0%}){long}"
        console.print(Text.assemble("\n", (title, "bold"), counts), soft_wrap=True)
        tokens, learned = example.tokens[: config.seq_len], example.learned[: config.seq_len]
        text = render(tokens, learned, tokenizer, colour=console.color_system is not None)
        console.print(text, soft_wrap=True)


def render(tokens: Any, learned: Any, tokenizer: Any, *, colour: bool) -> Text:
    """`tokens` (n,) decoded, those that are `learned` (n,) marked by colour, or by ⟦ and ⟧."""
    ids, special = tokens.tolist(), set(tokenizer.all_special_ids)
    text = Text()
    for is_learned, run in groupby(range(len(ids)), key=lambda i: bool(learned[i])):
        style = "green" if is_learned else "dim"
        marked = is_learned and not colour
        text.append("⟦" if marked else "")
        for is_special, part in groupby(run, key=lambda i: ids[i] in special):
            # a run at once, for a character may be made of several tokens
            decoded = tokenizer.decode([ids[i] for i in part], clean_up_tokenization_spaces=False)
            text.append(decoded, style=f"{style} underline" if is_special else style)
        text.append("⟧" if marked else "")
    return text


def _examples(rows: list[Row], tokenizer: Any, config: DataConfig) -> Iterator[tuple[str, Encoded]]:
    for at in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[at : at + ROWS_AT_ONCE]
        if config.loss_on == "pairs":
            yield from _pairs(some, tokenizer, config)
            continue
        for row, example in zip(some, encode(some, tokenizer, config), strict=True):
            learned = example.learned.copy()
            learned[:1] = False  # nothing before a document's first token predicts it
            if learned.any():
                yield row.place, example._replace(learned=learned)


def _pairs(rows: list[Row], tokenizer: Any, config: DataConfig) -> Iterator[tuple[str, Encoded]]:
    for row, pair in zip(rows, encode_pairs(rows, tokenizer, config), strict=True):
        for side in ("chosen", "rejected"):
            tokens = np.concatenate([pair.prompt, getattr(pair, side)])
            if len(tokens):
                learned = np.arange(len(tokens)) >= max(1, len(pair.prompt))
                yield f"{row.place}, {side}", Encoded(tokens, learned)
