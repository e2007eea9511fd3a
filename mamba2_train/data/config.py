"""What a run reads, and how it becomes batches: the `data` group."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

# What all sources of a mixture share; every other setting may differ from one to the next.
OF_THE_RUN = {
    "sources",
    "mix_until",
    "validation_fraction",
    "chat_template",
    "preview",
    "streaming",
    "block_rows",
    "seq_len",
    "packing",
    "length_grouped",
    "long_documents",
    "padding_side",
    "batch_size",
    "shuffle",
    "num_workers",
}


class SourceConfig(BaseModel):
    """One of several sources: where it is, its weight, and what it sets differently from `data`
    (its format and columns, its splits); those keys are checked as `data`'s own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    source: str
    weight: PositiveFloat = 1.0


class DataConfig(BaseModel):
    """Rows of a source, made into token sequences of at most `seq_len`.

    The split of a row is named by the hub, by the file's or folder's name (`train.jsonl`,
    `test/a.txt`), or by a string column called `split`; rows without a split are `train`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = Field(
        default=None,
        description="a .jsonl, .json, .csv, .tsv, .parquet or .txt file, one of these packed as "
        ".gz, .zst or .bz2, a folder of them, a hub data set as owner/name or owner/name:config, "
        "or embedded:quotes",
    )
    sources: tuple[SourceConfig, ...] | None = Field(
        default=None,
        description="several, mixed: [{source: A, weight: 0.7}, {source: B, weight: 0.3, "
        "text_column: body}]; weights are shares of the rows, exact in every stretch of them",
    )
    mix_until: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="an epoch of a mixture ends when the first of its sources is used up, or, "
        "repeating the others, the last (datasets.interleave_datasets' stopping_strategy)",
    )
    split: str | None = Field(
        default=None,
        description="rows to train on: train, train[:10%], train[:500]+test; null: train, or all "
        "where nothing is split",
    )
    validation_source: str | None = Field(default=None, description="null: the same source")
    validation_split: str | None = Field(
        default=None, description="rows held out; null: validation or test where there is one"
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.05, description="share of the texts held out where no source has such a split"
    )
    limit_rows: PositiveInt | None = Field(default=None, description="read only the first rows")
    text_unit: Literal["document", "line"] = Field(
        default="document", description="what a row of a .txt file is"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="a row that cannot be read or used: stop and name it, or "
        "leave it out and count it",
    )
    streaming: bool = Field(
        default=False,
        description="tokenize and pack while training, for data larger than memory; validation "
        "needs rows of its own",
    )
    block_rows: PositiveInt = Field(
        default=1000, description="streaming: rows of the source that are packed together"
    )

    format: Literal[
        "auto",
        "text",
        "prompt_completion",
        "messages",
        "conversations",
        "alpaca",
        "preference",
        "tokens",
    ] = Field(default="auto", description="what a row is; auto: seen from its columns")
    text_column: str | None = Field(default=None, description="null: seen from the columns")
    prompt_column: str | None = Field(default=None, description="null: prompt")
    completion_column: str | None = Field(
        default=None, description="null: completion; joined to the prompt with nothing between"
    )
    messages_column: str | None = Field(default=None, description="null: messages or conversations")
    chat_template: str | None = Field(
        default=None,
        description="a Jinja file, or embedded, a plain one; null: the tokenizer's own",
    )
    loss_on: Literal["completion", "assistant", "all", "pairs"] | None = Field(
        default=None,
        description="assistant: what the chat template puts between {% generation %} and "
        "{% endgeneration %}; null: completion where rows have one, else all; pairs: of two "
        "answers, one over the other, which is what objective=dpo makes of null",
    )
    append_eos: bool = Field(
        default=True,
        description="end each document with eos if it does not; a chat template ends its own, and "
        "tokens are taken as they are",
    )
    preview: NonNegativeInt = Field(
        default=0, description="show so many examples with what is learned of them, and stop"
    )

    seq_len: Annotated[int, Field(ge=2)] = Field(default=1024, description="most tokens in a row")
    packing: Literal["bfd", "split", "wrapped", "none", "continued"] = Field(
        default="bfd",
        description="bfd: rows filled with whole documents; split: and the room that is left with "
        "pieces; wrapped: one stream cut every seq_len; none: one document to a row; continued: "
        "each row goes on where that of the last batch stopped, for long_context=truncated",
    )
    length_grouped: bool = Field(
        default=False, description="with packing=none: rows of like length share a batch"
    )
    long_documents: Literal["split", "truncate", "error"] = Field(
        default="split", description="what happens to a document of more than seq_len tokens"
    )
    padding_side: Literal["right", "left"] = "right"
    batch_size: PositiveInt = Field(default=8, description="rows in a micro-batch, on each rank")
    shuffle: bool = Field(default=True, description="a new order of the training rows each epoch")
    num_workers: NonNegativeInt = Field(default=0, description="processes that build batches")

    @property
    def each(self) -> tuple["DataConfig", ...]:
        """The settings of each source by itself; those of a mixture without `sources`."""
        if self.sources is None:
            return (self,)
        own = self.model_dump(exclude={"source", "sources"})
        return tuple(
            DataConfig.model_validate(own | some.model_dump(exclude={"weight"}))
            for some in self.sources
        )

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) if self.sources is None else tuple(s.weight for s in self.sources)

    @property
    def together(self) -> int:
        """Documents that one row of the source becomes and that stay in one row of a batch."""
        return 2 if self.loss_on == "pairs" else 1

    @property
    def title(self) -> str:
        """What the rows come from, for people."""
        return " + ".join(str(some.source) for some in self.each)

    @model_validator(mode="after")
    def _one_origin(self) -> "DataConfig":
        if (self.source is None) == (not self.sources):
            raise ValueError(
                f"source is {self.source!r} and sources is {'set' if self.sources else 'not'}: set "
                "source to a file, folder or hub id, or sources to several, and the other to null"
            )
        for i, some in enumerate(self.sources or ()):
            for key in some.model_extra or ():
                if key in OF_THE_RUN:
                    raise ValueError(f"sources.{i}.{key}: is one for all sources: set data.{key}")
        if self.sources:
            try:
                _ = self.each
            except ValidationError as error:
                fault: Any = error.errors()[0]
                key = ".".join(map(str, fault["loc"]))
                raise ValueError(f"sources: {key}: {fault['msg']}") from None
        return self

    @model_validator(mode="after")
    def _some_need_all_documents(self) -> "DataConfig":
        if self.length_grouped and self.packing != "none":
            raise ValueError(
                f"length_grouped is for one document to a row, but packing is {self.packing!r}: "
                "its rows are all as long; set packing=none or length_grouped=false"
            )
        if self.packing == "continued" and self.streaming:
            raise ValueError(
                "packing=continued needs all documents before training, and streaming knows none: "
                "set streaming=false, or packing=wrapped with long_context=none"
            )
        if self.length_grouped and self.streaming:
            raise ValueError(
                "length_grouped needs all lengths before training, and streaming knows none: set "
                "one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _one_format(self) -> "DataConfig":
        pair = self.prompt_column is not None or self.completion_column is not None
        if self.text_column is not None and (pair or self.format == "prompt_completion"):
            raise ValueError(
                f"text_column is {self.text_column!r} but the rows are to be prompts and "
                "completions: set either text_column, or prompt_column and completion_column"
            )
        if pair and self.format == "text":
            raise ValueError("format=text has no prompts: remove prompt_column, completion_column")
        if self.messages_column is not None and (self.text_column is not None or pair):
            raise ValueError(
                f"messages_column is {self.messages_column!r} beside another column: keep the one "
                "that holds what is to be learned"
            )
        owners = {
            "text_column": ("text",),
            "prompt_column": ("prompt_completion", "preference"),
            "completion_column": ("prompt_completion",),
            "messages_column": ("messages", "conversations"),
        }
        for column, formats in owners.items():
            if getattr(self, column) is not None and self.format not in ("auto", *formats):
                raise ValueError(
                    f"format={self.format} has no {column}: remove it, or set format to "
                    f"{' or '.join(formats)}"
                )
        return self
