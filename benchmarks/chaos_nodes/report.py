"""Print what the events of a chaos run have cost, and say what was not as it has to be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from chaos_nodes.events import RETURN, Outcome
from chaos_nodes.run_history import PARTS

MOST_SECONDS = {False: 15.0, True: 12.0}  # beyond loading: after a lost node, and until a returned one trains


def describe(number: int, outcome: Outcome) -> str:
    """Return a line about one event."""
    if outcome.seconds is None:
        return f"{number}: {outcome.kind} {outcome.address}: {outcome.restarts} restarts"
    text = f"{number}: {outcome.kind} {outcome.address}: {outcome.seconds:.1f} s, {outcome.lost_steps} steps lost"
    assert outcome.recovery is not None
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in outcome.recovery.parts.items())
    more = f", {outcome.restarts} restarts" if outcome.restarts > 1 else ""
    return f"{text}{more} ({parts})"


def broken_rules(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence for each event that has lost more steps than it may."""
    return [
        f"event {number}, {each.kind} of {each.address}, lost {each.lost_steps} steps; {each.allowed_steps} are allowed"
        for number, each in enumerate(outcomes, start=1)
        if each.lost_steps > each.allowed_steps
    ]


def warnings(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence for each event that took longer than it should. A slow machine makes it so."""
    late = []
    for number, each in enumerate(outcomes, start=1):
        most = MOST_SECONDS[each.kind.startswith(RETURN)]
        if each.seconds is not None and each.seconds > most:
            late.append(f"event {number}, {each.kind} of {each.address}, took {each.seconds:.1f} s, not {most:.0f} s")
        if each.seconds is None and each.restarts:
            late.append(f"event {number}: the run left the slow node {each.address} behind")
    return late


def table(outcomes: Sequence[Outcome]) -> str:
    """Return tables of the seconds, median and worst, and of the lost steps."""
    rows = [
        "| event | number | median s | worst s | most steps lost | more than one restart |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted({_group(each) for each in outcomes}):
        own = [each for each in outcomes if _group(each) == kind]
        seconds = [each.seconds for each in own if each.seconds is not None]
        times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
        again = sum(each.restarts > 1 for each in own)
        rows.append(f"| {kind} | {len(own)} | {times} | {max(each.lost_steps for each in own)} | {again} |")
    rows += [
        "",
        "| part | after a fault: median s | worst s | after a return: median s | worst s |",
        "|---|---|---|---|---|",
    ]
    for part in PARTS:
        cells = []
        for is_return in (False, True):
            own = [each for each in outcomes if each.kind.startswith(RETURN) == is_return and each.restarts == 1]
            seconds = [each.recovery.parts[part] for each in own if each.recovery is not None]
            cells.append(f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -")
        rows.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _group(outcome: Outcome) -> str:
    return outcome.kind.partition(",")[0]
