"""Verify a folder of tensors: read every byte and compare it with the manifest."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor as _Thread
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tinytrain_dist.checkpoint.hashing import HASH_BLOCK_BYTES, HASH_FUNCTIONS, all_finite, file_digest
from tinytrain_dist.checkpoint.manifest import Manifest, read_manifest
from tinytrain_dist.checkpoint.safetensors_io import DTYPE_OF_NAME, THREADS_PER_RANK, TensorSpec, read_exactly
from tinytrain_dist.errors import CheckpointError


@dataclass(frozen=True)
class _ByteRange:
    """Bytes of a file that have one digest."""

    path: Path
    start: int
    nbytes: int
    hashed: str
    digest: str
    tensor: str = ""
    floats: torch.dtype | None = None  # which must be finite

    def problem(self, buffer: bytearray) -> str:
        """Return what is wrong with these bytes, read through `buffer`; empty if nothing. Errors: OSError."""
        name = f"{self.path}: {self.tensor}" if self.tensor else str(self.path)
        digest, finite, left = HASH_FUNCTIONS[self.hashed](), True, self.nbytes
        with open(self.path, "rb") as file:
            if hasattr(os, "posix_fadvise"):  # Linux reads further ahead, while this hashes: a lone tensor 1.2, not 1.1
                os.posix_fadvise(file.fileno(), self.start, left, os.POSIX_FADV_SEQUENTIAL)
            file.seek(self.start)
            while left:
                part = memoryview(buffer)[: min(left, len(buffer))]
                read_exactly(file, part)
                left -= len(part)
                digest.update(part)
                finite = finite and (self.floats is None or all_finite(torch.frombuffer(part, dtype=self.floats)))
        if digest.hexdigest() != self.digest:
            return f"{name} has {self.hashed} {digest.hexdigest()[:12]}..., but {self.digest[:12]}... was written"
        return "" if finite else f"{name} is not finite, although nothing was damaged after it was written"


def find_damage(folder: Path, files: Iterable[str] | None = None, part: int = 0, parts: int = 1) -> list[str]:
    """Read every byte and say what is not as the manifest has it; empty means the folder is as it was written.

    files: only these. With `parts` > 1 only the part-th of about equal shares; together they are everything.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    spans, found = list[_ByteRange](), list[str]()

    def said(path: Path, look: Callable[[], str]) -> str:
        try:
            return look()
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    for name in manifest.files if files is None else files:
        more = partial(_byte_ranges, folder / name, manifest, spans)
        found.append(said(folder / name, more))
    total, ends = 1 + sum(span.nbytes for span in spans), itertools.accumulate(span.nbytes for span in spans)
    mine = [span for span, end in zip(spans, ends, strict=True) if (end - span.nbytes) * parts // total == part]
    buffers = deque(bytearray(HASH_BLOCK_BYTES) for _ in range(THREADS_PER_RANK))

    def problem(span: _ByteRange) -> str:
        buffer = buffers.pop()
        try:
            return said(span.path, lambda: span.problem(buffer))
        finally:
            buffers.append(buffer)

    with _Thread(THREADS_PER_RANK) as pool:  # one reads while another hashes; hashing leaves Python's lock
        found += pool.map(problem, mine)
    return [problem for problem in found if problem]


def _byte_ranges(path: Path, manifest: Manifest, into: list[_ByteRange]) -> str:
    """Note what is to be read of a file; what is wrong with its size, or with the header of a file of tensors."""
    size, entry, hashed = path.stat().st_size, manifest.files[path.name], manifest.hashed
    if size != entry["bytes"]:
        return f"{path}: has {size:,} bytes, but {entry['bytes']:,} were written"
    if hashed in entry:
        into.append(_ByteRange(path, 0, size, hashed, entry[hashed]))
        return ""
    with open(path, "rb") as file:
        header, kind, start = file.read(entry["header_bytes"]), manifest.tensors[entry["kind"]], entry["header_bytes"]
    for name in entry["tensors"]:
        noted, dtype = kind[name], DTYPE_OF_NAME[kind[name]["dtype"]]
        floats = dtype if dtype.is_floating_point and noted.get("finite", True) else None
        count = TensorSpec(name, tuple(noted["shape"]), dtype).nbytes
        into.append(_ByteRange(path, start, count, hashed, noted[hashed], name, floats))
        start += count
    intact = file_digest(header, entry["tensors"], kind, hashed) == entry[f"{hashed}_of_digests"]
    return "" if intact else f"{path}: its header is not what was written"
