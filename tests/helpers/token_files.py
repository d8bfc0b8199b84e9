"""Write token files for tests, and measure how much of mapped files is in memory."""

from __future__ import annotations

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
