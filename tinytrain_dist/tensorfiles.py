"""Owns folders of tensors on disk: safetensors files written as a stream, their index, the manifest, and its checks.

Must not know ranks, models or steps. A folder is complete when manifest.json, written last, lists every file and every
tensor with size and digest; there is no pickle anywhere. Manifest format 3: a tensor has the BLAKE3 of its bytes, a
file of tensors the BLAKE3 over its header and, in the order of the file, its tensors' digests (32 bytes each), so that
every byte is hashed once; any other file has the BLAKE3 of its bytes. Formats 1 and 2 are still read: they had sha256,
1 also of whole files of tensors. The manifest's own digest is sha256 in all, so that any version can say which it is.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as _Thread
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.files import MANIFEST as MANIFEST
from tinytrain_dist.files import STATE as STATE

# tensors are hashed and written in chunks that stay in a core's share of the cache; RING of them may be under way.
# Few threads: each rank has its own, and a disk slows down with the streams it reads (two 1.2 GB/s, eight 0.9)
CHUNK_BYTES, RING, THREADS = 4 * 1024**2, 4, 2
BLOCK_BYTES = 1024**2  # is hashed at once, in a core's own cache: from the page cache 2.8 GB/s; blocks of 4 MiB 1.9
# a digest stands under the name of its hash; sha256 takes 1.0 GB/s of a core, less than a disk gives, BLAKE3 5
HASHES: dict[str, Callable[..., Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TYPES = {text: dtype for dtype, text in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Name, shape and type of one whole tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    finite: bool = True  # NaN or infinity in it is damage

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass
class Manifest:
    """What a complete folder holds: `files` by name, `tensors` by kind ("model", "optimizer") and name."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    under_way: list[str] = field(default_factory=list)  # files begun and not on the disk yet: what a stuck save is at
    hashed: str = "blake3"  # with which of HASHES


def cut_into_files(specs: Sequence[Spec], max_bytes: int) -> list[list[Spec]]:
    """Consecutive tensors in files of at most max_bytes; a larger tensor gets a file of its own."""
    files: list[list[Spec]] = []
    size = 0
    for spec in specs:
        if not files or size + spec.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    return files


def all_finite(values: Tensor) -> bool:
    """No NaN, no infinity. A sum takes a fortieth of the time of isfinite, and is finite only if all are."""
    return not values.is_floating_point() or math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _hash_chunk(spec: Spec, chunk: Tensor, digest: Any) -> None:
    for part in chunk.reshape(-1).split(BLOCK_BYTES // chunk.itemsize):
        if spec.finite and not all_finite(part):
            raise CheckpointError(f"{spec.name}: is not finite, so nothing is saved; resume from the last checkpoint")
        digest.update(bytes_of(part))


def _write_out(file: BinaryIO, data: memoryview) -> None:
    start = file.tell()
    while data:  # without a buffer a write may take less than it is given
        data = data[file.write(data) :]
    if hasattr(os, "posix_fadvise"):  # Linux begins to write these pages out now, so that the sync is short
        os.posix_fadvise(file.fileno(), start, file.tell() - start, os.POSIX_FADV_DONTNEED)


def _sync(file: BinaryIO, written: Future[None], manifest: Manifest) -> None:
    written.result()
    os.fsync(file.fileno())
    manifest.under_way.remove(Path(file.name).name)


def write_tensors(
    folder: Path,
    kind: str,
    specs: Sequence[Spec],
    chunks: Iterable[Tensor],
    max_bytes: int,
    manifest: Manifest,
    mine: Callable[[Spec], bool] = lambda _: True,
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
            written = writing.submit(_write_out, file, memoryview(_header(group)))
            for spec in group:
                left = spec.nbytes
                while left:
                    chunk = next(coming)
                    left -= chunk.nbytes
                    assert left >= 0, spec
                    assert chunk.dtype == spec.dtype, spec
                    written = writing.submit(_write_out, file, bytes_of(chunk))
                    under_way.append((hashing.submit(_hash_chunk, spec, chunk, digests[spec.name]), written))
                    if len(under_way) == RING:
                        _wait(under_way.popleft())
            syncs.append(syncing.submit(_sync, file, written, manifest))  # the next file goes on beside it
        _wait([*itertools.chain(*under_way), *syncs])
    tensors = manifest.tensors.setdefault(kind, {})
    for name, group in files:
        for spec in group:
            entry = {"shape": list(spec.shape), "dtype": DTYPES[spec.dtype], "blake3": digests[spec.name].hexdigest()}
            tensors[spec.name] = entry if spec.finite else {**entry, "finite": False}
        head, names = _header(group), [spec.name for spec in group]
        place = {"bytes": len(head) + sum(spec.nbytes for spec in group), "header_bytes": len(head)}
        whole = _digest_of_file(head, names, tensors, "blake3")
        manifest.files[name] = {**place, "kind": kind, "tensors": names, "blake3_of_digests": whole}


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _digest_of_file(header: bytes, names: list[str], tensors: dict[str, dict[str, Any]], hashed: str) -> str:
    digests = (bytes.fromhex(tensors[name][hashed]) for name in names)
    return str(HASHES[hashed](b"".join([header, *digests])).hexdigest())


def write_index(folder: Path, kind: str, specs: Sequence[Spec], max_bytes: int, manifest: Manifest) -> None:
    """Write KIND.safetensors.index.json: which tensor lies in which file."""
    weight_map = {spec.name: name for name, group in _named_files(kind, specs, max_bytes) for spec in group}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json(folder, f"{kind}.safetensors.index.json", index, manifest)


def _named_files(kind: str, specs: Sequence[Spec], max_bytes: int) -> list[tuple[str, list[Spec]]]:
    files = cut_into_files(specs, max_bytes)
    return [(f"{kind}-{number:05d}-of-{len(files):05d}.safetensors", group) for number, group in enumerate(files, 1)]


def _read(file: BinaryIO, into: memoryview) -> None:
    if into and file.readinto(into) < len(into):  # type: ignore[attr-defined]
        raise OSError(errno.EIO, "it ends too early")


def bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return memoryview(array)


def _header(specs: Iterable[Spec]) -> bytes:
    """The head of a safetensors file: length, then JSON with type, shape and place of every tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        place = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(folder: Path, name: str, value: Any, manifest: Manifest) -> None:
    """Write one JSON file, brought to the disk, and note it."""
    write_bytes(folder, name, (json.dumps(value, indent=1) + "\n").encode(), manifest)


def write_bytes(folder: Path, name: str, data: bytes, manifest: Manifest) -> None:
    """Write one small file, brought to the disk, and note it."""
    manifest.under_way.append(name)
    with open(folder / name, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest.under_way.remove(name)
    manifest.files[name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}


def commit(aside: Path, final: Path, manifest: Manifest) -> None:
    """Make the folder `aside` appear as `final`, complete: manifest, fsync, one rename, fsync of the parent.

    Errors: CheckpointError if `final` exists already (it is left alone); OSError from the disk.
    """
    body = {"format": 3, "files": dict(manifest.files), "tensors": manifest.tensors}
    write_json(aside, MANIFEST, {**body, "sha256": _digest_of(body)}, manifest)
    _fsync_folder(aside)
    if final.exists():
        raise CheckpointError(f"{final}: exists already and is not replaced; give another path or delete it")
    aside.rename(final)
    _fsync_folder(final.parent)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete folder. Errors: CheckpointError if it is missing or is not what was written."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        body = {key: found[key] for key in ("format", "files", "tensors")}
        intact = found["sha256"] == _digest_of(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no {MANIFEST}); use another one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if not intact:
        raise CheckpointError(f"{path}: was changed after it was written; use another checkpoint")
    if body["format"] not in (1, 2, 3):
        raise CheckpointError(f"{path}: has format {body['format']}, but this version reads 1 to 3; use a newer one")
    return Manifest(body["files"], body["tensors"], hashed="blake3" if body["format"] == 3 else "sha256")


@dataclass(frozen=True)
class _Span:
    """Bytes of a file that have one digest."""

    path: Path
    start: int
    nbytes: int
    hashed: str
    digest: str
    tensor: str = ""
    floats: torch.dtype | None = None  # which must be finite

    def problem(self, buffer: bytearray) -> str:
        """What is wrong with these bytes, read through `buffer`; empty if nothing. Errors: OSError."""
        name = f"{self.path}: {self.tensor}" if self.tensor else str(self.path)
        digest, finite, left = HASHES[self.hashed](), True, self.nbytes
        with open(self.path, "rb") as file:
            if hasattr(os, "posix_fadvise"):  # Linux reads further ahead, while this hashes: a lone tensor 1.2, not 1.1
                os.posix_fadvise(file.fileno(), self.start, left, os.POSIX_FADV_SEQUENTIAL)
            file.seek(self.start)
            while left:
                part = memoryview(buffer)[: min(left, len(buffer))]
                _read(file, part)
                left -= len(part)
                digest.update(part)
                finite = finite and (self.floats is None or all_finite(torch.frombuffer(part, dtype=self.floats)))
        if digest.hexdigest() != self.digest:
            return f"{name} has {self.hashed} {digest.hexdigest()[:12]}..., but {self.digest[:12]}... was written"
        return "" if finite else f"{name} is not finite, although nothing was damaged after it was written"


def problems_in(folder: Path, files: Iterable[str] | None = None, part: int = 0, parts: int = 1) -> list[str]:
    """Read every byte and say what is not as the manifest has it; empty means the folder is as it was written.

    files: only these. With `parts` > 1 only the part-th of about equal shares; together they are everything.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    spans, found = list[_Span](), list[str]()

    def said(path: Path, look: Callable[[], str]) -> str:
        try:
            return look()
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    for name in manifest.files if files is None else files:
        more = partial(_spans, folder / name, manifest, spans)
        found.append(said(folder / name, more))
    total, ends = 1 + sum(span.nbytes for span in spans), itertools.accumulate(span.nbytes for span in spans)
    mine = [span for span, end in zip(spans, ends, strict=True) if (end - span.nbytes) * parts // total == part]
    buffers = deque(bytearray(BLOCK_BYTES) for _ in range(THREADS))

    def problem(span: _Span) -> str:
        buffer = buffers.pop()
        try:
            return said(span.path, lambda: span.problem(buffer))
        finally:
            buffers.append(buffer)

    with _Thread(THREADS) as pool:  # one reads while another hashes; hashing leaves Python's lock
        found += pool.map(problem, mine)
    return [problem for problem in found if problem]


def _spans(path: Path, manifest: Manifest, into: list[_Span]) -> str:
    """Note what is to be read of a file; what is wrong with its size, or with the header of a file of tensors."""
    size, entry, hashed = path.stat().st_size, manifest.files[path.name], manifest.hashed
    if size != entry["bytes"]:
        return f"{path}: has {size:,} bytes, but {entry['bytes']:,} were written"
    if hashed in entry:
        into.append(_Span(path, 0, size, hashed, entry[hashed]))
        return ""
    with open(path, "rb") as file:
        header, kind, start = file.read(entry["header_bytes"]), manifest.tensors[entry["kind"]], entry["header_bytes"]
    for name in entry["tensors"]:
        noted, dtype = kind[name], TYPES[kind[name]["dtype"]]
        floats = dtype if dtype.is_floating_point and noted.get("finite", True) else None
        count = Spec(name, tuple(noted["shape"]), dtype).nbytes
        into.append(_Span(path, start, count, hashed, noted[hashed], name, floats))
        start += count
    intact = _digest_of_file(header, entry["tensors"], kind, hashed) == entry[f"{hashed}_of_digests"]
    return "" if intact else f"{path}: its header is not what was written"


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
                self.files = dict.fromkeys(_places_in(single), single.name)
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
        value = torch.empty((*rows, *shape[1:]), dtype=TYPES[dtype])
        self._fill(value, name, start)
        return value

    def fill(self, wanted: Iterable[tuple[Tensor, str, int]]) -> None:
        """Read into each tensor rows of the one of that name, from that row on, as many as it has.

        Errors: CheckpointError if a file cannot be read or rows do not fit; others have been read then.
        """
        with _Thread(THREADS) as pool:
            _wait([pool.submit(self._fill, *rows) for rows in wanted])

    def _fill(self, into: Tensor, name: str, start: int) -> None:
        place, into = self._place(name), into.detach()
        path, shape, dtype, row = place["path"], place["shape"], TYPES[place["dtype"]], list(into.shape[1:])
        if shape[1:] != row or into.ndim != len(shape) or (shape and start + into.shape[0] > shape[0]):
            raise CheckpointError(f"{path}: {name} is {shape}, but {list(into.shape)} from row {start} is wanted here")
        flat = into.reshape(-1)  # a copy only where it is not contiguous
        direct = flat.dtype == dtype and flat.is_cpu  # without a copy, into the tensor's memory
        try:
            with open(path, "rb") as file:
                file.seek(place["at"] + start * math.prod(row) * dtype.itemsize)
                for part in flat.split(CHUNK_BYTES // dtype.itemsize):
                    values = part if direct else torch.empty(part.shape, dtype=dtype)
                    _read(file, bytes_of(values))
                    part.copy_(values)  # does nothing to itself
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use another one") from None
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def _place(self, name: str) -> dict[str, Any]:
        file = self.files[name]
        if file not in self._places:
            try:
                self._places[file] = _places_in(self.folder / file)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error}); use another one") from None
        place: dict[str, Any] = self._places[file].get(name, {})
        if place.get("dtype") not in TYPES:
            has = f"{name} is {place.get('dtype', 'missing')}, not one of {', '.join(TYPES)}"
            raise CheckpointError(f"{self.folder / file}: {has}; use another one")
        return place


def _places_in(path: Path) -> dict[str, Any]:
    """By name: type, shape, path and first byte of the tensors of a safetensors file, which may come from anywhere."""
    safe_open(path, "numpy")  # raises if the header is broken, or names bytes that the file does not have
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: {**place, "path": path, "at": 8 + size + place["data_offsets"][0]} for name, place in header.items()}
