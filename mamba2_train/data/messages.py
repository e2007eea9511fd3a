"""Messages of a conversation as chat templates want them: `role`, `content`, `tool_calls`.

Rows spell them in several ways: OpenAI's `role`/`content`, ShareGPT's `from`/`value`, tool calls
whose arguments are a JSON string, and, in files with typed columns, every key of every message,
most of them null.
"""

import json
from typing import Any

from mamba2_train.data.files import BadRow
from mamba2_train.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {  # what stands in `from`
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # its value is the call, in JSON
    "observation": "tool",
    "function_response": "tool",
}

Message = dict[str, Any]


def is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_messages(value: Any, column: str) -> list[Message]:
    """The messages in a row's `column`; raises BadRow for what no template could render."""
    if value is None:
        return []
    if not is_messages(value):
        raise BadRow(f"column {column!r} holds {shown(value)}; make it a list of messages")
    return [_message(item, f"message {i} of {column!r}") for i, item in enumerate(value, 1)]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """What a row's `tools` offer, as a list of JSON schemas; None where there are none."""
    if isinstance(value, str):
        value = _json(value, "column 'tools'") if value.strip() else None
    else:
        value = _without_null(value)
    if value and not is_messages(value):
        raise BadRow(f"column 'tools' holds {shown(value)}; make it a list of JSON schemas")
    return value or None


def has_content(messages: list[Message]) -> bool:
    return any(message["content"].strip() or message.get("tool_calls") for message in messages)


def shown(value: Any) -> str:
    """`value` and its type, short enough for one line."""
    text = repr(value)
    return f"{text[:57] + '...' if len(text) > 60 else text} ({type(value).__name__})"


def _message(raw: dict[str, Any], where: str) -> Message:
    # columns with a type give every message the keys of all, and templates ask which are defined
    message = _without_null(raw)
    sharegpt = "from" in message and "role" not in message
    if sharegpt:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role = message.get("role")
    known = SHAREGPT_ROLES if sharegpt else ROLES
    if not isinstance(role, str) or role not in known:
        if role is None:
            raise BadRow(f"{where} has no role; give it one of: {', '.join(ROLES)}")
        raise BadRow(
            f"{where} has the unknown role {role!r}.{nearest(str(role), known)} "
            f"Known: {', '.join(known)}"
        )
    calls = message.pop("tool_calls", None) or []
    if "function_call" in message:  # OpenAI's earlier spelling
        calls = [message.pop("function_call")]
    if role == "function_call":
        parsed = _json(message.pop("content") or "", where)
        calls = parsed if isinstance(parsed, list) else [parsed]
    if sharegpt:
        role = SHAREGPT_ROLES[role]
    if not isinstance(calls, list):
        raise BadRow(f"{where} has tool_calls {shown(calls)}; make them a list")
    message |= {"role": role, "content": _content(message.get("content"), bool(calls), where)}
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    return message


def _content(value: Any, optional: bool, where: str) -> str:
    if value is None:
        if optional:
            return ""
        raise BadRow(f"{where} has no content; give it a string, or leave the message out")
    if isinstance(value, str):
        return value
    if is_messages(value) and all(isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise BadRow(f"{where} has the content {shown(value)}; make it a string")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """With its arguments as an object: templates write them with `tojson`, which would put a
    string into quotes once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has the tool call {shown(call)}; give it a name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}, call of {function['name']!r}") if arguments else {}
    function = {**function, "arguments": arguments}
    outer = {key: value for key, value in call.items() if key != "function"}
    return {"type": "function", **(outer if "function" in call else {}), "function": function}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, TypeError) as error:
        raise BadRow(f"{where} holds {shown(text)}; make it JSON") from error


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value
