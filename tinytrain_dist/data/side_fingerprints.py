"""Identify the files beside the token files of a source: masks, and where documents begin.

Must not know what the files mean. Their content decides which targets count and what attention reads, so a resume
compares it as it compares the token files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from tinytrain_dist.data.open_files import OpenFile
from tinytrain_dist.data.parallel_reads import READER_POOL, read_at
from tinytrain_dist.data.side_files import side_path

_BLOCK_BYTES, _BLOCKS, _MIN_BLOCKS = 4096, 64, 4


def mask_fingerprint(paths: Sequence[str]) -> str:
    """Return what identifies the mask files of these token files."""
    return _sampled_sha256([side_path(path, ".mask.npy") for path in paths])


def documents_fingerprint(paths: Sequence[str]) -> str:
    """Return what identifies the files that tell where the documents of these token files begin."""
    starts = [side_path(path, ".documents.npy") for path in paths]
    return _sampled_sha256(
        [file if os.path.exists(file) else side_path(path, ".idx") for file, path in zip(starts, paths, strict=True)]
    )


def _sampled_sha256(paths: Sequence[str]) -> str:
    """Return a sha256 of the sizes of files, and of blocks of 4,096 bytes from the first to the last of each."""
    blocks = max(_MIN_BLOCKS, _BLOCKS // len(paths))

    def digest(path: str) -> bytes:
        file = OpenFile(path)
        size = file.stamp().size
        sampled = hashlib.sha256(str(size).encode())
        for start in np.linspace(0, max(0, size - _BLOCK_BYTES), blocks).astype(np.int64).tolist():
            block = np.empty(min(_BLOCK_BYTES, size), np.uint8)
            sampled.update(block[: read_at(file, block, start)].tobytes())
        return sampled.digest()

    return hashlib.sha256(b"".join(READER_POOL.map(digest, paths))).hexdigest()
