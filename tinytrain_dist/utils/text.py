"""Format lists, sizes and durations for people."""

from __future__ import annotations

from collections.abc import Sequence


def format_list(numbers: Sequence[object], most: int = 12) -> str:
    """Format the first items of a list for a sentence."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_bytes(count: float) -> str:
    """Bytes in the unit that a person would choose."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_age(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
