"""Which run a run continues, from which checkpoint, and whether it may.

resume=auto    the newest checkpoint in run_dir, or in the newest run of this name
resume=PATH    that checkpoint, or the newest of that run; the run goes on in run_dir
"""

import itertools
import json
import logging
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from mamba2_train.errors import UserError
from mamba2_train.parallel.checkpoint import META, read_meta
from mamba2_train.parallel.checkpoint import is_whole as is_whole_folder
from mamba2_train.parallel.shards import (
    boxes,
    is_first_holder,
    local,
    mesh_of,
    summed_over_ranks,
)
from mamba2_train.processes import agreed
from mamba2_train.saving import CHECKPOINTS, RUN, checkpoints_in, step_of
from mamba2_train.schema import TrainConfig
from mamba2_train.tracking import CSV_FOLDER, run_stamp

logger = logging.getLogger(__name__)

START = "start.json"  # in the run folder: what was measured and sampled before the first step

# What may differ between the two parts of a run: everything else changes the numbers. Model and
# data may have moved; what they hold is compared by checksum.
FREE = (
    *("name", "run_dir", "debug", "resume", "logger", "callbacks"),
    "strategy",  # the ranks are counted
    *("trainer.max_epochs", "trainer.max_steps", "trainer.validate_every"),
    *("trainer.log_every", "trainer.progress_bar", "model.checkpointing"),
    *("trainer.on_nan", "trainer.max_skipped"),
    *("model.source", "model.revision", "model.tokenizer", "model.preset"),
    *("data.source", "data.validation_source", "data.chat_template", "data.num_workers"),
    *("long_context.offload", "long_context.ranks"),
    *("data.preview", "data.on_bad_row"),  # what was read so far was good, or is left out still
)
ROWS = ("data.batch_size", "trainer.accumulate")  # a step takes as many over all ranks
SOURCES = ("source", "validation_source")


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from."""

    checkpoint: Path
    run: dict[str, Any]  # as `identity` made it
    csv_rows: int
    ranks: int = 1  # processes, of which each has a state of its own in it

    @property
    def folder(self) -> Path:
        """Of the run that wrote it."""
        return self.checkpoint.parent.parent

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)


def locate(config: TrainConfig) -> tuple[TrainConfig, Resumed | None]:
    """The checkpoint to go on from, if any, and the config with the folder that the run owns.

    Raises:
        UserError: there is nothing at the path given; the folder holds another run, or a later
            state of this one; or a setting differs that changes the numbers.
    """
    if config.resume is None and config.run_dir.name == run_stamp():
        own = agreed("run_dir", lambda: str(_unused(config.run_dir)))
        config = config.model_copy(update={"run_dir": Path(own)})
    found = agreed("resume", lambda: str(_find(config) or ""))
    if not found:
        if config.resume is not None:
            logger.info("resume=%s: no checkpoint to go on from, starting afresh", config.resume)
        return config, None
    path = Path(found)
    saved = read_meta(path)
    state = next(s for s in saved["callbacks"].values() if "csv_rows" in s)
    resumed = Resumed(path, saved[RUN], state["csv_rows"], len(state["ranks"]))
    if config.resume == "auto":
        config = config.model_copy(update={"run_dir": resumed.folder})
    check_config(resumed, config)
    logger.info("going on after step %d, from %s", resumed.step, path)
    return config, resumed


def identity(
    config: TrainConfig, model: nn.Module, data: str, world: int, resumed: Resumed | None
) -> dict[str, Any]:
    """What a checkpoint belongs to; raises a UserError if that is not what `resumed` goes on with.

    Args:
        data: fingerprint of the data; world: number of ranks that see rows of their own.
    """
    now: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "model": _fingerprint(model),
        "data": data,
        "world": world,
        "rows": world * config.data.batch_size * config.trainer.accumulate,
    }
    if resumed is not None:
        cures = {
            "model": f"model.source={config.model.source} does not hold the weights that it "
            "adapted: give the model that the run began with",
            "data": f"data.source: {config.data.title} is not what it was trained on: give the "
            "data and the tokenizer that the run began with",
            "rows": f"it had {resumed.run['world']} ranks and this run has {world}, with the same "
            "rows in a step only if data.batch_size and trainer.accumulate make up for it: steps "
            f"had {resumed.run['rows']} rows and have {now['rows']}: start as many ranks",
            "world": f"it had {resumed.run['world']} ranks and this run has {world}, which see "
            "streamed, length-grouped or continued data in another order: start as many",
        }
        ordered = config.data.streaming or config.data.length_grouped
        if not (ordered or config.data.packing == "continued"):
            del cures["world"]
        then = resumed.run
        if 0 in (then["model"][2], now["model"][2]):  # cut over ranks before, or now
            then = then | {"model": [*then["model"][:2], now["model"][2]]}
        for key, cure in cures.items():
            if then[key] != now[key]:
                raise UserError(f"cannot resume {resumed.checkpoint}: {cure}, or set resume=null")
    return now


def check_config(resumed: Resumed, config: TrainConfig) -> None:
    """Raise a UserError that names the settings which differ and change the numbers."""
    then, now = _flat(resumed.run["config"]), _flat(config.model_dump(mode="json"))
    free: tuple[str, ...] = FREE
    per_rank = config.data.batch_size * config.trainer.accumulate
    ranks, rest = divmod(resumed.run["rows"], per_rank)
    if not rest and ranks and _processes(config) % ranks == 0:
        free += ROWS  # as many rows on another number of ranks, which `identity` counts
    changed = [
        f"{key} was {then[key]} and is {now.get(key)}"
        for key in then
        if now.get(key) != then[key] and not any(f"{key}.".startswith(f"{f}.") for f in free)
    ]
    if changed:
        raise UserError(
            f"cannot resume {resumed.checkpoint}: {'; '.join(changed)}; set what it was, or "
            "resume=null to start afresh"
        )
    if config.long_context.kind == "truncated" and resumed.ranks != _processes(config):
        raise UserError(
            f"cannot resume {resumed.checkpoint}: each of its {resumed.ranks} ranks carries states "
            f"of its own rows and heads, and this run has {_processes(config)}: start as many, or "
            "set resume=null"
        )
    for key in ("trainer.max_epochs", "trainer.max_steps"):
        if then[key] != now[key]:
            logger.info(
                "%s was %s and is %s: the learning rate follows the new length",
                *(key, then[key], now[key]),
            )


def _processes(config: TrainConfig) -> int:
    """That the run has or is about to have."""
    s = config.strategy
    devices = s.devices if s.devices != "auto" else max(torch.cuda.device_count(), 1)
    return int(os.environ.get("WORLD_SIZE", devices * s.num_nodes))


def inherit(resumed: Resumed, run_dir: Path) -> None:
    """Take over what the run noted before its first step, and its curves, into another folder."""
    for name in (START, f"{CSV_FOLDER}/metrics.csv"):
        old, new = resumed.folder / name, run_dir / name
        if old.is_file() and not new.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)


def read_start(run_dir: Path) -> dict[str, Any]:
    """What the first process of the run noted; empty if nothing that can be read."""
    try:
        return dict(json.loads((run_dir / START).read_text()))
    except (OSError, ValueError):
        return {}


def is_whole(checkpoint: Path) -> bool:
    """Whether the disk gives back what was written: every part has its checksum."""
    if checkpoint.is_dir():
        return is_whole_folder(checkpoint)
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except Exception:  # whatever zipfile makes of bytes that nobody wrote
        return False


def _find(config: TrainConfig) -> Path | None:
    if config.resume is None:
        there = _checkpoints(config.run_dir)
        if there:
            raise UserError(
                f"{config.run_dir} holds a run, at step {step_of(there[-1])}: resume=auto goes on "
                "with it; or set another run_dir"
            )
        return None
    if config.resume == "auto":
        folder: Path | None = config.run_dir
        if config.run_dir.name == run_stamp() and not _checkpoints(config.run_dir):
            folder = _newest_run(config.run_dir.parent, config.name)
        return _newest_whole(folder) if folder is not None else None

    given = Path(config.resume)
    if given.is_dir() and not (given / META).is_file():
        chosen = _newest_whole(given)
        if chosen is None:
            raise UserError(f"resume={given}: there is no checkpoint in {given / CHECKPOINTS}")
    elif not given.exists():
        raise UserError(f"resume={given}: there is no such file; give auto, a checkpoint or a run")
    elif not is_whole(given) or not _is_ours(given):
        raise UserError(f"resume={given}: it is damaged or no checkpoint of mamba2-train")
    else:
        chosen = given.resolve()
    later = [p for p in _checkpoints(config.run_dir) if step_of(p) > step_of(chosen)]
    if later:
        raise UserError(
            f"{config.run_dir} holds a later state, step {step_of(later[-1])}: resume=auto goes "
            "on with it; or set another run_dir"
        )
    return chosen


def _unused(run_dir: Path) -> Path:
    """`run_dir`, or, where a clock has named another run so before, with a number behind it. What
    Slurm or torchrun starts again has the name that it had."""
    env = os.environ
    if "SLURM_JOB_ID" in env or env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return run_dir
    numbered = (run_dir.with_name(f"{run_dir.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([run_dir], numbered) if not path.exists())


def _newest_run(folder: Path, name: str) -> Path | None:
    """Of the runs in `folder` called `name`, the one that was started last."""
    started = {}
    for config in folder.glob("*/config.yaml"):
        try:
            values = yaml.safe_load(config.read_text())
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(values, dict) and values.get("name") == name:
            started[config.parent] = config.stat().st_mtime_ns
    return max(started, key=lambda run: (started[run], run.name), default=None)


def _newest_whole(run: Path) -> Path | None:
    for path in reversed(_checkpoints(run)):
        if is_whole(path) and _is_ours(path):
            return path
        logger.warning("%s is damaged: trying the one before it", path)
    return None


def _is_ours(path: Path) -> bool:
    try:
        return RUN in read_meta(path)
    except Exception:  # whatever torch makes of what is no checkpoint
        return False


def _checkpoints(run: Path) -> list[Path]:
    return checkpoints_in(run.resolve() / CHECKPOINTS)


def _fingerprint(model: nn.Module) -> list[int]:
    """Three checksums: of the names, shapes and dtypes of all tensors but quantized ones, of the
    values that are not trained (the others are in the checkpoint), and of quantized ones' scales.

    The second is a sum over elements, so that ranks that hold parts of a tensor come to the same
    as a process that holds all of it.
    """
    described = 0
    values = torch.zeros((), dtype=torch.int64)  # which wraps around, alike everywhere
    for name, found in boxes(model):
        p, box = found[0]  # split heads have several, of one plain tensor
        described = zlib.crc32(f"{name} {tuple(box.size)} {p.dtype}".encode(), described)
        for p, box in found:
            if not p.requires_grad and is_first_holder(model, p):
                values += _sum_of_bits(name, box.local, box.offsets)
    for p in model.parameters():
        if not p.is_floating_point() and is_first_holder(model, p):
            values += local(p.detach()).sum(dtype=torch.int64).cpu()  # in any rank's order
    return [described, int(summed_over_ranks(model, values)), _scales(model)]


def _scales(model: nn.Module) -> int:
    """Checksum of what quantized weights have beside their codes; 0 where they are cut over ranks,
    each of which has scales of its own."""
    if mesh_of(model) is not None:
        return 0
    codes = {name for name, _ in model.named_parameters()}
    checksum = 0
    for name, tensor in model.state_dict().items():
        if name not in codes and isinstance(tensor, torch.Tensor):
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            checksum = zlib.crc32(raw.numpy().data, zlib.crc32(name.encode(), checksum))
    return checksum


def _sum_of_bits(name: str, part: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    """Of a part of a tensor that begins at `offsets`: its elements' bits, times a number by which
    rows, columns and tensors differ."""
    raw = part.detach().cpu().contiguous()
    if raw.numel() == 0:
        return torch.zeros((), dtype=torch.int64)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[raw.element_size()]
    bits = raw.view(-1).view(integer).view(raw.shape[0] if raw.dim() else 1, -1)
    first_row, first_column = (*offsets, 0, 0)[:2]
    rows = torch.arange(first_row, first_row + bits.shape[0]) * 2_654_435_761 + 1
    columns = torch.arange(first_column, first_column + bits.shape[1]) * 40_503 + 3
    total = (bits.sum(1, dtype=torch.int64) * rows).sum()
    total += (bits.sum(0, dtype=torch.int64) * columns).sum()
    return total * (zlib.crc32(name.encode()) | 1)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == "sources" and value:  # free to move, as data.source is
            value = [{k: v for k, v in one.items() if k not in SOURCES} for one in value]
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
