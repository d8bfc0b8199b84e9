"""Find out about each file of the sources how it is to be read, how large it is, and how to tell whether it changed.

Must not know tokenizers or token files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

from tinytrain_dist.data.preparation.compressed_files import Meter, decompressed_blocks, open_source
from tinytrain_dist.data.preparation.content_type import (
    HEAD_BYTES,
    JSON_LINES_SUFFIXES,
    TABLES,
    Format,
    NotTextError,
    table_format,
    text_format,
)
from tinytrain_dist.data.preparation.remote_errors import shown
from tinytrain_dist.data.preparation.remote_files import RemoteFile
from tinytrain_dist.data.preparation.sources import Source, text_suffix
from tinytrain_dist.data.preparation.table_documents import open_table, table_problems
from tinytrain_dist.data.preparation.text_documents import Reading
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.text import is_url

_SERVER_THREADS = 16  # files on servers are looked at side by side, because each takes several round trips


@dataclass(frozen=True)
class FileFacts:
    """What is known about a file before it is read. size: in bytes, 0 if a server does not say it.

    identity: differs when the file has changed, as far as its size, its time or its tag on a server show that.
    """

    form: Format
    size: int
    identity: str


def recognise(sources: Iterable[Source], reading: Reading, say: Callable[[str], None]) -> dict[str, FileFacts]:
    """Return the facts about each file; its content says how it is read where `reading.format` leaves that open.

    Errors: DataError that names the files that cannot be read as documents, and what to do.
    """
    files = [(source, path) for source in sources for path in source.files]

    def look(file: tuple[Source, str]) -> FileFacts | tuple[str, bool]:
        source, path = file
        try:
            return _facts(source, path, reading)
        except NotTextError as error:
            what, advice = error.args
            return f"{shown(path)}: looks like {what}; {advice}", True
        except _UnfitFileError as error:
            return f"{shown(path)}: {error}", False

    if any(is_url(path) for _, path in files):
        with ThreadPoolExecutor(_SERVER_THREADS, "recognise") as pool:
            found = list(pool.map(look, files))
    else:
        found = list(map(look, files))
    problems = [result for result in found if isinstance(result, tuple)]
    if problems:
        lines = [problem for problem, _ in problems[:10]]
        lines += [f"and {len(problems) - 10} more files"] if len(problems) > 10 else []
        hint = "\nto take such files as text anyway, syntax included, pass --format text"
        raise DataError("\n  ".join(lines) + (hint if any(not_text for _, not_text in problems) else ""))
    facts = {path: result for (_, path), result in zip(files, found, strict=True) if isinstance(result, FileFacts)}
    _note_json_lines(facts, reading, say)
    return facts


class _UnfitFileError(Exception):
    """A file lacks what the settings ask for: the end of a sentence."""


def _note_json_lines(facts: dict[str, FileFacts], reading: Reading, say: Callable[[str], None]) -> None:
    by_content = [
        path for path, fact in facts.items() if fact.form == "jsonl" and text_suffix(path) not in JSON_LINES_SUFFIXES
    ]
    if by_content and reading.format == "auto":
        others = f" and {len(by_content) - 1} more files" if len(by_content) > 1 else ""
        say(
            f"{shown(by_content[0])}{others}: read as JSON lines, the text from the field {reading.text_field!r} "
            "(--format text takes such files as text, syntax included)"
        )


def _facts(source: Source, path: str, reading: Reading) -> FileFacts:
    """Return the facts about a file. Errors: NotTextError; _UnfitFileError; DataError if it cannot be read."""
    with open_source(path) as file:
        if isinstance(file, RemoteFile):
            size, identity = file.facts.size or 0, f"{file.facts.size} {file.facts.tag}"
        else:
            status = os.fstat(file.fileno())
            size, identity = status.st_size, f"{status.st_size} {status.st_mtime_ns}"
        form = _format(source, path, file, reading)
        if form in TABLES:
            file.seek(0)
            problems = table_problems(open_table(shown(path), file, form), reading)
            if problems:
                raise _UnfitFileError("; ".join(problems))
    if form == "text" and reading.selection:
        raise _UnfitFileError("is text without fields, so --filter and --ids cannot select in it; leave it out")
    return FileFacts(form, size, identity)


def _format(source: Source, path: str, file: BinaryIO, reading: Reading) -> Format:
    if source.tolerant:
        return "text"
    if reading.format != "auto":
        return reading.format
    first = file.read(32)
    table = table_format(first)
    if table is not None:
        return table
    if reading.chat:
        return "jsonl"  # anything else in it is an error that names the line
    file.seek(0)
    head, whole = _head(path, file)
    if (packed := table_format(head)) is not None:
        raise NotTextError(f"a compressed {packed.split('-')[0].capitalize()} file", "decompress it first")
    return text_format(head, whole, text_suffix(path), reading.text_field, reading.errors)


def _head(path: str, file: BinaryIO) -> tuple[bytes, bool]:
    """Return the first bytes of a file, decompressed, and whether these are all."""
    head = b""
    with closing(decompressed_blocks(path, Meter(file))) as blocks:
        for block in blocks:
            head += block
            if len(head) > HEAD_BYTES:
                return head[:HEAD_BYTES], False
    return head, True
