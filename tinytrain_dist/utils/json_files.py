"""Write JSON that every parser accepts, and read JSON that a crash or another program may have damaged.

Python writes NaN and infinity as tokens that JSON does not have. Here they become null. `nulls_to_nan` restores NaN
where a number is expected. Must not know what is in a file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from tinytrain_dist.utils.regular_files import check_regular

# Deeper files are refused, so that code that follows the nesting by recursion cannot fail. Ours have about 10 levels.
MAX_DEPTH = 200
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, **options: Any) -> str:
    """Return a value as strict JSON: NaN and infinities become null. options: of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # some number is not finite, which is rare
        return json.dumps(_map_numbers(value, lambda number: None), allow_nan=False, **options)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; NaN and Infinity, which older versions wrote, are numbers.

    Errors: ValueError, whatever the text is.
    """
    try:
        value = json.loads(text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"brackets are nested deeper than {MAX_DEPTH} levels") from None
    if _is_deeper_than(value, MAX_DEPTH):
        raise ValueError(f"brackets are nested deeper than {MAX_DEPTH} levels")
    return value


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Errors: OSError; ValueError if it holds anything but JSON."""
    check_regular(path)
    return parse_json(path.read_bytes())


def read_json_dict(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Errors: OSError; ValueError if it holds anything but a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {describe_json_type(value)} instead of an object")
    return value


def describe_json_type(value: Any) -> str:
    """Return the type of a JSON value in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def is_whole_number(value: Any, least: int = 0) -> bool:
    """Return whether a JSON value is a whole number of at least `least` that fits into 63 bits."""
    return type(value) is int and least <= value < 2**63


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def whole_number(value: Any) -> int:
    """Return a JSON value if it is a whole number of at least 0; else 0."""
    return int(value) if is_whole_number(value) else 0


def is_file_name(value: Any) -> bool:
    """Return whether a JSON value can be the name of a file in a given folder."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    try:
        name = os.fsencode(value)
        return len(name) <= 255 and not set(name) & set(b"/\0")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def nulls_to_nan(value: Any) -> Any:
    """Return a copy of a JSON value with NaN in place of each null, also in lists and objects."""
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: nulls_to_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulls_to_nan(item) for item in value]
    return value


def spell_nonfinite(value: Any) -> Any:
    """Return a copy with the texts "NaN", "Infinity" and "-Infinity" in place of these numbers.

    For numbers that must survive a save exactly; `parse_nonfinite` reverses it.
    """
    return _map_numbers(value, lambda number: "NaN" if math.isnan(number) else f"{'-' * (number < 0)}Infinity")


def parse_nonfinite(value: Any) -> Any:
    """Return a copy with numbers in place of the texts that `spell_nonfinite` has written."""
    if isinstance(value, dict):
        return {key: parse_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [parse_nonfinite(item) for item in value]
    return NONFINITE.get(value, value) if isinstance(value, str) else value


def _map_numbers(value: Any, replace: Any) -> Any:
    """Return a copy with `replace(number)` in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: _map_numbers(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_numbers(item, replace) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return replace(value)
    return value


def _is_deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
