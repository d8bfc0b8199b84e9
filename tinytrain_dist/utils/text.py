"""Format lists, durations, sizes and ages for messages and tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def format_list(values: Sequence[object], limit: int = 12) -> str:
    """Return the first `limit` values separated by commas, followed by ", ..." if there are more."""
    listed = ", ".join(map(str, values[:limit]))
    return f"{listed}, ..." if len(values) > limit else listed


def format_choices(choices: Mapping[str, Sequence[object]]) -> str:
    """Return values to choose from, by setting: "a 1, 2; or b 4". A setting without values is left out."""
    return "; or ".join(f"{name} {format_list(values)}" for name, values in choices.items() if values)


def format_changes(changes: Mapping[str, object]) -> str:
    """Return changes of settings, where None stands for a setting that is left out: "with a = 1, without b"."""
    given = [
        f"{name} = {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in changes.items()
        if value is not None
    ]
    without = [name for name, value in changes.items() if value is None]
    parts = [f"with {', '.join(given)}"] if given else []
    return ", ".join([*parts, f"without {' and '.join(without)}"] if without else parts)


def is_url(place: str) -> bool:
    """Return whether a place is a URL and not a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", place) is not None


def format_duration(seconds: float) -> str:
    """Return a duration as h:mm:ss. A negative duration counts as 0."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_bytes(count: float) -> str:
    """Return a size in the decimal unit that gives a number below 1000 (or in TB), for example "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_age(seconds: float) -> str:
    """Return an age in seconds (below 2 minutes), minutes (below 2 hours), hours (below 2 days) or days."""
    for limit_seconds, unit_seconds, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit_seconds:
            return f"{max(0, seconds) / unit_seconds:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def printable(text: str, keep: str = "") -> str:
    """Return a text in which characters that a terminal does not show are escapes, such as \\x1b; `keep` stay."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; "" if it has none, or cannot say it."""
    try:
        return str(error).partition("\n")[0]
    except Exception:  # code of a user may define __str__
        return ""
