"""Write token files: append IDs to .npy files.

Must not know where documents come from or how they are encoded.
"""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from tinytrain_dist.data.preparation.encoding import Part


class TokenWriter:
    """A one-dimensional .npy file to which IDs are appended. `finish` completes its header."""

    def __init__(self, path: Path, dtype: str) -> None:
        """Create the file. dtype: `<u2` or `<u4`, in numpy's notation."""
        self.path = path
        self.dtype = dtype
        self.tokens = 0
        self.documents = 0
        self.bytes = 0
        self.file = path.open("wb")
        self.file.write(self._header())

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        fields = {"descr": self.dtype, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(buffer, fields)
        return buffer.getvalue()

    def append(self, part: Part) -> None:
        """Append the IDs of several documents."""
        self.file.write(part.ids.data)
        self.tokens += len(part.ids)
        self.documents += part.documents
        self.bytes += part.bytes

    def finish(self) -> str:
        """Write the final header, flush the file to disk, and return its SHA-256 digest."""
        self.file.seek(0)
        self.file.write(self._header())
        _sync(self.file)
        self.file.close()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # if the file is unfinished, another exception is already being raised
            self.file.close()


def write_file(path: Path, text: str) -> str:
    """Write a small file, flush it to disk, and return its SHA-256 digest."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        _sync(file)
    return hashlib.sha256(data).hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
