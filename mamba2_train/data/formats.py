"""What a row means: the texts it is made of, and which of them are to be learned.

A format is one function from a row's values to segments, and an entry in `FORMATS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mamba2_train.data.config import DataConfig
from mamba2_train.data.sources import Row
from mamba2_train.errors import UserError, nearest

TEXT_COLUMNS = ("text", "content", "quote", "document", "body", "article", "story", "sentence")


class Segment(NamedTuple):
    """A stretch of text that is tokenized by itself, as a prompt is when the model is used."""

    text: str
    learned: bool


Format = Callable[[Mapping[str, Any], DataConfig], list[Segment]]


def text(values: Mapping[str, Any], config: DataConfig) -> list[Segment]:
    assert config.text_column is not None
    return [Segment(_string(values, config.text_column), True)]


def prompt_completion(values: Mapping[str, Any], config: DataConfig) -> list[Segment]:
    assert config.prompt_column is not None
    assert config.completion_column is not None
    return [
        Segment(_string(values, config.prompt_column), config.loss_on == "all"),
        Segment(_string(values, config.completion_column), True),
    ]


FORMATS: dict[str, Format] = {"text": text, "prompt_completion": prompt_completion}


class WrongType(Exception):
    """A value that no text can be made of; `segments` adds the row's place."""


def detect(rows: list[Row], config: DataConfig) -> DataConfig:
    """`config` with its format and the columns that this needs, none of them left open."""
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    origin = rows[0].file
    format = config.format
    if format == "auto":
        pair = config.prompt_column is not None or config.completion_column is not None
        if config.text_column is None and (pair or {"prompt", "completion"} <= set(columns)):
            format = "prompt_completion"
        else:
            format = "text"
    if format == "prompt_completion":
        named = {
            "prompt_column": config.prompt_column or "prompt",
            "completion_column": config.completion_column or "completion",
        }
    else:
        named = {"text_column": config.text_column or _text_column(rows, columns)}
    for setting, column in named.items():
        if column not in columns:
            # only what the user wrote can be misspelt
            hint = nearest(column, columns) if getattr(config, setting) else ""
            raise UserError(
                f"{origin} has no column {column!r}.{hint} Set data.{setting} to one of: "
                f"{', '.join(columns)}"
            )
    return config.model_copy(update={"format": format, **named})


def segments(row: Row, config: DataConfig) -> list[Segment]:
    """The segments of a row; empty when its last one, the one to learn, is blank."""
    try:
        found = FORMATS[config.format](row.values, config)
    except WrongType as error:
        raise UserError(f"{row.place}: {error}") from None
    return found if found[-1].text.strip() else []


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


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        shown = repr(value)
        raise WrongType(
            f"column {column!r} holds {shown[:57] + '...' if len(shown) > 60 else shown} "
            f"({type(value).__name__}); make it a string"
        )
    return value
