"""Read documents from files: find the files, decompress and decode them, and split the text into documents.

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

from tinytrain_dist.data.preparation.content_type import (
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
# Text is read in blocks of this size. Blocks of 1 MB need 140 MB more memory, because they leave gaps between the
# documents that are kept, and glibc does not return the gaps to the system.
_BLOCK_BYTES = 1 << 16
# The longest line of a .jsonl file. A whole line is in memory, as bytes and as text of up to four bytes per character.
_JSON_LINE_BYTES = 16 << 20
# Compressed bytes that are decompressed at once. Zstd can expand them 30,000 times, so the result is below 64 MB.
_ZSTD_INPUT_BYTES = 2048
_SKIPPED_STDLIB_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """The files of one source argument.

    name: as in meta.json. files: in reading order. root: folder that file names in a digest are relative to.
    tolerant: bytes that are not UTF-8 are replaced, whatever the settings are.
    """

    name: str
    files: tuple[str, ...]
    root: str = ""
    tolerant: bool = False


@dataclass(frozen=True)
class Reading:
    """The settings for splitting text into documents; see `prepare`."""

    text_field: str
    split_by: Literal["file", "line"]
    errors: Literal["strict", "replace"]
    max_document_bytes: int
    format: Literal["auto", "text", "jsonl"] = "auto"  # text and jsonl: whatever the content looks like


class Meter:
    """A binary file that counts and hashes the bytes read from it, so that it is not read again for its digest."""

    def __init__(self, file: BinaryIO) -> None:
        """Wrap `file`."""
        self.file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes, as they are on disk (not decompressed)."""
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
    """Return a source for each argument: `stdlib`, a file, a folder or a glob. Each file is in one source only.

    say: prints a message. Errors: DataError if an argument gives no file, or if there is no argument.
    """
    sources: list[Source] = []
    seen: set[str] = set()
    for argument in arguments:
        source = _standard_library() if argument == "stdlib" else _find_source(argument, say)
        count = len(source.files)
        new_files: dict[str, str] = {}
        for file in source.files:
            real_path = os.path.realpath(file)
            if real_path not in seen:
                new_files[real_path] = file
        if len(new_files) < count:
            say(f"{argument}: {count - len(new_files)} of {count} files were already given; each is used once")
        seen.update(new_files)
        if new_files:
            sources.append(Source(source.name, tuple(new_files.values()), source.root, source.tolerant))
    if not sources:
        raise DataError("no source was given; give stdlib, files, folders or globs")
    return sources


def _find_source(argument: str, say: Callable[[str], None]) -> Source:
    """Return the files of one argument that is not `stdlib`. Errors: DataError if there are none."""
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        files = list(_text_files_below(path, say))
        if not files:
            raise DataError(
                f"{argument}: the folder contains no {', '.join(TEXT_SUFFIXES)} file, plain or compressed as "
                f"{', '.join(COMPRESSED_SUFFIXES)}; give other text files by name or by glob"
            )
        return Source(argument, tuple(files), root=path)
    if os.path.lexists(path):
        return Source(argument, (_check_regular_file(path),))
    if not glob.has_magic(path):
        remedy = "URLs are not supported, so download the file" if "://" in path else "check the path"
        raise DataError(f"{argument}: there is no such file or folder; {remedy}")
    files = []
    for match in sorted(glob.glob(path, recursive=True)):
        files += _text_files_below(match, say) if os.path.isdir(match) else [_check_regular_file(match)]
    if not files:
        raise DataError(f"{argument}: no file matches this glob; check the pattern (** also matches subfolders)")
    return Source(argument, tuple(files))


def _check_regular_file(path: str) -> str:
    """Return `path` if it is a regular file. Errors: DataError if it is not."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _unreadable_error(path, error) from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is not a regular file, but text is read twice; write the text to a file first")
    return path


def _text_files_below(folder: str, say: Callable[[str], None]) -> Iterator[str]:
    """Yield the text files below `folder` in sorted order. Hidden files and folders and linked folders are skipped."""
    skipped: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            if text_suffix(name) in TEXT_SUFFIXES:
                yield _check_regular_file(os.path.join(parent, name))
            else:
                skipped[os.path.splitext(name)[1] or name] += 1
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
        kinds += ", ..." if len(skipped) > 5 else ""
        say(f"{folder}: skipped {skipped.total()} files that are not {', '.join(TEXT_SUFFIXES)} ({kinds})")


def _standard_library() -> Source:
    """Return the source files of the running Python, without tests and files that differ between machines."""
    root = sysconfig.get_paths()["stdlib"]
    files: list[str] = []
    for parent, folders, names in os.walk(root):
        kept_folders = [name for name in folders if name not in _SKIPPED_STDLIB_FOLDERS]
        folders[:] = sorted(name for name in kept_folders if not name.startswith("config-"))
        for name in sorted(names):
            path = os.path.join(parent, name)
            machine_specific = name.startswith(("_sysconfigdata", "sitecustomize")) or os.path.islink(path)
            if name.endswith(".py") and not machine_specific:
                files.append(path)
    if not files:
        raise DataError(f"stdlib: this Python has no source files in {root}; give your own text files")
    return Source(f"stdlib (Python {platform.python_version()})", tuple(files), root, tolerant=True)


def text_suffix(name: str) -> str:
    """Return the suffix in lower case, ignoring a compression suffix: `.jsonl` for `a.JSONL.zst`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix


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
    with open_source(path) as file, closing(_decompressed_blocks(path, Meter(file))) as blocks:
        for block in blocks:
            head += block
            if len(head) > HEAD_BYTES:
                return head[:HEAD_BYTES], False
    return head, True


def open_source(path: str) -> BinaryIO:
    """Open a source file. Errors: DataError, because `new_folder` reports every OSError as a failed write."""
    try:
        return Path(path).open("rb", buffering=0)
    except OSError as error:
        raise _unreadable_error(path, error) from error


def read_documents(path: str, meter: Meter, reading: Reading, form: Format) -> Iterator[bytes]:
    """Yield the documents of one file as valid UTF-8, without blank documents.

    form: the format that `recognise` found.

    `<|endoftext|>` ends a document anywhere in the text. The line ends around it are dropped. A document longer than
    `max_document_bytes` becomes several: it is cut at line ends, or between two characters in a line that is too long.
    Errors: DataError that names the file, and the offset or the line.
    """
    blocks = _decompressed_blocks(path, meter)
    limit = reading.max_document_bytes
    if form == "jsonl":
        texts = _json_texts(path, blocks, reading)
    elif reading.split_by == "line":
        lines = cut(blocks, b"\n", limit)
        texts = (_to_valid_utf8(path, line, offset, reading).rstrip(b"\r\n") for offset, line, _ in lines)
    else:
        pieces = cut(blocks, SEPARATOR, limit)
        yield from _strip((_to_valid_utf8(path, piece, offset, reading), ended) for offset, piece, ended in pieces)
        return
    for text in texts:
        yield from _strip((piece, ended) for _, piece, ended in cut([text], SEPARATOR, limit))


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


def _to_valid_utf8(path: str, piece: bytes, offset: int, reading: Reading) -> bytes:
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
    """Yield the text in each line of a .jsonl file that is not blank. Errors: DataError that names the line."""
    for number, (offset, line, ended) in enumerate(cut(blocks, b"\n", _JSON_LINE_BYTES), 1):
        where = f"{path}: line {number}"
        if not ended and len(line) > _JSON_LINE_BYTES - 4:  # `cut` may cut a line up to three bytes before the limit
            raise DataError(f"{where} is longer than {_JSON_LINE_BYTES:,} bytes, the limit for one line; split it")
        line = _to_valid_utf8(path, line, offset, reading)
        if line.strip():
            yield _json_text(where, line, reading)


def _json_text(where: str, line: bytes, reading: Reading) -> bytes:
    """Return the text in one line of a .jsonl file. Errors: DataError that begins with `where`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); a .jsonl file has one JSON object on every line") from error
    text = record.get(reading.text_field) if isinstance(record, dict) else None
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


def _decompressed_blocks(path: str, meter: Meter) -> Generator[bytes, None, None]:
    """Yield the decompressed bytes of a file in blocks of limited size. Errors: DataError if it cannot be read.

    The first bytes decide whether it is compressed, and where they do not, its name.
    """
    suffix = os.path.splitext(path.lower())[1]
    try:
        stream = _Peekable(meter, 32)
        packed = compression(stream.first) or _COMPRESSION_OF_SUFFIX.get(suffix)
        if packed == "zstd":
            yield from _zstd_blocks(path, stream)
            return
        raw = cast(BinaryIO, stream)  # the decompressors only call its read()
        plain = raw if packed is None or not stream.first else _STREAMS[packed](raw)
        while block := plain.read(_BLOCK_BYTES):
            yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged_error(path, str(error)) from error
    except OSError as error:
        if error.errno is None:  # from a decompressor and not from the system
            raise _damaged_error(path, str(error)) from error
        raise _unreadable_error(path, error) from error


# These need not be closed, because the caller closes the file.
_STREAMS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def _zstd_blocks(path: str, stream: _Peekable) -> Iterator[bytes]:
    """Yield the decompressed bytes of a zstd file. Errors: DataError if it is damaged or zstandard is missing."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path}: is compressed with zstd, and the package that reads it is missing; pip install zstandard"
        ) from error
    # Frames are decompressed one by one, because zstandard's stream reader does not report a file that ends early.
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    unused = b""  # bytes after the end of a frame, which belong to the next one
    frame_complete = True
    try:
        while compressed := unused or stream.read(_ZSTD_INPUT_BYTES):
            if frame_complete:
                frame = decompressor.decompressobj()
            yield frame.decompress(compressed)
            frame_complete = frame.eof
            unused = frame.unused_data if frame_complete else b""
    except zstandard.ZstdError as error:
        raise _damaged_error(path, str(error)) from error
    if not frame_complete:
        raise _damaged_error(path, "it ends in the middle of a frame")


def _damaged_error(path: str, reason: str) -> DataError:
    return DataError(f"{path}: the compressed data is damaged or cut short ({reason}); get or create the file again")


def _unreadable_error(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path, its permissions and its disk")
