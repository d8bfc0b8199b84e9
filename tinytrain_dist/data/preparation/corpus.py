"""Read the documents of all sources, in order, as often as needed and from any position.

Must not know tokenizers, token files or processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tinytrain_dist.data.preparation.compressed_files import Meter, decompressed_blocks, open_source
from tinytrain_dist.data.preparation.content_type import TABLES
from tinytrain_dist.data.preparation.recognition import FileFacts
from tinytrain_dist.data.preparation.remote_errors import shown
from tinytrain_dist.data.preparation.sources import Source
from tinytrain_dist.data.preparation.table_documents import open_table, table_documents
from tinytrain_dist.data.preparation.text_documents import Document, Reading, split_documents
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.progress import Advance, no_progress, progress_bar


@dataclass(frozen=True)
class Position:
    """How far a corpus was read.

    Args:
        file: number of files that were read to their end
        block: part of the next file from which reading can start; see `Document`
        documents: number of documents of this part that were read
        bytes: number of bytes of this file that were read, for the progress bar
        digest: of the documents of this file that were read, if it is a table
        total: number of documents of all files that were read
    """

    file: int = 0
    block: int = 0
    documents: int = 0
    bytes: int = 0
    digest: str = ""
    total: int = 0


@dataclass(frozen=True)
class FileDigest:
    """What was read of a file: its bytes, and their SHA-256 or, for a table, a digest of its documents."""

    sha256: str
    bytes: int


@dataclass
class Corpus:
    """All documents of all sources, in order. They can be read several times."""

    sources: list[Source]
    reading: Reading
    facts: dict[str, FileFacts]
    position: Position = Position()  # after the document that `documents` yielded last
    digests: list[FileDigest] = field(default_factory=list)  # of the files that the first reading read
    _advance: Advance = no_progress

    @property
    def files(self) -> list[tuple[Source, str]]:
        """All files in order, each with its source."""
        return [(source, path) for source in self.sources for path in source.files]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, as far as they are known."""
        return sum(self.facts[path].size for _, path in self.files)

    def documents(self, title: str, start: Position | None = None) -> Iterator[bytes]:
        """Yield all documents once, from a position on. title: of the progress bar.

        The first time, the digest of each file is kept in `digests`, and later it is compared.
        Errors: DataError if a file cannot be read, or if it has changed since the first time.
        """
        start = self.position = start or Position()
        files = self.files
        is_first = not self.digests
        done = sum(self.facts[path].size for _, path in files[: start.file]) + start.bytes
        with progress_bar(title, self.total_bytes, unit="bytes", done=done) as self._advance:
            for number, (source, path) in enumerate(files[start.file :], start.file):
                digest = yield from self._documents_of(source, path, self.position)
                if is_first:
                    self.digests.append(digest)
                elif digest != self.digests[number]:
                    raise DataError(
                        f"{shown(path)}: a source changed between its first and second reading; run again when nothing "
                        "writes to it"
                    )
                self.position = Position(number + 1, total=self.position.total)

    def _documents_of(self, source: Source, path: str, start: Position) -> Generator[bytes, None, FileDigest]:
        """Yield the documents of one file from a position in it on; return its digest."""
        reading = replace(self.reading, errors="replace", format="text") if source.tolerant else self.reading
        fact = self.facts[path]
        with open_source(path) as file:
            meter = Meter(file)
            is_table = fact.form in TABLES
            if is_table:
                table = open_table(shown(path), file, fact.form)
                documents = table_documents(table, reading, meter, fact.size, start.block)
            else:
                blocks = decompressed_blocks(path, meter)
                texts = split_documents(shown(path), blocks, reading, fact.form)
                documents = (Document(0, text) for text in texts)
            block, number, seen_bytes, digest, total = start.block, 0, start.bytes, start.digest, start.total
            for document in documents:
                block, number = (block, number + 1) if document.block == block else (document.block, 1)
                if block == start.block and number <= start.documents:
                    continue  # read before the interruption
                if is_table:
                    digest = hashlib.sha256(bytes.fromhex(digest) + document.text).hexdigest()
                read_bytes = max(meter.bytes, seen_bytes)
                self._advance(read_bytes - seen_bytes)
                seen_bytes, total = read_bytes, total + 1
                self.position = Position(start.file, block, number, seen_bytes, digest, total)
                yield document.text
            self._advance(max(fact.size - seen_bytes, 0))
        return FileDigest(digest if is_table else meter.sha256.hexdigest(), fact.size if is_table else meter.bytes)

    def records(self) -> list[dict[str, Any]]:
        """Return an entry for each source, for meta.json."""
        records, digests = [], iter(self.digests)
        for source in self.sources:
            of_files = [next(digests) for _ in source.files]
            lines = [
                f"{digest.sha256}  {source.name_of(path)}\n"
                for digest, path in zip(of_files, source.files, strict=True)
            ]
            # The digest of a single file, or that of the list which sha256sum would print for several files.
            of_list = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
            record: dict[str, Any] = {
                "path": source.name,
                "files": len(of_files),
                "bytes": sum(digest.bytes for digest in of_files),
                "sha256": of_files[0].sha256 if len(of_files) == 1 else of_list,
            }
            if any(self.facts[path].form in TABLES for path in source.files):
                record["sha256_of"] = "documents"  # where a file is a table
            records.append(record)
        return records
