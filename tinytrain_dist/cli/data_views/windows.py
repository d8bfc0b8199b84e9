"""Show windows as text with visible document boundaries and tokens that do not count.

Must not know how windows are drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinytrain_dist.data.statistics.token_texts import TokenTexts
from tinytrain_dist.data.statistics.windows import MarkedWindow
from tinytrain_dist.utils.text import printable

BEGINS, CONTINUES = "document begins", "a document continues"
NOT_COUNTED = ("\x1b[2;31m", "\x1b[0m")  # faint red on a terminal
BOUNDARY = ("\x1b[1;36m", "\x1b[0m")
PLAIN_MARKS = ("[-", "-]")  # as wdiff marks what was removed


@dataclass(frozen=True)
class Segment:
    """Successive tokens that are shown in the same way."""

    boundary: str  # what begins before the first of them; "": nothing does
    counted: bool
    ids: list[int]


def segments(window: MarkedWindow) -> list[Segment]:
    """Divide a window where documents begin, and where tokens begin or cease to count."""
    boundaries = window.begins | window.continues
    cuts = boundaries.copy()
    cuts[0] = True
    cuts[1:] |= window.counted[1:] != window.counted[:-1]
    firsts = np.flatnonzero(cuts).tolist()
    found = []
    for first, end in zip(firsts, [*firsts[1:], len(window.tokens)], strict=True):
        boundary = (BEGINS if window.begins[first] else CONTINUES) if boundaries[first] else ""
        found.append(Segment(boundary, bool(window.counted[first]), window.tokens[first:end]))
    return found


def heading(window: MarkedWindow) -> str:
    """Return what a window is, in one line."""
    targets = len(window.tokens) - 1 + window.padding
    padding = f", {window.padding:,} of padding" if window.padding else ""
    return (
        f"slot {window.slot}: {window.place}, {len(window.tokens):,} tokens{padding}; "
        f"{int(window.counted.sum()):,} of {targets:,} targets count"
    )


def uses_colour() -> bool:
    """Return whether stdout is a terminal on which colours are wanted."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_windows(windows: list[MarkedWindow], texts: TokenTexts, colour: bool, notes: Sequence[str] = ()) -> None:
    """Print windows with marks, after sentences about them."""
    mark = "in faint red" if colour else f"in {PLAIN_MARKS[0]} {PLAIN_MARKS[1]}"
    print(f"tokens that do not count as targets are {mark}; the first token of a window never does")
    for note in notes:
        print(printable(note))
    for window in windows:
        print()
        print(_marked(printable(heading(window)), BOUNDARY if colour else ("== ", " ==")))
        print("".join(_lines(window, texts, colour)))


def _lines(window: MarkedWindow, texts: TokenTexts, colour: bool) -> Iterator[str]:
    at_line_start = True
    for segment in segments(window):
        if segment.boundary:
            line = _marked(f"--- {segment.boundary} ---", BOUNDARY if colour else ("", ""))
            yield f"{'' if at_line_start else chr(10)}{line}\n"
            at_line_start = True
        text = segment_text(segment, texts)
        if text:
            yield text if segment.counted else _marked(text, NOT_COUNTED if colour else PLAIN_MARKS)
            at_line_start = text.endswith("\n") and (segment.counted or colour)
    if window.padding:
        yield f"{'' if at_line_start else chr(10)}--- {window.padding:,} tokens of padding ---"


def segment_text(segment: Segment, texts: TokenTexts) -> str:
    """Return the text of a segment. Escapes keep bytes of the data from changing the state of a terminal."""
    text = printable(texts.text(segment.ids), keep="\n\t")
    return text if texts.known else f"{text} "  # between two numbers


def _marked(text: str, marks: tuple[str, str]) -> str:
    return f"{marks[0]}{text}{marks[1]}"


def as_values(windows: list[MarkedWindow], texts: TokenTexts) -> list[dict[str, Any]]:
    """Return windows as values for JSON."""
    return [
        {
            "slot": window.slot,
            "place": window.place,
            "tokens": window.tokens,
            "document_begins": np.flatnonzero(window.begins).tolist(),
            "document_continues": np.flatnonzero(window.continues).tolist(),
            "not_counted": np.flatnonzero(~window.counted).tolist(),
            "padding": window.padding,
            "text": texts.text(window.tokens),
        }
        for window in windows
    ]
