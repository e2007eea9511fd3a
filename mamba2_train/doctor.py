"""Whether this machine and this installation can do what a run needs.

Each check gives findings: what was found, whether that is well, and what to do if not. A check that
fails to run is a problem in itself, and never the end of the others. Nothing here needs a GPU, a
network or an optional package; where one is missing the line says what that means.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mamba2_train.assets import FOLDER
from mamba2_train.data.cache import folder as cache_folder
from mamba2_train.data.tokenizer import load_tokenizer
from mamba2_train.loggers import PACKAGES, stored_key, wandb_fault, wandb_url
from mamba2_train.quantization import bitsandbytes

OURS = "mamba2-train"
GB = 1e9
LITTLE, TOO_LITTLE = 20 * GB, 1 * GB  # of free disk: a few checkpoints of a 7B adapter; none


class Finding(NamedTuple):
    """One line: `level` is ok, warning (a run may go worse) or problem (a run will fail)."""

    level: Literal["ok", "warning", "problem"]
    what: str
    found: str
    cure: str = ""


def examine(run_dir: Path, timeout: float) -> Iterator[Finding]:
    """All findings, one after the other.

    Args:
        run_dir: where runs would be written.
        timeout: seconds that a server has to answer.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "torch": _torch,
        "gpu": _gpus,
        "ops": _ops,
        "triton": _triton,
        "nccl": _nccl,
        "bitsandbytes": _bitsandbytes,
        "tokenizer": _tokenizer,
        "memory": _memory,
        "disk": lambda: _disk(run_dir),
        "hub": lambda: _hub(timeout),
        "wandb": lambda: _wandb(timeout),
    }
    for what, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            yield Finding("problem", what, text, "mend that, or reinstall what it names")


def _python() -> Iterator[Finding]:
    needed = importlib.metadata.metadata(OURS)["Requires-Python"]
    found = platform.python_version()
    fits = Requirement(f"python{needed}").specifier.contains(found)
    yield Finding(
        "ok" if fits else "problem",
        "python",
        f"{found} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "" if fits else f"use Python {needed}",
    )


def _packages() -> Iterator[Finding]:
    """Installed versions against the ranges of our own metadata."""
    n, optional = 0, []
    for line in importlib.metadata.requires(OURS) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        extra = marker is not None and "extra" in str(marker)
        if marker is not None and not extra and not marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                cure = f"pip install '{requirement.name}{requirement.specifier}'"
                yield Finding("problem", "packages", f"{requirement.name} is missing", cure)
            continue
        if requirement.specifier.contains(Version(found), prereleases=True):
            n += not extra
            if extra:
                optional.append(f"{requirement.name} {found}")
            continue
        yield Finding(
            "warning" if extra else "problem",
            "packages",
            f"{requirement.name} {found}, and {requirement.specifier} is needed",
            f"pip install '{requirement.name}{requirement.specifier}'",
        )
    found = f"{OURS} {importlib.metadata.version(OURS)} with {n} packages in their ranges"
    yield Finding("ok", "packages", found + (f"; {', '.join(sorted(optional))}" * bool(optional)))


def _torch() -> Iterator[Finding]:
    build = f"{torch.__version__}, " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    )
    driver = _driver()
    if torch.cuda.is_available():
        yield Finding("ok", "torch", f"{build}, driver {driver or 'unknown'}")
    elif driver and not torch.version.cuda:
        cure = "install torch's CUDA build: pip install --force-reinstall torch"
        yield Finding("problem", "torch", f"{build}, beside an NVIDIA driver {driver}", cure)
    elif driver:
        try:
            torch.cuda.init()
            why = "it sees no GPU"
        except (RuntimeError, AssertionError) as error:
            why = " ".join(str(error).split())[:200]
        cure = "update the driver, or look at CUDA_VISIBLE_DEVICES"
        yield Finding("problem", "torch", f"{build}, driver {driver}, but {why}", cure)
    else:
        yield Finding("ok", "torch", build)


def _driver() -> str:
    """Version of NVIDIA's driver; empty if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("ok", "gpu", "none: runs take the CPU and PyTorch's operations")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        arch = f"sm_{properties.major}{properties.minor}"
        text = f"{i}: {properties.name}, {arch}, {free / GB:.1f} of {total / GB:.1f} GB free"
        if properties.major < 8:
            cure = "use precision=fp32: it has no bfloat16"
            yield Finding("warning", "gpu", text, cure)
        elif free < total / 2:
            yield Finding("warning", "gpu", text, "nvidia-smi names what holds the rest")
        else:
            yield Finding("ok", "gpu", text)


def _ops() -> Iterator[Finding]:
    """The scan as a run computes it here, beside the sequential recurrence in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if device == "cuda" else "torch"
    error = _scan_error(device, backend)
    level: Literal["ok", "problem"] = "ok" if error < 1e-4 else "problem"
    cure = "" if level == "ok" else "MAMBA2_BACKEND=torch avoids Triton; please report this"
    text = f"scan by {backend} on {device}: {error:.0e} from float64, relative"
    yield Finding(level, "ops", text, cure)


def _scan_error(device: str, backend: str) -> float:
    from mamba2_kernels import ssd_scan

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, B, C = draw(1, 96, 2, 64), draw(1, 96, 1, 128), draw(1, 96, 1, 128)
    dt, A = torch.rand(1, 96, 2, generator=generator, dtype=torch.float64), -draw(2).exp()
    inputs = (x, dt, A, B, C)
    truth = ssd_scan(*inputs, chunk_size=32, backend="reference")
    single = (t.to(device, torch.float32) for t in inputs)
    found = ssd_scan(*single, chunk_size=32, backend=backend).double().cpu()
    return float((found - truth).norm() / truth.norm())


def _triton() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        on_linux = platform.system() == "Linux"
        cure = "pip install triton" if on_linux and torch.cuda.is_available() else ""
        text = "missing: PyTorch's operations take its place"
        yield Finding("problem" if cure else "ok", "triton", text, cure)
        return
    if not torch.cuda.is_available():
        yield Finding("ok", "triton", f"{version}; not tried: there is no GPU to compile for")
        return
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        cure = "install gcc, or set CC: Triton builds its launchers with it"
        yield Finding("problem", "triton", f"{version}, and no C compiler", cure)
        return
    yield Finding("ok", "triton", f"{version} compiled and ran the scan above, with {compiler}")


def _nccl() -> Iterator[Finding]:
    distributed = torch.distributed
    if not distributed.is_available():
        cure = "install a torch build with torch.distributed to use several processes"
        yield Finding("warning", "nccl", "torch has no distributed package", cure)
    elif not torch.cuda.is_available():
        level: Literal["ok", "warning"] = "ok" if distributed.is_gloo_available() else "warning"
        text = "not needed without GPUs; gloo is " + ("there" if level == "ok" else "missing")
        yield Finding(level, "nccl", text)
    elif not distributed.is_nccl_available():
        cure = "install torch's CUDA build for Linux"
        yield Finding("warning", "nccl", "torch has no NCCL: one GPU alone", cure)
    else:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        with tempfile.TemporaryDirectory() as folder:
            store = distributed.FileStore(f"{folder}/store", 1)
            distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
            try:
                one = torch.ones(1, device="cuda")
                distributed.all_reduce(one)
                torch.cuda.synchronize()
            finally:
                distributed.destroy_process_group()
        n = torch.cuda.device_count()
        yield Finding("ok", "nccl", f"{version}, one all-reduce on GPU 0 of {n}")


def _bitsandbytes() -> Iterator[Finding]:
    """nf4 there and back, which is off by less than half of its widest step."""
    if platform.system() != "Linux":
        yield Finding("ok", "bitsandbytes", "is for Linux: no quantization= and 8-bit optimizers")
        return
    functional = bitsandbytes().functional
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    error = float((functional.dequantize_4bit(codes, state) - weight).abs().max())
    version = importlib.metadata.version("bitsandbytes")
    if error < 0.16:
        yield Finding("ok", "bitsandbytes", f"{version}, 4 bits on {device}")
    else:
        cure = "reinstall bitsandbytes for this CUDA; without it leave out quantization="
        yield Finding("problem", "bitsandbytes", f"{version}: 4 bits are off by {error:.2f}", cure)


def _tokenizer() -> Iterator[Finding]:
    tokenizer = load_tokenizer(FOLDER / "tiny_base")
    text = "Love is patient, 1 naïve café\n"
    again = tokenizer.decode(tokenizer.encode(text))
    version = importlib.metadata.version("tokenizers")
    if again == text:
        yield Finding("ok", "tokenizer", f"tokenizers {version}, the embedded one there and back")
    else:
        cure = "reinstall tokenizers and transformers"
        yield Finding("problem", "tokenizer", f"{version} gave back {again!r}", cure)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB available"
    if memory.available < 2 * GB:
        cure = "close what holds it: the demo needs about 1 GB, a 7B model 15"
        yield Finding("warning", "memory", text, cure)
    else:
        yield Finding("ok", "memory", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < 256e6:
        cure = "docker run --shm-size=2g, or data.num_workers=0"
        yield Finding("warning", "memory", f"/dev/shm has {size / 1e6:.0f} MB", cure)


def _disk(run_dir: Path) -> Iterator[Finding]:
    home = Path.home()
    hub = os.environ.get("HF_HOME") or home / ".cache" / "huggingface"
    places = {
        "runs": (run_dir, "run_dir=ELSEWHERE"),
        "data cache": (cache_folder(), "MAMBA2_CACHE"),
        "hub cache": (Path(hub), "HF_HOME"),
        "temporary": (Path(tempfile.gettempdir()), "TMPDIR"),
    }
    if torch.cuda.is_available():
        triton = os.environ.get("TRITON_CACHE_DIR") or home / ".triton"
        places["triton cache"] = (Path(triton), "TRITON_CACHE_DIR")
    for name, (folder, setting) in places.items():
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        text = f"{name} in {folder}: {free / GB:.1f} GB free"
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            why = f"{name} in {folder} cannot be written ({error.strerror})"
            yield Finding("problem", "disk", why, f"make it writable, or set {setting}")
            continue
        if free < LITTLE:
            level: Literal["warning", "problem"] = "problem" if free < TOO_LITTLE else "warning"
            yield Finding(level, "disk", text, f"free some, or set {setting}")
        else:
            yield Finding("ok", "disk", text)


def _hub(timeout: float) -> Iterator[Finding]:
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding("ok", "hub", "not asked: HF_HUB_OFFLINE is set, folders are read")
    elif answers(url, timeout):
        yield Finding("ok", "hub", f"{url} answers")
    else:
        cure = "give models and data as folders, and set HF_HUB_OFFLINE=1, or HF_ENDPOINT"
        yield Finding("warning", "hub", f"{url} did not answer within {timeout:g} s", cure)


def answers(url: str, timeout: float) -> bool:
    """Whether there is a server, whatever it says; in a thread, for no timeout bounds the look-up
    of a name."""
    heard: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=timeout
            ).close()
            heard.append(True)
        except urllib.error.HTTPError as error:
            heard.append(error.code < 500)  # a proxy's word for a server that is not there
        except (OSError, ValueError):
            heard.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 0.5)
    return bool(heard and heard[0])


def _wandb(timeout: float) -> Iterator[Finding]:
    url = wandb_url()
    modules = {name: module for name, (module, _) in PACKAGES.items()}
    missing = [name for name, module in modules.items() if not importlib.util.find_spec(module)]
    others = f"; not installed: {', '.join(missing)}" if missing else ""
    key = os.environ.get("WANDB_API_KEY") or stored_key(url)
    if os.environ.get("WANDB_MODE", "online") != "online":
        found = f"WANDB_MODE is {os.environ['WANDB_MODE']}"
        yield Finding("ok", "wandb", f"{found}: runs are logged offline{others}")
    elif not key:
        yield Finding("ok", "wandb", f"no key: runs are logged offline{others}")
    elif fault := wandb_fault(url, key, timeout):
        yield Finding("warning", "wandb", fault, "runs are logged offline until that is mended")
    else:
        yield Finding("ok", "wandb", f"{url} takes the key: runs are logged online{others}")
