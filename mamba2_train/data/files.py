"""Local files as tables: rows that are counted, and read from any point without the rest.

A table of lines (JSONL, CSV, TSV, text by lines) has an index of where its rows are. Making it
parses every row once, so that one which cannot be read is known before training starts.
"""

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from mamba2_train.data.cache import CHUNK, Arrays, Entry, cached, content, digest, in_memory
from mamba2_train.data.config import DataConfig
from mamba2_train.errors import UserError

logger = logging.getLogger(__name__)

Ids = NDArray[np.int64]  # rows of a table, from 0, ascending
INDEX_IN_MEMORY = 32 << 20  # bytes of a file above which its index is on disk

LINES = (".jsonl", ".csv", ".tsv", ".txt")  # whose rows are counted by lines
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SPLIT = "split"  # the column that names a row's split
MOST_SPLITS = 64  # with more values, a column called split is about something else
BOM = b"\xef\xbb\xbf"
ROWS_AT_ONCE = 10_000  # of an index, brought to the disk together

_UNREADABLE = "is JSON too deeply nested, or with numbers too long, to be read: flatten it"

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


class Row(NamedTuple):
    values: dict[str, Any]
    file: str
    number: int  # counted from 1: the line of a text file, the row of another

    @property
    def place(self) -> str:
        return f"{self.file}, {_counted_by(self.file)} {self.number}"


class BadRow(Exception):
    """What is wrong with a row; whoever knows the row adds where it is."""


class Table(Protocol):
    """The rows of a file, or of a split of the hub.

    `skipped` says how many could not be read and were left out; `splits` the names in a column
    `split` and each row's index into them, or None where some row has no such name.
    """

    def __len__(self) -> int: ...

    def read(self, ids: Ids) -> Iterator[Row]: ...

    def content(self) -> str:
        """A hash of what it holds, or of what tells that as surely and is read sooner."""
        ...

    @property
    def skipped(self) -> int: ...

    @property
    def splits(self) -> tuple[list[str], Ids] | None: ...


def open_file(file: Path, config: DataConfig) -> Table:
    """`file` as a table. Nothing is read yet, but that a packed one is unpacked into the cache."""
    path, name = file, str(file)
    if file.suffix in PACKED:
        path = _unpacked(file)
    kind = kind_of(file)
    if kind == ".parquet":
        return ParquetFile(path, name)
    if kind == ".txt" and config.text_unit == "document":
        return TextFile(path, name)
    if kind == ".json" and _is_list(path, name):
        if config.streaming:
            raise UserError(
                f"{name} is one list of JSON, which has to be read whole: write one object to a "
                "line, or set data.streaming=false"
            )
        return JsonList(path, name, config)
    return LineFile(path, name, ".jsonl" if kind == ".json" else kind, config)


def kind_of(file: Path) -> str:
    """`.jsonl` for rows.jsonl and rows.jsonl.gz; empty for what is no data."""
    suffix = Path(file.stem).suffix if file.suffix in PACKED else file.suffix
    return suffix if suffix in KINDS else ""


def _counted_by(name: str) -> str:
    return "line" if kind_of(Path(name)) in LINES else "row"


class LineFile:
    """A row to a line, or, quoted in CSV, to several."""

    def __init__(self, path: Path, name: str, kind: str, config: DataConfig) -> None:
        self.path, self.name, self.kind = path, name, kind
        self._skip = config.on_bad_row == "skip"
        self._keep_index = config.streaming

    def __len__(self) -> int:
        return len(self._index.arrays["starts"])

    def read(self, ids: Ids) -> Iterator[Row]:
        index = self._index.arrays
        spans = (index[name][ids].tolist() for name in ("starts", "stops", "lines"))
        with _opened(self.path, self.name) as file:
            if os.fstat(file.fileno()).st_size != self._index.facts["size"]:
                raise UserError(f"{self.name} changed while it was in use: start the run again")
            parse = self._parser(file)
            for start, stop, line in zip(*spans, strict=True):
                file.seek(start)
                yield Row(parse(file.read(stop - start)), self.name, line)

    def content(self) -> str:
        return self._content

    @property
    def skipped(self) -> int:
        return self._index.facts["skipped"]

    @property
    def splits(self) -> tuple[list[str], Ids] | None:
        names = self._index.facts["splits"]
        return (names, self._index.arrays["splits"]) if names else None

    @cached_property
    def _index(self) -> Entry:
        if not self._keep_index and self.path.stat().st_size < INDEX_IN_MEMORY:
            return in_memory(self._scan)
        reading = f"{self.kind} {self._skip}"
        return cached(f"index-{digest(_source_code(), reading, self._content)}", self._scan)

    @cached_property
    def _content(self) -> str:
        return content(self.path)

    def _scan(self, arrays: Arrays) -> dict[str, Any]:
        names: dict[str, int] = {}
        split_column = True
        n_bad, first_bad = 0, ""
        found: list[tuple[int, int, int, int]] = []  # start, stop, line, split

        def store() -> None:
            columns = np.array(found, dtype=np.int64).reshape(-1, 4).T
            for name, column in zip(("starts", "stops", "lines", "splits"), columns, strict=True):
                arrays.append(name, np.ascontiguousarray(column))
            found.clear()

        with _opened(self.path, self.name) as file:
            size = os.fstat(file.fileno()).st_size
            parse = self._parser(file)
            for start, stop, line, raw in self._records(file):
                try:
                    values = parse(raw)
                except BadRow as error:
                    message = f"{self.name}, line {line} {error}"
                    if not self._skip or isinstance(error, _NeverClosed):
                        raise UserError(message) from error
                    first_bad = first_bad or message
                    n_bad += 1
                    continue
                value = values.get(SPLIT)
                if not isinstance(value, str) or not value or len(names) > MOST_SPLITS:
                    split_column = False
                split = names.setdefault(str(value), len(names)) if split_column else -1
                found.append((start, stop, line, split))
                if len(found) == ROWS_AT_ONCE:
                    store()
        store()
        _tell_skipped(n_bad, first_bad)
        return {
            "size": size,
            "skipped": n_bad,
            "splits": list(names) if split_column and names else [],
        }

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
        """Start, stop, first line and bytes of each row from here on that is not blank."""
        lines = _csv_records(file, self.kind) if self.kind in SEPARATORS else _lines(file)
        start, line = file.tell(), 1 + self._header_lines
        for raw, n_lines in lines:
            if raw.strip():
                yield start, start + len(raw), line, raw
            start, line = start + len(raw), line + n_lines

    def _parser(self, file: BinaryIO) -> Callable[[bytes], dict[str, Any]]:
        """What makes values of a row's bytes; leaves `file` at the first row."""
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        self._header_lines = 0
        if self.kind == ".jsonl":
            return _from_json
        if self.kind == ".txt":
            return lambda raw: {"text": _text(raw).rstrip("\r\n")}
        start = file.tell()
        raw, self._header_lines = next(_csv_records(file, self.kind), (b"", 0))
        file.seek(start + len(raw))
        try:
            header = _fields(raw, self.kind)
        except BadRow as error:
            raise UserError(f"{self.name}, line 1 {error}") from error
        return lambda raw: _from_csv(raw, header, self.kind)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    for line in file:
        yield line, 1


def _from_json(raw: bytes) -> dict[str, Any]:
    text = _text(raw)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"is not JSON ({error.msg} at column {error.colno}): write one object to a line"
        ) from error
    except (RecursionError, ValueError) as error:
        raise BadRow(_UNREADABLE) from error
    return _object(value, text)


def _object(value: Any, text: str | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(
            f"is a {type(value).__name__}, not an object: write "
            '{"text": "..."} or {"prompt": "...", "completion": "..."}'
        )
    if text is None or "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadRow(f"has {half!r}, half of a character: escape both halves or none") from None
    return value


SEPARATORS = {".csv": ",", ".tsv": "\t"}


def _csv_records(file: BinaryIO, kind: str) -> Iterator[tuple[bytes, int]]:
    """The bytes of each row and how many lines they are. Only a quote that is never closed is a
    fault here; `_fields` judges the rest."""
    raw: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in file:
            raw.append(line)
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), delimiter=SEPARATORS[kind], strict=True)
    while True:
        raw.clear()
        try:
            next(reader)
        except StopIteration:
            return
        except csv.Error:
            pass
        yield b"".join(raw), len(raw)


def _fields(raw: bytes, kind: str) -> list[str]:
    reader = csv.reader(
        io.StringIO(_text(raw), newline=""), delimiter=SEPARATORS[kind], strict=True
    )
    try:
        return next(reader, [])
    except csv.Error as error:
        if "unexpected end" in str(error):  # it has swallowed the rest of the file
            raise _NeverClosed(f"is not CSV ({error}): close its quotes") from error
        raise BadRow(f"is not CSV ({error}): close its quotes") from error


class _NeverClosed(BadRow):
    """All rows to the end of the file are lost in this one."""


def _from_csv(raw: bytes, header: list[str], kind: str) -> dict[str, Any]:
    fields = _fields(raw, kind)
    if len(fields) != len(header):
        raise BadRow(
            f"has not the {len(header)} fields of the header: put quotes around a field that "
            "holds a separator"
        )
    return dict(zip(header, fields, strict=True))


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRow(
            f"is not UTF-8 (byte 0x{raw[error.start]:02x}): convert it, for instance with "
            "`iconv -t utf-8`"
        ) from error


class TextFile:
    """One row: the whole text."""

    skipped = 0
    splits = None

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __len__(self) -> int:
        return 1

    def read(self, ids: Ids) -> Iterator[Row]:
        for _ in ids:
            raw = _whole(self.path, self.name)
            yield Row({"text": raw.replace("\r\n", "\n").replace("\r", "\n")}, self.name, 1)

    def content(self) -> str:
        return content(self.path)


class JsonList:
    """A file that is one list of objects, held in memory."""

    def __init__(self, path: Path, name: str, config: DataConfig) -> None:
        self.path, self.name = path, name
        self._skip = config.on_bad_row == "skip"

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, ids: Ids) -> Iterator[Row]:
        for i in ids.tolist():
            yield self._rows[i]._replace(values=dict(self._rows[i].values))

    def content(self) -> str:
        return content(self.path)

    @cached_property
    def _rows(self) -> list[Row]:
        try:
            values = json.loads(_whole(self.path, self.name))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.name}, line {error.lineno} is not JSON ({error.msg} at column "
                f"{error.colno}): write a list of objects"
            ) from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{self.name} {_UNREADABLE}") from error
        rows, first_bad = [], ""
        for number, value in enumerate(values, 1):
            try:
                rows.append(Row(_object(value), self.name, number))
            except BadRow as error:
                message = f"{self.name}, row {number} {error}"
                if not self._skip:
                    raise UserError(message) from error
                first_bad = first_bad or message
        self._skipped = len(values) - len(rows)
        _tell_skipped(self._skipped, first_bad)
        return rows

    @property
    def skipped(self) -> int:
        _ = self._rows
        return self._skipped

    @property
    def splits(self) -> tuple[list[str], Ids] | None:
        return split_codes(row.values.get(SPLIT) for row in self._rows)


class ParquetFile:
    """Parquet is read by row groups, each from its beginning: what is to be streamed should have
    small ones."""

    skipped = 0

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._cursor: _Cursor | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, ids: Ids) -> Iterator[Row]:
        for i in ids.tolist():
            group = int(np.searchsorted(self._ends, i, side="right"))
            at = self._cursor
            # a forked worker goes on with a cursor of its own
            if at is None or at.pid != os.getpid() or at.group != group or at.next > i:
                first = int(self._ends[group - 1]) if group else 0
                at = self._cursor = _Cursor(os.getpid(), group, i, self._group(group, i - first))
            try:
                values = next(islice(at.rows, i - at.next, None))
            except (pa.ArrowException, OSError) as error:
                raise self._fault(error) from error
            at.next = i + 1
            yield Row(values, self.name, i + 1)

    def content(self) -> str:
        # its size, and of each column of each row group the size and the statistics
        return digest(str(self.path.stat().st_size), repr(self._open().metadata.to_dict()))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Row number behind the last one of each row group."""
        metadata = self._open().metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return np.cumsum(sizes, dtype=np.int64)

    @property
    def splits(self) -> tuple[list[str], Ids] | None:
        file = self._open()
        if SPLIT not in file.schema_arrow.names:
            return None
        batches = file.iter_batches(columns=[SPLIT])
        return split_codes(value for batch in batches for value in batch.column(0).to_pylist())

    def _group(self, group: int, first: int) -> Iterator[dict[str, Any]]:
        """The rows of a row group from its row `first` on."""
        for batch in self._open().iter_batches(1024, row_groups=[group]):
            if first < len(batch):
                yield from batch.slice(first).to_pylist()
            first = max(0, first - len(batch))

    def _open(self) -> Any:
        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> UserError:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, OSError) and error.strerror:
            return UserError(f"{self.name} cannot be read: {error.strerror}")
        return UserError(f"{self.name} is not Parquet ({reason}): write it again")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cursor": None}


class _Cursor:
    """Where a ParquetFile is in a row group; what comes next is decoded already."""

    def __init__(self, pid: int, group: int, next: int, rows: Iterator[Any]) -> None:
        self.pid, self.group, self.next, self.rows = pid, group, next, rows


def _tell_skipped(n: int, first: str) -> None:
    if n:
        logger.warning("skipped %d rows that cannot be read; the first: %s", n, first)


def split_codes(values: Iterable[Any]) -> tuple[list[str], Ids] | None:
    """The splits that `values` name, and each one's index; None if they are about anything else."""
    names: dict[str, int] = {}
    codes = []
    for value in values:
        if not (isinstance(value, str) and value) or len(names) > MOST_SPLITS:
            return None
        codes.append(names.setdefault(value, len(names)))
    return (list(names), np.array(codes, dtype=np.int64)) if codes else None


def _is_list(path: Path, name: str) -> bool:
    with _opened(path, name) as file:
        while chunk := file.read(64).removeprefix(BOM):
            if found := chunk.lstrip():
                return found.startswith(b"[")
    return False


def _unpacked(file: Path) -> Path:
    """The content of a packed file, in the cache."""

    def build(arrays: Arrays) -> dict[str, Any]:
        try:
            with pa.input_stream(str(file), compression=PACKED[file.suffix]) as stream:
                while chunk := stream.read(CHUNK):
                    arrays.append("data", np.frombuffer(chunk, np.uint8))
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's
                raise
            raise UserError(f"{file} cannot be unpacked ({error}): write it again") from error
        return {}

    entry = cached(f"unpacked-{content(file)}", build)
    if entry.folder is None:
        raise UserError(f"there is no room to unpack {file}: set MAMBA2_CACHE to another folder")
    data = entry.folder / "data.bin"
    if not entry.arrays:  # nothing was in it
        data.touch()
    return data


def _opened(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def _whole(path: Path, name: str) -> str:
    try:
        with _opened(path, name) as file:
            return file.read().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}): convert "
            "it, for instance with `iconv -t utf-8`"
        ) from error


def _source_code() -> str:
    return content(Path(__file__))
