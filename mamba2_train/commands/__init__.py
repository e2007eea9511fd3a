"""Commands: a config becomes objects, the objects run. One screen each.

`command` gives them what they share: Hydra composes, pydantic checks, and a fault of the user's
is one line and exit code 1.
"""

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from rich.console import Console

from mamba2_train.errors import UserError, nearest
from mamba2_train.schema import Group, validated
from mamba2_train.tracking import register_run_stamp

console = Console(highlight=False)


def command(schema: type[Group], config_name: str) -> Callable[..., Callable[[], None]]:
    """Turn `run(config)` into a `main()` that reads the command line."""

    def decorate(run: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(run)
        def task(composed: DictConfig) -> None:
            run(validated(schema, OmegaConf.to_container(composed, resolve=True)))  # type: ignore[arg-type]

        def main() -> None:
            register_run_stamp()
            # Hydra then raises its errors instead of printing them, and we print all alike
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            if sys.stderr.isatty():
                logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
            warnings.filterwarnings("ignore", module="lightning")
            with _one_line_errors():
                hydra.main(
                    version_base="1.3", config_path="pkg://mamba2_configs", config_name=config_name
                )(task)()

        return main

    return decorate


class _one_line_errors:
    """Prints a UserError, or a fault of composition, as one line on stderr; exit code 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or _debug():
            return
        if isinstance(error, UserError):
            message = str(error)
        elif isinstance(error, HydraException | OmegaConfBaseException):
            message = _composition_fault(error)
        elif isinstance(error, OSError) and error.errno == 28:
            message = f"the disk is full: {error.filename or 'a write failed'}; free some space"
        else:
            return
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]error:[/] {_escaped(message)}"
        )
        sys.exit(1)


def _debug() -> bool:
    return any(re.fullmatch(r"\+*debug=(true|True|1)", a) for a in sys.argv[1:])


def _escaped(message: str) -> str:
    return " ".join(message.split()).replace("[", r"\[")


def _composition_fault(error: Exception) -> str:
    """Hydra's message of several lines as one, with the nearest key that exists."""
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, ConfigKeyError | Exception):
        key = getattr(cause, "full_key", None)
        parent = getattr(cause, "parent_node", None)
        if key and isinstance(parent, DictConfig):
            known = [str(k) for k in parent]
            hint = nearest(str(key).rsplit(".", 1)[-1], known)
            return f"{key}: unknown key.{hint} Known: {', '.join(sorted(known))}"
    return str(error)
