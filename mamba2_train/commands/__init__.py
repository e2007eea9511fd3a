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
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console

from mamba2_train import sweep
from mamba2_train.commands.help import print_help, recipes
from mamba2_train.errors import UserError, nearest
from mamba2_train.processes import forbid_restart, is_first_to_fail, log_only, part, rank
from mamba2_train.schema import Group, TrainConfig, validated
from mamba2_train.tracking import run_stamp

console = Console(highlight=False)


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
                    run(validated(schema, _values(composed)))
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
        elif _is_full_disk(error):
            message = f"the disk is full ({error}): free some space, or set run_dir elsewhere"
        else:
            message = ""
        if first and (_debug() or not message):
            return
        if first:
            which = f" on rank {rank()}" if rank() else ""
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"[bold red]error{which}:[/] {_escaped(message)}"
            )
            forbid_restart()
        sys.exit(1)


def _is_full_disk(error: BaseException) -> bool:
    # torch's own writer reports it as a RuntimeError without a number
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "PytorchStreamWriter failed writing" in str(error)


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
