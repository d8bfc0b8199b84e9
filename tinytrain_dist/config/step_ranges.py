"""Read ranges of steps from a setting: "1000:1010,2000:2004". Must not know what they are for."""

from __future__ import annotations

import re

STEP_RANGES = re.compile(r"\s*[0-9]{1,15}:[0-9]{1,15}\s*(,\s*[0-9]{1,15}:[0-9]{1,15}\s*)*")


def parse_step_ranges(text: str | None) -> tuple[range, ...]:
    """Return the ranges in ascending order, with ranges that touch or overlap joined; () for None.

    text: START:STOP, both ends included, or several of these with commas between, as `STEP_RANGES` matches.
    """
    pairs = sorted((int(start), int(stop)) for start, stop in re.findall(r"(\d+):(\d+)", text or ""))
    joined: list[range] = []
    for start, stop in pairs:
        if joined and start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, stop + 1))
        else:
            joined.append(range(start, stop + 1))
    return tuple(joined)


def up_to(ranges: tuple[range, ...], step: int) -> tuple[range, ...]:
    """Return the parts of the ranges up to `step`, which is included."""
    return tuple(range(part.start, min(part.stop, step + 1)) for part in ranges if part.start <= step)


def format_step_ranges(ranges: tuple[range, ...]) -> str:
    """Return ranges as a setting has them; "" for none. `parse_step_ranges` is the inverse."""
    return ",".join(f"{part.start}:{part.stop - 1}" for part in ranges)
