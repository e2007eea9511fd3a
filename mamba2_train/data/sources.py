"""Where rows come from: files, folders of files, the Hugging Face hub, the embedded quotes.

Local files are read here and not by `datasets`, which would serve an old copy of a file that was
rewritten within its time stamp, and whose errors name no line.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.parquet

from mamba2_train.assets import FOLDER
from mamba2_train.data.config import DataConfig
from mamba2_train.errors import UserError, nearest

EMBEDDED = {"embedded:quotes": FOLDER / "quotes.jsonl"}
TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")  # the first one there is used
SPLIT_NAME = re.compile(rf"({'|'.join(TRAIN + HELD_OUT)})(?![a-z])", re.IGNORECASE)
LINES = (".jsonl", ".csv", ".tsv")  # whose rows are counted by lines
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Row(NamedTuple):
    values: dict[str, Any]
    file: str
    number: int  # counted from 1: the line of a text file, the row of another

    @property
    def place(self) -> str:
        return f"{self.file}, {'line' if Path(self.file).suffix in LINES else 'row'} {self.number}"


class Source(Protocol):
    """Rows by split. `names` is empty where nothing is split, and then the split is None."""

    name: str
    names: list[str]

    def rows(self, split: str | None) -> list[Row]: ...


def load_rows(config: DataConfig) -> tuple[list[Row], list[Row] | None]:
    """The rows to train on, and those held out; None where they must be taken from the former."""
    source = open_source(config.source)
    split = config.split or _default_split(source)
    train = _read(source, split, config)
    held_out = source
    if config.validation_source is not None:
        held_out = open_source(config.validation_source)
    wanted = config.validation_split
    if wanted is None:
        choices = [name for name in HELD_OUT if name in held_out.names]
        if held_out is source:
            choices = [name for name in choices if name != split]
        if not choices and held_out is source:
            return train, None
        wanted = choices[0] if choices else _default_split(held_out)
    elif held_out is source and wanted == split:
        raise UserError(
            f"data.split and data.validation_split are both {split!r}: the loss would be measured "
            "on what was trained on; choose another one, or remove validation_split"
        )
    return train, _read(held_out, wanted, config)


def open_source(name: str) -> Source:
    """The source called `name`; whatever exists on disk goes before the hub."""
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise UserError(f"there is no {name!r}: the embedded data are {', '.join(EMBEDDED)}")
        return LocalSource(name, EMBEDDED[name])
    path = Path(name).expanduser()
    if path.exists():
        return LocalSource(name, path)
    # in a folder that is there, `data/quotes` is a slip and no hub name
    if HUB_NAME.fullmatch(name) and path.suffix not in READERS and not path.parent.exists():
        return HubSource(name)
    raise UserError(_missing(name, path))


class LocalSource:
    """A file, or all files below a folder, in the order of their names."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        files = _files(path)
        by_file = {file: _split_of_file(file, path) for file in files}
        self._rows: dict[str | None, list[Row]] = {}
        if any(by_file.values()):
            for file, split in by_file.items():
                if split is not None:  # beside train.jsonl, notes.txt is no data
                    self._rows.setdefault(split, []).extend(_read_file(file))
        else:
            rows = [row for file in files for row in _read_file(file)]
            column = [row.values.get("split") for row in rows]
            if column and all(isinstance(value, str) and value for value in column):
                for row in rows:
                    self._rows.setdefault(row.values.pop("split"), []).append(row)
            else:
                self._rows[None] = rows
        self.names = [split for split in self._rows if split is not None]

    def rows(self, split: str | None) -> list[Row]:
        return self._rows[split]


class HubSource:
    """A data set of the hub, `owner/name` or `owner/name:config`, through its cache."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path, _, config = name.partition(":")
        self._config = config or None
        self.names: list[str] = self._ask("get_dataset_split_names", self._path, self._config)

    def rows(self, split: str | None) -> list[Row]:
        data = self._ask("load_dataset", self._path, self._config, split=split)
        return [Row(dict(values), f"{self.name}[{split}]", i) for i, values in enumerate(data, 1)]

    def _ask(self, function: str, *arguments: Any, **options: Any) -> Any:
        import datasets

        try:
            return getattr(datasets, function)(*arguments, **options)
        # whatever the hub, its cache or a server answers
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{self.name} is no file here, and the hub could not give it ({reason}): check the "
                "name, the network and HF_TOKEN, or give a local path"
            ) from error


def _read(source: Source, split: str | None, config: DataConfig) -> list[Row]:
    # the hub also takes slices such as train[:10%]
    base = re.split(r"[\[+]", split)[0] if split and isinstance(source, HubSource) else split
    if base is not None and base not in source.names:
        if not source.names:
            raise UserError(
                f"{source.name} has no split {split!r}, for it has none at all: remove it from the "
                "config, or add a column `split`"
            )
        raise UserError(
            f"{source.name} has no split {split!r}.{nearest(base, source.names)} It has: "
            f"{', '.join(source.names)}"
        )
    rows = source.rows(split)[: config.limit_rows]
    if not rows:
        raise UserError(f"{source.name} holds no rows: give it some, or name another source")
    return rows


def _default_split(source: Source) -> str | None:
    if not source.names:
        return None
    for name in TRAIN:
        if name in source.names:
            return name
    if len(source.names) == 1:
        return source.names[0]
    raise UserError(
        f"{source.name} has the splits {', '.join(source.names)} and none is called train: set "
        "data.split (or, for a validation_source, data.validation_split) to one of them"
    )


def _split_of_file(file: Path, root: Path) -> str | None:
    """From `train.jsonl`, `train-00000-of-00002.parquet` or `train/part.jsonl` below `root`.

    None for `root` itself: a file that the user names is read whole, whatever it is called.
    """
    for part in file.relative_to(root).parts:
        if match := SPLIT_NAME.match(part):
            return match[1].lower()
    return None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(
                f"{path} is of no kind that can be read: give {', '.join(READERS)}, or a folder"
            )
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.suffix in READERS
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{path} holds no data: put files into it ({', '.join(READERS)})")
    return files


def _missing(name: str, path: Path) -> str:
    message = f"{name} does not exist."
    folder = path.parent
    if folder.is_dir():
        there = [p.name for p in folder.iterdir() if p.suffix in READERS or p.is_dir()]
        if hint := nearest(path.name, there):
            return message + hint
        return f"{message} Give a file or folder that does, or a hub data set as owner/name"
    return f"{message} Neither does the folder {folder}: check data.source"


def _read_file(file: Path) -> list[Row]:
    try:
        return [Row(values, str(file), number) for number, values in READERS[file.suffix](file)]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x}): convert it, for "
            f"instance with `iconv -t utf-8`"
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{file}, line {number} is not JSON ({error.msg} at column {error.colno}): "
                        "write one object to a line"
                    ) from error
                yield number, _object(value, f"{file}, line {number}")


def _json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _jsonl(file)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {error.lineno} is not JSON ({error.msg} at column {error.colno}): "
            "write a list of objects"
        ) from error
    for number, value in enumerate(values, 1):
        yield number, _object(value, f"{file}, row {number}")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{place} is a {type(value).__name__}, not an object: write "
            '{"text": "..."} or {"prompt": "...", "completion": "..."}'
        )
    return value


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as lines:
        separator = "\t" if file.suffix == ".tsv" else ","
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            n_fields = len(reader.fieldnames or ())
            for values in reader:
                if None in values or None in values.values():
                    raise UserError(
                        f"{file}, line {reader.line_num} has not the {n_fields} fields of the "
                        "header: put quotes around a field that holds a separator"
                    )
                yield reader.line_num, values
        except csv.Error as error:
            raise UserError(
                f"{file}, line {reader.line_num + 1} is not CSV ({error}): close its quotes"
            ) from error


def _txt(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    yield 1, {"text": file.read_text(encoding="utf-8-sig")}


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in rows.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield number, values
    except pyarrow.ArrowException as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file} is not Parquet ({reason}): write it again") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
