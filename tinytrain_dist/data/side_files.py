"""Read the files beside a token file: which tokens count as targets (mask), and where documents begin.

* FILE without its suffix + .mask.npy: uint8 or bool, 0 or 1, as many values as FILE has tokens; 1: the token counts.
* FILE without its suffix + .documents.npy: int64, the ascending positions in tokens at which documents begin; the first
  is 0. A Megatron index takes its place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.megatron_index import MegatronIndex, read_megatron_index
from tinytrain_dist.data.npy_files import NpyHeader, check_npy_file
from tinytrain_dist.data.open_files import OPEN_FILES, OpenFile
from tinytrain_dist.data.parallel_reads import as_array
from tinytrain_dist.data.token_formats import Layout
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.permissions import permission_problem
from tinytrain_dist.utils.regular_files import check_regular

_PAGE = 4096  # document starts that are read together
_SCAN_PAGES = 256


def side_path(path: str, ending: str) -> str:
    """Return the path of a file beside a token file: its own without the suffix, with `ending` (.mask.npy)."""
    return os.path.splitext(path)[0] + ending


class _SideFile:
    """A file that is opened when it is read."""

    def __init__(self, path: str, owner: object) -> None:
        self.path = path
        self._key = (owner, path)

    def read(self, dtype: np.dtype[Any], first: int, count: int, offset: int) -> npt.NDArray[Any]:
        """Return values of a type that begins at `offset`. Errors: DataError if there are too few; OSError."""
        file = OPEN_FILES.get(self._key)
        if file is None:
            try:
                file = OpenFile(self.path)
            except FileNotFoundError:
                raise DataError(f"{self.path}: was removed since the run began; restore it and resume") from None
            OPEN_FILES.keep(self._key, file)
        values = as_array(dtype, count, file, offset + first * dtype.itemsize)
        if len(values) < count:
            raise DataError(f"{self.path}: has become shorter since the run began; restore it and resume")
        return values


class Mask:
    """The mask file of one shard."""

    def __init__(self, path: str, header: NpyHeader, owner: object) -> None:
        """Read the file at `path`, whose header was checked, when values are asked for. owner: of the open file."""
        self.path = path
        self.header = header
        self._file = _SideFile(path, owner)

    def read(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Return which of `count` tokens of the shard count as targets.

        Errors: DataError if a value is not 0 or 1, or if the file has changed; OSError.
        """
        values = self._file.read(np.dtype(np.uint8), first, count, self.header.offset)
        if count and values.max() > 1:
            at = int(np.argmax(values > 1))
            raise DataError(
                f"{self.path}: has the value {values[at]} at position {first + at}, but a mask holds only 0 and "
                "1; make it again with its token file"
            )
        return values.view(np.bool_)


def open_mask(path: str, tokens: int, owner: object) -> Mask | None:
    """Return the mask of a shard of `tokens` tokens; None if it has none. Errors: DataError if it does not fit.

    owner: whose files are closed together, see `OpenFiles.forget`.
    """
    mask_path = side_path(path, ".mask.npy")
    header = _header(mask_path)
    if header is None:
        return None
    if header.dtype not in (np.dtype(np.uint8), np.dtype(np.bool_)) or len(header.shape) != 1:
        raise DataError(
            f"{mask_path}: holds {len(header.shape)}-D {header.dtype}, but a mask is a 1-D array of uint8 or bool; "
            "save mask.astype('uint8')"
        )
    if header.shape[0] != tokens:
        raise DataError(
            f"{mask_path}: has {header.shape[0]:,} values, but {path} has {tokens:,} tokens; a mask has one value for "
            "each token: make both again"
        )
    return Mask(mask_path, header, owner)


class DocumentStarts:
    """Where the documents of one shard begin. Every 4,096th position is kept in memory, from `check` on."""

    may_repeat = False  # documents may be empty, so that positions repeat or are the number of tokens

    def __init__(self, path: str, tokens: int, count: int, owner: object) -> None:
        """Describe `count` positions below `tokens` in the file at `path`. owner: of the open file."""
        self.path = path
        self.tokens = tokens
        self.count = count
        self._file = _SideFile(path, owner)
        self._samples: npt.NDArray[np.int64] | None = None

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return `count` positions from the one with number `first`; see `may_repeat`."""
        raise NotImplementedError

    def between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the positions at which documents begin in first .. last - 1, ascending. Errors: DataError; OSError."""
        if self._samples is None:
            self.check()
        assert self._samples is not None
        # Positions before `low` are less than `first`, and those from `high` on are not less than `last`.
        low = max(0, int(np.searchsorted(self._samples, first, side="left")) - 1) * _PAGE
        high = min(self.count, int(np.searchsorted(self._samples, last, side="left")) * _PAGE)
        starts = self.read(low, max(0, high - low))
        return np.unique(starts[(starts >= first) & (starts < last)])

    def check(self) -> None:
        """Check that the positions ascend from 0, and keep every 4,096th. Errors: DataError; OSError."""
        samples, last = [np.empty(0, np.int64)], -1
        for first in range(0, self.count, _PAGE * _SCAN_PAGES):
            starts = self.read(first, min(_PAGE * _SCAN_PAGES, self.count - first))
            wrong = (np.diff(starts, prepend=last) < 1 - self.may_repeat) | (starts >= self.tokens + self.may_repeat)
            wrong[0] |= first == 0 and starts[0] != 0
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self.path}: does not hold ascending positions from 0 to less than {self.tokens} (number "
                    f"{first + at} is {int(starts[at])}); make it again together with the token file"
                )
            last = int(starts[-1])
            samples.append(starts[::_PAGE])
        self._samples = np.concatenate(samples)


class _StartsFile(DocumentStarts):
    """Positions in a .documents.npy file."""

    def __init__(self, path: str, tokens: int, header: NpyHeader, owner: object) -> None:
        super().__init__(path, tokens, header.shape[0], owner)
        self.header = header

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        return self._file.read(self.header.dtype, first, count, self.header.offset).astype(np.int64)


class _StartsInIndex(DocumentStarts):
    """Positions in a Megatron index, by way of the first sequence of each document."""

    may_repeat = True

    def __init__(self, path: str, index: MegatronIndex, owner: object) -> None:
        super().__init__(path, index.tokens, index.documents, owner)
        self.index = index

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        if not count:
            return np.empty(0, np.int64)
        index, dtype = self.index, np.dtype("<i8")
        sequences = self._file.read(dtype, first, count, index.documents_at)
        lowest, highest = int(sequences[0]), min(int(sequences[-1]) + 1, index.sequences)
        pointers = self._file.read(dtype, lowest, max(0, highest - lowest), index.pointers_at)
        starts = np.append(pointers // index.dtype.itemsize, index.tokens)  # the last: of documents without sequences
        positions: npt.NDArray[np.int64] = starts[np.minimum(sequences - lowest, len(pointers))].astype(np.int64)
        return positions


def open_document_starts(path: str, layout: Layout, size: int, owner: object) -> DocumentStarts | None:
    """Return where the documents of a shard begin, after reading all of it; None if that is not recorded.

    size: of the token file, in bytes. owner: as of `open_mask`. Errors: DataError.
    """
    try:
        starts = _find_document_starts(path, layout, size, owner)
        if starts is not None:
            starts.check()  # now, so that a bad file is reported before the first step
    except OSError as error:
        problem = f"{path}: where its documents begin cannot be read ({error}); restore the file"
        raise DataError(permission_problem(error) or problem) from None
    return starts


def _find_document_starts(path: str, layout: Layout, size: int, owner: object) -> DocumentStarts | None:
    """Return where the documents of a shard begin, as `open_document_starts`, without reading it."""
    starts_path = side_path(path, ".documents.npy")
    header = _header(starts_path)
    if header is None:
        if layout.format != "Megatron":
            return None
        index_path = Path(side_path(path, ".idx"))
        return _StartsInIndex(str(index_path), read_megatron_index(index_path, size), owner)
    if header.dtype.kind not in "ui" or len(header.shape) != 1:
        raise DataError(
            f"{starts_path}: holds {len(header.shape)}-D {header.dtype}, but document starts are a 1-D array of int64; "
            "make it again together with the token file"
        )
    if not header.shape[0] and layout.tokens:
        raise DataError(f"{starts_path}: is empty, but {path} has {layout.tokens:,} tokens; make both again")
    return _StartsFile(starts_path, layout.tokens, header, owner)


def _header(path: str) -> NpyHeader | None:
    """Return the checked header of a .npy file; None if there is no such file. Errors: DataError."""
    try:
        check_regular(path)
        return check_npy_file(Path(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = f"{path}: not a readable .npy file ({error}); make it again with its token file"
        raise DataError(permission_problem(error) or problem) from None
