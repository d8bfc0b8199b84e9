"""Split text into documents: at separators, at line ends, and where a document would be too long.

Must not know files, tokenizers or token files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tinytrain_dist.data.preparation.compressed_files import COMPRESSED_SUFFIXES
from tinytrain_dist.data.preparation.content_type import Format
from tinytrain_dist.data.preparation.conversations import conversation
from tinytrain_dist.data.preparation.selection import Selection, field_of
from tinytrain_dist.errors import DataError

SEPARATOR = b"<|endoftext|>"
# The longest line of a .jsonl file. A whole line is in memory, as bytes and as text of up to four bytes per character.
_JSON_LINE_BYTES = 16 << 20


class Document(NamedTuple):
    """One document. block: the part of its file from which reading can start again; 0 where there are no parts."""

    block: int
    text: bytes


@dataclass(frozen=True)
class Reading:
    """The settings for splitting text into documents; see `prepare`."""

    text_field: str
    split_by: Literal["file", "line"]
    errors: Literal["strict", "replace"]
    max_document_bytes: int
    format: Literal["auto", "text", "jsonl"] = "auto"  # text and jsonl: whatever the content looks like
    selection: Selection = field(default_factory=Selection)
    chat: bool = False  # documents are conversations


def split_documents(path: str, blocks: Iterable[bytes], reading: Reading, form: Format) -> Iterator[bytes]:
    """Yield the documents of one file as valid UTF-8, without blank documents.

    blocks: its content, decompressed. form: the format that `recognise` found.

    `<|endoftext|>` ends a document anywhere in the text. The line ends around it are dropped. A document longer than
    `max_document_bytes` becomes several: it is cut at line ends, or between two characters in a line that is too long.
    Errors: DataError that names the file, and the offset or the line.
    """
    limit = reading.max_document_bytes
    if reading.chat:
        yield from _conversations(path, blocks, reading)
        return
    if form == "jsonl":
        texts = _json_texts(path, blocks, reading)
    elif reading.split_by == "line":
        lines = cut(blocks, b"\n", limit)
        texts = (to_valid_utf8(path, line, offset, reading).rstrip(b"\r\n") for offset, line, _ in lines)
    else:
        pieces = cut(blocks, SEPARATOR, limit)
        yield from _strip((to_valid_utf8(path, piece, offset, reading), ended) for offset, piece, ended in pieces)
        return
    for text in texts:
        yield from documents_of_text(text, reading)


def documents_of_text(text: bytes, reading: Reading) -> Iterator[bytes]:
    """Yield the documents of one text in UTF-8: usually one."""
    if len(text) <= reading.max_document_bytes and SEPARATOR not in text:
        if text.strip():
            yield text
        return
    yield from _strip((piece, ended) for _, piece, ended in cut([text], SEPARATOR, reading.max_document_bytes))


def _strip(pieces: Iterable[tuple[bytes, bool]]) -> Iterator[bytes]:
    """Yield documents from pieces (text, whether a separator ended it).

    Drops the line ends before and after separators, and documents that are only white space.
    """
    after_separator = False
    for piece, ended in pieces:
        document = piece.lstrip(b"\r\n") if after_separator else piece
        document = document.rstrip(b"\r\n") if ended else document
        after_separator = ended
        if document.strip():
            yield document


def cut(blocks: Iterable[bytes], separator: bytes, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """Cut a stream at separators, and where a piece would be longer than `limit` bytes.

    Yields (offset, piece, whether a separator ended it).
    """
    buffer, offset = b"", 0  # `offset` is the position of the buffer in the stream
    for block in blocks:
        buffer += block
        start = 0
        while True:
            # Search beyond the limit by the length of a separator, because no cut may be inside a separator.
            end = buffer.find(separator, start, start + limit + len(separator))
            if end < 0 and len(buffer) - start < limit + len(separator):
                break
            ended = end >= 0
            end = end if ended else _cut_point(buffer, start, limit)
            yield offset + start, buffer[start:end], ended
            start = end + (len(separator) if ended else 0)
        buffer, offset = buffer[start:], offset + start
    while buffer:
        end = _cut_point(buffer, 0, limit) if len(buffer) > limit else len(buffer)
        yield offset, buffer[:end], False
        buffer, offset = buffer[end:], offset + end


def _cut_point(buffer: bytes, start: int, limit: int) -> int:
    """Return the position at which to cut a piece that begins at `start` and is longer than `limit` bytes.

    It is the last one within the limit that follows a line end, or else the last one between two characters.
    """
    end = start + limit
    line_end = buffer.rfind(b"\n", start, end) + 1
    if line_end > start:
        return line_end
    # A character of UTF-8 starts with any byte but 0b10xxxxxx, and has at most three bytes of this form.
    character_starts = (position for position in range(end, end - 4, -1) if buffer[position] & 0xC0 != 0x80)
    return next(character_starts, end)


def to_valid_utf8(path: str, piece: bytes, offset: int, reading: Reading) -> bytes:
    """Return a piece of a file as valid UTF-8. Errors: DataError unless invalid bytes are to be replaced."""
    if offset == 0:
        piece = piece.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not text
    if reading.format != "text" and b"\0" in piece:
        raise DataError(
            f"{path}: looks like binary: it has a NUL byte at offset {offset + piece.index(0)}; extract its text "
            "first, or pass --format text to take it as text anyway"
        )
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        if reading.errors == "replace":
            return piece.decode(errors="replace").encode()
        where = " of the decompressed text" if path.lower().endswith(COMPRESSED_SUFFIXES) else ""
        raise DataError(
            f"{path}: byte 0x{piece[error.start]:02x} at offset {offset + error.start}{where} is not UTF-8 "
            f"({error.reason}); convert the file to UTF-8, or pass --errors replace to replace such bytes by U+FFFD"
        ) from error
    return piece


def _json_texts(path: str, blocks: Iterable[bytes], reading: Reading) -> Iterator[bytes]:
    """Yield the text in each line of a .jsonl file that is kept. Errors: DataError that names the line."""
    for where, record in _json_records(path, blocks, reading):
        yield _json_text(where, record, reading)


def _conversations(path: str, blocks: Iterable[bytes], reading: Reading) -> Iterator[bytes]:
    """Yield the conversation in each line of a .jsonl file that is kept. Errors: DataError that names the line."""
    for where, record in _json_records(path, blocks, reading):
        yield conversation(where, record, reading.text_field)


def _json_records(path: str, blocks: Iterable[bytes], reading: Reading) -> Iterator[tuple[str, Any]]:
    """Yield each line of a .jsonl file that is not blank and that is kept, and where it is."""
    for number, (offset, line, ended) in enumerate(cut(blocks, b"\n", _JSON_LINE_BYTES), 1):
        where = f"{path}: line {number}"
        if not ended and len(line) > _JSON_LINE_BYTES - 4:  # `cut` may cut a line up to three bytes before the limit
            raise DataError(f"{where} is longer than {_JSON_LINE_BYTES:,} bytes, the limit for one line; split it")
        line = to_valid_utf8(path, line, offset, reading)
        if not line.strip():
            continue
        record = _json_record(where, line)
        if not reading.selection or reading.selection.keeps(where, record):
            yield where, record


def _json_record(where: str, line: bytes) -> Any:
    """Return the value in one line of a .jsonl file. Errors: DataError that begins with `where`."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); a .jsonl file has one JSON object on every line") from error


def _json_text(where: str, record: Any, reading: Reading) -> bytes:
    """Return the text of a record. Errors: DataError that begins with `where`."""
    text = field_of(record, reading.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the line is of type {type(record).__name__}, not an object"
        if isinstance(record, dict):
            fields = [f"{name}: {type(value).__name__}" for name, value in list(record.items())[:9]]
            found = f"the line has {', '.join(fields) or 'no fields'}"
        raise DataError(
            f"{where} has no string in the field {reading.text_field!r} ({found}); set --text-field to the field with "
            "the text"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        if reading.errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        raise DataError(
            f"{where}: character {error.start} of field {reading.text_field!r} is half a surrogate pair; repair the "
            "line, or pass --errors replace to write U+FFFD in its place"
        ) from error
