"""Read the documents of all sources, in order, as often as needed.

Must not know tokenizers, token files or processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from tinytrain_dist.data.preparation.compressed_files import Meter, decompressed_blocks, open_source
from tinytrain_dist.data.preparation.content_type import (
    HEAD_BYTES,
    JSON_LINES_SUFFIXES,
    Format,
    NotTextError,
    text_format,
)
from tinytrain_dist.data.preparation.sources import Source, text_suffix
from tinytrain_dist.data.preparation.text_documents import Reading, split_documents
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.progress import progress_bar


def recognise(sources: Iterable[Source], reading: Reading, say: Callable[[str], None]) -> dict[str, Format]:
    """Return how each file is to be read, by its content where `reading.format` leaves that open.

    Errors: DataError that names the files that contain no text, what they are, and what to do.
    """
    formats: dict[str, Format] = {}
    problems: list[str] = []
    for source in sources:
        for path in source.files:
            if source.tolerant or reading.format != "auto":
                formats[path] = "jsonl" if reading.format == "jsonl" and not source.tolerant else "text"
                continue
            try:
                formats[path] = text_format(*_head(path), text_suffix(path), reading.text_field, reading.errors)
            except NotTextError as error:
                what, advice = error.args
                problems.append(f"{path}: looks like {what}; {advice}")
    if problems:
        more = [f"and {len(problems) - 10} more files"] if len(problems) > 10 else []
        raise DataError(
            "\n  ".join([*problems[:10], *more])
            + "\nto take such files as text anyway, syntax included, pass --format text"
        )
    by_content = [
        path for path, form in formats.items() if form == "jsonl" and text_suffix(path) not in JSON_LINES_SUFFIXES
    ]
    if by_content and reading.format == "auto":
        others = f" and {len(by_content) - 1} more files" if len(by_content) > 1 else ""
        say(
            f"{by_content[0]}{others}: read as JSON lines, the text from the field {reading.text_field!r} "
            "(--format text takes such files as text, syntax included)"
        )
    return formats


def _head(path: str) -> tuple[bytes, bool]:
    """Return the first bytes of a file, decompressed, and whether these are all."""
    head = b""
    with open_source(path) as file, closing(decompressed_blocks(path, Meter(file))) as blocks:
        for block in blocks:
            head += block
            if len(head) > HEAD_BYTES:
                return head[:HEAD_BYTES], False
    return head, True


def read_documents(path: str, meter: Meter, reading: Reading, form: Format) -> Iterator[bytes]:
    """Yield the documents of one file; see `split_documents`."""
    return split_documents(path, decompressed_blocks(path, meter), reading, form)


@dataclass
class Corpus:
    """All documents of all sources, in order. They can be read several times."""

    sources: list[Source]
    reading: Reading
    formats: dict[str, Format]  # of each file
    total_bytes: int
    records: list[dict[str, Any]] = field(default_factory=list)

    def documents(self, title: str) -> Iterator[bytes]:
        """Yield all documents once. Afterwards, `records` has an entry for each source. title: of the progress bar."""
        self.records = []
        with progress_bar(title, self.total_bytes, unit="bytes") as advance:
            for source in self.sources:
                digest_of_list = hashlib.sha256()
                source_bytes = 0
                reading = replace(self.reading, errors="replace", format="text") if source.tolerant else self.reading
                for path in source.files:
                    with open_source(path) as file:
                        meter = Meter(file)
                        shown_bytes = 0
                        for document in read_documents(path, meter, reading, self.formats[path]):
                            yield document
                            advance(meter.bytes - shown_bytes)
                            shown_bytes = meter.bytes
                    source_bytes += meter.bytes
                    name = os.path.relpath(path, source.root) if source.root else path
                    line = f"{meter.sha256.hexdigest()}  {name}\n"
                    digest_of_list.update(line.encode(errors="surrogateescape"))
                # The digest of a single file, or that of the list which sha256sum would print for several files.
                digest = meter.sha256 if len(source.files) == 1 else digest_of_list
                self.records.append(
                    {
                        "path": source.name,
                        "files": len(source.files),
                        "bytes": source_bytes,
                        "sha256": digest.hexdigest(),
                    }
                )
