"""Owns folders of tensors on disk: safetensors files written as a stream, their index, the manifest, and its checks.

Must not know ranks, models or steps. A folder is complete when manifest.json, written last, lists every file with its
size and sha256 and every tensor with its shape, type and sha256; there is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinytrain_dist.errors import CheckpointError

MANIFEST, STATE = "manifest.json", "trainer_state.json"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Name, shape and type of one whole tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass
class Manifest:
    """What a complete folder holds: `files` by name, `tensors` by kind ("model", "optimizer") and name."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


class _HashingFile:
    """A file that is hashed while it is written, so that the digest is of what memory held, not of what disk kept."""

    def __init__(self, path: Path) -> None:
        self.path, self.digest, self.size = path, hashlib.sha256(), 0
        self.file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by finish()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def finish(self) -> dict[str, Any]:
        """Bring the file to the disk; its size and digest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}


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


def write_tensors(
    folder: Path,
    kind: str,
    specs: Sequence[Spec],
    fetch: Callable[[Spec], Tensor],
    max_bytes: int,
    manifest: Manifest,
    mine: Callable[[Spec], bool] = lambda _: True,
) -> None:
    """Write the tensors as KIND-00001-of-N.safetensors ..., only those files whose first tensor is `mine`; note them.

    fetch(spec) gives one whole tensor on the CPU; it is called once per tensor, in order, and nothing is kept, so the
    memory is that of the largest tensor. `write_index` completes the kind. Errors: OSError from the disk.
    """
    tensors = manifest.tensors.setdefault(kind, {})
    for name, group in _named_files(kind, specs, max_bytes):
        if not mine(group[0]):
            continue
        out = _HashingFile(folder / name)
        try:
            out.write(_header(group))
            for spec in group:
                value = fetch(spec).contiguous()
                assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype), spec
                data = _bytes_of(value)
                out.write(data)
                digest = hashlib.sha256(data).hexdigest()
                tensors[spec.name] = {"shape": list(spec.shape), "dtype": DTYPES[spec.dtype], "sha256": digest}
            manifest.files[name] = out.finish()
        finally:
            out.file.close()


def write_index(folder: Path, kind: str, specs: Sequence[Spec], max_bytes: int, manifest: Manifest) -> None:
    """Write KIND.safetensors.index.json: which tensor lies in which file."""
    weight_map = {spec.name: name for name, group in _named_files(kind, specs, max_bytes) for spec in group}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json(folder, f"{kind}.safetensors.index.json", index, manifest)


def _named_files(kind: str, specs: Sequence[Spec], max_bytes: int) -> list[tuple[str, list[Spec]]]:
    files = cut_into_files(specs, max_bytes)
    return [(f"{kind}-{number:05d}-of-{len(files):05d}.safetensors", group) for number, group in enumerate(files, 1)]


def _bytes_of(value: Tensor) -> memoryview:
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
    out = _HashingFile(folder / name)
    try:
        out.write(data)
        manifest.files[name] = out.finish()
    finally:
        out.file.close()


def commit(aside: Path, final: Path, manifest: Manifest) -> None:
    """Make the folder `aside` appear as `final`, complete: manifest, fsync, one rename, fsync of the parent.

    Errors: CheckpointError if `final` exists already (it is left alone); OSError from the disk.
    """
    body = {"format": 1, "files": manifest.files, "tensors": manifest.tensors}
    write_json(aside, MANIFEST, {**body, "sha256": _digest_of(body)}, Manifest())
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
    if not intact or body["format"] != 1:
        raise CheckpointError(f"{path}: was changed after it was written; use another checkpoint")
    return Manifest(body["files"], body["tensors"])


def problems_in(folder: Path, files: Iterable[str] | None = None) -> list[str]:
    """Read every byte and say what is not as the manifest has it; empty means the folder is as it was written."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name in manifest.files if files is None else files:
        path, expected = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                found.append(f"{path}: has {size:,} bytes, but {expected['bytes']:,} were written")
                continue
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected["sha256"]:
                found.append(f"{path}: has sha256 {digest[:12]}..., but {expected['sha256'][:12]}... was written")
        except OSError as error:
            found.append(f"{path}: cannot be read ({error.strerror})")
    return found


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
