"""Read the .idx file of Megatron, which describes the token IDs in the .bin file of the same name.

Layout (little-endian): 9 bytes of magic, uint64 version 1, uint8 code of the type, uint64 number n of sequences, uint64
number d of entries in the document index, int32 lengths [n], int64 pointers in bytes [n], int64 document index [d]. The
document index names the first sequence of each document, and ends with n. Must not know torch.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinytrain_dist.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<QBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_BLOCK = 1 << 20  # entries read at a time


class MegatronIndex(NamedTuple):
    """What an index says about its .bin file."""

    dtype: np.dtype[Any]
    tokens: int
    sequences: int
    documents: int  # entries of the document index, without the last one

    @property
    def pointers_at(self) -> int:
        """Position in the index of the pointers, in bytes."""
        return len(MAGIC) + _HEAD.size + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        """Position in the index of the document index, in bytes."""
        return self.pointers_at + 8 * self.sequences


def is_megatron_index(head: bytes) -> bool:
    """Return whether these first bytes of a file are those of an index."""
    return head.startswith(MAGIC)


def read_megatron_index(path: Path, bin_bytes: int) -> MegatronIndex:
    """Read an index and check that it fits a .bin file of bin_bytes bytes. Errors: DataError; OSError."""
    with open(path, "rb") as file:
        head = file.read(len(MAGIC) + _HEAD.size)
        size = os.fstat(file.fileno()).st_size
    if not is_megatron_index(head) or len(head) < len(MAGIC) + _HEAD.size:
        raise DataError(
            f"{path}: lies beside a .bin file, but is no Megatron index (it begins with {head[:9]!r}); restore it, or "
            "move it away if the .bin file is of another format"
        )
    version, code, sequences, entries = _HEAD.unpack(head[len(MAGIC) :])
    if version != 1:
        raise DataError(f"{path}: has version {version} of Megatron's format, but only 1 is known; convert it")
    dtype = np.dtype(_TYPES.get(code, "V1"))
    if dtype.kind not in "ui":
        what = dtype.name if code in _TYPES else "unknown"
        known = ", ".join(f"{number} {np.dtype(name).name}" for number, name in _TYPES.items() if name[-2] in "ui")
        raise DataError(
            f"{path}: has the type code {code} ({what}), but token IDs have one of these: {known}; make the files again"
        )
    index = MegatronIndex(dtype, bin_bytes // dtype.itemsize, sequences, entries - 1)
    least = index.documents_at + 8 * entries
    if entries < 1 or size < least:
        raise DataError(f"{path}: has {size:,} bytes, but {least:,} by its header; copy or make the files again")
    _check_pointers(path, index, bin_bytes)
    _check_documents(path, index)
    return index


def _check_pointers(path: Path, index: MegatronIndex, bin_bytes: int) -> None:
    """Check that the sequences lie one behind the other and fill the .bin file."""
    expected = 0
    for first in range(0, index.sequences, _BLOCK):
        count = min(_BLOCK, index.sequences - first)
        lengths = np.fromfile(path, "<i4", count, offset=len(MAGIC) + _HEAD.size + 4 * first).astype(np.int64)
        pointers = np.fromfile(path, "<i8", count, offset=index.pointers_at + 8 * first)
        ends = expected + np.cumsum(lengths) * index.dtype.itemsize
        wrong = np.flatnonzero((pointers != ends - lengths * index.dtype.itemsize) | (lengths < 0))
        if len(wrong):
            at = int(wrong[0])
            raise DataError(
                f"{path}: its tokens lie in several pieces (sequence {first + at} begins at byte {int(pointers[at])} "
                "of the .bin file, not where the one before it ends), but only files in one piece can be read; write "
                "them again, one sequence behind the other"
            )
        expected = int(ends[-1])
    if expected != bin_bytes:
        raise DataError(
            f"{path}: does not fit its .bin file, which has {bin_bytes:,} bytes, but {expected:,} by the index; copy "
            "or make both again"
        )


def _check_documents(path: Path, index: MegatronIndex) -> None:
    """Check that the document index ascends from 0 to the number of sequences."""
    last = 0
    for first in range(0, index.documents + 1, _BLOCK):
        count = min(_BLOCK, index.documents + 1 - first)
        entries = np.fromfile(path, "<i8", count, offset=index.documents_at + 8 * first)
        if int(entries[0]) < last or (np.diff(entries) < 0).any() or (first == 0 and entries[0] != 0):
            raise DataError(f"{path}: its document index does not ascend from 0; make the files again")
        last = int(entries[-1])
    if last != index.sequences:
        raise DataError(
            f"{path}: its document index ends with sequence {last} of {index.sequences}; make the files again"
        )
