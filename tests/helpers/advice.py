"""Read the advice of a message as changes of settings, so that a test can follow it literally.

Must not know which advice is right.
"""

from __future__ import annotations

import re
from typing import Any

Change = dict[str, Any]  # by setting; None: leave it out. `ranks` is the number of processes


def advice_in(problem: str) -> list[Change]:
    """Return every change that a message offers. An assertion fails if it offers nothing that can be read."""
    setting = problem.partition(":")[0]
    offers = problem.partition("possible: ")[2].split("; or ") if "possible: " in problem else []
    offers += re.findall(r"\w+ can be .*|start 1 process, or set .*", problem)
    found = [change for offer in offers for change in _in_offer(offer, setting)]
    limits = re.findall(r"(\w+) to at (?:most|least) ([\d.e+-]*\d)", problem)
    found += [{name: int(limit) if limit.isdigit() else float(limit)} for name, limit in limits]
    if "leave it out" in problem:
        found.append({setting: None})
    assert found, f"no advice that can be followed: {problem}"
    return found


def _in_offer(offer: str, setting: str) -> list[Change]:
    offer = offer.removesuffix(", ...")
    if match := re.fullmatch(r"dp_replicate x dp_shard ([\dx, ]+)", offer):
        pairs = [pair.split(" x ") for pair in match[1].split(", ")]
        return [{"dp_replicate": int(replicas), "dp_shard": int(shards)} for replicas, shards in pairs]
    if match := re.fullmatch(r"(start 1 process, or set )?parallel = ([\w ]+?)(?: without ([\w, ]+))?", offer):
        without = dict.fromkeys(re.split(r", | and ", match[3])) if match[3] else {}
        return [{"ranks": 1}] * bool(match[1]) + [{"parallel": mode, **without} for mode in match[2].split(" or ")]
    if match := re.fullmatch(r"(\w+) = (\w+)", offer):
        return [{match[1]: match[2]}]
    match = re.fullmatch(r"(?:(\w+) (?:can be )?)?((?:\d+, )*\d+)", offer)
    assert match, f"no values that can be read: {offer}"
    return [{match[1] or setting: number} for number in _numbers(match[2])]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(", ")]


def with_change(values: Change, change: Change) -> Change:
    """Return settings with a change that was advised."""
    return {name: value for name, value in {**values, **change}.items() if value is not None}
