"""Secrets stay in the environment: settings that hold one are refused, for they are saved with the
run, shown in its report and sent to trackers; what is printed or logged has them struck out.

A secret is the value of an environment variable whose name says so, a string of the form that a
service gives its keys, or what stands before the @ of a URL. A password that is none of these
cannot be told from a word.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Collection
from typing import Any

from mamba2_train.errors import UserError

STRUCK = "***"
SHORTEST = 8  # characters of a variable's value that is taken for a secret
_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_KEY = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}"
    r"|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|wandb_v1_\w{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_IN_URL = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
_ASSIGNED = re.compile(r"\b([A-Z][A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)=)([^\s'\",]+)")


def redacted(text: str) -> str:
    """`text` with every secret in it struck out."""
    for value in _of_environment().values():
        text = text.replace(value, STRUCK)
    text = _ASSIGNED.sub(rf"\g<1>{STRUCK}", text)
    return _IN_URL.sub(STRUCK, _KEY.sub(STRUCK, text))


def refuse_secrets(values: Any, leave: Collection[str] = (), path: str = "") -> None:
    """Raise a UserError that names the setting which holds a secret, if one does.

    Args:
        leave: paths of settings that are not looked at.
    """
    if path in leave:
        return
    if isinstance(values, dict):
        for key, value in values.items():
            refuse_secrets(value, leave, f"{path}.{key}".lstrip("."))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            refuse_secrets(value, leave, f"{path}.{i}")
    elif isinstance(values, str) and (what := _secret_in(values)):
        raise UserError(
            f"{path}: holds {what}, and settings are saved with the run and shown in its report: "
            "remove it, and leave secrets to the environment and to the tools that read them there"
        )


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def redact_tracebacks() -> None:
    """Let the traceback of whatever ends the process hold no secret."""
    before = sys.excepthook

    def show(kind: Any, error: Any, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show


def _secret_in(text: str) -> str | None:
    for name, value in _of_environment().items():
        if value in text:
            return f"the value of {name}"
    if found := _KEY.search(text):
        return f"what looks like a key ({found[0][:4]}...)"
    if (found := _IN_URL.search(text)) and (":" in found[0] or len(found[0]) >= 16):
        return "a password or token in a URL"
    return None


def _of_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _NAME.search(name)
    }
