"""Read the bytes of a file once, decompressed.

Must not know what the bytes mean.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from tinytrain_dist.data.preparation.content_type import Compression, compression
from tinytrain_dist.data.preparation.remote_errors import shown
from tinytrain_dist.data.preparation.remote_files import RemoteFile
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.text import is_url

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_COMPRESSION_OF_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
# Text is read in blocks of this size. Blocks of 1 MB need 140 MB more memory, because they leave gaps between the
# documents that are kept, and glibc does not return the gaps to the system.
_BLOCK_BYTES = 1 << 16
# Compressed bytes that are decompressed at once. Zstd can expand them 30,000 times, so the result is below 64 MB.
_ZSTD_INPUT_BYTES = 2048


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


def open_source(path: str) -> BinaryIO:
    """Open a source file, or a URL. Errors: DataError, because `new_folder` reports every OSError as a failed write."""
    if is_url(path):
        return cast(BinaryIO, RemoteFile(path))
    try:
        return Path(path).open("rb", buffering=0)
    except OSError as error:
        raise unreadable_error(path, error) from error


def decompressed_blocks(path: str, meter: Meter) -> Generator[bytes, None, None]:
    """Yield the decompressed bytes of a file in blocks of limited size. Errors: DataError if it cannot be read.

    The first bytes decide whether it is compressed, and where they do not, its name.
    """
    suffix = os.path.splitext(shown(path).lower())[1]
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
        raise unreadable_error(path, error) from error


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
            f"{shown(path)}: is compressed with zstd, and the package that reads it is missing; pip install zstandard"
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
    return DataError(
        f"{shown(path)}: the compressed data is damaged or cut short ({reason}); get or create the file again"
    )


def unreadable_error(path: str, error: OSError) -> DataError:
    """Return the error for a file that the system does not give."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path, its permissions and its disk")
