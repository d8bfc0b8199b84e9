"""Check the head of a .npy file before numpy opens it, so that a damaged file is described in a sentence.

Must not know what the numbers in the file mean.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAX_HEADER_BYTES = 10_000  # numpy's own limit; the header of a token file has 118
ZIP_MARK = b"PK\x03\x04"


class NpyHeader(NamedTuple):
    """What the header of a .npy file says, and where its values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # of the first value, in bytes


def check_npy_file(path: Path) -> NpyHeader:
    """Check that a file is one array of plain values, whole and without anything after it; return its header.

    Errors: OSError; ValueError with what was found, as the end of a sentence.
    """
    with open(path, "rb") as file:
        shape, dtype = _read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are never loaded")
        if not dtype.itemsize or any(length < 0 for length in shape):
            raise ValueError(f"its header says {dtype} {list(shape)}, which is not an array of numbers")
        found_bytes = os.fstat(file.fileno()).st_size - file.tell()
        stated_bytes = math.prod(shape) * dtype.itemsize
        if found_bytes != stated_bytes:
            raise ValueError(f"it has {found_bytes:,} bytes of values, but {stated_bytes:,} by its header")
        return NpyHeader(shape, dtype, file.tell())


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header up to the first value; return shape and type. Errors: ValueError."""
    start = file.read(8)
    if not start.startswith(np.lib.format.MAGIC_PREFIX):
        if start.startswith(ZIP_MARK):
            raise ValueError("it is an .npz archive, which holds several arrays; save one with numpy.save")
        what = "it is empty" if not start else f"it begins with {start!r}, which is not how such a file begins"
        raise ValueError(what)
    version = tuple(start[6:8])
    readers: dict[tuple[int, ...], tuple[int, Any]] = {
        (1, 0): (2, np.lib.format.read_array_header_1_0),
        (2, 0): (4, np.lib.format.read_array_header_2_0),
    }
    if version not in readers:
        raise ValueError(f"it has version {'.'.join(map(str, version))} of the format; save it with numpy.save again")
    size_bytes, read = readers[version]
    header_bytes = int.from_bytes(file.read(size_bytes), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {header_bytes:,} bytes by its own account, more than any array needs")
    file.seek(8)
    try:
        shape, _, dtype = read(file)
    except Exception:  # numpy parses it as Python: also SyntaxError, MemoryError and RecursionError
        raise ValueError("its header is damaged") from None
    return shape, dtype


def missing_tokens(count: int, context_len: int) -> str:
    """Return why `count` tokens hold no window of context_len tokens and the token after them; "" if they do."""
    if count > context_len:
        return ""
    shorter = f", or set context_len to at most {count - 1}" if count > 1 else ""
    return (
        f"has {count} tokens, but context_len {context_len} needs at least {context_len + 1}; "
        f"{context_len + 1 - count} more are needed{shorter}"
    )
