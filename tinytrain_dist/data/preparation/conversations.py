"""Check the form of conversations, and pass them on as documents: JSON in UTF-8 that knows where it comes from.

Must not know tokenizers or chat templates.
"""

from __future__ import annotations

import json
from typing import Any

from tinytrain_dist.data.preparation.selection import field_of
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import parse_json

TOOLS_FIELD = "tools"  # beside the field with the messages
# By the word in "from", in messages as ShareGPT and many data sets after it write them.
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Conversation(bytes):
    """A document: {"messages": [...]} as JSON, perhaps with a list of "tools". where: its file, and line or row."""

    where: str


def conversation(where: str, record: Any, messages_field: str) -> Conversation:
    """Return the conversation in a record. Errors: DataError that begins with `where`.

    messages_field: holds messages of the form {"role": ..., "content": ...}, or of ShareGPT's form {"from": ...,
    "value": ...}, which become the former.
    """
    messages = field_of(record, messages_field) if isinstance(record, dict) else None
    messages = [_with_role(message) for message in messages] if isinstance(messages, list) else messages
    if problem := _problem(messages, record, messages_field):
        raise DataError(f"{where}: {problem}")
    chat = {"messages": messages}
    if tools := _tools(where, record):
        chat[TOOLS_FIELD] = tools
    try:
        document = Conversation(json.dumps(chat, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise DataError(f"{where}: a message has half a surrogate pair; repair it") from None
    document.where = where
    return document


def conversation_of_row(where: str, messages: Any, tools: Any, messages_field: str) -> Conversation:
    """Return the conversation in a row of a table, as `conversation` does for a line of JSON.

    Arrow gives each object all keys that an object of its column has, with null for those that it lacks. They are left
    out, because a template may ask whether a key is there.
    """
    messages = [_without_nulls(message, keep="content") for message in messages] if messages is not None else None
    return conversation(where, {messages_field: messages, TOOLS_FIELD: _without_nulls(tools)}, messages_field)


def _with_role(message: Any) -> Any:
    """Return a message of ShareGPT's form with "role" and "content"; any other message as it is."""
    if not isinstance(message, dict) or "role" in message or not {"from", "value"} <= message.keys():
        return message
    role = _SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
    return {"role": role, "content": message["value"]} if role else message


def _without_nulls(value: Any, keep: str = "") -> Any:
    """Return a value without the keys whose value is None, at any depth. keep: a key that stays."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None or name == keep}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _tools(where: str, record: dict[str, Any]) -> list[Any] | None:
    """Return the tools of a conversation: a list, or JSON that is one. Errors: DataError that begins with `where`."""
    tools = record.get(TOOLS_FIELD)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise DataError(f"{where}: the text in 'tools' is not JSON ({error}); write a list of tools") from None
    if tools and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is a {type(tools).__name__} and not a list; write a list of tools")
    return tools or None


def _problem(messages: Any, record: Any, messages_field: str) -> str:
    """Return what is wrong with the form of messages, and what to do; "" if nothing is."""
    if not isinstance(messages, list):
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        lists = [name for name, value in record.items() if isinstance(value, list)] if isinstance(record, dict) else []
        example = f", perhaps {lists[0]!r}" if lists else ""
        return (
            f"has no list in the field {messages_field!r} (found: {found or 'no fields'}); set --text-field to the "
            f"field with the messages{example}"
        )
    if not messages:
        return "has no messages; remove it"
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict) and "role" not in message and "from" in message:
            return (
                f'message {number} is "from" {message["from"]!r}, but only {", ".join(_SHAREGPT_ROLES)} are known '
                'there; write {"role": ..., "content": ...} with the role that the chat template knows'
            )
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'message {number} has no "role"; write {{"role": "user", "content": "..."}}'
        if message.get("content") is None and not message.get("tool_calls"):
            return f'message {number} has no "content"; write {{"role": "{message["role"]}", "content": "..."}}'
    return ""
