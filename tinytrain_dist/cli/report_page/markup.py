"""Write text and numbers for a page: everything that comes from a run is escaped here.

Must not know what is shown.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tinytrain_dist.utils.json_files import to_json

# control characters, which HTML does not allow, and halves of surrogate pairs, which UTF-8 cannot hold
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escaped(value: object) -> str:
    """Return a value as text for HTML, between tags or inside a quoted attribute."""
    return html.escape(NOT_TEXT.sub("\ufffd", str(value).replace("\r\n", "\n")))


def script_data(value: Any) -> str:
    """Return JSON for the inside of a script element: nothing in it can end the element."""
    text = to_json(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: bool = False) -> str:
    """Return a table whose cells are HTML already. The first cell of a row is its heading. numeric: right-aligned."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    kind = ' class="numbers"' if numeric else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def setting_text(value: Any) -> str:
    """Return a value of config.toml or environment.json as text, at most a few lines of it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 500 else f"{text[:500]} […]"


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number for a table or an axis; "" for None."""
    if value is None or not math.isfinite(value):
        return "" if value is None else "not finite"
    for least, unit, name in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= abs(value) < 1e15:
            return f"{value / unit:.{digits}g}{name}"
    return f"{value:.{digits}g}"
