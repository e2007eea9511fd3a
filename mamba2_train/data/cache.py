"""Arrays that are made once and kept, under a name that is a hash of all they depend on.

An entry is a folder of flat memory-mapped arrays. It is built beside its place and moved there
whole, so that it is either complete or absent; a file lock lets one process build while the others
wait for it, be they ranks of one run or runs of their own. The system frees the lock of a process
that dies.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mamba2_train.errors import UserError

logger = logging.getLogger(__name__)

FACTS = "entry.json"
CHUNK = 1 << 22  # bytes read at once
PATIENCE = 10  # seconds


def folder() -> Path:
    """MAMBA2_CACHE, or mamba2_train in the user's cache folder. All in it may be deleted."""
    if named := os.environ.get("MAMBA2_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mamba2_train"


class Arrays:
    """Named arrays that grow at their end: in memory, or in files of `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._files: dict[str, Any] = {}
        self._types: dict[str, np.dtype[Any]] = {}
        self._sizes: dict[str, int] = {}

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Each of `values` behind what `name` holds; its first values decide the dtype."""
        if name not in self._types:
            self._types[name], self._sizes[name] = values.dtype, 0
            if self._folder is None:
                self._parts[name] = []
            else:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
        assert values.dtype == self._types[name], f"{name} is {self._types[name]}"
        self._sizes[name] += len(values)
        if self._folder is None:
            self._parts[name].append(values)
        else:
            self._files[name].write(values.tobytes())

    def read(self, name: str) -> NDArray[Any]:
        """All that was appended to `name`."""
        if self._folder is None:
            self._parts[name] = [np.concatenate(self._parts[name])]
            return self._parts[name][0]
        self._files[name].flush()
        return _mapped(self._folder / f"{name}.bin", self._types[name], self._sizes[name])

    def drop(self, name: str) -> None:
        """Forget `name`, if there is one; an array that `read` returned stays readable."""
        if name not in self._types:
            return
        del self._types[name], self._sizes[name]
        if self._folder is None:
            del self._parts[name]
        else:
            self._files.pop(name).close()
            (self._folder / f"{name}.bin").unlink()

    def all(self) -> dict[str, NDArray[Any]]:
        return {name: self.read(name) for name in self._types}

    def store(self, facts: dict[str, Any]) -> None:
        """Bring all of it to the disk, with a table of what there is."""
        assert self._folder is not None
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        arrays = {name: [self._types[name].str, self._sizes[name]] for name in self._types}
        with (self._folder / FACTS).open("w") as out:
            json.dump({"arrays": arrays, "facts": facts}, out)
            out.flush()
            os.fsync(out.fileno())


@dataclass(frozen=True)
class Entry:
    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]
    folder: Path | None  # None: it could not be stored and is in memory


Build = Callable[[Arrays], dict[str, Any]]


def in_memory(build: Build) -> Entry:
    arrays = Arrays()
    facts = build(arrays)
    return Entry(arrays.all(), facts, None)


def cached(key: str, build: Build) -> Entry:
    """What `build` made under `key`: it appends arrays and returns facts that JSON can hold.

    Where nothing can be written, on a full disk for one, it is built in memory, with a warning.
    `build` raises nothing of OSError's kind for faults that are not the cache's own.
    """
    place = folder() / key
    try:
        return _open(place) or _build(place, build)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): this run keeps its data in memory and the next one starts "
            "anew; free some space, or set MAMBA2_CACHE to another folder",
            folder(),
            error.strerror or error,
        )
        return in_memory(build)


def _build(place: Path, build: Build) -> Entry:
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{place}.lock", mode=0o666)
    _leave_it_to_the_first(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that prepares the same data")
        lock.acquire()
    try:
        if entry := _open(place):
            return entry
        for left in place.parent.glob(f"{place.name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)  # was damaged, or _open had found it
        temporary = Path(tempfile.mkdtemp(".tmp", f"{place.name}.", place.parent))
        try:
            arrays = Arrays(temporary)
            arrays.store(build(arrays))
            mode = os.umask(0)
            os.umask(mode)
            temporary.chmod(0o777 & ~mode)  # mkdtemp's are closed to everybody else
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        entry = _open(place)
        if entry is None:
            raise OSError(f"{place} vanished as soon as it was written")
        return entry
    finally:
        lock.release()


def _leave_it_to_the_first(place: Path) -> None:
    """The first rank of a node builds, for it is the one that shows progress; the others give it
    some time to begin. The lock decides, should it not."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not (place / FACTS).exists():
        if any(place.parent.glob(f"{place.name}.*.tmp")):
            return
        time.sleep(0.02)


def _open(place: Path) -> Entry | None:
    try:
        stored = json.loads((place / FACTS).read_text())
        arrays = {
            name: _mapped(place / f"{name}.bin", np.dtype(dtype), size)
            for name, (dtype, size) in stored["arrays"].items()
        }
    except FileNotFoundError:
        return None
    except ValueError:  # shorter than it was: somebody cut it
        logger.warning("%s is damaged and is built anew", place)
        return None
    return Entry(arrays, stored["facts"], place)


def _mapped(file: Path, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    if size == 0:
        return np.empty(0, dtype)
    # a plain array over the map: np.memmap's own class makes every small slice slow
    return np.asarray(np.memmap(file, dtype, mode="r", shape=(size,)))


def digest(*parts: str | bytes | memoryview) -> str:
    """128 bits of `parts`, as hex; where one ends and the next begins counts."""
    h = xxhash.xxh3_128()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        h.update(f"{memoryview(raw).nbytes}:".encode())
        h.update(raw)
    return h.hexdigest()


def content(file: Path) -> str:
    """128 bits of the bytes of `file`. Time stamps are not asked: they survive some edits."""
    h = xxhash.xxh3_128()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                h.update(chunk)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    return h.hexdigest()
