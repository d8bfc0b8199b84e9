"""Read and write safetensors files in chunks, and the index of a folder of them.

`write_tensors` records what it wrote in the folder's manifest, and only `manifest.commit_folder` makes the folder a
checkpoint. The reader also reads files that other programs wrote. Must not know ranks, models or steps.

The file format is safetensors (https://github.com/huggingface/safetensors): the length of the header as 8 bytes, a JSON
header with type, shape and position of every tensor, then the values. The index has Hugging Face's format.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinytrain_dist.checkpoint.file_digests import HASH_BLOCK_BYTES, all_finite, file_digest
from tinytrain_dist.checkpoint.manifest import Manifest, write_json_file
from tinytrain_dist.distributed.dtensor import tensor_bytes
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.json_files import is_file_name, parse_json, read_json_dict
from tinytrain_dist.utils.progress import Advance, no_progress
from tinytrain_dist.utils.regular_files import check_regular, open_regular

CHUNK_BYTES = 4 * 1024**2  # tensors are hashed and written in chunks that stay in a core's share of the cache
CHUNKS_IN_FLIGHT = 4  # maximum number of chunks that wait to be hashed and written

# Number of threads with which each rank reads. A disk is slower if it reads many streams at once.
# measured (2-core x86 VM, 2026-11-25): two streams 1.2 GB/s, eight 0.9 GB/s
THREADS_PER_RANK = 2

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
    finite: bool = True  # whether NaN or infinity in it counts as damage

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of its values."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def split_into_files(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Group consecutive tensors into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    files: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not files or size + spec.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    return files


# ---------------------------------------------------------------- writing


def write_tensors(
    folder: Path,
    kind: str,
    specs: Sequence[TensorSpec],
    chunks: Iterable[Tensor],
    max_bytes: int,
    manifest: Manifest,
    mine: Callable[[TensorSpec], bool] = lambda _: True,
) -> None:
    """Write tensors to the files KIND-00001-of-N.safetensors, ... and record files and tensors in the manifest.

    The index of the kind is written separately, by `write_index`.

    Args:
        folder: where the files are created; none of them may exist
        kind: "model" or "optimizer"
        specs: all tensors of the kind, also those that other ranks write
        chunks: the values of the tensors to write, in order, as flat tensors on the CPU. Each tensor may come in any
            number of chunks. The next chunk is fetched when there is room for it. The memory of a chunk may be reused
            once CHUNKS_IN_FLIGHT further chunks have been fetched.
        max_bytes: size at which a new file begins
        manifest: gets an entry for every file and tensor that was written
        mine: returns for the first tensor of a file whether this file is to be written

    Errors: OSError from the disk; CheckpointError for a value that is not finite in a tensor that must be finite.
    """
    files = [(name, group) for name, group in _named_files(kind, specs, max_bytes) if mine(group[0])]
    digests = _stream_to_disk(folder, files, chunks, manifest)
    _record(kind, files, digests, manifest)


NamedFiles = list[tuple[str, list[TensorSpec]]]  # file name, tensors in file order


def _named_files(kind: str, specs: Sequence[TensorSpec], max_bytes: int) -> NamedFiles:
    files = split_into_files(specs, max_bytes)
    return [(f"{kind}-{number:05d}-of-{len(files):05d}.safetensors", group) for number, group in enumerate(files, 1)]


def _stream_to_disk(folder: Path, files: NamedFiles, chunks: Iterable[Tensor], manifest: Manifest) -> dict[str, str]:
    """Write the files, sync them to disk, and return the BLAKE3 of each tensor by name."""
    hashers = {spec.name: blake3() for _, group in files for spec in group}
    chunks_with_values = (chunk for chunk in chunks if chunk.numel())
    # The files are closed after the pipeline has ended. Until then, its threads may still write, even after an error.
    with ExitStack() as open_files, _WritePipeline(manifest) as pipeline:
        for name, group in files:
            manifest.files_in_progress.append(name)
            file = open_files.enter_context(open(folder / name, "xb", buffering=0))
            pipeline.write_header(file, _safetensors_header(group))
            for spec in group:
                for chunk in _chunks_of_tensor(spec, chunks_with_values):
                    pipeline.hash_and_write(file, spec, chunk, hashers[spec.name])
            pipeline.sync(file)
        pipeline.wait()
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}


def _chunks_of_tensor(spec: TensorSpec, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Fetch the chunks of one tensor, and check that they end where it ends."""
    bytes_left = spec.nbytes
    while bytes_left:
        chunk = next(chunks, None)
        assert chunk is not None, spec
        bytes_left -= chunk.nbytes
        assert bytes_left >= 0, spec
        assert chunk.dtype == spec.dtype, spec
        yield chunk


class _WritePipeline:
    """Hash, write and sync in three threads, which overlap with each other and with the caller's next chunk.

    Only one thread hashes and only one writes, so that chunks are hashed and written in order.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._hashing = ThreadPoolExecutor(1)
        self._writing = ThreadPoolExecutor(1)
        self._syncing = ThreadPoolExecutor(1)
        self._in_flight = deque[tuple[Future[None], Future[None]]]()  # (hash, write) of each unfinished chunk
        self._last_write: Future[None] | None = None
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> _WritePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._syncing, self._writing, self._hashing):
            pool.shutdown()  # waits for what was submitted, also after an error

    def write_header(self, file: BinaryIO, header: bytes) -> None:
        """Queue the header of a new file for writing."""
        self._last_write = self._writing.submit(_write_out, file, memoryview(header))

    def hash_and_write(self, file: BinaryIO, spec: TensorSpec, chunk: Tensor, hasher: Any) -> None:
        """Queue a chunk for both, then wait until there is room for the next one. Errors: those of earlier chunks."""
        self._last_write = self._writing.submit(_write_out, file, tensor_bytes(chunk))
        hashed = self._hashing.submit(_hash_chunk, spec, chunk, hasher)
        self._in_flight.append((hashed, self._last_write))
        if len(self._in_flight) == CHUNKS_IN_FLIGHT:
            _wait_for_all(self._in_flight.popleft())
        self._manifest.bytes_written += chunk.nbytes

    def sync(self, file: BinaryIO) -> None:
        """Queue the file for syncing after its last write. The next file can be written during the sync."""
        assert self._last_write is not None, "a file begins with its header"
        self._syncs.append(self._syncing.submit(_fsync, file, self._last_write, self._manifest))

    def wait(self) -> None:
        """Wait until everything is hashed, written and synced. Errors: the first error in any of these."""
        _wait_for_all([*itertools.chain(*self._in_flight), *self._syncs])


def _hash_chunk(spec: TensorSpec, chunk: Tensor, hasher: Any) -> None:
    """Check that the values are finite, and hash them. Each block stays in the core's cache between the two."""
    for block in chunk.reshape(-1).split(HASH_BLOCK_BYTES // chunk.itemsize):
        if spec.finite and not all_finite(block):
            raise CheckpointError(f"{spec.name}: is not finite, so nothing is saved; resume from the last checkpoint")
        hasher.update(tensor_bytes(block))


def _write_out(file: BinaryIO, data: memoryview) -> None:
    start = file.tell()
    while data:  # an unbuffered write may write only a part of its argument
        data = data[file.write(data) :]
    if hasattr(os, "posix_fadvise"):  # makes Linux write these pages to the disk now, so that the sync is short
        os.posix_fadvise(file.fileno(), start, file.tell() - start, os.POSIX_FADV_DONTNEED)


def _fsync(file: BinaryIO, last_write: Future[None], manifest: Manifest) -> None:
    last_write.result()
    os.fsync(file.fileno())
    manifest.files_in_progress.remove(Path(file.name).name)


def _wait_for_all(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _record(kind: str, files: NamedFiles, digests: dict[str, str], manifest: Manifest) -> None:
    """Add the entries of files and tensors to the manifest. The docstring of `manifest` describes the keys."""
    tensors = manifest.tensors.setdefault(kind, {})
    for name, group in files:
        for spec in group:
            entry: dict[str, Any] = {
                "shape": list(spec.shape),
                "dtype": NAME_OF_DTYPE[spec.dtype],
                "blake3": digests[spec.name],
            }
            if not spec.finite:
                entry["finite"] = False
            tensors[spec.name] = entry
        header = _safetensors_header(group)
        names = [spec.name for spec in group]
        manifest.files[name] = {
            "bytes": len(header) + sum(spec.nbytes for spec in group),
            "header_bytes": len(header),
            "kind": kind,
            "tensors": names,
            "blake3_of_digests": file_digest(header, names, tensors, "blake3"),
        }


def write_index(folder: Path, kind: str, specs: Sequence[TensorSpec], max_bytes: int, manifest: Manifest) -> None:
    """Write KIND.safetensors.index.json, which maps each tensor to its file."""
    weight_map = {spec.name: name for name, group in _named_files(kind, specs, max_bytes) for spec in group}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json_file(folder, f"{kind}.safetensors.index.json", index, manifest)


def _safetensors_header(specs: Iterable[TensorSpec]) -> bytes:
    """Return the start of a safetensors file: length, then JSON with type, shape and position of every tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        dtype = NAME_OF_DTYPE[spec.dtype]
        entries[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------- reading


def read_exactly(file: BinaryIO, into: memoryview) -> None:
    """Fill `into` from the file. Errors: OSError if the file ends before `into` is full."""
    if into and file.readinto(into) < len(into):  # type: ignore[attr-defined]
        raise OSError(errno.EIO, "the file ends too early")


class TensorReader:
    """Reads rows of tensors from a folder with an index; the header of each file is read once."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Read the index KIND.safetensors.index.json, or the header of a single KIND.safetensors.

        Errors: CheckpointError if it is missing or broken.
        """
        self.folder = folder
        self.kind = kind
        self.files: dict[str, str]  # name of the tensor -> name of its file
        self._headers: dict[str, dict[str, Any]] = {}  # name of the file -> its header, as _read_header returns it
        index = folder / f"{kind}.safetensors.index.json"
        single = folder / f"{kind}.safetensors"
        try:
            if index.exists():
                self.files = _read_weight_map(index)
            else:
                self.files = dict.fromkeys(_read_header(single), single.name)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: has no readable {kind} weights ({error}); give another folder") from None

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape of one tensor, and its type by safetensors' name, such as "F32"."""
        entry = self._entry(name)
        return tuple(entry["shape"]), entry["dtype"]

    def unlisted(self) -> list[tuple[str, str]]:
        """Return (tensor, file) for each tensor that is in a file of the index, but not according to the index.

        Errors: CheckpointError if a file cannot be read.
        """
        files = dict.fromkeys(self.files.values())
        found = [(name, file) for file in files for name in self._header(file)]
        return [(name, file) for name, file in found if self.files.get(name) != file]

    def read(self, name: str, start: int = 0, stop: int | None = None, advance: Advance = no_progress) -> Tensor:
        """Read rows start .. stop - 1 of one tensor, or all of it. advance: called with numbers of bytes read."""
        shape, dtype = self.spec(name)
        rows = [len(range(*slice(start, stop).indices(shape[0])))] if shape else []
        value = torch.empty((*rows, *shape[1:]), dtype=DTYPE_OF_NAME[dtype])
        self._fill(value, name, start, advance)
        return value

    def fill(self, wanted: Iterable[tuple[Tensor, str, int]], advance: Advance = no_progress) -> None:
        """Fill each of the given tensors with rows of a tensor on disk.

        `wanted`: (tensor to fill, name of the tensor on disk, first row). The number of rows is that of the tensor to
        fill, which may have another type, device or memory layout. Errors: CheckpointError if a file cannot be read or
        rows do not fit. Other tensors may then have been filled. `advance`: called with numbers of bytes read.
        """
        with ThreadPoolExecutor(THREADS_PER_RANK) as pool:
            _wait_for_all([pool.submit(self._fill, into, name, start, advance) for into, name, start in wanted])

    def _fill(self, into: Tensor, name: str, start: int, advance: Advance) -> None:
        entry = self._entry(name)
        into = into.detach()
        path, shape, dtype = entry["path"], entry["shape"], DTYPE_OF_NAME[entry["dtype"]]
        row_shape = list(into.shape[1:])
        too_many_rows = bool(shape) and into.ndim == len(shape) and start + into.shape[0] > shape[0]
        if shape[1:] != row_shape or into.ndim != len(shape) or too_many_rows:
            wanted = f"{list(into.shape)} from row {start}"
            raise CheckpointError(f"{path}: {name} is {shape}, but {wanted} is needed; use a file of the same model")
        flat = into.reshape(-1)  # a copy only where it is not contiguous
        read_in_place = flat.dtype == dtype and flat.is_cpu
        try:
            with open_regular(path) as file:
                file.seek(entry["first_byte"] + start * math.prod(row_shape) * dtype.itemsize)
                for part in flat.split(CHUNK_BYTES // dtype.itemsize):
                    values = part if read_in_place else torch.empty(part.shape, dtype=dtype)
                    read_exactly(file, tensor_bytes(values))
                    part.copy_(values)  # does nothing if `values` is `part`
                    advance(values.nbytes)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use another folder") from None
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def _entry(self, name: str) -> dict[str, Any]:
        """Return the entry of a tensor in its file's header. Errors: CheckpointError, also for an unknown type."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder}: has no {self.kind} tensor {name}; give another folder")
        file = self.files[name]
        entry: dict[str, Any] = self._header(file).get(name, {})
        if entry.get("dtype") not in DTYPE_OF_NAME:
            problem = f"{name} is {entry.get('dtype', 'missing')}, not one of {', '.join(DTYPE_OF_NAME)}"
            raise CheckpointError(f"{self.folder / file}: {problem}; use another folder")
        return entry

    def _header(self, file: str) -> dict[str, Any]:
        """Return the header of a file, which is read once. Errors: CheckpointError."""
        if file not in self._headers:
            path = self.folder / file
            try:
                self._headers[file] = _read_header(path)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); use another folder") from None
        return self._headers[file]


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names. Errors: OSError, ValueError."""
    weight_map = read_json_dict(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index.name}: weight_map is not an object")
    for name, file in weight_map.items():
        if not is_file_name(file):
            raise ValueError(f"{index.name}: {name} is in {file!r}, which is not the name of a file")
    return weight_map


def _read_header(path: Path) -> dict[str, Any]:
    """Return the type, shape, path and first byte of each tensor in a safetensors file, by name.

    The file may come from anywhere, so the safetensors library checks the header first.
    """
    check_regular(path)  # otherwise safe_open could block in native code, and stop all threads of Python
    safe_open(path, "numpy")  # raises if the header is broken, or names bytes that the file does not have
    with open_regular(path) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = parse_json(file.read(header_bytes))
    header.pop("__metadata__", None)
    values_start = 8 + header_bytes
    return {
        name: {**entry, "path": path, "first_byte": values_start + entry["data_offsets"][0]}
        for name, entry in header.items()
    }
