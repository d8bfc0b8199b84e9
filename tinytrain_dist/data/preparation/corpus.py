"""Turn files into documents: find sources, decompress, decode, separate and cut.

Must not know tokenizers, token files or processes.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import os
import platform
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from tinytrain_dist.data.preparation.content import (
    HEAD_BYTES,
    JSON_LINES_SUFFIXES,
    Compression,
    Format,
    NotTextError,
    compression,
    text_format,
)
from tinytrain_dist.errors import DataError

SEPARATOR = b"<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_COMPRESSION_OF_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
# Blocks of 1 MB cost 140 MB more: glibc then keeps the holes between the documents that stay.
_BLOCK_BYTES = 1 << 16
# A line of .jsonl is held whole, as bytes and as text of up to four bytes a character.
_JSON_LINE_BYTES = 16 << 20
# A zstd frame can expand 30,000 times; fed this little at once, what comes out stays below 64 MB.
_ZSTD_FEED_BYTES = 2048
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One source argument: its name in meta.json and its files in reading order; `tolerant` forgives bad bytes."""

    name: str
    files: tuple[str, ...]
    root: str = ""
    tolerant: bool = False


@dataclass(frozen=True)
class Reading:
    """How text becomes documents."""

    text_field: str
    split_by: Literal["file", "line"]
    errors: Literal["strict", "replace"]
    max_document_bytes: int
    format: Literal["auto", "text", "jsonl"] = "auto"  # text and jsonl: whatever the content looks like


class Meter:
    """A binary file that counts and digests what is read from it, so that hashing needs no further reading."""

    def __init__(self, file: BinaryIO) -> None:
        """Read through `file`."""
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, as they are on disk."""
        block = self.file.read(size)
        self.bytes += len(block)
        self.sha256.update(block)
        return block


class _Peekable:
    """A stream whose first bytes were looked at and are still to be read."""

    def __init__(self, stream: Meter, size: int) -> None:
        self.stream, self.first = stream, stream.read(size)
        self.waiting = self.first

    def read(self, size: int = -1) -> bytes:
        if not self.waiting:
            return self.stream.read(size)
        end = size if size >= 0 else len(self.waiting)
        block, self.waiting = self.waiting[:end], self.waiting[end:]
        return block + self.stream.read() if size < 0 else block


def find_sources(arguments: Iterable[str], say: Callable[[str], None]) -> list[Source]:
    """Return the files behind `stdlib`, files, folders and globs, each file once; DataError where there are none."""
    sources, seen = [], set[str]()
    for argument in arguments:
        source = _standard_library() if argument == "stdlib" else _find(argument, say)
        places = [os.path.realpath(file) for file in source.files]
        fresh = {place: file for place, file in zip(places, source.files, strict=True) if place not in seen}
        if len(fresh) < len(places):
            say(f"{argument}: {len(places) - len(fresh)} of {len(places)} files were named before; each is used once")
        seen.update(fresh)
        if fresh:
            sources.append(Source(source.name, tuple(fresh.values()), source.root, source.tolerant))
    if not sources:
        raise DataError("no source was given: name stdlib, files, folders or globs")
    return sources


def _find(argument: str, say: Callable[[str], None]) -> Source:
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        files = tuple(_walk(path, say))
        wanted = f"{', '.join(TEXT_SUFFIXES)} file, plain or as {', '.join(COMPRESSED_SUFFIXES)}"
        if not files:
            raise DataError(f"{argument}: the folder holds no {wanted}; name other plain text by file or by glob")
        return Source(argument, files, root=path)
    if os.path.lexists(path):
        return Source(argument, (_regular(path),))
    if not glob.has_magic(path):
        hint = "nothing is downloaded, so fetch it first" if "://" in path else "check the path"
        raise DataError(f"{argument}: there is no such file or folder; {hint}")
    found: list[str] = []
    for match in sorted(glob.glob(path, recursive=True)):
        found += _walk(match, say) if os.path.isdir(match) else [_regular(match)]
    if not found:
        raise DataError(f"{argument}: no file matches this glob; check the pattern (** also enters folders)")
    return Source(argument, tuple(found))


def _regular(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is not a regular file, and text is read twice; write it to a file first")
    return path


def _walk(folder: str, say: Callable[[str], None]) -> Iterator[str]:
    """Text files below `folder` in sorted order, without hidden ones and links to folders."""
    skipped: Counter[str] = Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            if text_suffix(name) in TEXT_SUFFIXES:
                yield _regular(os.path.join(place, name))
            else:
                skipped[os.path.splitext(name)[1] or name] += 1
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
        more = ", ..." if len(skipped) > 5 else ""
        say(f"{folder}: skipped {skipped.total()} files that are not {', '.join(TEXT_SUFFIXES)} ({kinds}{more})")


def _standard_library() -> Source:
    """Return the running Python's own source, without tests, compiled modules and files about the machine."""
    root, files = sysconfig.get_paths()["stdlib"], list[str]()
    for place, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _STDLIB_SKIPPED and not f.startswith("config-"))
        for name in sorted(names):
            path = os.path.join(place, name)
            of_machine = name.startswith(("_sysconfigdata", "sitecustomize")) or os.path.islink(path)
            if name.endswith(".py") and not of_machine:
                files.append(path)
    if not files:
        raise DataError(f"stdlib: this Python keeps no source files in {root}; name text of your own")
    return Source(f"stdlib (Python {platform.python_version()})", tuple(files), root, tolerant=True)


def text_suffix(name: str) -> str:
    """Return the lower-case suffix, without a compression suffix: `.jsonl` for `a.JSONL.zst`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix


def recognise(sources: Iterable[Source], reading: Reading, say: Callable[[str], None]) -> dict[str, Format]:
    """Return how each file is to be read, by its content where `reading.format` leaves that open.

    Errors: DataError that names the files that hold no text, what they are, and what to do.
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
    with open_source(path) as file, closing(_blocks(path, Meter(file))) as blocks:
        for block in blocks:
            head += block
            if len(head) > HEAD_BYTES:
                return head[:HEAD_BYTES], False
    return head, True


def open_source(path: str) -> BinaryIO:
    """Open a source file; DataError where it cannot be, so that OSError is left to mean a failed write."""
    try:
        return Path(path).open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_documents(path: str, meter: Meter, reading: Reading, form: Format) -> Iterator[bytes]:
    """Yield the documents of one file as valid UTF-8, none blank; DataError names the file and offset or line.

    `form` is what `recognise` found.
    `<|endoftext|>` ends a document wherever it stands, and the line ends around it belong to it. A document
    longer than `max_document_bytes` becomes several, cut at line ends (a longer line: between two characters).
    """
    blocks, limit = _blocks(path, meter), reading.max_document_bytes
    if form == "jsonl":
        texts = _json_texts(path, blocks, reading)
    elif reading.split_by == "line":
        lines = cut(blocks, b"\n", limit)
        texts = (_utf8(path, line, offset, reading).rstrip(b"\r\n") for offset, line, _ in lines)
    else:
        pieces = cut(blocks, SEPARATOR, limit)
        yield from _strip((_utf8(path, piece, offset, reading), ended) for offset, piece, ended in pieces)
        return
    for text in texts:
        yield from _strip((piece, ended) for _, piece, ended in cut([text], SEPARATOR, limit))


def _strip(pieces: Iterable[tuple[bytes, bool]]) -> Iterator[bytes]:
    """Drop the line ends around separators, then documents of nothing but white space."""
    after_separator = False
    for piece, ended in pieces:
        document = piece.lstrip(b"\r\n") if after_separator else piece
        document = document.rstrip(b"\r\n") if ended else document
        after_separator = ended
        if document.strip():
            yield document


def cut(blocks: Iterable[bytes], separator: bytes, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """Cut a stream at separators and after at most `limit` bytes: (offset, piece, whether a separator ended it)."""
    buffer, offset = b"", 0
    for block in blocks:
        buffer += block
        start = 0
        while True:
            # Look a separator's length past the limit: no cut may fall inside a separator.
            end = buffer.find(separator, start, start + limit + len(separator))
            if end < 0 and len(buffer) - start < limit + len(separator):
                break
            ended = end >= 0
            end = end if ended else _cut_point(buffer, start, limit)
            yield offset + start, buffer[start:end], ended
            start = end + len(separator) * ended
        buffer, offset = buffer[start:], offset + start
    while buffer:
        end = _cut_point(buffer, 0, limit) if len(buffer) > limit else len(buffer)
        yield offset, buffer[:end], False
        buffer, offset = buffer[end:], offset + end


def _cut_point(buffer: bytes, start: int, limit: int) -> int:
    """Return the last line end in the `limit` bytes after `start`, or else the last place between two characters."""
    end = start + limit
    line_end = buffer.rfind(b"\n", start, end) + 1
    if line_end > start:
        return line_end
    starts = (place for place in range(end, end - 4, -1) if buffer[place] & 0xC0 != 0x80)
    return next(starts, end)  # 0b10xxxxxx continues a character, at most three times


def _utf8(path: str, piece: bytes, offset: int, reading: Reading) -> bytes:
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
            f"({error.reason}); convert the file to UTF-8, or pass --errors replace to put U+FFFD in such places"
        ) from error
    return piece


def _json_texts(path: str, blocks: Iterable[bytes], reading: Reading) -> Iterator[bytes]:
    for number, (offset, line, ended) in enumerate(cut(blocks, b"\n", _JSON_LINE_BYTES), 1):
        where = f"{path}: line {number}"
        if not ended and len(line) > _JSON_LINE_BYTES - 4:
            raise DataError(f"{where} is longer than {_JSON_LINE_BYTES:,} bytes, the most a line may have; split it")
        line = _utf8(path, line, offset, reading)
        if line.strip():
            yield _json_text(where, line, reading)


def _json_text(where: str, line: bytes, reading: Reading) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); a .jsonl file has one JSON object on every line") from error
    text = record.get(reading.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = record.items() if isinstance(record, dict) else [("(no object)", record)]
        has = ", ".join(f"{key}: {type(value).__name__}" for key, value in list(fields)[:9])
        raise DataError(
            f"{where} lacks the field {reading.text_field!r} with a string: it has {has}; set --text-field to the one "
            "that holds the text"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        if reading.errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        raise DataError(
            f"{where}: character {error.start} of field {reading.text_field!r} is half a surrogate pair; repair the "
            "line, or pass --errors replace to put U+FFFD in such places"
        ) from error


def _blocks(path: str, meter: Meter) -> Generator[bytes, None, None]:
    """Yield the decompressed bytes of a file in blocks of bounded size; DataError for a damaged one.

    The first bytes decide whether it is compressed, and where they do not, its name.
    """
    suffix = os.path.splitext(path.lower())[1]
    try:
        stream = _Peekable(meter, 32)
        packed = compression(stream.first) or _COMPRESSION_OF_SUFFIX.get(suffix)
        if packed == "zstd":
            yield from _zstd_blocks(path, stream)
            return
        raw = cast(BinaryIO, stream)  # all need nothing but its read
        plain = raw if packed is None or not stream.first else _STREAMS[packed](raw)
        while block := plain.read(_BLOCK_BYTES):
            yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        if error.errno is None:  # from a decompressor and not from the system
            raise _damaged(path, str(error)) from error
        raise _unreadable(path, error) from error


# Closing these would close nothing: the file is the caller's.
_STREAMS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def _zstd_blocks(path: str, stream: _Peekable) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path}: is compressed with zstd, and the package that reads it is missing; pip install zstandard"
        ) from error
    # Frame by frame, by hand: zstandard's stream reader takes a file that ends early for a whole one.
    decompressor = zstandard.ZstdDecompressor()
    frame, pending, whole = decompressor.decompressobj(), b"", True
    try:
        while fed := pending or stream.read(_ZSTD_FEED_BYTES):
            if whole:
                frame = decompressor.decompressobj()
            yield frame.decompress(fed)
            pending, whole = frame.unused_data if frame.eof else b"", frame.eof
    except zstandard.ZstdError as error:
        raise _damaged(path, str(error)) from error
    if not whole:
        raise _damaged(path, "it ends in the middle of a frame")


def _damaged(path: str, reason: str) -> DataError:
    return DataError(f"{path}: the compressed data is damaged or cut short ({reason}); fetch or write the file again")


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path, its permissions and its disk")
