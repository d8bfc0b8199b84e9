"""Write token files, one or several of a stated size, with the positions at which their documents begin.

Must not know where documents come from or how they are encoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from tinytrain_dist.data.preparation.encoding import Part
from tinytrain_dist.errors import DataError

MAX_SHARDS = 100_000  # more would not sort by name in the order of their numbers


class NpyWriter:
    """A one-dimensional .npy file to which values are appended. `finish` completes its header."""

    def __init__(self, path: Path, dtype: str, length: int | None = None) -> None:
        """Create the file, or open it to continue after its first `length` values. dtype: in numpy's notation."""
        self.path = path
        self.dtype = dtype
        self.length = length or 0
        self.file = path.open("wb" if length is None else "r+b")
        if length is None:
            self.file.write(self._header())
        else:
            size = len(self._header()) + length * np.dtype(dtype).itemsize
            self.file.truncate(size)
            self.file.seek(size)

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        fields = {"descr": self.dtype, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(buffer, fields)
        return buffer.getvalue()

    def append(self, values: NDArray[Any]) -> None:
        """Append values of the type of the file."""
        self.file.write(values.data)
        self.length += len(values)

    def sync(self) -> None:
        """Flush what was appended to disk."""
        _sync(self.file)

    def finish(self) -> str:
        """Write the final header, flush the file to disk, and return its SHA-256 digest."""
        self.file.seek(0)
        self.file.write(self._header())
        _sync(self.file)
        self.file.close()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Close the file as it is."""
        with suppress(OSError):  # if the file is unfinished, another exception is already being raised
            self.file.close()


class TokenWriter:
    """The token files of train or of val: one, or shards that end with the last document that fits.

    Beside each token file NAME.npy is NAME.documents.npy, with the position at which each document begins.
    """

    def __init__(
        self,
        folder: Path,
        side: str,
        dtype: str,
        shard_tokens: int | None = None,
        state: dict[str, int] | None = None,
        *,
        masked: bool = False,
    ) -> None:
        """Create the files. dtype: `<u2` or `<u4`. state: of an interrupted writer, to continue its files.

        masked: NAME.mask.npy is written too, which says which tokens count as targets.
        """
        state = state or {}
        self.folder, self.side, self.dtype, self.shard_tokens = folder, side, dtype, shard_tokens
        self.tokens, self.documents, self.bytes = (state.get(name, 0) for name in ("tokens", "documents", "bytes"))
        self.counted = state.get("counted", 0)  # tokens that count as targets
        self.shards = state.get("shards", 0)  # complete ones
        self.endings = {".npy": dtype, ".documents.npy": "<i8"} | ({".mask.npy": "|u1"} if masked else {})
        self.digests = self._read_digests()
        self._open: list[NpyWriter] | None = None
        if "open_tokens" in state:
            self._open = self._files(state["open_tokens"], state["open_documents"])
        elif shard_tokens is None:
            self._open = self._files()

    def _name(self, number: int) -> str:
        return self.side if self.shard_tokens is None else f"{self.side}-{number:05d}"

    def _files(self, tokens: int | None = None, documents: int | None = None) -> list[NpyWriter]:
        """Open the token file, the file of document starts, and the mask if there is one."""
        name = self._name(self.shards)
        if self.shards >= MAX_SHARDS:
            raise DataError(
                f"--shard-tokens {self.shard_tokens}: gives more than {MAX_SHARDS:,} files; set a larger one"
            )
        lengths = [tokens, documents, tokens]
        return [
            NpyWriter(self.folder / f"{name}{ending}", dtype, length)
            for (ending, dtype), length in zip(self.endings.items(), lengths, strict=False)
        ]

    def append(self, part: Part) -> None:
        """Append the IDs of several documents."""
        ends = np.cumsum(part.lengths)
        first = written = 0  # document, token
        while first < len(ends):
            self._open = self._open or self._files()
            tokens, documents, *masks = self._open
            last = len(ends)
            if self.shard_tokens is not None:
                room = self.shard_tokens - tokens.length
                last = int(np.searchsorted(ends, written + room, side="right"))
                last = max(last, first + (tokens.length == 0))  # a document that is longer than a shard has its own
            if last > first:
                starts = tokens.length - written + ends[first:last] - part.lengths[first:last]
                documents.append(starts.astype("<i8"))
                tokens.append(part.ids[written : ends[last - 1]])
                for mask in masks:
                    assert part.counted is not None
                    mask.append(part.counted[written : ends[last - 1]])
                first, written = last, int(ends[last - 1])
            if first < len(ends):
                self._finish_shard()
        self.tokens += len(part.ids)
        self.documents += len(part.lengths)
        self.bytes += part.bytes
        self.counted += 0 if part.counted is None else int(part.counted.sum())

    def _finish_shard(self) -> None:
        assert self._open is not None
        for writer in self._open:
            self.digests[writer.path.name] = writer.finish()
            if self.shard_tokens is not None:
                with self._digest_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([writer.path.name, self.digests[writer.path.name]]) + "\n")
        self._open = None
        self.shards += 1

    def commit(self) -> dict[str, int]:
        """Flush everything to disk, and return the state from which another writer can continue."""
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self.shards}
        counts["counted"] = self.counted
        if self._digest_file.exists():
            with self._digest_file.open("rb") as file:
                os.fsync(file.fileno())
        if self._open is not None:
            for writer in self._open:
                writer.sync()
            counts |= {"open_tokens": self._open[0].length, "open_documents": self._open[1].length}
        return counts

    def finish(self) -> dict[str, str]:
        """Complete the last file, and return the SHA-256 digest of each file by its name."""
        if self._open is not None:
            self._finish_shard()
        return self.digests

    @property
    def _digest_file(self) -> Path:
        """The digests of the shards that are complete, so that they are not read again after an interruption."""
        return self.folder.parent / f"{self.side}.digests.jsonl"

    def _read_digests(self) -> dict[str, str]:
        """Return the digests of the complete shards, and forget those of later ones that an interrupted run wrote."""
        if self.shard_tokens is None or not self._digest_file.exists():
            return {}
        known: dict[str, str] = {}
        for line in self._digest_file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that was cut short
                name, digest = json.loads(line)
                known[name] = digest
        names = [f"{self._name(number)}{ending}" for number in range(self.shards) for ending in self.endings]
        return {name: known[name] for name in names}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._open or ():
            writer.close()


def write_file(path: Path, text: str) -> str:
    """Write a small file, flush it to disk, and return its SHA-256 digest."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        _sync(file)
    return hashlib.sha256(data).hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
