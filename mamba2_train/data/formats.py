"""What a row means: the texts, messages or tokens it is made of, and which of them are learned.

A format is one function from a row's values to `Content`, and an entry in `FORMATS`. It knows no
tokenizer and no chat template: these come in `encoding`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamba2_train.data.config import DataConfig
from mamba2_train.data.files import BadRow
from mamba2_train.data.messages import (
    Message,
    has_content,
    is_messages,
    read_messages,
    read_tools,
    shown,
)
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError, nearest

TEXT_COLUMNS = ("text", "content", "quote", "document", "body", "article", "story", "sentence")
MASKS = ("completion_mask", "assistant_masks")  # as TRL names them, its `s` included
NOT_LEARNED = -100  # in `labels`

# The prompts of Stanford Alpaca, with the line break that its published `text` column has.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Segment(NamedTuple):
    """A stretch of text that is tokenized by itself, as a prompt is when the model is used."""

    text: str
    learned: bool


class Chat(NamedTuple):
    """A conversation for the chat template; without a prompt, all of it is its completion."""

    prompt: list[Message]
    completion: list[Message]
    tools: list[dict[str, Any]] | None


class Ids(NamedTuple):
    """Tokens that somebody else made: both (n,)."""

    tokens: NDArray[np.int64]
    learned: NDArray[np.bool_]


class Pair(NamedTuple):
    """Two answers to one prompt, for an objective that prefers the first."""

    chosen: "list[Segment] | Chat"
    rejected: "list[Segment] | Chat"


class Fault(NamedTuple):
    """Why a row is skipped. False, as is whatever leaves nothing to learn."""

    message: str

    def __bool__(self) -> bool:
        return False


Content = list[Segment] | Chat | Ids | Pair | Fault  # an empty list: nothing to learn
Format = Callable[[Mapping[str, Any], DataConfig], Content]


def text(values: Mapping[str, Any], config: DataConfig) -> Content:
    assert config.text_column is not None
    return _unless_blank([Segment(_string(values, config.text_column), True)])


def prompt_completion(values: Mapping[str, Any], config: DataConfig) -> Content:
    """Both strings, or both lists of messages."""
    assert config.prompt_column is not None
    assert config.completion_column is not None
    return _answer(values, config.prompt_column, config.completion_column, config)


def messages(values: Mapping[str, Any], config: DataConfig) -> Content:
    assert config.messages_column is not None
    found = read_messages(values.get(config.messages_column), config.messages_column)
    return Chat([], found, read_tools(values.get("tools"))) if has_content(found) else []


def alpaca(values: Mapping[str, Any], config: DataConfig) -> Content:
    given = _string(values, "input")
    prompt = (ALPACA_WITH_INPUT if given.strip() else ALPACA).format(
        instruction=_string(values, "instruction"), input=given
    )
    answer = _string(values, "output")
    return _unless_blank([Segment(prompt, config.loss_on == "all"), Segment(answer, True)])


def preference(values: Mapping[str, Any], config: DataConfig) -> Content:
    """Strings or lists of messages. The prompt is a column, or what both answers begin with; the
    latter too where the column is a string and the answers are whole conversations."""
    prompt = values.get(config.prompt_column or "prompt")
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if prompt is None or (isinstance(prompt, str) and is_messages(chosen)):
        prompt, chosen, rejected = _common_prompt(chosen, rejected)
    if chosen == rejected:
        return []
    sides = [
        _answer({**values, "prompt": prompt, side: value}, "prompt", side, config)
        for side, value in (("chosen", chosen), ("rejected", rejected))
    ]
    return Pair(*sides) if all(sides) else []


def tokens(values: Mapping[str, Any], config: DataConfig) -> Content:
    """`input_ids`, learned where `labels` repeat them and every mask is 1; where
    `attention_mask` is 0 there is padding, which goes."""
    ids = _integers(values, "input_ids")
    if ids is None:
        return []
    learned = np.ones(len(ids), dtype=bool)
    labels = _integers(values, "labels", len(ids))
    if labels is not None:
        learned = labels != NOT_LEARNED
        wrong = np.flatnonzero(learned & (labels != ids))
        if len(wrong):
            at = wrong[0]
            raise BadRow(
                f"column 'labels' has {labels[at]} at position {at}, where input_ids has "
                f"{ids[at]}; give the same ids, not shifted, or {NOT_LEARNED} for what is not "
                "learned"
            )
    for column in MASKS if config.loss_on != "all" else ():
        mask = _integers(values, column, len(ids))
        if mask is not None:
            learned &= mask != 0
    real = _integers(values, "attention_mask", len(ids))
    if real is not None:
        ids, learned = ids[real != 0], learned[real != 0]
    return Ids(ids, learned) if learned.any() else []


FORMATS: dict[str, Format] = {
    "text": text,
    "prompt_completion": prompt_completion,
    "messages": messages,
    "conversations": messages,
    "alpaca": alpaca,
    "preference": preference,
    "tokens": tokens,
}


def detect(rows: list[Row], config: DataConfig) -> DataConfig:
    """`config` with its format, the columns that this needs and what is learned of it, none of
    them left open."""
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    format = _format(columns, config) if config.format == "auto" else config.format
    named = _columns(format, rows, columns, config)
    for setting, column in named.items():
        if column not in columns:
            origin = rows[0].file
            cure = f"Set data.{setting} to one of: {', '.join(columns)}"
            if setting not in DataConfig.model_fields:
                named_columns = ", ".join(columns)
                cure = f"data.format={format} needs it; the columns are: {named_columns}"
            # only what the user wrote can be misspelt
            hint = nearest(column, columns) if getattr(config, setting, None) else ""
            raise UserError(f"{origin} has no column {column!r}.{hint} {cure}")
    settings = {s: c for s, c in named.items() if s in DataConfig.model_fields}
    loss_on = _loss_on(format, columns, config)
    return config.model_copy(update={"format": format, "loss_on": loss_on, **settings})


def read(row: Row, config: DataConfig) -> Content:
    """What a row holds; false when that leaves nothing to learn.

    A row that cannot be used raises UserError, or is a Fault under `on_bad_row=skip`.
    """
    try:
        return FORMATS[config.format](row.values, config)
    except BadRow as error:
        return fault(row, error, config)


def fault(row: Row, error: BadRow, config: DataConfig) -> Fault:
    """What becomes of a row that cannot be used: an error with its place, or a reason to skip."""
    message = f"{row.place}: {error}"
    if config.on_bad_row == "error":
        raise UserError(message) from error
    return Fault(message)


def learned_column(config: DataConfig) -> str | None:
    """The column that holds what is learned."""
    return {
        "text": config.text_column,
        "prompt_completion": config.completion_column,
        "messages": config.messages_column,
        "conversations": config.messages_column,
        "alpaca": "output",
        "preference": "chosen",
        "tokens": "input_ids",
    }[config.format]


def _format(columns: list[str], config: DataConfig) -> str:
    """The format of rows with `columns`: what the user named goes first, then what says most."""
    there = set(columns)
    if config.text_column is not None:
        return "text"
    if config.messages_column is not None:
        return "messages"
    if config.completion_column is not None:
        return "prompt_completion"
    if "input_ids" in there:
        return "tokens"
    if {"chosen", "rejected"} <= there:
        return "preference"
    if config.prompt_column is not None or {"prompt", "completion"} <= there:
        return "prompt_completion"
    for format in ("messages", "conversations"):
        if format in there:
            return format
    return "alpaca" if {"instruction", "output"} <= there else "text"


def _columns(
    format: str, rows: list[Row], columns: list[str], config: DataConfig
) -> dict[str, str]:
    """The columns that rows of `format` must have, by the setting that names them, or by their
    own name where none does."""
    if format == "text":
        return {"text_column": config.text_column or _text_column(rows, columns)}
    if format == "prompt_completion":
        return {
            "prompt_column": config.prompt_column or "prompt",
            "completion_column": config.completion_column or "completion",
        }
    if format in ("messages", "conversations"):
        return {"messages_column": config.messages_column or format}
    if format == "alpaca":
        return {"instruction": "instruction", "output": "output"}
    if format == "preference":
        prompt = {"prompt_column": config.prompt_column} if config.prompt_column else {}
        return {**prompt, "chosen": "chosen", "rejected": "rejected"}
    masks = {"completion": "completion_mask", "assistant": "assistant_masks"}
    asked = [masks[config.loss_on]] if config.loss_on in masks else []
    return {column: column for column in ("input_ids", *asked)}


def _loss_on(format: str, columns: list[str], config: DataConfig) -> str:
    """What is learned, by TRL's rule where the user says nothing: completions, else all."""
    wanted = config.loss_on
    strings = format in ("text", "alpaca")
    if wanted == "completion" and format in ("text", "messages", "conversations"):
        raise UserError(
            f"data.loss_on=completion needs prompts, and rows of format {format} have none: set "
            f"data.loss_on to {'all' if strings else 'assistant or all'}"
        )
    if wanted == "assistant" and strings:
        raise UserError(_NO_TURNS.format(f"rows of format {format}"))
    if wanted == "pairs" and format != "preference":
        raise UserError(
            f"objective=dpo learns from pairs, in columns chosen and rejected, and rows of format "
            f"{format} have none (the columns are: {', '.join(columns)}): give such data, or set "
            "objective=sft"
        )
    if wanted is not None:
        return wanted
    if format == "tokens":
        masks = [column for column in MASKS if column in columns]
        return {"completion_mask": "completion", "assistant_masks": "assistant"}.get(
            masks[0] if masks else "", "all"
        )
    return "all" if format in ("text", "messages", "conversations") else "completion"


_NO_TURNS = (
    "data.loss_on=assistant needs messages, and {} are strings: set data.loss_on to completion or "
    "all"
)


def _answer(
    values: Mapping[str, Any], prompt_column: str, column: str, config: DataConfig
) -> list[Segment] | Chat:
    """A prompt and what follows it: strings or messages, whichever the row has."""
    prompt, answer = values.get(prompt_column), values.get(column)
    if is_messages(answer) and answer and not isinstance(prompt, str):
        before, after = read_messages(prompt, prompt_column), read_messages(answer, column)
        if before and after[0]["role"] != "assistant":
            raise BadRow(
                f"column {column!r} begins with a message of the {after[0]['role']}; begin it with "
                "the assistant's"
            )
        return Chat(before, after, read_tools(values.get("tools"))) if has_content(after) else []
    if is_messages(prompt) and prompt and answer is not None and answer != []:
        raise BadRow(
            f"column {prompt_column!r} holds messages and {column!r} {shown(answer)}; make both "
            "strings or both lists of messages"
        )
    if answer is None or answer == []:
        return []
    segments = [
        Segment(_string(values, prompt_column), config.loss_on == "all"),
        Segment(_string(values, column), True),
    ]
    if config.loss_on == "assistant":
        raise UserError(_NO_TURNS.format(f"columns {prompt_column!r} and {column!r}"))
    return _unless_blank(segments)


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both answers begin with, and the rest of each; TRL's `extract_prompt`.

    The answers differ from their first item on, so one that the other begins with keeps its last
    item; and a space between a prompt and its answers belongs to the answers.
    """
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        return None, chosen, rejected
    n = min(len(chosen), len(rejected))
    at = next((i for i in range(n) if chosen[i] != rejected[i]), max(0, n - 1))
    if isinstance(chosen, str) and at > 0 and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def _text_column(rows: list[Row], columns: list[str]) -> str:
    known = [column for column in TEXT_COLUMNS if column in columns]
    if "text" in known or len(known) == 1:
        return known[0]
    strings = [c for c in columns if any(isinstance(row.values.get(c), str) for row in rows)]
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise UserError(
            f"{rows[0].file} has no column of strings, only {', '.join(columns) or 'empty rows'}: "
            "add one called text"
        )
    raise UserError(
        f"{rows[0].file} has several columns of strings ({', '.join(strings)}): set "
        "data.text_column to the one to learn, or data.prompt_column and data.completion_column"
    )


def _unless_blank(segments: list[Segment]) -> list[Segment]:
    return segments if segments[-1].text.strip() else []


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} holds {shown(value)}; make it a string")
    return value


def _integers(
    values: Mapping[str, Any], column: str, length: int | None = None
) -> NDArray[np.int64] | None:
    """A column of integers, as long as `input_ids`; None where the row has none."""
    value = values.get(column)
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # nested lists of different lengths
        array = np.empty((0, 0))
    if array.shape == (0,):  # whose type says nothing
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise BadRow(f"column {column!r} holds {shown(value)}; make it a list of integers")
    if length is not None and len(array) != length:
        raise BadRow(
            f"column {column!r} has {len(array)} values and input_ids {length}; give one for each"
        )
    return array.astype(np.int64)
