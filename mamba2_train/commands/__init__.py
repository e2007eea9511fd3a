"""Commands: a config becomes objects, the objects run. One screen each.

`command` gives them what they share: Hydra composes, pydantic checks, and a fault of the user's
is one line and exit code 1.
"""

import os

# Before torch loads OpenMP: its threads spin for milliseconds when they wait, which makes a run on
# a CPU several times slower as soon as anything else wants a core. This is some microseconds.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Before torch connects: it remembers the last collectives, for `watch` to name the one that hangs.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")

import errno
import functools
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from mamba2_train import sweep
from mamba2_train.commands.help import print_help, recipes
from mamba2_train.errors import UserError, nearest
from mamba2_train.processes import forbid_restart, is_first_to_fail, log_only, part, rank
from mamba2_train.redaction import (
    RedactingFormatter,
    redact_tracebacks,
    redacted,
    refuse_secrets,
)
from mamba2_train.schema import Group, TrainConfig, validated
from mamba2_train.tracking import run_stamp

console = Console(highlight=False)
# What Hydra may build from a config: plugins for sweeps, and logging, each a class by its module. A
# longer path could lead through a module's imports to anything.
_BUILT = re.compile(
    r"(hydra\._internal\.core_plugins\.\w+|hydra_plugins\.\w+\.\w+|optuna\.samplers"
    r"|mamba2_train(\.\w+){1,2}|logging(\.handlers)?|colorlog)\.[A-Z]\w*"
)
_BUILDS = ("_target_", "()", "class", "custom_search_space")  # keys whose value is called
_BUILT_FROM = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")  # of hydra
# what a system says of its disks and permissions, which no traceback explains
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
}


def command(
    schema: type[Group], config_name: str, free_text: tuple[str, ...] = ()
) -> Callable[..., Callable[[], None]]:
    """Turn `run(config)` into a `main()` that reads the command line.

    Args:
        free_text: keys whose values are taken as they are. Elsewhere Hydra's grammar gives
            commas, brackets, quotes and colons a meaning, which no prose survives.
    """

    def decorate(run: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(run)
        def task(composed: DictConfig) -> None:
            # inside, or Hydra would announce the fault with a line of its own
            with _one_line_errors():
                try:
                    values = _values(composed)
                    refuse_secrets(values, leave=free_text)
                    # it is noted, by us and by trackers
                    sys.argv[1:] = [redacted(argument) for argument in sys.argv[1:]]
                    run(validated(schema, values))
                finally:
                    part()

        @functools.wraps(run)
        def main() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print_help(config_name, schema, sys.modules[run.__module__].__doc__ or "")
                return
            extend_hydra()
            # Hydra then raises its errors instead of printing them, and we print all alike
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            sys.argv[1:] = [_quoted(argument, free_text) for argument in sys.argv[1:]]
            _quiet()
            redact_tracebacks()
            with _one_line_errors(), sweep.concluded():
                function: Callable[[DictConfig], float | None] = task
                if schema is TrainConfig and _sweeps():
                    sweep.check(sys.argv[1:])
                    function = sweep_job
                hydra.main(
                    version_base="1.3", config_path="pkg://mamba2_configs", config_name=config_name
                )(function)()

        return main

    return decorate


def sweep_job(composed: DictConfig) -> float:
    """What Hydra calls for each job of a sweep, and pickles where the job is to run elsewhere."""
    try:
        validated(TrainConfig, _values(composed))
    except UserError as error:
        return sweep.failed_job(str(error))
    return sweep.run_job()


def _sweeps() -> bool:
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv[1:]))


def _values(composed: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


class _OurConfigs(SearchPathPlugin):
    """A recipe, ours or a user's from anywhere, finds `train` and the groups; ours need no
    --config-dir."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("mamba2-train", "pkg://mamba2_configs")
        search_path.append("mamba2-train", "pkg://mamba2_recipes")


def extend_hydra() -> None:
    """Make our configs and `${run_stamp:}` known to Hydra."""
    OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True)
    Plugins.instance().register(_OurConfigs)
    ConfigLoaderImpl.load_configuration = _composed  # type: ignore[method-assign]


_compose = ConfigLoaderImpl.load_configuration


def _composed(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
    """What Hydra composes, refused before Hydra builds anything from it."""
    composed = _compose(self, *args, **options)
    refuse_code(composed)
    return composed


def refuse_code(composed: DictConfig) -> None:
    """Raise a UserError if a config asks for code to be called.

    Our groups choose by name among what there is; Hydra's own may name plugins for sweeps.
    """
    values: Any = OmegaConf.to_container(composed, resolve=False)
    hydra = values.pop("hydra", None) or {}
    _refuse_calls(values, "", None)
    refuse_secrets(hydra.get("job"), path="hydra.job")  # of a sweep it is saved at once
    for name in _BUILT_FROM:
        part = composed.hydra.get(name) if hydra else None
        if part is None:
            continue
        try:
            found = OmegaConf.to_container(part, resolve=True)
        except OmegaConfBaseException:  # what is not known before a job begins
            found = OmegaConf.to_container(part, resolve=False)
            if re.search(r"oc\.(create|decode)", str(found)):
                raise UserError(
                    f"hydra.{name}: oc.create and oc.decode may make what runs: write it out"
                ) from None
        _refuse_calls(found, f"hydra.{name}", _BUILT)


def _refuse_calls(value: Any, path: str, allowed: re.Pattern[str] | None) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_calls(item, f"{path}.{i}", allowed)
    if not isinstance(value, dict):
        if allowed is not None and isinstance(value, str) and re.match(r"(ext|cfg)://", value):
            raise UserError(f"{path}: {value} names code, and a config runs none: remove it")
        return
    for key, inner in value.items():
        where = f"{path}.{key}".lstrip(".")
        calls = key in _BUILDS if allowed is not None else key == "_target_"
        known = inner is None or (allowed is not None and allowed.fullmatch(str(inner)))
        if calls and not known:
            raise UserError(
                f"{where}: {inner} names code, and a config runs none: remove it, and choose among "
                "what there is by name (mamba2-train --help)"
            )
        _refuse_calls(inner, where, allowed)


def _quoted(argument: str, free_text: tuple[str, ...]) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key not in free_text:
        return argument
    # Hydra's escapes inside single quotes, where backslashes count only before a quote; and
    # OmegaConf's for what looks like an interpolation
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value, flags=re.S)
    value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    return f"{key}='{value}'"


def _quiet() -> None:
    """Show our own log lines from INFO on and those of the libraries from WARNING, of the first
    rank; the others' go to their logs."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger().handlers[0].setFormatter(RedactingFormatter("%(message)s"))
    if rank() > 0:
        logging.getLogger().handlers[0].setLevel(logging.ERROR)
    logging.getLogger("mamba2_train").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # its retries are of no use to anybody once the error says what could not be reached
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # rows cut by two meshes take two gathers, which is slow where it is rare: samples, checkpoints
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


class _one_line_errors:
    """Prints a UserError, or a fault of composition, as one line on stderr; exit code 1. Of several
    ranks the one that failed first speaks, and the logs have the tracebacks of all."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt):
            return
        log_only.error("failed", exc_info=error)
        first = is_first_to_fail()
        if isinstance(error, UserError):
            message = str(error)
        elif isinstance(error, HydraException | OmegaConfBaseException):
            message = _composition_fault(error)
        elif isinstance(error, YAMLError):
            message = f"a config is not YAML: {error}"
        else:
            message = _disk_fault(error)
        if first and (_debug() or not message):
            return
        if first:
            which = f" on rank {rank()}" if rank() else ""
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"[bold red]error{which}:[/] {_escaped(redacted(message))}"
            )
            forbid_restart()
        sys.exit(1)


def _disk_fault(error: BaseException) -> str:
    """What the disk, or who may write to it, has refused; empty if the fault is another."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            where = f": {cause.filename}" if cause.filename else ""
            if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                reason = f"the disk is full ({cause.strerror}{where}): free some space"
            else:
                reason = f"{cause.strerror}{where}: mend that"
            return f"{reason}, or set run_dir elsewhere; what was saved before is whole"
        cause = cause.__cause__ or cause.__context__
    if "PytorchStreamWriter failed writing" in str(error):  # without the system's number
        return f"the disk is full ({error}): free some space, or set run_dir elsewhere"
    return ""


def _debug() -> bool:
    return any(re.fullmatch(r"\+*debug=(true|True|1)", a) for a in sys.argv[1:])


def _escaped(message: str) -> str:
    return " ".join(message.split()).replace("[", r"\[")


def _composition_fault(error: Exception) -> str:
    """Hydra's message of several lines as one, with the nearest key that exists."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: needs a value"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        known = sorted(error.options or ([] if group else recipes()))
        if known:
            own = "" if group else "; your own needs --config-dir FOLDER"
            asked = f"{group}=" if group else "--config-name "
            hint = nearest(name, known)
            return f"{asked}{name}: no such choice.{hint} Known: {', '.join(known)}{own}"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        known = sorted(str(key) for key in cause.parent_node)
        hint = nearest(str(cause.key), known)
        return f"{cause.full_key}: unknown key.{hint} Known: {', '.join(known)}"
    return str(error).split("Config search path:")[0]
