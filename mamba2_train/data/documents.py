"""Rows become documents: token ids, and which of them are to be learned.

They go to the cache as they are made and are read from there through the memory map, so neither
needs more memory than a batch of rows does.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from mamba2_train.data.cache import Arrays, Entry, cached, content, digest
from mamba2_train.data.config import DataConfig
from mamba2_train.data.encoding import encode, encode_pairs
from mamba2_train.data.formats import detect, learned_column
from mamba2_train.data.mixing import Mixture, Part
from mamba2_train.data.sources import Row, load_held_out, load_rows, open_source
from mamba2_train.data.tokenizer import save_tokenizer
from mamba2_train.errors import UserError

logger = logging.getLogger(__name__)

# Tokenized by one call, which uses every core: enough to feed them, and some 100 MB of memory.
ROWS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20
SEEN = 1000  # rows from which the format is seen
ALL, TRAIN, VAL = "all.", "train.", "val."
COUNTS = ("documents", "tokens", "dropped", "skipped", "long")

# What documents do not depend on. A setting that is not here makes new ones.
OTHER_SETTINGS = {
    "batch_size",
    "block_rows",
    "length_grouped",
    "num_workers",
    "padding_side",
    "preview",
    "shuffle",
    "source",
    "sources",
    "streaming",
    "validation_source",
}


@dataclass(frozen=True)
class Documents:
    """Sequences of at most seq_len tokens, end to end in flat arrays, which may be memory maps.

    Of preference pairs the chosen answer and the rejected one follow each other, each behind the
    prompt.
    `tokens` (all,) int32; `learned` (all,) bool; document i is [bounds[i], bounds[i + 1]).
    `counts`: documents, dropped, long, skipped (rows of the source), tokens.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    bounds: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.bounds)


def load_documents(config: DataConfig, tokenizer: Any) -> tuple[Documents, Documents]:
    """Documents to train on and held-out ones, from the cache where they have been made before."""
    entry = cached(f"documents-{_key(config, tokenizer)}", partial(_build, config, tokenizer))
    return _stored(entry, TRAIN, config), _stored(entry, VAL, config)


def load_parts(config: DataConfig, block_rows: int) -> tuple[Mixture, list[Part]]:
    """The rows to train on, and the held-out ones of all sources; nothing is tokenized yet.

    None of the latter: they are to be taken from the former.
    """
    # one validation_source for the run stands for the splits of all sources
    shared = config.sources is not None and config.validation_source is not None
    own = {"validation_source": None, "validation_split": None} if shared else {}
    train, held_out = [], []
    for one in config.each:
        rows, validation = load_rows(one.model_copy(update=own))
        found = detect(list(rows[:SEEN]), one)
        train.append(Part(rows, found))
        if validation is not None and not shared:
            held_out.append(Part(validation, detect(list(validation[:SEEN]), found)))
    if shared:
        rows = load_held_out(config)
        held_out.append(Part(rows, detect(list(rows[:SEEN]), config)))
    return Mixture(train, config.weights, config.mix_until, block_rows), held_out


def load_held_out_documents(held_out: list[Part], config: DataConfig, tokenizer: Any) -> Documents:
    """Documents of the held-out rows alone, from the cache where they have been made before."""

    def build(arrays: Arrays) -> dict[str, Any]:
        with _progress(sum(len(part.rows) for part in held_out)) as progress:
            made = _tokenize(held_out, tokenizer, arrays, VAL, progress)
        return _finished(arrays, VAL, *made)

    rows = (repr(row.values) for part in held_out for row in part.rows)
    settings = (_settings(part.config) for part in held_out)
    entry = cached(f"documents-{digest(*rows, *settings, *_code(tokenizer))}", build)
    return _stored(entry, VAL, config)


def build_documents(rows: list[Row], tokenizer: Any, config: DataConfig) -> Documents:
    """Tokenize `rows`, end each with eos, and make what is longer than `seq_len` fit, in memory.

    `config` names its format and columns (see `formats.detect`). Rows that leave nothing to learn
    are dropped; log lines tell how many, how many were skipped because they cannot be used (under
    `on_bad_row=skip`), and how many were too long.
    """
    faults: list[str] = []
    found = documents_of([(rows, config)], tokenizer, faults)
    _refuse_nothing(found.counts, rows[0].file, config)
    _tell(found.counts, faults, config)
    return found


def documents_of(
    parts: Iterable[tuple[Iterable[Row], DataConfig]], tokenizer: Any, faults: list[str]
) -> Documents:
    """The documents of some rows, perhaps none, in memory and without a word."""
    arrays = Arrays()
    counts = dict.fromkeys(COUNTS, 0)
    for rows, config in parts:
        more = append_documents(rows, tokenizer, config, arrays, ALL, faults)
        counts = {name: n + more[name] for name, n in counts.items()}
    tokens, learned, lengths = (arrays.read(ALL + x) for x in ("tokens", "learned", "lengths"))
    return Documents(tokens, learned, _bounds(lengths), counts)


def append_documents(
    rows: Iterable[Row],
    tokenizer: Any,
    config: DataConfig,
    arrays: Arrays,
    to: str,
    faults: list[str],
) -> Counter[str]:
    """The documents of `rows` behind those in `arrays`; returns how many.

    Under names that begin with `to`: `tokens` and `learned`; for each document `lengths`; for each
    row that leaves any, `texts` (a hash of its tokens), `pieces` (its documents) and `long`.
    `faults` gets the first of the rows that cannot be used.
    """
    counts: Counter[str] = Counter()
    for some in _batches(rows):
        tokens: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
        learned: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        lengths: list[int] = []
        kept: list[tuple[int, int, bool]] = []
        made = _pairs if config.loss_on == "pairs" else _pieces
        for text, documents, fault in made(some, tokenizer, config):
            if fault is not None:
                counts["skipped"] += 1
                if not faults:
                    faults.append(fault)
                continue
            long = len(text) > config.seq_len
            counts["long"] += long
            for ids, learn in documents:
                tokens.append(ids)
                learned.append(learn)
                lengths.append(len(ids))
            if documents:
                text_hash = xxhash.xxh3_64_intdigest(text.tobytes())
                kept.append((text_hash, len(documents), long))
            else:
                counts["dropped"] += 1
        arrays.append(to + "tokens", np.concatenate(tokens))
        arrays.append(to + "learned", np.concatenate(learned))
        arrays.append(to + "lengths", np.array(lengths, np.int64))
        arrays.append(to + "texts", np.array([text for text, _, _ in kept], np.uint64))
        arrays.append(to + "pieces", np.array([n for _, n, _ in kept], np.int64))
        arrays.append(to + "long", np.array([long for _, _, long in kept], np.bool_))
        counts["documents"] += len(kept)
        counts["tokens"] += sum(lengths)
    return counts


def hold_out(texts: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which of `texts`, hashes, are held out: `fraction` of the different ones, at least one.

    The lowest hashes: this depends neither on the seed nor on the order, and equal texts are on
    the same side.
    """
    different = np.unique(texts)
    if len(different) < 2:
        raise UserError(
            f"there are {len(different)} different rows with anything to learn, too few to hold "
            "one out for validation: add rows or set data.validation_source"
        )
    n = min(max(1, round(fraction * len(different))), len(different) - 1)
    return texts <= different[n - 1]


def would_be_held_out(uncut: tuple[Documents, Documents], config: DataConfig) -> Documents:
    """Of whole documents, on both sides, those that a run with `config` holds out.

    Where it cuts long ones, it may leave some out, which then do not count among the texts of which
    a fraction is held out.
    """
    texts, sides, spans = [], [], []
    for side, documents in enumerate(uncut):
        for start, stop in pairwise(documents.bounds.tolist()):
            learned = documents.learned[start:stop]
            cuts = _places(stop - start, config)
            if any(learned[a + 1 : b].any() for a, b in pairwise(cuts)):
                tokens = documents.tokens[start:stop]
                texts.append(xxhash.xxh3_64_intdigest(tokens.tobytes()))
                sides.append(side)
                spans.append((start, stop))
    chosen = np.flatnonzero(hold_out(np.array(texts, np.uint64), config.validation_fraction))
    parts = [(uncut[sides[i]], slice(*spans[i])) for i in chosen]
    return Documents(
        np.concatenate([documents.tokens[span] for documents, span in parts]),
        np.concatenate([documents.learned[span] for documents, span in parts]),
        _bounds(np.array([span.stop - span.start for _, span in parts], np.int64)),
    )


def _build(config: DataConfig, tokenizer: Any, arrays: Arrays) -> dict[str, Any]:
    """Both parts in `arrays`; their counts."""
    mixture, held_out = load_parts(config, ROWS_AT_ONCE)
    blocks = (part for i in range(len(mixture)) for part in mixture.block(i))
    with _progress(mixture.n_rows + sum(len(part.rows) for part in held_out)) as progress:
        to = TRAIN if held_out else ALL
        train, faults = _tokenize(blocks, tokenizer, arrays, to, progress)
        if held_out:
            val = _tokenize(held_out, tokenizer, arrays, VAL, progress)
        else:
            train, of_val = _separate(arrays, config.validation_fraction, train)
            val = of_val, []
    train["skipped"] += mixture.skipped
    return _finished(arrays, TRAIN, train, faults) | _finished(arrays, VAL, *val)


def _tokenize(
    parts: Iterable[Part], tokenizer: Any, arrays: Arrays, to: str, progress: Progress
) -> tuple[dict[str, int], list[str]]:
    """Counts, and the first row that cannot be used."""
    counts = dict.fromkeys(COUNTS, 0)
    faults: list[str] = []
    part: Part | None = None
    for part in parts:
        more = append_documents(part.rows, tokenizer, part.config, arrays, to, faults)
        counts = {name: n + more[name] for name, n in counts.items()}
        progress.advance(progress.task_ids[0], len(part.rows))
    assert part is not None, "a source without rows was refused"
    _refuse_nothing(counts, part.rows[0].file, part.config)
    return counts, faults


def _separate(
    arrays: Arrays, fraction: float, counts: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Move the documents from `all` to `train` and `val`; the counts of both."""
    names = ("tokens", "learned", "lengths", "texts", "pieces", "long")
    tokens, learned, lengths, texts, pieces, long = (arrays.read(ALL + name) for name in names)
    held_out = hold_out(texts, fraction)
    side = np.repeat(held_out, pieces)  # of each document
    bounds = _bounds(lengths)
    edges = [0, *(np.flatnonzero(np.diff(side)) + 1).tolist(), len(side)]
    for start, stop in pairwise(edges):
        to = VAL if side[start] else TRAIN
        span = slice(bounds[start], bounds[stop])
        arrays.append(to + "tokens", tokens[span])
        arrays.append(to + "learned", learned[span])
        arrays.append(to + "lengths", lengths[start:stop])
    for name in names:
        arrays.drop(ALL + name)
    val = dict.fromkeys(COUNTS, 0) | {
        "documents": int(held_out.sum()),
        "tokens": int(lengths[side].sum()),
        "long": int(long[held_out].sum()),
    }
    return {name: n - val[name] for name, n in counts.items()}, val


def _finished(
    arrays: Arrays, part: str, counts: dict[str, int], faults: list[str]
) -> dict[str, Any]:
    """Leave what `Documents` are made of."""
    arrays.append(part + "bounds", _bounds(arrays.read(part + "lengths")))
    for name in ("lengths", "texts", "pieces", "long"):
        arrays.drop(part + name)
    return {part: {"counts": counts, "faults": faults}}


def _stored(entry: Entry, part: str, config: DataConfig) -> Documents:
    facts = entry.facts[part]
    _tell(facts["counts"], facts["faults"], config)
    tokens, learned, bounds = (entry.arrays[part + x] for x in ("tokens", "learned", "bounds"))
    return Documents(tokens, learned, bounds, facts["counts"])


def _progress(n_rows: int) -> Progress:
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    progress.add_task("tokenizing", total=n_rows)
    return progress


def _key(config: DataConfig, tokenizer: Any) -> str:
    """Of everything that documents depend on, but for the names of files and where they are."""
    parts = [repr(config.weights), config.mix_until]
    for one in (*config.each, config):
        for source in (one.source, one.validation_source):
            parts.append(open_source(source, one).content() if source else "")
        parts.append(_settings(one))
    return digest(*parts, *_code(tokenizer))


def _settings(config: DataConfig) -> str:
    """The settings and the content of the files that they name."""
    values = config.model_dump(mode="json", exclude=OTHER_SETTINGS)
    files = [content(Path(v)) for v in values.values() if isinstance(v, str) and _is_file(v)]
    return repr((sorted(values.items()), files))


def _code(tokenizer: Any) -> list[str]:
    """What makes tokens of text: the tokenizer, the libraries, this package."""
    parts = [version("tokenizers"), version("transformers")]
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            parts += [str(file.relative_to(folder)), content(file)]
    return parts + [content(file) for file in sorted(Path(__file__).parent.rglob("*.py"))]


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or no name at all
        return False


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    some: list[Row] = []
    size = 0
    for row in rows:
        some.append(row)
        size += _size(row.values)
        if len(some) >= ROWS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield some
            some, size = [], 0
    # also where there are no rows at all: the arrays then exist, and are empty
    yield some


def _size(values: dict[str, Any]) -> int:
    """Characters, nearly."""
    return sum([len(v) if isinstance(v, str) else len(repr(v)) for v in values.values()])


def _bounds(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _tell(counts: dict[str, int], faults: list[str], config: DataConfig) -> None:
    n_rows = counts["documents"] + counts["dropped"] + counts["skipped"]
    if counts["skipped"]:
        first = f"; the first: {faults[0]}" if faults else ": they cannot be read"
        logger.warning("skipped %d of %d rows%s", counts["skipped"], n_rows, first)
    if counts["dropped"]:
        logger.warning("dropped %d of %d rows: nothing to learn in them", counts["dropped"], n_rows)
    if n := counts["long"]:
        what = {"split": "split", "truncate": "cut off"}[config.long_documents]
        logger.info("%d of %d rows exceed %d tokens: %s", n, n_rows, config.seq_len, what)


def _refuse_nothing(counts: dict[str, int], origin: str, config: DataConfig) -> None:
    if not counts["documents"]:
        n_rows = counts["dropped"] + counts["skipped"]
        raise UserError(
            f"{origin}: none of its {n_rows} rows leaves anything to learn; check that "
            f"{learned_column(config)!r} is the right column and not empty"
        )


class _Made(NamedTuple):
    """What a row becomes: its tokens, the documents they are cut into, each with what is learned
    of it, or why the row is skipped."""

    text: NDArray[np.int32]
    documents: list[tuple[NDArray[np.int32], NDArray[np.bool_]]]
    fault: str | None


def _pieces(rows: list[Row], tokenizer: Any, config: DataConfig) -> Iterator[_Made]:
    for row, (ids, learned, fault) in zip(rows, encode(rows, tokenizer, config), strict=True):
        cuts = pairwise(_cuts(len(ids), row, config))
        pieces = [(ids[start:stop], learned[start:stop]) for start, stop in cuts]
        yield _Made(ids, [piece for piece in pieces if _teaches(piece[1])], fault)


def _pairs(rows: list[Row], tokenizer: Any, config: DataConfig) -> Iterator[_Made]:
    """Two documents of each row, which fit `seq_len` together."""
    for row, pair in zip(rows, encode_pairs(rows, tokenizer, config), strict=True):
        answers = [np.concatenate([pair.prompt, a]) for a in (pair.chosen, pair.rejected)]
        text = np.concatenate(answers)
        if len(text) > config.seq_len:
            if config.long_documents != "truncate":
                raise UserError(
                    f"{row.place}: a pair stays in one row, and its answers with their prompts "
                    f"have {len(text)} tokens, but data.seq_len is {config.seq_len}: raise it, or "
                    "set data.long_documents=truncate to cut their ends off"
                )
            # what the shorter one leaves is the longer one's
            most = max(config.seq_len // 2, config.seq_len - min(map(len, answers)))
            answers = [a[:most] for a in answers]
        documents = [(a, np.arange(len(a)) >= len(pair.prompt)) for a in answers]
        differ = not np.array_equal(answers[0], answers[1])
        kept = differ and all(_teaches(learned) for _, learned in documents)
        yield _Made(text, documents if kept else [], pair.fault)


def _teaches(learned: NDArray[np.bool_]) -> bool:
    return bool(learned[1:].any())  # nothing before a document's first token predicts it


def _cuts(length: int, row: Row, config: DataConfig) -> list[int]:
    """Where a document of `length` tokens begins, is cut, and ends."""
    if length > config.seq_len and config.long_documents == "error":
        raise UserError(
            f"{row.place} has {length} tokens and data.seq_len is {config.seq_len}: raise it, "
            "shorten the text, or set data.long_documents to split or truncate"
        )
    return _places(length, config)


def _places(length: int, config: DataConfig) -> list[int]:
    cut_later = config.packing in ("wrapped", "continued")
    whole = cut_later and config.long_documents == "split"
    if length <= config.seq_len or whole:
        return [0, length]
    if config.long_documents == "truncate":
        return [0, config.seq_len]
    return [*range(0, length, config.seq_len), length]
