"""Where rows come from: files, folders of files, the Hugging Face hub, the embedded quotes.

Local files are read by `files` and not by `datasets`, which would serve an old copy of a file that
was rewritten within its time stamp, and whose errors name no line.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from mamba2_train.assets import FOLDER
from mamba2_train.data.cache import content, digest
from mamba2_train.data.config import DataConfig
from mamba2_train.data.files import (
    KINDS,
    SPLIT,
    Ids,
    Row,
    Table,
    kind_of,
    open_file,
)
from mamba2_train.errors import UserError, nearest

EMBEDDED = {f"embedded:{name}": FOLDER / f"{name}.jsonl" for name in ("quotes", "preferences")}
TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")  # the first one there is used
SPLIT_NAME = re.compile(rf"({'|'.join(TRAIN + HELD_OUT)})(?![a-z])", re.IGNORECASE)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
ROWS_AT_ONCE = 4096  # read with one opening of their file


class Span(NamedTuple):
    """Some rows of a table."""

    table: Table
    ids: range | Ids


class Rows:
    """Rows in order, of one table or several; read when they are asked for, and not kept."""

    def __init__(self, spans: list[Span], without_split: bool = False) -> None:
        self.spans = spans
        self.without_split = without_split  # the column has named the split and means nothing more
        self._ends = np.cumsum([len(span.ids) for span in spans], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.spans else 0

    def __iter__(self) -> Iterator[Row]:
        for table, ids in self.spans:
            for at in range(0, len(ids), ROWS_AT_ONCE):
                for row in table.read(_array(ids[at : at + ROWS_AT_ONCE])):
                    if self.without_split:
                        row.values.pop(SPLIT)
                    yield row

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        """A row, or those of a slice; a slice reads nothing."""
        if isinstance(index, int):
            return next(iter(self[index : index + 1 or None]))
        start, stop, step = index.indices(len(self))
        assert step == 1, "rows come in their order"
        first = int(np.searchsorted(self._ends, start, side="right"))
        spans = []
        for i in range(first, len(self.spans)):
            begin = int(self._ends[i]) - len(self.spans[i].ids)
            if begin >= stop:
                break
            table, ids = self.spans[i]
            spans.append(Span(table, ids[max(0, start - begin) : stop - begin]))
        return Rows(spans, self.without_split)

    @property
    def skipped(self) -> int:
        """How many rows of its tables could not be read."""
        return sum({id(t): t.skipped for t, _ in self.spans}.values())


class Source(Protocol):
    """Rows by split. `names` is empty where nothing is split: all rows are `train` then."""

    name: str

    @property
    def names(self) -> list[str]: ...

    def rows(self, split: str) -> Rows: ...

    def content(self) -> str:
        """A hash of everything that it holds."""
        ...


def load_rows(config: DataConfig) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those held out; None where they must be taken from the former.

    `config` is that of one source.
    """
    assert config.source is not None
    source = open_source(config.source, config)
    split = config.split or _default_split(source)
    train = _read(source, split, config)
    if config.validation_source is not None:
        return train, load_held_out(config)
    wanted = config.validation_split
    if wanted is None:
        bases = _base_names(split)
        wanted = next((n for n in HELD_OUT if n in source.names and n not in bases), None)
        if wanted is None:
            return train, None
    held_out = _read(source, wanted, config)
    if _overlap(train, held_out):
        base = _base_names(split)[0]
        raise UserError(
            f"data.split is {split!r} and data.validation_split {wanted!r}: they share rows, so "
            "the loss would be measured on what was trained on; choose others, such as "
            f"{base}[:95%] and {base}[95%:]"
        )
    return train, held_out


def load_held_out(config: DataConfig) -> Rows:
    """The rows of `validation_source`."""
    assert config.validation_source is not None
    source = open_source(config.validation_source, config)
    named = (name for name in HELD_OUT if name in source.names)
    split = config.validation_split or next(named, None) or _default_split(source)
    return _read(source, split, config)


def open_source(name: str, config: DataConfig) -> Source:
    """The source called `name`; whatever exists on disk goes before the hub."""
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise UserError(f"there is no {name!r}: the embedded data are {', '.join(EMBEDDED)}")
        return LocalSource(name, EMBEDDED[name], config)
    path = Path(name).expanduser()
    if path.exists():
        return LocalSource(name, path, config)
    # in a folder that is there, `data/quotes` is a slip and no hub name
    if HUB_NAME.fullmatch(name) and not kind_of(path) and not path.parent.exists():
        return HubSource(name)
    raise UserError(_missing(name, path))


class LocalSource:
    """A file, or all files below a folder, in the order of their names."""

    def __init__(self, name: str, path: Path, config: DataConfig) -> None:
        self.name = name
        self._root, self._config = path, config
        self._files = _files(path)

    @property
    def names(self) -> list[str]:
        return list(self._splits)

    def rows(self, split: str) -> Rows:
        if self._splits:
            return self._splits[split]
        return Rows([Span(table, range(len(table))) for table in self._tables(self._files)])

    def content(self) -> str:
        # not the root's own name: data that moved are the same data
        names = [file.relative_to(self._root).parts for file in self._files]
        kinds = [kind_of(file) for file in self._files]
        return digest(repr(names), repr(kinds), *(content(file) for file in self._files))

    @cached_property
    def _splits(self) -> dict[str, Rows]:
        by_file = {file: _split_of_file(file, self._root) for file in self._files}
        spans: dict[str, list[Span]] = {}
        if any(by_file.values()):
            # beside train.jsonl, notes.txt is no data
            files = [file for file, split in by_file.items() if split is not None]
            for file, table in zip(files, self._tables(files), strict=True):
                span = Span(table, range(len(table)))
                spans.setdefault(by_file[file] or "", []).append(span)
            return {split: Rows(of_split) for split, of_split in spans.items()}
        for table in self._tables(self._files):
            if not len(table):
                continue
            if (found := table.splits) is None:
                return {}
            names, codes = found
            for code, split in enumerate(names):
                spans.setdefault(split, []).append(Span(table, np.flatnonzero(codes == code)))
        return {split: Rows(of_split, without_split=True) for split, of_split in spans.items()}

    def _tables(self, files: list[Path]) -> list[Table]:
        # one for each file, so that its index is made once
        for file in files:
            if file not in self._opened:
                self._opened[file] = open_file(file, self._config)
        return [self._opened[file] for file in files]

    @cached_property
    def _opened(self) -> dict[Path, Table]:
        return {}


class HubSource:
    """A data set of the hub, `owner/name` or `owner/name:config`, through its cache, where it is
    on disk as Arrow: of any size, and read from any point."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path, _, config = name.partition(":")
        self._config = config or None

    @property
    def names(self) -> list[str]:
        return list(self._data)

    def rows(self, split: str) -> Rows:
        table = self._tables[split]
        return Rows([Span(table, range(len(table)))])

    def content(self) -> str:
        parts = []
        for split, data in self._data.items():
            parts += [split, repr(data.features)]
            if data.cache_files:
                parts += [content(Path(file["filename"])) for file in data.cache_files]
            else:  # not on disk
                parts.append(digest(*map(repr, data)))
        return digest(*parts)

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return {split: HubTable(d, f"{self.name}[{split}]") for split, d in self._data.items()}

    @cached_property
    def _data(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self._path, self._config)
        # whatever the hub, its cache or a server answers
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{self.name} is no file here, and the hub could not give it ({reason}): check the "
                "name, the network and HF_TOKEN, or give a local path"
            ) from error


class HubTable:
    """A split of a hub data set; its rows are counted from 1."""

    skipped = 0
    splits = None

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self.data)

    def read(self, ids: Ids) -> Iterator[Row]:
        if not len(ids):
            return
        columns = self.data[ids.tolist()]
        for at, i in enumerate(ids.tolist()):
            yield Row({k: values[at] for k, values in columns.items()}, self.name, i + 1)

    def content(self) -> str:
        return digest(self.name, self.data._fingerprint)  # of the files that it was made from


def _read(source: Source, split: str, config: DataConfig) -> Rows:
    """The rows that a split, or an expression such as `train[:10%]+test`, names."""
    names = source.names
    bases = _base_names(split)
    for base in bases:
        if base in (names or TRAIN[:1]):
            continue
        if not names:
            raise UserError(
                f"{source.name} has no split {base!r}, for it has none at all and all its rows are "
                "'train': remove it from the config, or add a column `split`"
            )
        raise UserError(
            f"{source.name} has no split {base!r}.{nearest(base, names)} It has: {', '.join(names)}"
        )
    of_base = {base: source.rows(base) for base in bases}
    if bases == [split]:
        rows = of_base[split]
    else:
        spans = []
        for base, start, stop in _ranges(split, {base: len(of_base[base]) for base in bases}):
            spans += of_base[base][start:stop].spans
        rows = Rows(spans, of_base[bases[0]].without_split)
    rows = rows[: config.limit_rows]
    if not len(rows):
        which = "" if bases == [split] else f" in {split}"
        raise UserError(f"{source.name} holds no rows{which}: give it some, or name another source")
    return rows


def _base_names(split: str) -> list[str]:
    return list(dict.fromkeys(re.split(r"[\[(]", part)[0].strip() for part in split.split("+")))


def _ranges(split: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """What an expression selects of splits of `sizes`, in `datasets`' grammar and rounding."""
    from datasets import ReadInstruction

    try:
        found = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{split!r} is no selection of rows ({error}): write train[:10%], train[500:1000], "
            "train[-5%:] or train+test"
        ) from error
    return [(part.splitname, part.from_, part.to) for part in found]


def _overlap(some: Rows, others: Rows) -> bool:
    return any(
        len(_common(mine, theirs)) > 0
        for table, mine in some.spans
        for other, theirs in others.spans
        if table is other
    )


def _common(some: range | Ids, others: range | Ids) -> range | Ids:
    if isinstance(some, range) and isinstance(others, range):
        return range(max(some.start, others.start), min(some.stop, others.stop))
    return np.intersect1d(_array(some), _array(others))


def _array(ids: range | Ids) -> Ids:
    return np.arange(ids.start, ids.stop) if isinstance(ids, range) else ids


def _default_split(source: Source) -> str:
    if not source.names:
        return TRAIN[0]
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
        if not kind_of(path):
            raise UserError(
                f"{path} is of no kind that can be read: give {', '.join(KINDS)}, or a folder"
            )
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and kind_of(file)
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{path} holds no data: put files into it ({', '.join(KINDS)})")
    return files


def _missing(name: str, path: Path) -> str:
    message = f"{name} does not exist."
    folder = path.parent
    if folder.is_dir():
        there = [p.name for p in folder.iterdir() if kind_of(p) or p.is_dir()]
        if hint := nearest(path.name, there):
            return message + hint
        return f"{message} Give a file or folder that does, or a hub data set as owner/name"
    return f"{message} Neither does the folder {folder}: check data.source"
