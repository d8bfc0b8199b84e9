"""Convert plain values (from TOML, JSON or a command line) to the declared type of a setting; format values as TOML.

Must not know any setting by name: each function takes a type or a value.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "None"}


def convert_value(hint: Any, value: Any) -> Any:
    """Return `value` as an instance of the type `hint`. A whole number becomes a float if `hint` is float.

    hint: int, float, str, bool, None, a Literal, a tuple of one type, or a union of these. In a union, the first
    option that fits is used. Errors: TypeError if no option fits.

    An empty list fits only a tuple that is not in a union: where None is possible, it already means "nothing".
    """
    if get_origin(hint) is tuple and value in ([], ()) and get_args(hint)[-1] is Ellipsis:
        return ()
    options = get_args(hint) if is_optional(hint) else (hint,)
    for option in options:
        with contextlib.suppress(TypeError):
            return _convert_to_plain_type(option, value)
    raise TypeError(f"{value!r} is not {describe_type(hint)}")


def _convert_to_plain_type(kind: Any, value: Any) -> Any:
    """Return `value` as an instance of `kind`, which must not be a union. Errors: TypeError if it does not fit."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        item_types = get_args(kind)
        any_length = item_types[-1] is Ellipsis  # as in tuple[str, ...], which still needs one item
        if len(value) == len(item_types) or (value and any_length):
            return tuple(_convert_to_plain_type(item_types[0], item) for item in value)
    elif value is None and kind is type(None):
        return None
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:  # not isinstance, because True is also an int
        return value
    elif kind is str and isinstance(value, Path):
        return str(value)
    raise TypeError


def is_optional(hint: Any) -> bool:
    """Return whether a type is a union that allows None. Every union among the types of settings does."""
    return type(None) in get_args(hint)


def describe_type(hint: Any) -> str:
    """Return a type in words for an error message, for example "a whole number or None"."""
    if is_optional(hint):
        return " or ".join(describe_type(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices)
    if get_origin(hint) is tuple:
        item_types = get_args(hint)
        plural = TYPE_NAMES[item_types[0]].removeprefix("a ") + "s"
        return f"a list of {plural}" if item_types[-1] is Ellipsis else "two numbers"
    return TYPE_NAMES[hint]


def to_toml_value(value: Any) -> str:
    """Return a string, number, boolean or list as TOML.

    The result is JSON with two changes. Non-ASCII characters are not escaped, because JSON would escape some of them
    as surrogate pairs, which TOML rejects. DEL is escaped, because TOML does not allow it unescaped.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
