"""Run Triton kernels without a GPU, with the right numbers, and count what they move.

Set TRITON_INTERPRET=1 before Triton is imported. Then

    with repaired():                 # the results are right
        y = op(x)
    with count() as traffic:         # and every byte is counted
        y = op(x)
    print(traffic.table(per=seq_len))

Triton's interpreter (3.7 to 3.9) keeps bfloat16 as 16-bit integers: `tl.dot` and arithmetic on it
are wrong, and float32 is cut off instead of rounded. `repaired` corrects both; float32 products are
taken in full precision, 16-bit ones gather in float32.

Counts are exact, and the same on every machine:

    hbm      distinct bytes read plus distinct bytes written, launch by launch: what memory must
             move if the cache catches every second access inside a launch and none between two
    loaded, stored   bytes asked for by all programs, second accesses included
    atomic   bytes asked for by atomic operations
    outside  bytes asked for outside every tensor passed to the kernel
    flops    of `tl.dot`, 2 M N K

PyTorch operations that move data count as launches, too, named `aten.*`.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Compute in bfloat16 as a GPU does, inside the block."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the interpreter is off: set TRITON_INTERPRET=1 before importing triton")
    quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
    with _attributes(Builder, _bfloat16_methods()), quiet, _fast_scans():
        yield


@dataclass
class Launch:
    """What one launch moved, in bytes."""

    name: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    read: int = 0  # distinct
    written: int = 0  # distinct
    outside: int = 0
    flops: int = 0

    @property
    def hbm(self) -> int:
        return self.read + self.written


@dataclass
class Traffic:
    """The launches of one block of code, in their order."""

    launches: list[Launch] = field(default_factory=list)

    def total(self, name: str) -> int:
        """Sum one of a launch's numbers over all launches."""
        return sum(getattr(launch, name) for launch in self.launches)

    def by_kernel(self) -> dict[str, list[Launch]]:
        kernels: dict[str, list[Launch]] = {}
        for launch in self.launches:
            kernels.setdefault(launch.name, []).append(launch)
        return kernels

    def table(self, per: int = 1) -> str:
        """One line per kernel; bytes and FLOPs divided by `per`, say the number of tokens."""
        columns = ("hbm", "read", "written", "loaded", "stored", "atomic", "outside", "flops")
        lines = [f"{'kernel':28}{'launches':>9}" + "".join(f"{name:>10}" for name in columns)]
        for name, launches in [*self.by_kernel().items(), ("total", self.launches)]:
            sums = [sum(getattr(launch, column) for launch in launches) for column in columns]
            numbers = "".join(f"{number / per:>10.0f}" for number in sums)
            lines.append(f"{name[:27]:28}{len(launches):>9}{numbers}")
        return "\n".join(lines)


@contextlib.contextmanager
def count() -> Iterator[Traffic]:
    """Count every Triton launch and every PyTorch operation that moves data, inside the block."""
    traffic = Traffic()
    counter = _Counter(traffic)
    with repaired(), _attributes(Builder, counter.builder_methods()):
        run = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            counter.begin(executor, args, kwargs)
            run(executor, *args, **kwargs)
            counter.end()

        with (
            _attributes(interpreter.GridExecutor, {"__call__": launch}),
            _TorchOperations(counter),
        ):
            yield traffic


@contextlib.contextmanager
def capture() -> Iterator[list[dict[str, Any]]]:
    """Record the arguments of every launch and run none: what `compile_report` compiles."""
    captures: list[dict[str, Any]] = []

    def record(executor: Any, *args: Any, **kwargs: Any) -> None:
        captures.append(_describe(executor, {**_named(executor, args), **kwargs}))

    with _attributes(interpreter.GridExecutor, {"__call__": record}):
        yield captures


def compulsory_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the distinct elements; an expanded dimension counts once."""
    total = 0
    for tensor in tensors:
        if tensor is not None and tensor.numel() > 0:
            size = tensor.element_size()
            for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
                size *= length if stride else 1
            total += size
    return total


@contextlib.contextmanager
def _attributes(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    before = {name: owner.__dict__[name] for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(bits: Any) -> Any:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(values: Any) -> Any:
    """The bfloat16 bits nearest to float32 values, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint32(0x7FC0), (bits + up) >> np.uint32(16)).astype(
        np.uint16
    )


def _wide(handle: Any) -> Any:
    return Handle(_widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrow(handle: Any) -> Any:
    if handle.data.dtype == np.float32:
        return Handle(_rounded(handle.data), tl.bfloat16)
    return handle


def _bfloat16_methods() -> dict[str, Callable[..., Any]]:
    """Replacements for the builder's methods that mishandle bfloat16."""
    names = ("binary_op", "ternary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_dot",
             "create_fma", "create_rsqrt")  # fmt: skip
    before = {name: getattr(Builder, name) for name in names}

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if not (_is_bfloat16(a) and _is_bfloat16(b)):
            return before["binary_op"](self, a, b, op)
        result = op(_widened(a.data), _widened(b.data))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(_rounded(result), tl.bfloat16)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is np.where or not _is_bfloat16(c):
            return before["ternary_op"](self, a, b, c, op)
        return _narrow(before["ternary_op"](self, _wide(a), _wide(b), _wide(c), op))

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        result = before["unary_op"](self, _wide(a), op)
        return _narrow(result) if _is_bfloat16(a) else result

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        result = before["create_fma"](self, _wide(a), _wide(b), _wide(c))
        return _narrow(result) if _is_bfloat16(c) else result

    def create_rsqrt(self: Any, a: Any) -> Any:
        result = before["create_rsqrt"](self, _wide(a))
        return _narrow(result) if _is_bfloat16(a) else result

    def cast(source: Any, target: Any, fallback: Callable[[], Any]) -> Any:
        old, new = source.dtype.scalar, target.scalar
        floats = (tl.float16, tl.float32, tl.float64)
        if old == tl.bfloat16 and (new in floats or new.is_int()):
            values = _widened(source.data).astype(interpreter._get_np_dtype(new))
            return Handle(values, new)
        if new == tl.bfloat16 and (old in floats or old.is_int()):
            return Handle(_rounded(source.data.astype(np.float32)), new)
        return fallback()

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        return cast(source, target, lambda: before["cast_impl"](self, source, target))

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        old = before["create_fp_to_fp"]
        return cast(source, target, lambda: old(self, source, target, rounding))

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        halves = a.data.dtype.itemsize == 2 and b.data.dtype.itemsize == 2
        if not (halves and total.data.dtype == np.float32):
            return before["create_dot"](self, a, b, total, *options)
        left, right = (_wide(h).data.astype(np.float32, copy=False) for h in (a, b))
        return Handle(np.matmul(left, right) + total.data, total.dtype.scalar)

    return {
        "binary_op": binary_op,
        "ternary_op": ternary_op,
        "unary_op": unary_op,
        "create_fma": create_fma,
        "create_rsqrt": create_rsqrt,
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_dot": create_dot,
    }


def _fast_scans() -> contextlib.AbstractContextManager[None]:
    """Let NumPy do the running maxima and minima, which Triton takes element by element."""
    slow = interpreter.ScanOps.generic_scan
    running = {"later": np.maximum.accumulate, "earlier": np.minimum.accumulate}

    def generic_scan(self: Any, inputs: Any) -> Any:
        name = getattr(getattr(self.combine_fn, "fn", None), "__name__", "")
        if name not in running:
            return slow(self, inputs)
        values = running[name](inputs[0].handle.data, axis=self.axis)
        return [self.to_tensor(values, dtype=inputs[0].dtype)]

    return _attributes(interpreter.ScanOps, {"generic_scan": generic_scan})


def _named(executor: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(executor.arg_names, args, strict=False))


def _base(argument: Any) -> Tensor | None:
    if isinstance(argument, TensorDescriptor):
        argument = argument.base
    return argument if isinstance(argument, Tensor) else None


def _describe(executor: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What is needed to compile a launch as the launcher would specialise it."""
    described: dict[str, Any] = {}
    for name in executor.arg_names:
        value = arguments.get(name)
        if isinstance(value, TensorDescriptor):
            described[name] = {
                "descriptor": str(value.base.dtype).removeprefix("torch."),
                "shape": [int(n) for n in value.shape],
                "strides": [int(n) for n in value.strides],
                "block": list(value.block_shape),
            }
        elif isinstance(value, Tensor):
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            dtype = str(value.dtype).removeprefix("torch.")
            described[name] = {"tensor": dtype, "aligned": aligned}
        else:
            described[name] = {"value": value}
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return {
        "module": executor.fn.__module__,
        "kernel": executor.fn.__name__,
        "arguments": described,
        "options": options,
    }


class _Counter:
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.current: Launch | None = None
        self.alive: list[Any] = []  # so that no address is used twice
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.touched: dict[tuple[int, int, bool], Any] = {}

    def begin(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = Launch(executor.fn.__name__)
        storages = {}
        for argument in {**_named(executor, args), **kwargs}.values():
            tensor = _base(argument)
            if tensor is not None and tensor.untyped_storage().nbytes() > 0:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        self.alive += storages.values()
        self.starts = sorted(storages)
        self.ends = [start + storages[start].nbytes() for start in self.starts]
        self.touched = {}

    def end(self) -> None:
        launch, self.current = self.current, None
        assert launch is not None
        launch.programs = int(np.prod(interpreter.interpreter_builder.grid_dim))
        for (_, size, written), elements in self.touched.items():
            distinct = int(np.count_nonzero(elements)) * size
            if written:
                launch.written += distinct
            else:
                launch.read += distinct
        self.traffic.launches.append(launch)

    def touch(self, pointers: Any, mask: Any, kind: str) -> None:
        launch = self.current
        if launch is None:
            return
        # A mask joined with a scalar is of integers, which would index instead of choose.
        mask = np.broadcast_to(np.asarray(mask).astype(bool), pointers.data.shape)
        addresses = pointers.data[mask]
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        setattr(launch, kind, getattr(launch, kind) + addresses.size * size)
        low, high = int(addresses.min()), int(addresses.max()) + size
        index = bisect.bisect_right(self.starts, low) - 1
        if index < 0 or high > self.ends[index]:
            inside = np.zeros(addresses.shape, bool)
            for start, end in zip(self.starts, self.ends, strict=True):
                inside |= (addresses >= np.uint64(start)) & (addresses < np.uint64(end))
            launch.outside += int(np.count_nonzero(~inside)) * size
            return
        start, end = self.starts[index], self.ends[index]
        key = (start, size, kind != "loaded")
        if key not in self.touched:
            self.touched[key] = np.zeros(-(-(end - start) // size), bool)
        elements = (addresses - np.uint64(start)) // np.uint64(size)
        self.touched[key][elements.astype(np.intp)] = True

    def builder_methods(self) -> dict[str, Callable[..., Any]]:
        names = ("create_masked_load", "create_masked_store", "create_atomic_rmw",
                 "create_atomic_cas", "create_dot")  # fmt: skip
        before = {name: getattr(Builder, name) for name in names}

        def create_masked_load(
            builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any
        ) -> Any:
            self.touch(pointers, mask.data, "loaded")
            return before["create_masked_load"](builder, pointers, mask, *rest, **more)

        def create_masked_store(
            builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any
        ) -> Any:
            self.touch(pointers, mask.data, "stored")
            return before["create_masked_store"](builder, pointers, value, mask, *rest, **more)

        def create_atomic_rmw(
            builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any
        ) -> Any:
            self.touch(pointers, mask.data, "atomic")
            return before["create_atomic_rmw"](builder, op, pointers, value, mask, *rest)

        def create_atomic_cas(builder: Any, pointers: Any, *rest: Any) -> Any:
            self.touch(pointers, True, "atomic")
            return before["create_atomic_cas"](builder, pointers, *rest)

        def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            if self.current is not None:
                self.current.flops += 2 * a.data.size * b.data.shape[-1]
            return before["create_dot"](builder, a, b, *rest)

        return {
            "create_masked_load": create_masked_load,
            "create_masked_store": create_masked_store,
            "create_atomic_rmw": create_atomic_rmw,
            "create_atomic_cas": create_atomic_cas,
            "create_dot": create_dot,
        }


class _TorchOperations(TorchDispatchMode):
    """Counts ATen operations that read or write memory; views and allocations do neither."""

    FREE = ("empty", "new_empty", "detach", "alias", "set_", "record_stream", "is_", "_local_")

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        counter = self.counter
        namespace, name = func._schema.name.split("::")
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if counter.current is not None or is_view or namespace != "aten":
            return result
        if name.startswith(self.FREE):
            return result
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        if name in ("copy_", "zero_", "fill_"):
            inputs = inputs[1:]
        if name == "_to_copy" and result is args[0]:
            return result
        launch = Launch(f"aten.{name}")
        launch.read = launch.loaded = compulsory_bytes(*inputs)
        launch.written = launch.stored = compulsory_bytes(*outputs)
        if launch.hbm > 0:
            counter.traffic.launches.append(launch)
            counter.alive += [t.untyped_storage() for t in outputs]
        return result
