"""Owns folders of tensors on disk: safetensors files written as a stream, their index, the manifest, and its checks.

Must not know ranks, models or steps. A folder is complete when manifest.json, written last, lists every file and every
tensor with size and digest; there is no pickle anywhere. Manifest format 2: a tensor has the sha256 of its bytes, a
file of tensors the sha256 over its header and, in the order of the file, its tensors' sha256 (32 bytes each), so that
every byte is hashed once; any other file has the sha256 of its bytes. In format 1, which is still read, all files had.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.files import MANIFEST as MANIFEST
from tinytrain_dist.files import STATE as STATE

# tensors are hashed and written in chunks that stay in a core's share of the cache; RING of them may be under way
CHUNK_BYTES, RING, THREADS = 8 * 1024**2, 4, 8
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
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _hash_chunk(spec: Spec, chunk: Tensor, digest: Any) -> None:
    if spec.finite and not all_finite(chunk):
        raise CheckpointError(f"{spec.name}: is not finite, so nothing is saved; resume from the last checkpoint")
    digest.update(bytes_of(chunk))


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
    fetch: Callable[[Spec], Iterable[Tensor]],
    max_bytes: int,
    manifest: Manifest,
    mine: Callable[[Spec], bool] = lambda _: True,
) -> None:
    """Write the tensors as KIND-00001-of-N.safetensors ..., only those files whose first tensor is `mine`; note them.

    fetch(spec) gives the values of one tensor on the CPU in order, in chunks of any size; it is called once per tensor,
    in order, and a chunk is not read any more when RING others have been given. `write_index` completes the kind.
    Errors: OSError from the disk; CheckpointError for a value that is not finite where the spec says it must be.
    """
    files = [(name, group) for name, group in _named_files(kind, specs, max_bytes) if mine(group[0])]
    digests = {spec.name: hashlib.sha256() for _, group in files for spec in group}
    chunks, syncs = deque[tuple[Future[None], Future[None]]](), list[Future[None]]()
    with ExitStack() as opened, _Thread(1) as hashing, _Thread(1) as writing, _Thread(1) as syncing:
        for name, group in files:
            manifest.under_way.append(name)
            file = opened.enter_context(open(folder / name, "xb", buffering=0))
            written = writing.submit(_write_out, file, memoryview(_header(group)))
            for spec in group:
                size = 0
                for chunk in fetch(spec):
                    assert chunk.dtype == spec.dtype, spec
                    written = writing.submit(_write_out, file, bytes_of(chunk))
                    chunks.append((hashing.submit(_hash_chunk, spec, chunk, digests[spec.name]), written))
                    if len(chunks) == RING:
                        _wait(chunks.popleft())
                    size += chunk.nbytes
                assert size == spec.nbytes, spec
            syncs.append(syncing.submit(_sync, file, written, manifest))  # the next file goes on beside it
        _wait([*itertools.chain(*chunks), *syncs])
    tensors = manifest.tensors.setdefault(kind, {})
    for name, group in files:
        for spec in group:
            entry = {"shape": list(spec.shape), "dtype": DTYPES[spec.dtype], "sha256": digests[spec.name].hexdigest()}
            tensors[spec.name] = entry if spec.finite else {**entry, "finite": False}
        head, names = _header(group), [spec.name for spec in group]
        whole = _digest_of_file(head, (digests[name].hexdigest() for name in names))
        place = {"bytes": len(head) + sum(spec.nbytes for spec in group), "header_bytes": len(head)}
        manifest.files[name] = {**place, "kind": kind, "tensors": names, "sha256_of_digests": whole}


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _digest_of_file(header: bytes, digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join([header, *map(bytes.fromhex, digests)])).hexdigest()


def write_index(folder: Path, kind: str, specs: Sequence[Spec], max_bytes: int, manifest: Manifest) -> None:
    """Write KIND.safetensors.index.json: which tensor lies in which file."""
    weight_map = {spec.name: name for name, group in _named_files(kind, specs, max_bytes) for spec in group}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json(folder, f"{kind}.safetensors.index.json", index, manifest)


def _named_files(kind: str, specs: Sequence[Spec], max_bytes: int) -> list[tuple[str, list[Spec]]]:
    files = cut_into_files(specs, max_bytes)
    return [(f"{kind}-{number:05d}-of-{len(files):05d}.safetensors", group) for number, group in enumerate(files, 1)]


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
    manifest.files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit(aside: Path, final: Path, manifest: Manifest) -> None:
    """Make the folder `aside` appear as `final`, complete: manifest, fsync, one rename, fsync of the parent.

    Errors: CheckpointError if `final` exists already (it is left alone); OSError from the disk.
    """
    body = {"format": 2, "files": dict(manifest.files), "tensors": manifest.tensors}
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
    if body["format"] not in (1, 2):
        raise CheckpointError(f"{path}: has format {body['format']}, but this version reads 1 and 2; use a newer one")
    return Manifest(body["files"], body["tensors"])


@dataclass(frozen=True)
class _Span:
    """Bytes of a file that have one digest."""

    path: Path
    start: int
    nbytes: int
    sha256: str
    tensor: str = ""
    floats: torch.dtype | None = None  # which must be finite

    def problem(self) -> str:
        """What is wrong with these bytes; empty if nothing. Errors: OSError."""
        name = f"{self.path}: {self.tensor}" if self.tensor else str(self.path)
        digest, finite, left = hashlib.sha256(), True, self.nbytes
        buffer = bytearray(min(left, CHUNK_BYTES // 2))
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while left:
                part = memoryview(buffer)[: min(left, len(buffer))]
                if file.readinto(part) < len(part):
                    raise OSError(errno.EIO, "it ends too early")
                left -= len(part)
                digest.update(part)
                finite = finite and (self.floats is None or all_finite(torch.frombuffer(part, dtype=self.floats)))
        if digest.hexdigest() != self.sha256:
            return f"{name} has sha256 {digest.hexdigest()[:12]}..., but {self.sha256[:12]}... was written"
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
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    for name in manifest.files if files is None else files:
        more = partial(_spans, folder / name, manifest.files[name], manifest.tensors, spans)
        found.append(said(folder / name, more))
    total, ends = 1 + sum(span.nbytes for span in spans), itertools.accumulate(span.nbytes for span in spans)
    mine = [span for span, end in zip(spans, ends, strict=True) if (end - span.nbytes) * parts // total == part]
    with _Thread(THREADS) as pool:  # one reads while another hashes; hashing leaves Python's lock
        found += pool.map(lambda span: said(span.path, span.problem), mine)
    return [problem for problem in found if problem]


def _spans(path: Path, entry: dict[str, Any], tensors: dict[str, dict[str, Any]], into: list[_Span]) -> str:
    """Note what is to be read of a file; what is wrong with its size, or with the header of a file of tensors."""
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path}: has {size:,} bytes, but {entry['bytes']:,} were written"
    if "sha256" in entry:
        into.append(_Span(path, 0, size, entry["sha256"]))
        return ""
    with open(path, "rb") as file:
        header, kind, start = file.read(entry["header_bytes"]), tensors[entry["kind"]], entry["header_bytes"]
    for name in entry["tensors"]:
        noted, dtype = kind[name], TYPES[kind[name]["dtype"]]
        floats = dtype if dtype.is_floating_point and noted.get("finite", True) else None
        count = Spec(name, tuple(noted["shape"]), dtype).nbytes
        into.append(_Span(path, start, count, noted["sha256"], name, floats))
        start += count
    intact = _digest_of_file(header, (kind[name]["sha256"] for name in entry["tensors"])) == entry["sha256_of_digests"]
    return "" if intact else f"{path}: its header is not what was written"


class TensorReader:
    """Reads rows of tensors from a folder with an index, opening each file once."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Errors: CheckpointError if the index is missing or broken. Also reads a lone KIND.safetensors."""
        self.folder, self.kind, self._open = folder, kind, {}  # type: ignore[var-annotated]
        index, single = folder / f"{kind}.safetensors.index.json", folder / f"{kind}.safetensors"
        try:
            if index.is_file():
                self.files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            else:
                with safe_open(single, "pt") as file:
                    self.files = dict.fromkeys(file.keys(), single.name)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: has no readable {kind} weights ({error}); give another folder") from None

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type (in safetensors' words) of one tensor."""
        piece = self._slice(name)
        return tuple(piece.get_shape()), piece.get_dtype()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop - 1 of one tensor, or all of it."""
        if not self.spec(name)[0]:
            whole: Tensor = self._file(name).get_tensor(name)
            return whole
        rows: Tensor = self._slice(name)[start:stop]
        return rows

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)

    def _file(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._open:
            try:
                self._open[path] = safe_open(self.folder / path, "pt")
            except Exception as error:  # safetensors raises its own class, OSError, or FileNotFoundError
                raise CheckpointError(f"{self.folder / path}: cannot be read ({error}); use another one") from None
        return self._open[path]
