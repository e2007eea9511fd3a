"""The one exception that is a message to the user, not a bug.

Commands print it as a single line and leave with exit code 1; the traceback is shown only under
`debug=true`. So a message carries the value received and the cure, and nothing else is needed.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user asked for cannot be done; the message says why and what to do instead."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `choices`, or an empty string."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
