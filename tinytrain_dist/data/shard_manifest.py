"""Open the shards of a source, and remember what was found, so that the next start need not open them again.

The manifest is a JSON file beside the shards, or in the user's cache folder if theirs cannot be written. It holds one
row for each shard: layout, fingerprint, range of token IDs, and the stamp of the file (size, times of its last change
and of its last status change). A row counts only if the stamp is still the same. The status change cannot be set back,
so a file that was changed and then given its old modification time is read again. So is a file that was changed less
than two seconds before it was read, because it could change again without another stamp.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinytrain_dist.data.open_files import FileStamp, OpenFile
from tinytrain_dist.data.parallel_reads import READER_POOL, as_array, in_chunks
from tinytrain_dist.data.token_file import SlicedTokens, Tokens, check_id_range, dataset_fingerprint, scan_id_range
from tinytrain_dist.data.token_formats import Layout, find_layout
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.json_files import read_json_dict

VERSION = 1
_SCAN_BLOCK_TOKENS = 1 << 20  # per thread
_STATUS_CHUNK = 256  # files whose status one task asks for
_SAVED_CHUNK = 1024  # shards after whose reading the manifest is written
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One token file of a source."""

    path: str
    layout: Layout
    stamp: FileStamp
    index_stamp: FileStamp | None  # of Megatron's .idx file
    sha256: str  # of dataset_fingerprint
    id_range: tuple[int, int] | None  # smallest and largest token ID; None: not scanned
    read_at: int  # when the file was read, in nanoseconds

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the file; see `dataset_fingerprint`."""
        dtype = str(self.layout.dtype)
        return {
            "file": os.path.basename(self.path),
            "tokens": self.layout.tokens,
            "dtype": dtype,
            "sha256": self.sha256,
        }


class _FileTokens:
    """The token IDs of an open file; reads a slice when it is taken."""

    def __init__(self, file: OpenFile, layout: Layout) -> None:
        self.file, self.layout, self.dtype = file, layout, layout.dtype

    def __len__(self) -> int:
        return self.layout.tokens

    def __getitem__(self, part: slice) -> Tokens:
        first, last, _ = part.indices(len(self))
        position = self.layout.offset + first * self.dtype.itemsize
        values = as_array(self.dtype, max(0, last - first), self.file.descriptor, position)
        if len(values) != max(0, last - first):
            raise EOFError("it became shorter while it was read")
        return values


def file_tokens(file: OpenFile, layout: Layout) -> SlicedTokens:
    """Return the token IDs of an open file, which are read when slices are taken."""
    return _FileTokens(file, layout)


def open_shards(paths: Sequence[str], token_dtype: str | None, vocab_size: int | None) -> list[Shard]:
    """Open and check the shards of a source; read only those that are not in the manifest.

    vocab_size: check that all token IDs belong to the vocabulary. Errors: DataError naming the shard.
    """
    folder = os.path.commonpath({os.path.dirname(path) for path in paths})
    names = [path[len(folder) :].lstrip(os.sep) for path in paths]
    places = _manifest_places(folder, names, token_dtype)
    manifests = _read_manifests(places)
    stamps = [stamp for part in READER_POOL.map(_stamps, in_chunks(paths, _STATUS_CHUNK)) for stamp in part]
    shards: dict[int, Shard] = {}
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        for rows in manifests:
            shard = _known_shard(path, rows.get(name), stamps[number])
            if shard is not None and (shard.id_range is not None or vocab_size is None):
                shards[number] = shard
                break
    unknown = [number for number in range(len(paths)) if number not in shards]
    for part in in_chunks(unknown, _SAVED_CHUNK):
        read = READER_POOL.map(lambda number: _read_shard(paths[number], token_dtype, vocab_size), part)
        shards.update(zip(part, read, strict=True))
        # now, because a killed start should not begin again
        _write_manifest(places, {names[number]: _row(shard) for number, shard in shards.items()})
    if vocab_size is not None:
        for number in range(len(paths)):
            shard = shards[number]
            if shard.id_range is not None and shard.layout.tokens:
                check_id_range(shard.path, shard.layout, shard.id_range, vocab_size)
    return [shards[number] for number in range(len(paths))]


def _stamps(paths: Sequence[str]) -> list[tuple[FileStamp, FileStamp | None] | None]:
    """Return the stamps of each file and of the index beside it, if there is one; None for a file that is missing."""
    return [_stamp(path) for path in paths]


def _stamp(path: str) -> tuple[FileStamp, FileStamp | None] | None:
    try:
        stamp, index_stamp = FileStamp.of(os.stat(path)), None
        if path.endswith(".bin"):
            with contextlib.suppress(FileNotFoundError):
                index_stamp = FileStamp.of(os.stat(path[: -len(".bin")] + ".idx"))
        return stamp, index_stamp
    except OSError:
        return None  # reading it gives the error


def _read_shard(path: str, token_dtype: str | None, vocab_size: int | None) -> Shard:
    """Read what must be known of a shard, from the file itself. Errors: DataError."""
    now = time.time_ns()
    stamps = _stamp(path)
    layout = find_layout(Path(path), token_dtype, vocab_size)
    try:
        tokens = file_tokens(OpenFile(path), layout)
        sha256: str = dataset_fingerprint(path, tokens)["sha256"]
        id_range = None if vocab_size is None else scan_id_range(tokens, _SCAN_BLOCK_TOKENS)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or correct the path") from None
    if stamps is None or stamps != _stamp(path):
        raise DataError(f"{path}: was changed while it was read; start again when it is complete")
    return Shard(path, layout, *stamps, sha256, id_range, now)


def _known_shard(path: str, row: Any, stamps: tuple[FileStamp, FileStamp | None] | None) -> Shard | None:
    """Return a shard from its row in the manifest; None if the row is damaged, or the file may have changed since."""
    try:
        stamp, index_stamp, layout, sha256, id_range, read_at = row
        shard = Shard(
            path,
            Layout(str(layout[0]), np.dtype(layout[1]), int(layout[2]), int(layout[3])),
            FileStamp(*stamp),
            FileStamp(*index_stamp) if index_stamp else None,
            str(sha256),
            (int(id_range[0]), int(id_range[1])) if id_range else None,
            int(read_at),
        )
        if (shard.stamp, shard.index_stamp) != stamps:
            return None
        last_change = max(shard.stamp.changed, shard.index_stamp.changed if shard.index_stamp else 0)
        return shard if last_change + _SETTLED_NS < shard.read_at else None
    except (TypeError, ValueError, IndexError):
        return None


def _row(shard: Shard) -> list[Any]:
    layout = shard.layout
    return [
        shard.stamp,
        shard.index_stamp,
        [layout.format, layout.dtype.str, layout.offset, layout.tokens],
        shard.sha256,
        shard.id_range,
        shard.read_at,
    ]


def _manifest_places(folder: str, names: Sequence[str], token_dtype: str | None) -> list[Path]:
    """Return where the manifest of these shards may be: beside them, else in the user's cache folder."""
    key = hashlib.sha256("\0".join([str(token_dtype), *names]).encode("utf-8", "surrogateescape"))
    beside = Path(folder) / f"shards-{key.hexdigest()[:16]}.range.json"
    key.update(os.fsencode(os.path.abspath(folder)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [beside, cache / "tinytrain_dist" / f"shards-{key.hexdigest()[:16]}.range.json"]


def _read_manifests(places: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of each usable manifest, by the shards' names."""
    found = []
    for path in places:
        with contextlib.suppress(OSError, ValueError):
            manifest = read_json_dict(path)
            rows = manifest.get("shards")
            if manifest.get("version") == VERSION and isinstance(rows, dict):
                found.append(rows)
    return found


def _write_manifest(places: Sequence[Path], rows: dict[str, Any]) -> None:
    """Write the manifest to the first place that can be written. Without one, each start reads the shards again."""
    for path in places:
        with contextlib.suppress(OSError):
            if path is not places[0]:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, {"version": VERSION, "shards": rows})
            return
