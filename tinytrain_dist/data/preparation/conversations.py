"""Check the form of conversations, and pass them on as documents: JSON in UTF-8 that knows where it comes from.

Must not know tokenizers or chat templates.
"""

from __future__ import annotations

import json
from typing import Any

from tinytrain_dist.data.preparation.selection import field_of
from tinytrain_dist.errors import DataError


class Conversation(bytes):
    """A document: {"messages": [...]} as JSON, perhaps with "tools". where: the file and the line or row of it."""

    where: str


def conversation(where: str, record: Any, messages_field: str) -> Conversation:
    """Return the conversation in a record. Errors: DataError that begins with `where`."""
    messages = field_of(record, messages_field) if isinstance(record, dict) else None
    if problem := _problem(messages, record, messages_field):
        raise DataError(f"{where}: {problem}")
    chat = {"messages": messages}
    if record.get("tools"):
        chat["tools"] = record["tools"]
    try:
        document = Conversation(json.dumps(chat, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise DataError(f"{where}: a message has half a surrogate pair; repair it") from None
    document.where = where
    return document


def _problem(messages: Any, record: Any, messages_field: str) -> str:
    """Return what is wrong with the form of messages, and what to do; "" if nothing is."""
    if not isinstance(messages, list):
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        return (
            f"has no list in the field {messages_field!r} (found: {found or 'no fields'}); set --text-field to the "
            "field with the messages"
        )
    if not messages:
        return "has no messages; remove it"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'message {number} has no "role"; write {{"role": "user", "content": "..."}}'
        if message.get("content") is None and not message.get("tool_calls"):
            return f'message {number} has no "content"; write {{"role": "{message["role"]}", "content": "..."}}'
    return ""
