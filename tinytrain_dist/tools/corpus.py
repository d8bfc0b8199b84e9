"""Owns the way from files to documents: sources, decompression, decoding, separators, cutting.

Must not know tokenizers, token files or processes.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from tinytrain_dist.errors import DataError

SEPARATOR = b"<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")

_BLOCK_BYTES = 1 << 16
# One line of a .jsonl file is held whole, decoded and parsed: about eight times its length in memory.
_JSON_LINE_BYTES = 16 << 20
# A zstd frame can expand 30,000 times; feeding it this little at once bounds what comes out at about 64 MB.
_ZSTD_FEED_BYTES = 2048
_STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
}


@dataclass(frozen=True)
class Source:
    """One source argument: its name in meta.json and its files, in the order in which they are read."""

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


class Meter:
    """A binary file that counts and digests what is read from it, so that hashing needs no second reading."""

    def __init__(self, file: BinaryIO) -> None:
        """Read through `file`."""
        self.file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes of the file as it is on disk."""
        block = self.file.read(size)
        self.bytes += len(block)
        self.sha256.update(block)
        return block


def find_sources(arguments: Sequence[str], say: Callable[[str], None]) -> list[Source]:
    """The files behind `stdlib`, files, folders and globs, each file once; DataError where there are none."""
    if not arguments:
        raise DataError("no source was given: name `stdlib`, a file, a folder or a glob")
    seen: set[str] = set()
    sources = []
    for argument in arguments:
        source = _find_source(argument, say)
        fresh = tuple(file for file in source.files if os.path.realpath(file) not in seen)
        if len(fresh) < len(source.files):
            say(f"{argument}: {len(source.files) - len(fresh)} files were already named, each is used once")
        if len(arguments) > 1:  # a lone folder of a million files need not pay for this set
            seen.update(os.path.realpath(file) for file in fresh)
        if fresh:
            sources.append(Source(source.name, fresh, source.root, source.tolerant))
    return sources


def _find_source(argument: str, say: Callable[[str], None]) -> Source:
    if argument == "stdlib":
        return _standard_library()
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        files = tuple(_walk(path, say))
        if not files:
            raise DataError(
                f"{argument}: the folder holds no {', '.join(TEXT_SUFFIXES)} file (nor one of them as "
                f"{', '.join(COMPRESSED_SUFFIXES)}); name other plain-text files explicitly or by a glob"
            )
        return Source(argument, files, root=path)
    if os.path.lexists(path):
        return Source(argument, (_regular(path),))
    if not glob.has_magic(path):
        hint = "nothing is downloaded, fetch it first" if "://" in path else "check the path"
        raise DataError(f"{argument}: no such file or folder; {hint}")
    matches = sorted(glob.glob(path, recursive=True))
    files = tuple(
        file for match in matches for file in (_walk(match, say) if os.path.isdir(match) else [_regular(match)])
    )
    if not files:
        raise DataError(f"{argument}: the glob matches no file; check the pattern (** also enters folders)")
    return Source(argument, tuple(dict.fromkeys(files)))


def _regular(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is not a regular file, but text is read twice; write it to a file first")
    return path


def _walk(folder: str, say: Callable[[str], None]) -> Iterator[str]:
    """Text files below `folder` in sorted order; hidden ones and links to folders are passed over."""
    skipped: Counter[str] = Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if text_suffix(name) in TEXT_SUFFIXES and not name.startswith("."):
                yield _regular(os.path.join(place, name))
            else:
                skipped[os.path.splitext(name)[1] or name] += 1
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
        more = ", ..." if len(skipped) > 5 else ""
        say(f"{folder}: skipped {skipped.total()} files that are not {', '.join(TEXT_SUFFIXES)} ({kinds}{more})")


def _standard_library() -> Source:
    """The running Python's own source, without tests, compiled modules and files that name their machine."""
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _STDLIB_SKIPPED and not f.startswith("config-"))
        files += [
            os.path.join(place, name)
            for name in sorted(names)
            if name.endswith(".py")
            and not name.startswith(("_sysconfigdata", "sitecustomize"))
            and not os.path.islink(os.path.join(place, name))
        ]
    if not files:
        raise DataError(f"stdlib: this Python keeps no source files in {root}; name your own text instead")
    return Source(f"stdlib (Python {platform.python_version()})", tuple(files), root, tolerant=True)


def text_suffix(name: str) -> str:
    """The lower-case suffix below a compression suffix: `.jsonl` for `a.jsonl.zst`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix


def read_documents(path: str, meter: Meter, reading: Reading) -> Iterator[bytes]:
    """The documents of one file as valid UTF-8, none empty; DataError names file and offset or line.

    `<|endoftext|>` ends a document wherever it stands, and the line ends around it belong to it. A document
    longer than `max_document_bytes` becomes several, cut at line ends (a longer line: between two characters).
    """
    blocks = _blocks(path, meter)
    if text_suffix(path) == ".jsonl":
        texts = _json_texts(path, blocks, reading)
    elif reading.split_by == "line":
        texts = (
            _utf8(path, line, offset, reading).rstrip(b"\r\n")
            for offset, line, _ in _pieces(blocks, b"\n", reading.max_document_bytes)
        )
    else:
        yield from _separated(
            (_utf8(path, piece, offset, reading), ended)
            for offset, piece, ended in _pieces(blocks, SEPARATOR, reading.max_document_bytes)
        )
        return
    for text in texts:
        pieces = _pieces([text], SEPARATOR, reading.max_document_bytes)
        yield from _separated((piece, ended) for _, piece, ended in pieces)


def _separated(pieces: Iterable[tuple[bytes, bool]]) -> Iterator[bytes]:
    """Drop the line ends around separators, then what is only white space."""
    after_separator = False
    for piece, ended in pieces:
        document = piece.lstrip(b"\r\n") if after_separator else piece
        document = document.rstrip(b"\r\n") if ended else document
        after_separator = ended
        if document.strip():
            yield document


def _pieces(blocks: Iterable[bytes], separator: bytes, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """Cut a stream at separators and at `limit` bytes: (offset, piece, whether a separator ended it)."""
    buffer, offset = b"", 0
    for block in blocks:
        buffer += block
        start = 0
        while True:
            # Look a separator's length past the limit, so that no cut can fall inside a separator.
            end = buffer.find(separator, start, start + limit + len(separator))
            if end >= 0:
                yield offset + start, buffer[start:end], True
                start = end + len(separator)
            elif len(buffer) - start >= limit + len(separator):
                end = _cut(buffer, start, limit)
                yield offset + start, buffer[start:end], False
                start = end
            else:
                break
        buffer, offset = buffer[start:], offset + start
    start = 0
    while len(buffer) - start > limit:
        end = _cut(buffer, start, limit)
        yield offset + start, buffer[start:end], False
        start = end
    if start < len(buffer):
        yield offset + start, buffer[start:], False


def _cut(buffer: bytes, start: int, limit: int) -> int:
    """Where to cut at most `limit` bytes after `start`: behind a line end, else between two characters."""
    end = start + limit
    line_end = buffer.rfind(b"\n", start, end) + 1
    if line_end > start:
        return line_end
    for back in range(4):  # UTF-8 continuation bytes are 0b10xxxxxx, three at most
        if buffer[end - back] & 0xC0 != 0x80:
            return end - back
    return end


def _utf8(path: str, piece: bytes, offset: int, reading: Reading) -> bytes:
    if offset == 0:
        piece = piece.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not text
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        if reading.errors == "replace":
            return piece.decode(errors="replace").encode()
        at = offset + error.start
        where = " of the decompressed text" if path.lower().endswith(COMPRESSED_SUFFIXES) else ""
        raise DataError(
            f"{path}: byte 0x{piece[error.start]:02x} at offset {at:,}{where} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8, or pass --errors replace to put U+FFFD in such places"
        ) from error
    return piece


def _json_texts(path: str, blocks: Iterable[bytes], reading: Reading) -> Iterator[bytes]:
    for number, (offset, line, ended) in enumerate(_pieces(blocks, b"\n", _JSON_LINE_BYTES), 1):
        if not ended and len(line) >= _JSON_LINE_BYTES - 4:
            raise DataError(
                f"{path}: line {number} is longer than {_JSON_LINE_BYTES:,} bytes, the most one line may have; "
                "split its document over several lines"
            )
        text = _utf8(path, line, offset, reading)
        if text.strip():
            yield _json_text(f"{path}: line {number}", text, reading)


def _json_text(where: str, line: bytes, reading: Reading) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); a .jsonl file has one JSON object on every line") from error
    if not isinstance(record, dict) or reading.text_field not in record:
        has = f"has the fields {sorted(record)[:10]}" if isinstance(record, dict) else f"is a {type(record).__name__}"
        raise DataError(f"{where} lacks the field {reading.text_field!r}: it {has}; set --text-field to one of those")
    text = record[reading.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {reading.text_field!r} holds {type(text).__name__}, not a string; "
            "set --text-field to the field with the text, or drop such lines"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        if reading.errors == "replace":
            return text.encode(errors="surrogatepass").decode(errors="replace").encode()
        raise DataError(
            f"{where}: field {reading.text_field!r} holds half a character at offset {error.start:,} "
            f"({error.reason}); repair it, or pass --errors replace to put U+FFFD in such places"
        ) from error


def _blocks(path: str, meter: Meter) -> Iterator[bytes]:
    """The decompressed bytes of a file, in blocks of bounded size; DataError for a damaged one."""
    suffix = os.path.splitext(path.lower())[1]
    try:
        if suffix == ".zst":
            yield from _zstd_blocks(path, meter)
            return
        stream: Meter | gzip.GzipFile | lzma.LZMAFile = meter
        raw = cast(BinaryIO, meter)  # both need nothing but its read
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw, mode="rb")
        elif suffix == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115  # closing it would close nothing: the file is the caller's
        while block := stream.read(_BLOCK_BYTES):
            yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, suffix, str(error)) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its disk") from error


def _zstd_blocks(path: str, meter: Meter) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs the package zstandard; pip install zstandard") from error
    # Frame by frame and by hand: zstandard's stream reader takes a file that ends early for a whole one.
    decompressor, pending, done = zstandard.ZstdDecompressor(), b"", True
    frame = decompressor.decompressobj()
    try:
        while fed := pending or meter.read(_ZSTD_FEED_BYTES):
            if done:
                frame = decompressor.decompressobj()
            block = frame.decompress(fed)
            pending, done = frame.unused_data if frame.eof else b"", frame.eof
            if block:
                yield block
    except zstandard.ZstdError as error:
        raise _damaged(path, ".zst", str(error)) from error
    if not done:
        raise _damaged(path, ".zst", "it ends in the middle of a frame")


def _damaged(path: str, suffix: str, reason: str) -> DataError:
    return DataError(f"{path}: the {suffix} stream is damaged or cut short ({reason}); fetch or write the file again")


def open_source(path: str) -> BinaryIO:
    """Open a source file; DataError instead of OSError, so that only writing can raise the latter."""
    try:
        return Path(path).open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
