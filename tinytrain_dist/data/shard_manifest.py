"""Open the shards of a source, and remember what was found, so that the next start need not open them again.

The manifest is a JSON file beside the shards, or in the user's cache folder if theirs cannot be written. It holds for
each shard: layout, fingerprint, range of token IDs, and the stamp of the file (size, times of its last change and of
its last status change). They count only if the stamp is still the same. The status change cannot be set back, so a
file that was changed and then given its old modification time is read again. So is a file that was changed less than
two seconds before it was read, because it could change again without another stamp.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.open_files import FileStamp, OpenFile
from tinytrain_dist.data.parallel_reads import READER_POOL, as_array, in_chunks
from tinytrain_dist.data.side_files import side_path
from tinytrain_dist.data.token_file import SlicedTokens, Tokens, check_id_range, dataset_fingerprint, scan_id_range
from tinytrain_dist.data.token_formats import Layout, check_stated_type, find_layout
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.json_files import read_json_dict

VERSION = 1
_SCAN_BLOCK_TOKENS = 1 << 20  # per thread
_STATUS_CHUNK = 256  # files whose status one task asks for
_SAVED_CHUNK = 1024  # shards after whose reading the manifest is written
_SETTLED_NS = 2_000_000_000
# What is known of a shard. In a table, because 10,000 objects would take a large part of a second to make.
_ROW = np.dtype(
    [
        ("stamps", np.int64, 6),  # size, modified, changed: of the file, and of Megatron's index (0 without one)
        ("read_at", np.int64),  # when the file was read, in nanoseconds; 0: it was not
        ("format", "U10"),
        ("dtype", "U8"),
        ("offset", np.int64),
        ("tokens", np.int64),
        ("scanned", np.int64),  # 1: the next two are known
        ("smallest", np.int64),
        ("largest", np.int64),
        ("sha256", "U64"),  # of dataset_fingerprint
    ]
)
Table = npt.NDArray[Any]  # of _ROW


class Shard(NamedTuple):
    """One token file of a source."""

    path: str
    layout: Layout
    stamp: FileStamp
    sha256: str  # of dataset_fingerprint

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


class Shards(Sequence[Shard]):
    """The shards of a source, in order."""

    def __init__(self, paths: Sequence[str], table: Table) -> None:
        """Combine paths with what is known of the files."""
        self.paths = paths
        self.table = table

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each shard: int64 [shards]."""
        tokens: npt.NDArray[np.int64] = self.table["tokens"]
        return tokens

    @property
    def dtypes(self) -> set[np.dtype[Any]]:
        """The types of the token IDs."""
        return {np.dtype(name) for name in np.unique(self.table["dtype"]).tolist()}

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.paths)

    def __getitem__(self, number: Any) -> Any:
        """Return a shard."""
        row = self.table[number]
        layout = Layout(str(row["format"]), np.dtype(str(row["dtype"])), int(row["offset"]), int(row["tokens"]))
        return Shard(self.paths[number], layout, FileStamp(*row["stamps"][:3].tolist()), str(row["sha256"]))

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the source in a checkpoint: that of its file, or one entry for all its shards."""
        if len(self) == 1:
            fingerprint: dict[str, Any] = self[0].fingerprint
            return fingerprint
        names = [os.path.basename(path) for path in self.paths]
        columns = [names, self.table["dtype"].tolist(), self.table["sha256"].tolist()]
        digest = hashlib.sha256("\n".join("\0".join(column) for column in columns).encode("utf-8", "surrogateescape"))
        digest.update(self.tokens.astype("<i8").tobytes())
        return {
            "file": f"{names[0]} .. {names[-1]}",
            "shards": len(self),
            "tokens": int(self.tokens.sum()),
            "dtype": ", ".join(sorted(map(str, self.dtypes))),
            "sha256": digest.hexdigest(),
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
        values = as_array(self.dtype, max(0, last - first), self.file, position)
        if len(values) != max(0, last - first):
            raise EOFError("it became shorter while it was read")
        return values


def file_tokens(file: OpenFile, layout: Layout) -> SlicedTokens:
    """Return the token IDs of an open file, which are read when slices are taken."""
    return _FileTokens(file, layout)


def open_single(path: str, layout: Layout, sha256: str, stamp: FileStamp) -> Shards:
    """Return the shards of a source of one file."""
    table = np.zeros(1, _ROW)
    table[0] = ((*stamp, 0, 0, 0), 0, layout.format, layout.dtype.str, layout.offset, layout.tokens, 0, 0, 0, sha256)
    return Shards([path], table)


def open_shards(paths: Sequence[str], token_dtype: str | None, vocab_size: int | None) -> Shards:
    """Open and check the shards of a source; read only those that are not in the manifest.

    vocab_size: check that all token IDs belong to the vocabulary. Errors: DataError naming the shard.
    """
    folder = os.path.commonpath({os.path.dirname(path) for path in paths})
    places = _manifest_places(folder, [path[len(folder) :].lstrip(os.sep) for path in paths], token_dtype)
    stamps = np.array([stamp for part in READER_POOL.map(_stamps, in_chunks(paths, _STATUS_CHUNK)) for stamp in part])
    table = np.zeros(len(paths), _ROW)
    for known in _read_manifests(places, len(paths)):
        last_change = np.maximum(known["stamps"][:, 2], known["stamps"][:, 5])
        usable = (known["stamps"] == stamps).all(axis=1) & (last_change + _SETTLED_NS < known["read_at"])
        usable &= (known["scanned"] == 1) | (vocab_size is None)
        table[usable] = known[usable]
    for part in in_chunks(np.flatnonzero(table["read_at"] == 0).tolist(), _SAVED_CHUNK):
        rows = READER_POOL.map(lambda number: _read_shard(paths[number], token_dtype, vocab_size), part)
        for number, row in zip(part, rows, strict=True):
            table[number] = row
        _write_manifest(places, table)  # now, because a killed start should not begin again
    shards = Shards(paths, table)
    if token_dtype is not None:  # otherwise nothing is stated, and there may be 10,000 shards
        check_stated_type([(shard.path, shard.layout) for shard in shards], token_dtype)
    if vocab_size is not None:
        outside = (table["smallest"] < 0) | (table["largest"] >= vocab_size)
        for number in np.flatnonzero(outside & (table["tokens"] > 0))[:1].tolist():
            row = table[number]
            check_id_range(
                paths[number], shards[number].layout, (int(row["smallest"]), int(row["largest"])), vocab_size
            )
    return shards


def _stamps(paths: Sequence[str]) -> list[tuple[int, ...]]:
    return [_stamp(path) for path in paths]


def _stamp(path: str) -> tuple[int, ...]:
    """Return the stamps of a file and of the index beside it: six numbers; 0 for a file that is missing."""
    stamps: tuple[int, ...] = ()
    for file in (path, side_path(path, ".idx") if path.endswith(".bin") else ""):
        try:
            stamps += FileStamp.of(os.stat(file))
        except OSError:
            stamps += (0, 0, 0)  # if it is the token file, reading it gives the error
    return stamps


def _read_shard(path: str, token_dtype: str | None, vocab_size: int | None) -> tuple[Any, ...]:
    """Return what is known of a shard after reading it, as a row of the table. Errors: DataError."""
    now, stamps = time.time_ns(), _stamp(path)
    layout = find_layout(Path(path), token_dtype, vocab_size)
    try:
        tokens = _FileTokens(OpenFile(path), layout)
        sha256: str = dataset_fingerprint(path, tokens)["sha256"]
        smallest, largest = (0, -1) if vocab_size is None else scan_id_range(tokens, _SCAN_BLOCK_TOKENS)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or correct the path") from None
    if stamps != _stamp(path):
        raise DataError(f"{path}: was changed while it was read; start again when it is complete")
    kind, dtype, offset, count = layout
    return stamps, now, kind, dtype.str, offset, count, int(vocab_size is not None), smallest, largest, sha256


def _manifest_places(folder: str, names: Sequence[str], token_dtype: str | None) -> list[Path]:
    """Return where the manifest of these shards may be: beside them, else in the user's cache folder."""
    key = hashlib.sha256("\0".join([str(token_dtype), *names]).encode("utf-8", "surrogateescape"))
    beside = Path(folder) / f"shards-{key.hexdigest()[:16]}.range.json"
    key.update(os.fsencode(os.path.abspath(folder)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [beside, cache / "tinytrain_dist" / f"shards-{key.hexdigest()[:16]}.range.json"]


def _read_manifests(places: Sequence[Path], count: int) -> list[Table]:
    """Return what each usable manifest says about the shards, the first last. Their names are in its own name."""
    found = []
    for path in reversed(places):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
            manifest = read_json_dict(path)
            if manifest.get("version") == VERSION:
                table = np.zeros(count, _ROW)
                for column in _ROW.names or ():
                    table[column] = np.array(manifest[column]).reshape(table[column].shape)
                for name in np.unique(table["dtype"][table["read_at"] != 0]).tolist():
                    np.dtype(name)
                found.append(table)
    return found


def _write_manifest(places: Sequence[Path], table: Table) -> None:
    """Write the manifest to the first place that can be written. Without one, each start reads the shards again."""
    columns = {column: table[column].reshape(-1).tolist() for column in _ROW.names or ()}
    for path in places:
        with contextlib.suppress(OSError):
            if path is not places[0]:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, {"version": VERSION, **columns})
            return
