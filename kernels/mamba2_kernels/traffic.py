"""What the launches of an op move through HBM and multiply, told from their arguments alone.

    hbm      each element of each tensor that a launch is given, once: what memory must move if the
             cache catches every second access inside a launch and none between two
    flops    of `tl.dot`, 2 M N K, from the tile sizes and the grid

Nothing runs, so tensors may be fake and of any size. `interpreter.count` has the truth, for small
shapes: it runs the kernels and looks at every address. Tests hold one to the other.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from mamba2_kernels.launch import dry_run


class Launch(NamedTuple):
    """Of one kernel: its name, bytes, and floating-point operations of its products."""

    name: str
    hbm: int
    flops: int


def launches(op: Callable[[], Any]) -> list[Launch]:
    """Those that `op` would make, in their order."""
    with dry_run() as planned:
        op()
    return [_counted(*one) for one in planned]


def _counted(name: str, grid: tuple[int, ...], a: dict[str, Any]) -> Launch:
    hbm = distinct_bytes(a.values())
    for arguments, share in _UNREAD[name](a) if name in _UNREAD else ():
        hbm -= round(share * distinct_bytes(a[key] for key in arguments))
    return Launch(name, hbm, 2 * _DOTS[name](grid, a) if name in _DOTS else 0)


def distinct_bytes(arguments: Iterable[Any]) -> int:
    """Of all tensors and descriptors among them; a broadcast dimension has one element."""
    seen: dict[tuple[Any, ...], int] = {}
    for argument in arguments:
        tensor = getattr(argument, "base", argument)  # of a descriptor
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            continue
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride else 1
        # a tensor may stand in for one that is not there: once
        storage = tensor.untyped_storage()._cdata
        seen[storage, tensor.storage_offset(), tensor.shape, tensor.stride()] = size
    return sum(seen.values())


def _n_tiles(a: dict[str, Any]) -> int:
    return -(-a["seq_len"] // a["Q"])


def _tiles_carried(a: dict[str, Any]) -> int:
    # all but those of one chunk, whose state nobody reads
    per_chunk = a["CHUNK"] // a["Q"]
    if a["TO_FAR_EDGE"]:
        return _n_tiles(a)
    return max(0, _n_tiles(a) - per_chunk) if a["REVERSE"] else (a["n_chunks"] - 1) * per_chunk


def _states(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    # [p, q] @ [q, n]
    return math.prod(grid) * _tiles_carried(a) * a["PB"] * a["Q"] * a["NB"]


def _scan(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    # for each tile [q, n] @ [n, p] twice, [q, n] @ [n, q] and [q, q] @ [q, p]
    q, n_tiles = a["Q"], _n_tiles(a)
    return math.prod(grid[1:]) * n_tiles * q * (2 * a["N"] * a["PB"] + q * (a["N"] + a["PB"]))


def _inside(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    # [q, n] @ [n, q], then [q, p] @ [p, q] for each head
    return math.prod(grid) * a["Q"] ** 2 * (a["N"] + a["heads_per_split"] * a["P"])


def _across(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    # [q, q] @ [q, n] twice; for each head two or four products with the states at the tile, and
    # those that carry the states there from the chunk's ends
    q, p, n = a["Q"], a["P"], a["NB"]
    products = (2 if a["RELOAD"] else 4) + a["CHUNK"] // q - 1
    return math.prod(grid) * (2 * q * q * n + a["heads_per_split"] * products * q * p * n)


_DOTS: dict[str, Callable[[tuple[int, ...], dict[str, Any]], int]] = {
    "states_kernel": _states,
    "scan_kernel": _scan,
    "dx_kernel": _scan,
    "inside_kernel": _inside,
    "across_kernel": _across,
}

# which share of which arguments a kernel leaves alone
_UNREAD: dict[str, Callable[[dict[str, Any]], list[tuple[tuple[str, ...], float]]]] = {
    "states_kernel": lambda a: [
        (("x", "keys", "log_decay", "log_dt"), 1 - _tiles_carried(a) / _n_tiles(a))
    ],
    # one state to a span, of those at the ends of its chunks
    "dx_kernel": lambda a: [
        (("dstates",), 1 - -(-a["n_chunks"] // (a["SPAN"] // a["CHUNK"])) / a["n_chunks"])
    ],
}
