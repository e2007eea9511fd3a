"""What a run reads, and how it becomes batches: the `data` group."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator


class DataConfig(BaseModel):
    """Rows of a source, made into token sequences of at most `seq_len`.

    The split of a row is named by the hub, by the file's or folder's name (`train.jsonl`,
    `test/a.txt`), or by a string column called `split`; a source may also have no splits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="a .jsonl, .json, .csv, .tsv, .parquet or .txt file (one document), a folder "
        "of them, a hub data set as owner/name or owner/name:config, or embedded:quotes"
    )
    split: str | None = Field(
        default=None, description="rows to train on; null: train, or all where nothing is split"
    )
    validation_source: str | None = Field(default=None, description="null: the same source")
    validation_split: str | None = Field(
        default=None, description="rows held out; null: validation or test where there is one"
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.05, description="share of the rows held out where the source has no such split"
    )
    limit_rows: PositiveInt | None = Field(default=None, description="read only the first rows")

    format: Literal["auto", "text", "prompt_completion"] = Field(
        default="auto", description="what a row is; auto: seen from its columns"
    )
    text_column: str | None = Field(default=None, description="null: seen from the columns")
    prompt_column: str | None = Field(default=None, description="null: prompt")
    completion_column: str | None = Field(
        default=None, description="null: completion; joined to the prompt with nothing between"
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion", description="all: learn the prompts too; text is always learned"
    )
    append_eos: bool = Field(default=True, description="end each document with eos if it does not")

    seq_len: Annotated[int, Field(ge=2)] = Field(default=1024, description="most tokens in a row")
    packing: Literal["bfd", "split", "wrapped", "none"] = Field(
        default="bfd",
        description="bfd: rows filled with whole documents; split: and the room that is left with "
        "pieces; wrapped: one stream cut every seq_len; none: one document to a row",
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

    @model_validator(mode="after")
    def _grouping_needs_lengths(self) -> "DataConfig":
        if self.length_grouped and self.packing != "none":
            raise ValueError(
                f"length_grouped is for one document to a row, but packing is {self.packing!r}: "
                "its rows are all as long; set packing=none or length_grouped=false"
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
        return self
