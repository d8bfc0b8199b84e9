"""Check that each message on the page troubleshooting.md still exists in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [block.strip() for block in re.findall(r"```output\n(.*?)```", PAGE, re.DOTALL)]
HOLE = "…"  # stands for a value, in a message on the page and here


def texts_of_code() -> str:
    """Return all texts of the package and the scripts, one per line; values in them are replaced by HOLE."""
    texts: list[str] = []
    for path in (ROOT / "tinytrain_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    folders = (ROOT / "launch", ROOT / "tinytrain_dist" / "launch")
    scripts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.sh")]
    return "\n".join([*texts, *scripts])


CODE = texts_of_code()


def is_in_code(message: str) -> bool:
    """Return whether a text contains the message. One HOLE of the page may stand for several values in a row."""
    parts = [re.escape(part) for part in message.split(HOLE)]
    return re.search(rf"[^\n]*?{HOLE}[^\n]*?".join(parts), CODE) is not None


def test_the_page_has_the_most_likely_messages() -> None:
    assert len(MESSAGES) == len(set(MESSAGES))
    assert len(MESSAGES) >= 20


@pytest.mark.parametrize("message", MESSAGES, ids=[message[:50] for message in MESSAGES])
def test_a_message_exists_in_the_code(message: str) -> None:
    assert "\n" not in message
    assert is_in_code(message), f"no such message in the code: {message}; correct the page"


def test_a_changed_message_is_noticed() -> None:
    assert is_in_code("…: no such token file; make one")
    assert not is_in_code("…: no such token file; build one")
    assert not is_in_code("…: nothing of this kind …; do something")
