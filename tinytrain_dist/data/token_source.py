"""Read one source, that is one entry of train_data or val_data: its token files (shards) as one stream of tokens.

Positions count tokens from the first one of the first shard. The stream is a ring: its first token follows its last.
Must not know how windows are chosen.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.open_files import OPEN_FILES, FileStamp, OpenFile
from tinytrain_dist.data.parallel_reads import READER_POOL, read_at
from tinytrain_dist.data.shard_manifest import Shard, Shards, file_tokens, open_shards, open_single
from tinytrain_dist.data.side_files import DocumentStarts, Mask, open_document_starts, open_mask
from tinytrain_dist.data.token_file import Tokens, dataset_fingerprint, load_token_dataset, torch_compatible_dtype
from tinytrain_dist.data.token_formats import find_layout
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.permissions import permission_problem
from tinytrain_dist.utils.shard_paths import NoTokenFilesError, shard_paths

# At the start, so many values of the masks of a source are checked, which takes about a tenth of a second. If none of
# them counts, up to a billion values are read to find one that does.
_CHECKED_MASK_TOKENS = 1 << 27
_MASK_CHECK_TOKENS = 1 << 30
_MASK_CHECK_BLOCK = 1 << 20


class TokenSource:
    """The shards of one source as one stream.

    Files are read and not memory-mapped, for three reasons:

    * A page that was mapped once counts as memory of the process until the process ends: 64 kB for each window drawn.
    * A file that is cut short would kill the process with SIGBUS.
    * Other threads of the process wait while a page is fetched.

    All methods that read may be called from several threads at once.
    """

    def __init__(self, entry: str, *, vocab_size: int | None = None, token_dtype: str | None = None) -> None:
        """Open and check the shards.

        entry: a file, a folder or a glob. vocab_size: check that every token ID lies in 0 .. vocab_size - 1 (None: not
        checked). token_dtype: the type of token IDs in files without a header.
        Errors: DataError naming the file.
        """
        self.entry = entry
        try:
            paths = shard_paths(entry)
        except NoTokenFilesError as error:
            raise DataError(str(error)) from None
        if len(paths) == 1:
            self.shards = _open_single(paths[0], vocab_size, token_dtype)
        else:
            self.shards = open_shards(paths, token_dtype, vocab_size)
        self.paths = self.shards.paths
        # Position of the first token of each shard, and behind them the number of tokens: int64 [shards + 1].
        self.shard_starts = np.concatenate([[0], np.cumsum(self.shards.tokens)]).astype(np.int64)
        # The type that holds the token IDs of all shards in a tensor.
        self.dtype = np.result_type(*map(torch_compatible_dtype, self.shards.dtypes))
        self._masks: list[Mask] | None = None
        self._documents: list[DocumentStarts] | None = None
        self._key = object()  # of the open files
        weakref.finalize(self, OPEN_FILES.forget, self._key)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.shard_starts[-1])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the source in a checkpoint."""
        return self.shards.fingerprint()

    def locate(self, position: int) -> tuple[int, int]:
        """Return the shard that holds a position, and the position in that shard."""
        position %= len(self)
        shard = int(np.searchsorted(self.shard_starts, position, side="right")) - 1
        return shard, position - int(self.shard_starts[shard])

    def read(self, position: int, length: int) -> Tokens:
        """Return `length` tokens from a position, in `dtype`; see `read_into`."""
        tokens = np.empty(length, self.dtype)
        self.read_into(position, tokens)
        return tokens

    def read_into(self, position: int, tokens: Tokens) -> None:
        """Fill an array with the tokens from a position, across the ends of shards and of the source.

        Errors: DataError if a file has changed since it was opened; OSError if it cannot be read.
        """
        for shard_number, first, part in self._parts(position, len(tokens)):
            shard = self.shards[shard_number]
            wanted = tokens[part]
            ids = wanted if shard.layout.dtype == tokens.dtype else np.empty(len(wanted), shard.layout.dtype)
            at = shard.layout.offset + first * shard.layout.dtype.itemsize
            if read_at(self._opened(shard_number), ids, at) != ids.nbytes:
                raise DataError(_shorter(shard))
            if ids is not wanted:
                wanted[:] = ids  # widens the IDs

    def open_masks(self) -> bool:
        """Open and check the mask files, FILE without its suffix + .mask.npy; return whether there are any.

        Errors: DataError if one does not fit its shard, if only some shards have one, or if no token counts.
        """
        if self._masks is None:
            found = READER_POOL.map(lambda shard: open_mask(shard.path, shard.layout.tokens, self._key), self.shards)
            masks: list[Mask] = _of_all(self.shards, found, "mask file", ".mask.npy")
            if masks and not self._some_token_counts(masks):
                place = masks[0].path if len(masks) == 1 else f"{self.entry}, all {len(masks):,} mask files"
                raise DataError(
                    f"{place}: no value is 1, so no token counts as a target; write a 1 for each token that the model "
                    "shall learn to predict, or set loss_mask = false"
                )
            self._masks = masks
        return bool(self._masks)

    def _some_token_counts(self, masks: Sequence[Mask]) -> bool:
        """Return whether some mask holds a 1; also True if none of the first _MASK_CHECK_TOKENS values is one.

        Reading ends behind the first 1, but not before _CHECKED_MASK_TOKENS, so that it costs little.
        Errors: DataError if a value that is read is not 0 or 1, or if a file cannot be read.
        """
        some_counts, read = False, 0
        for mask, tokens in zip(masks, self.shards.tokens.tolist(), strict=True):
            for first in range(0, tokens, _MASK_CHECK_BLOCK):
                if read >= (_CHECKED_MASK_TOKENS if some_counts else _MASK_CHECK_TOKENS):
                    return True
                count = min(_MASK_CHECK_BLOCK, tokens - first)
                try:
                    some_counts |= bool(mask.read(first, count).any())
                except OSError as error:
                    problem = f"{mask.path}: cannot be read ({error}); restore it"
                    raise DataError(permission_problem(error) or problem) from None
                read += count
        return some_counts

    def read_mask(self, position: int, length: int) -> npt.NDArray[np.bool_]:
        """Return which of the tokens from a position count as targets: bool [length]. `open_masks` comes first."""
        assert self._masks, "open_masks has returned True"
        counted = np.empty(length, np.bool_)
        for shard, first, part in self._parts(position, length):
            counted[part] = self._masks[shard].read(first, part.stop - part.start)
        return counted

    def open_documents(self) -> bool:
        """Open the files of document starts, or Megatron's indexes; return whether there are any.

        Errors: DataError if one does not fit its shard, if only some shards have one, or if no document has two tokens.
        """
        if self._documents is None:
            found = READER_POOL.map(
                lambda shard: open_document_starts(shard.path, shard.layout, shard.stamp.size, self._key), self.shards
            )
            documents: list[DocumentStarts] = _of_all(self.shards, found, "file of document starts", ".documents.npy")
            if documents and all(starts.count == starts.tokens and not starts.may_repeat for starts in documents):
                raise DataError(
                    f"{documents[0].path}: every token begins a document, so there is no document of two tokens and "
                    "nothing to predict; make it again together with the token file"
                )
            self._documents = documents
        return bool(self._documents)

    def document_starts(self, position: int, length: int) -> npt.NDArray[np.int64]:
        """Return at which of the tokens from a position documents begin: ascending numbers below `length`, int64.

        The first token of each shard begins a document. `open_documents` comes first.
        Errors: DataError if a file has changed; OSError if it cannot be read.
        """
        assert self._documents, "open_documents has returned True"
        starts = [np.empty(0, np.int64)]
        for shard, first, part in self._parts(position, length):
            found = self._documents[shard].between(first, first + part.stop - part.start)
            starts.append(found - first + part.start)
        return np.concatenate(starts)

    def recorded_documents(self) -> int:
        """Return how many documents are recorded, also empty ones. `open_documents` comes first."""
        assert self._documents, "open_documents has returned True"
        return sum(documents.count for documents in self._documents)

    def _opened(self, number: int) -> OpenFile:
        """Return the file of a shard, open. Errors: as of `_open_again`."""
        file = OPEN_FILES.get((self._key, number))
        if file is None:
            file = _open_again(self.shards[number])
            OPEN_FILES.keep((self._key, number), file)
        return file

    def _parts(self, position: int, length: int) -> list[tuple[int, int, slice]]:
        """Divide a range into parts of one shard each: (shard, first token in it, which of the tokens)."""
        parts, done = [], 0
        while done < length:
            shard, first = self.locate(position + done)
            count = min(length - done, int(self.shards.tokens[shard]) - first)
            parts.append((shard, first, slice(done, done + count)))
            done += count
        return parts


def _open_single(path: str, vocab_size: int | None, token_dtype: str | None) -> Shards:
    """Open a source of one file, whose range of token IDs is kept beside it in FILE.range.json."""
    layout = find_layout(Path(path), token_dtype, vocab_size)
    stamp = FileStamp.of(os.stat(path))  # before the file is read: a later change shows
    tokens = load_token_dataset(path, vocab_size=vocab_size, token_dtype=token_dtype)
    return open_single(path, layout, dataset_fingerprint(path, tokens)["sha256"], stamp)


def _open_again(shard: Shard) -> OpenFile:
    """Open a shard. Errors: DataError if it is no longer the file that was checked; OSError."""
    try:
        file = OpenFile(shard.path)
    except FileNotFoundError:
        raise DataError(f"{shard.path}: was removed since the run began; restore it and resume") from None
    stamp = file.stamp()
    if stamp.size < shard.stamp.size:
        raise DataError(_shorter(shard))
    # A file that was only copied back or touched has other times, and the same content.
    same = stamp.size == shard.stamp.size and (
        stamp == shard.stamp or dataset_fingerprint(shard.path, file_tokens(file, shard.layout)) == shard.fingerprint
    )
    if not same:
        raise DataError(f"{shard.path}: was changed since the run began; restore it and resume")
    return file


def _shorter(shard: Shard) -> str:
    return f"{shard.path}: has become shorter since the run began; restore it and resume"


def _of_all(shards: Sequence[Shard], found: Sequence[Any], what: str, ending: str) -> list[Any]:
    """Return the files beside all shards, or [] if no shard has one. Errors: DataError if only some have."""
    without = [shard.path for shard, file in zip(shards, found, strict=True) if file is None]
    if without and len(without) < len(shards):
        raise DataError(
            f"{without[0]}: has no {what} ({os.path.splitext(without[0])[0]}{ending}), but other files of its source "
            "have one; make those that are missing, or remove the others"
        )
    return [] if without else list(found)
