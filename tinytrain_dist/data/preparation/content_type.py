"""Recognise what a file contains by its first bytes: text, JSON lines, or something that is no text.

Must not know sources, tokenizers or token files.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

Format = Literal["text", "jsonl", "parquet", "arrow", "arrow-stream"]
TABLES: tuple[Format, ...] = ("parquet", "arrow", "arrow-stream")
Compression = Literal["gzip", "bzip2", "xz", "zstd"]

HEAD_BYTES = 1 << 16
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
# Largest share of bytes that are not UTF-8: Western languages in Latin-1 have less, Cyrillic and Asian encodings more.
_MAX_NOISE = 0.3
_MAX_CONTROLS = 0.01
_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\a\b\t\n\v\f\r\x1a\x1b")

COMPRESSIONS: tuple[tuple[bytes, Compression], ...] = (
    (rb"\x1f\x8b", "gzip"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd"),
)
_TABLES: tuple[tuple[bytes, Format], ...] = (
    (rb"PAR1\x15", "parquet"),
    (rb"ARROW1\0\0", "arrow"),
    (rb"\xff\xff\xff\xff.{3}\0\x10\0\0\0", "arrow-stream"),
)
_TO_JSON_LINES = "write its documents to a .jsonl file, one JSON object on every line"
_TO_TEXT = "extract its text first"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"Obj\x01", "an Avro file", _TO_JSON_LINES),
    (rb"\x89HDF\r\n", "an HDF5 file", _TO_JSON_LINES),
    (rb"SQLite format 3\0", "an SQLite database", _TO_JSON_LINES),
    (rb"\x93NUMPY", "a NumPy file", "give token files to training with --train-data; this command takes text"),
    (rb"%PDF-", "a PDF", _TO_TEXT),
    (rb"%!PS", "PostScript", _TO_TEXT),
    (rb"\{\\rtf", "an RTF document", _TO_TEXT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _TO_TEXT),
    (rb"PK(\x03\x04|\x05\x06)", "a ZIP archive (as are .docx, .epub and .npz)", "unpack it first"),
    (rb".{257}ustar", "a TAR archive", "unpack it first"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "a 7z or RAR archive", "unpack it first"),
    (rb"\x04\x22\x4d\x18|LZIP\x01", "compressed in a way that is not read here", "decompress it first"),
    (rb"WARC/\d", "a web archive (WARC)", _TO_TEXT),
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer and not the file itself", "run git lfs pull"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|\x7fELF", "a picture or a program", _TO_TEXT),
)
_HTML = re.compile(rb"(\s|<!--.*?-->)*<(!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"\s*<(\?xml\s|mediawiki\s)")
_SUFFIXES = {
    ".csv": ("a table", _TO_JSON_LINES),
    ".tsv": ("a table", _TO_JSON_LINES),
    ".html": ("HTML", _TO_TEXT),
    ".htm": ("HTML", _TO_TEXT),
    ".xhtml": ("HTML", _TO_TEXT),
    ".xml": ("XML", _TO_TEXT),
}
# The start of a JSON value that is longer than the bytes at hand.
_JSON_START = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:|\[\s*(?:\{\s*"|"(?:[^"\\]|\\.)*"\s*,)')


class NotTextError(Exception):
    """What a file contains instead of text, and what to do: two parts of a sentence."""


def compression(head: bytes) -> Compression | None:
    """Return how a file is compressed, by its first bytes."""
    return next((name for magic, name in COMPRESSIONS if re.match(magic, head)), None)


def table_format(head: bytes) -> Format | None:
    """Return which kind of table a file is, by its first bytes."""
    return next((form for magic, form in _TABLES if re.match(magic, head, re.DOTALL)), None)


def text_format(head: bytes, whole: bool, suffix: str, text_field: str, errors: str) -> Format:
    """Return how the documents of a file are to be read.

    Args:
        head: its first bytes, decompressed
        whole: whether these are all
        suffix: of its name, without a compression suffix
        text_field: the field of a JSON line that contains the text
        errors: "replace" where bytes that are not UTF-8 are to be replaced

    Errors: NotTextError for what is neither text nor JSON lines with that field.
    """
    if suffix in JSON_LINES_SUFFIXES:
        return "jsonl"  # anything else in it is an error that names the line
    _check_bytes(head, whole, errors)
    if suffix in _SUFFIXES:
        raise NotTextError(*_SUFFIXES[suffix])
    text = head.decode(errors="ignore").removeprefix("\ufeff")
    return "text" if suffix == ".py" else _json_format(text, whole, suffix, text_field)


def _check_bytes(head: bytes, whole: bool, errors: str) -> None:
    """Check that these are bytes of a text in UTF-8, apart from some that are damaged. Errors: NotTextError."""
    if packed := compression(head):
        raise NotTextError(f"still compressed ({packed}) after it was decompressed", "decompress it once more first")
    if encoding := _wide_encoding(head):
        raise NotTextError(f"text in {encoding}", f"convert it: iconv -f {encoding} -t UTF-8")
    start = head.removeprefix(b"\xef\xbb\xbf")
    for magic, what, advice in _KINDS:
        if re.match(magic, start, re.DOTALL):
            raise NotTextError(what, advice)
    if _HTML.match(start):
        raise NotTextError("HTML", _TO_TEXT)
    if _XML.match(start):
        raise NotTextError("XML", _TO_TEXT)
    if b"\0" in head:
        raise NotTextError(f"binary: it has a NUL byte at offset {head.index(0)}", _TO_TEXT)
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if controls > _MAX_CONTROLS * len(head):
        raise NotTextError(f"binary: {controls / len(head):.0%} of its bytes are control characters", _TO_TEXT)
    if errors == "replace":
        end = len(head) if whole else max(len(head) - 3, 0)  # where the last character may be cut
        valid = len(head[:end].decode(errors="ignore").encode())
        if end - valid > _MAX_NOISE * end:
            share = 1 - valid / end
            advice = "convert it from its encoding (iconv -f ENCODING -t UTF-8)"
            raise NotTextError(f"in another encoding or binary: {share:.0%} of its bytes are not UTF-8", advice)


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 where a byte-order mark or the places of NUL bytes show it."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for width, encodings in ((4, ("UTF-32LE", "UTF-32BE")), (2, ("UTF-16LE", "UTF-16BE"))):
        count = len(head) // width
        if not count:
            continue
        zeros = [head[place : count * width : width].count(0) / count for place in range(width)]
        # Of text in a Latin alphabet, the low byte of a character is never zero and the high ones nearly always are.
        if min(zeros[1:]) > 0.5 and zeros[0] < 0.01:
            return encodings[0]
        if min(zeros[:-1]) > 0.5 and zeros[-1] < 0.01:
            return encodings[1]
    return None


def _json_format(text: str, whole: bool, suffix: str, text_field: str) -> Format:
    """Tell text from JSON lines. Errors: NotTextError for other JSON, and for JSON lines without the field."""
    start = text.strip() if whole else text.lstrip()
    line, _, more = start.partition("\n")
    first = _json_value(line)
    if isinstance(first, dict) and (not more.strip() or more.lstrip().startswith("{")):
        if isinstance(first.get(text_field), str):
            return "jsonl"
        fields = ", ".join(f"{key}: {type(value).__name__}" for key, value in list(first.items())[:9])
        raise NotTextError(
            f"JSON with the fields {fields or '(none)'}", "set --text-field to the one that contains the text"
        )
    cut_short = not whole and _JSON_START.match(start)
    if cut_short and not more and start.startswith("{"):
        return "jsonl"  # the first line is longer than the head; reading it decides
    value, rest = _first_json_value(start)
    if cut_short or (value and not rest) or (value and rest.startswith("{")):
        kind = "a JSON array" if start.startswith("[") else "JSON, but not one object on every line"
        raise NotTextError(kind, _TO_JSON_LINES)
    if suffix == ".json":
        raise NotTextError("named .json, but not one JSON object on every line", _TO_JSON_LINES)
    return "text"


def _json_value(text: str) -> Any:
    """Return the JSON value that a text is; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _first_json_value(text: str) -> tuple[Any, str]:
    """Return the object, or the array of objects or texts, that a text begins with, and what follows it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, text
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict | str)):
        return value, text[end:].strip()
    return None, text
