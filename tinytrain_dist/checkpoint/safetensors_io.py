"""Write and read safetensors files as a stream, with an index that says which file holds which tensor.

Must not know ranks, models or steps. There is no pickle anywhere.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as _Thread
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinytrain_dist.checkpoint.hashing import HASH_BLOCK_BYTES, all_finite, file_digest
from tinytrain_dist.checkpoint.manifest import Manifest, write_json_file
from tinytrain_dist.distributed.dtensor import tensor_bytes
from tinytrain_dist.errors import CheckpointError

# tensors are hashed and written in chunks that stay in a core's share of the cache.
# Few threads: each rank has its own, and a disk slows down with the streams it reads (two 1.2 GB/s, eight 0.9)
CHUNK_BYTES, CHUNKS_IN_FLIGHT, THREADS_PER_RANK = 4 * 1024**2, 4, 2
NAME_OF_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPE_OF_NAME = {text: dtype for dtype, text in NAME_OF_DTYPE.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of one whole tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    finite: bool = True  # NaN or infinity in it is damage

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def split_into_files(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors in files of at most max_bytes; a larger tensor gets a file of its own."""
    files: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not files or size + spec.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    return files


def _hash_chunk(spec: TensorSpec, chunk: Tensor, digest: Any) -> None:
    for part in chunk.reshape(-1).split(HASH_BLOCK_BYTES // chunk.itemsize):
        if spec.finite and not all_finite(part):
            raise CheckpointError(f"{spec.name}: is not finite, so nothing is saved; resume from the last checkpoint")
        digest.update(tensor_bytes(part))


def _write_out(file: BinaryIO, data: memoryview) -> None:
    start = file.tell()
    while data:  # without a buffer a write may take less than it is given
        data = data[file.write(data) :]
    if hasattr(os, "posix_fadvise"):  # Linux begins to write these pages out now, so that the sync is short
        os.posix_fadvise(file.fileno(), start, file.tell() - start, os.POSIX_FADV_DONTNEED)


def _fsync(file: BinaryIO, written: Future[None], manifest: Manifest) -> None:
    written.result()
    os.fsync(file.fileno())
    manifest.under_way.remove(Path(file.name).name)


def write_tensors(
    folder: Path,
    kind: str,
    specs: Sequence[TensorSpec],
    chunks: Iterable[Tensor],
    max_bytes: int,
    manifest: Manifest,
    mine: Callable[[TensorSpec], bool] = lambda _: True,
) -> None:
    """Write the tensors as KIND-00001-of-N.safetensors ..., only those files whose first tensor is `mine`; note them.

    chunks: the values of those tensors on the CPU, in order, each in any number of parts. The next is taken when there
    is room for it, and one is not read any more when RING others have been given. `write_index` completes the kind.
    Errors: OSError from the disk; CheckpointError for a value that is not finite where the spec says it must be.
    """
    files = [(name, group) for name, group in _named_files(kind, specs, max_bytes) if mine(group[0])]
    digests = {spec.name: blake3() for _, group in files for spec in group}
    under_way, syncs = deque[tuple[Future[None], Future[None]]](), list[Future[None]]()
    coming = (chunk for chunk in chunks if chunk.numel())
    with ExitStack() as opened, _Thread(1) as hashing, _Thread(1) as writing, _Thread(1) as syncing:
        for name, group in files:
            manifest.under_way.append(name)
            file = opened.enter_context(open(folder / name, "xb", buffering=0))
            written = writing.submit(_write_out, file, memoryview(_safetensors_header(group)))
            for spec in group:
                left = spec.nbytes
                while left:
                    chunk = next(coming)
                    left -= chunk.nbytes
                    assert left >= 0, spec
                    assert chunk.dtype == spec.dtype, spec
                    written = writing.submit(_write_out, file, tensor_bytes(chunk))
                    under_way.append((hashing.submit(_hash_chunk, spec, chunk, digests[spec.name]), written))
                    if len(under_way) == CHUNKS_IN_FLIGHT:
                        _wait_for_all(under_way.popleft())
            syncs.append(syncing.submit(_fsync, file, written, manifest))  # the next file is written meanwhile
        _wait_for_all([*itertools.chain(*under_way), *syncs])
    tensors = manifest.tensors.setdefault(kind, {})
    for name, group in files:
        for spec in group:
            entry = {
                "shape": list(spec.shape),
                "dtype": NAME_OF_DTYPE[spec.dtype],
                "blake3": digests[spec.name].hexdigest(),
            }
            tensors[spec.name] = entry if spec.finite else {**entry, "finite": False}
        head, names = _safetensors_header(group), [spec.name for spec in group]
        place = {"bytes": len(head) + sum(spec.nbytes for spec in group), "header_bytes": len(head)}
        whole = file_digest(head, names, tensors, "blake3")
        manifest.files[name] = {**place, "kind": kind, "tensors": names, "blake3_of_digests": whole}


def _wait_for_all(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def write_index(folder: Path, kind: str, specs: Sequence[TensorSpec], max_bytes: int, manifest: Manifest) -> None:
    """Write KIND.safetensors.index.json: which tensor lies in which file."""
    weight_map = {spec.name: name for name, group in _named_files(kind, specs, max_bytes) for spec in group}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json_file(folder, f"{kind}.safetensors.index.json", index, manifest)


def _named_files(kind: str, specs: Sequence[TensorSpec], max_bytes: int) -> list[tuple[str, list[TensorSpec]]]:
    files = split_into_files(specs, max_bytes)
    return [(f"{kind}-{number:05d}-of-{len(files):05d}.safetensors", group) for number, group in enumerate(files, 1)]


def read_exactly(file: BinaryIO, into: memoryview) -> None:
    """Fill `into` from the file. Errors: OSError if the file ends before."""
    if into and file.readinto(into) < len(into):  # type: ignore[attr-defined]
        raise OSError(errno.EIO, "it ends too early")


def _safetensors_header(specs: Iterable[TensorSpec]) -> bytes:
    """Return the head of a safetensors file: its length, then JSON with type, shape and offsets of every tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        place = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": NAME_OF_DTYPE[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorReader:
    """Reads rows of tensors from a folder with an index, each file's header once."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Errors: CheckpointError if the index is missing or broken. Also reads a lone KIND.safetensors."""
        self.folder, self.kind, self._places = folder, kind, dict[str, dict[str, Any]]()
        index, single = folder / f"{kind}.safetensors.index.json", folder / f"{kind}.safetensors"
        try:
            if index.is_file():
                found = dict(json.loads(index.read_bytes())["weight_map"])
                self.files = {name: str(file) for name, file in found.items()}
            else:
                self.files = dict.fromkeys(_read_header(single), single.name)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: has no readable {kind} weights ({error}); give another folder") from None

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type (in safetensors' words) of one tensor."""
        place = self._place(name)
        return tuple(place["shape"]), place["dtype"]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop - 1 of one tensor, or all of it."""
        shape, dtype = self.spec(name)
        rows = [len(range(*slice(start, stop).indices(shape[0])))] if shape else []
        value = torch.empty((*rows, *shape[1:]), dtype=DTYPE_OF_NAME[dtype])
        self._fill(value, name, start)
        return value

    def fill(self, wanted: Iterable[tuple[Tensor, str, int]]) -> None:
        """Read into each tensor rows of the one of that name, from that row on, as many as it has.

        Errors: CheckpointError if a file cannot be read or rows do not fit; others have been read then.
        """
        with _Thread(THREADS_PER_RANK) as pool:
            _wait_for_all([pool.submit(self._fill, *rows) for rows in wanted])

    def _fill(self, into: Tensor, name: str, start: int) -> None:
        place, into = self._place(name), into.detach()
        path, shape, dtype, row = place["path"], place["shape"], DTYPE_OF_NAME[place["dtype"]], list(into.shape[1:])
        if shape[1:] != row or into.ndim != len(shape) or (shape and start + into.shape[0] > shape[0]):
            raise CheckpointError(f"{path}: {name} is {shape}, but {list(into.shape)} from row {start} is wanted here")
        flat = into.reshape(-1)  # a copy only where it is not contiguous
        direct = flat.dtype == dtype and flat.is_cpu  # without a copy, into the tensor's memory
        try:
            with open(path, "rb") as file:
                file.seek(place["at"] + start * math.prod(row) * dtype.itemsize)
                for part in flat.split(CHUNK_BYTES // dtype.itemsize):
                    values = part if direct else torch.empty(part.shape, dtype=dtype)
                    read_exactly(file, tensor_bytes(values))
                    part.copy_(values)  # does nothing to itself
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use another one") from None
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def _place(self, name: str) -> dict[str, Any]:
        file = self.files[name]
        if file not in self._places:
            try:
                self._places[file] = _read_header(self.folder / file)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error}); use another one") from None
        place: dict[str, Any] = self._places[file].get(name, {})
        if place.get("dtype") not in DTYPE_OF_NAME:
            has = f"{name} is {place.get('dtype', 'missing')}, not one of {', '.join(DTYPE_OF_NAME)}"
            raise CheckpointError(f"{self.folder / file}: {has}; use another one")
        return place


def _read_header(path: Path) -> dict[str, Any]:
    """By name: type, shape, path and first byte of the tensors of a safetensors file, which may come from anywhere."""
    safe_open(path, "numpy")  # raises if the header is broken, or names bytes that the file does not have
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: {**place, "path": path, "at": 8 + size + place["data_offsets"][0]} for name, place in header.items()}
