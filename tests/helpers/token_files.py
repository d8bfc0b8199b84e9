"""Write token files for tests, and measure how much of mapped files is in memory."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

PROCESS_STATUS = Path("/proc/self/status")
needs_linux_memory_figures = pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="only Linux reports memory by kind")


def save_tokens(path: Path, ids: npt.ArrayLike, dtype: str = "uint16") -> Path:
    """Write a token file of one type and return its path."""
    np.save(path, np.asarray(ids, dtype=dtype))
    return path


def save_sparse_tokens(path: Path, tokens: int) -> Path:
    """Write a token file of zeros that takes no space on the disk."""
    with path.open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * tokens)
    return path


def mapped_mib() -> float:
    """Return how many MiB of mapped files count as memory of this process."""
    return int(PROCESS_STATUS.read_text().split("RssFile:")[1].split()[0]) / 1024


def save_megatron(prefix: Path, documents: list[npt.NDArray[np.uint16]], shift: int = 0) -> Path:
    """Write PREFIX.bin and PREFIX.idx as Megatron's IndexedDatasetBuilder does, one sequence for each document.

    shift: bytes by which the pointers are wrong.
    """
    lengths = [len(document) for document in documents]
    prefix.with_suffix(".bin").write_bytes(b"".join(document.astype("<u2").tobytes() for document in documents))
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8))
        index.write(struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1))
        index.write(np.array(lengths, dtype=np.int32).tobytes(order="C"))
        pointers = [2 * sum(lengths[:number]) + shift for number in range(len(lengths))]
        index.write(np.array(pointers, dtype=np.int64).tobytes(order="C"))
        index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes(order="C"))
    return prefix.with_suffix(".bin")


def save_llm_c(path: Path, ids: npt.ArrayLike, magic: int = 20240520, dtype: str = "<u2") -> Path:
    """Write a .bin file with the header of llm.c and modded-nanogpt."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, 1, len(np.asarray(ids))
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path
