"""Open and check token files, and read windows of several files as one dataset.

Must not know ranks, models or devices: a rank asks for sample slots and gets their windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap as maps
import os
import weakref
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinytrain_dist.data.sampling import TRAIN_STREAM, slot_random_words, uniform_integers
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.regular_files import NotAFileError, check_regular, open_regular, read_text

Tokens = npt.NDArray[Any]


def load_token_dataset(path: str | Path, mmap: bool = True, *, vocab_size: int | None = None) -> Tokens:
    """Open a token file (.npy, 1-D integers, C order), memory-mapped by default.

    vocab_size: check that every id lies in 0 .. vocab_size - 1 (one scan of the file, remembered beside it).
    Errors: DataError naming the file, what was found and what is allowed.
    """
    path = Path(path)
    try:
        check_regular(path)
        tokens: Any = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such token file; make one with `tinytrain prepare` or correct the path") from None
    except NotAFileError as error:
        raise DataError(f"{error}; give a token file made by `tinytrain prepare`") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error}); make it again with `tinytrain prepare`") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        found = f"{tokens.ndim}-D {tokens.dtype}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise DataError(
            f"{path}: holds {found}, but a token file is a 1-D array of integers; save ids.astype('uint16')"
        )
    if not tokens.flags.c_contiguous:
        raise DataError(f"{path}: is not in C order; save np.ascontiguousarray(ids)")
    if vocab_size is not None:
        smallest, largest = _id_range(path, tokens)
        if smallest < 0 or largest >= vocab_size:
            bad = smallest if smallest < 0 else largest
            raise DataError(f"{path}: holds token id {bad}, but vocab_size {vocab_size} allows 0 .. {vocab_size - 1}")
    opened: Tokens = tokens
    if isinstance(tokens, np.memmap) and hasattr(maps, "MADV_RANDOM"):
        # Windows lie anywhere: reading ahead would fetch 128 kB for each (measured: 90 ms instead of 0.06 ms for 8
        # windows of a file of 20 GB). What the scan above has mapped is given back.
        mapping: Any = vars(tokens)["_mmap"]
        mapping.madvise(maps.MADV_DONTNEED)
        mapping.madvise(maps.MADV_RANDOM)
    return opened


def dataset_fingerprint(path: str | Path, tokens: Tokens) -> dict[str, Any]:
    """Return what identifies a token file: length, type and a sha256 over 64 blocks of 4,096 IDs spread over it."""
    digest = hashlib.sha256()
    for start in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(np.int64):
        digest.update(np.ascontiguousarray(tokens[start : start + 4096]).tobytes())
    return {"file": Path(path).name, "tokens": len(tokens), "dtype": str(tokens.dtype), "sha256": digest.hexdigest()}


def _id_range(path: Path, tokens: Tokens) -> tuple[int, int]:
    """Smallest and largest id; scanned once and cached in FILE.range.json under the file's fingerprint."""
    if not len(tokens):
        return 0, -1
    cache, key = (
        path.with_name(path.name + ".range.json"),
        {**dataset_fingerprint(path, tokens), "mtime": path.stat().st_mtime},
    )
    try:
        known = json.loads(read_text(cache))
        if known["key"] == key:
            return known["range"][0], known["range"][1]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass  # no usable cache: scan
    blocks = [tokens[start : start + (1 << 24)] for start in range(0, len(tokens), 1 << 24)]
    found = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
    with contextlib.suppress(OSError):  # a read-only data folder costs a scan per start, nothing else
        write_atomically(cache, {"key": key, "range": found})
    return found


def num_windows(tokens: Tokens, context_len: int, name: str = "the token file") -> int:
    """How many windows of context_len ids with their next ids there are: n - context_len.

    Errors: DataError saying how many tokens are missing if there is none.
    """
    windows = len(tokens) - context_len
    if windows < 1:
        raise DataError(
            f"{name}: has {len(tokens)} tokens, but context_len {context_len} needs at least {context_len + 1}; "
            f"{1 - windows} more are needed, or a smaller context_len"
        )
    return windows


def _torch_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # torch has no kernels for wide unsigned types and none for a foreign byte order
    known = {"u2": np.int32, "u4": np.int64, "u8": np.int64}
    return np.dtype(known.get(dtype.str[1:], dtype.newbyteorder("=")))


def read_windows(tokens: Tokens, starts: Tokens, context_len: int) -> Tensor:
    """Read the windows that begin at `starts`, with the token after each: [len(starts), context_len + 1], CPU."""
    rows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context_len + 1)[starts]
    return torch.from_numpy(rows.astype(_torch_dtype(rows.dtype), copy=False))


class TokenDataset:
    """Token files as one source of windows: which file and window each slot draws, and the ids in them.

    Files are read and not mapped: a page once mapped counts as this process's memory until it ends (64 kB for each
    window drawn), a file cut short would kill it with SIGBUS, and other threads stand still while a page is fetched.
    """

    def __init__(
        self,
        paths: Sequence[str],
        context_len: int,
        *,
        vocab_size: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """weights: how often each file is drawn from; None: in proportion to its windows, so all are equally likely.

        Errors: DataError naming the file that is missing, malformed, or shorter than context_len + 1.
        """
        self.names, self.context_len = short_names(paths), context_len
        self.fingerprints: list[dict[str, Any]] = []
        self.windows: list[int] = []
        self._files: list[tuple[int, int, np.dtype[Any]]] = []  # descriptor, offset of the first id, type
        for path in paths:
            tokens = load_token_dataset(path, vocab_size=vocab_size)
            self.windows.append(num_windows(tokens, context_len, path))
            self.fingerprints.append(dataset_fingerprint(path, tokens))
            with open_regular(path) as file:
                descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._files.append((descriptor, tokens.offset, tokens.dtype))  # type: ignore[attr-defined]
        self._type = np.result_type(*(_torch_dtype(dtype) for _, _, dtype in self._files))
        shares = [Fraction(share) for share in weights or self.windows]
        # the chance that two slots draw the same window
        self.meeting = float(sum((one / sum(shares)) ** 2 / n for one, n in zip(shares, self.windows, strict=True)))
        self._bounds = [int(bound / sum(shares) * (1 << 63)) for bound in itertools.accumulate(shares[:-1])]

    def draw(
        self, seed: int, step: int, slots: Sequence[int], stream: int = TRAIN_STREAM
    ) -> tuple[npt.NDArray[np.int64], Tokens]:
        """File and first token of each slot's window, both int64 [len(slots)]; pure in (seed, step, slot).

        The last word of a slot chooses the file and the others the window, which is uniform within its file. Of one
        file the windows are those of `window_starts`.
        """
        words = slot_random_words(seed, step, slots, stream)
        files = np.searchsorted(np.array(self._bounds, np.uint64), words[:, 3] >> np.uint64(1), side="right")
        starts = np.empty(len(words), dtype=np.int64)
        for file, windows in enumerate(self.windows):
            chosen = files == file
            starts[chosen] = uniform_integers(words[chosen, : 3 if self._bounds else 4], windows)
        return files, starts

    def read(self, files: npt.NDArray[np.int64], starts: Tokens) -> Tensor:
        """Read the windows that `draw` chose, with the token after each: [len(starts), context_len + 1], CPU.

        Errors: DataError if a file has become shorter; OSError if it cannot be read.
        """
        rows = np.empty((len(starts), self.context_len + 1), self._type)
        for row, file, start in zip(rows, files.tolist(), starts.tolist(), strict=True):
            descriptor, offset, dtype = self._files[file]
            ids = np.empty(len(row), dtype)
            if os.preadv(descriptor, [ids], offset + start * dtype.itemsize) != ids.nbytes:  # type: ignore[list-item]
                raise DataError(f"{self.names[file]}: has become shorter since the run began; restore it and resume")
            row[:] = ids
        return torch.from_numpy(rows)

    def places(self, seed: int, step: int, slots: Sequence[int]) -> list[str]:
        """Where each slot's window begins, for people: FILE:TOKEN."""
        files, starts = self.draw(seed, step, slots)
        return [f"{self.names[file]}:{start}" for file, start in zip(files.tolist(), starts.tolist(), strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the part of each path that tells the files apart: train.npy, or a/train.npy and b/train.npy."""
    whole = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath([os.path.dirname(path) for path in whole]) if whole else ""
    return [os.path.relpath(path, shared) for path in whole]


def bytes_per_token(folder: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """How many bytes of text each id stands for, [vocab_size]; None where that is not known.

    Taken from token_bytes.npy in the folder, which anybody can put there for a tokenizer of any kind, else from a
    tokenizer.json that is a byte-level BPE: there each character of a token stands for one byte. Special tokens, such
    as the end of a document, are no text and count 0. Errors: DataError if a file is there and cannot be used.
    """
    sizes = np.zeros(vocab_size, dtype=np.int64)
    table, tokenizer = folder / "token_bytes.npy", folder / "tokenizer.json"
    try:
        if table.is_file():
            sizes[:] = np.load(table, allow_pickle=False)
            return sizes
        if not tokenizer.is_file():
            return None
        found = json.loads(tokenizer.read_bytes())
        decoder, vocabulary = found["decoder"], found["model"]["vocab"]
        if found["model"]["type"] != "BPE" or not decoder or decoder["type"] != "ByteLevel":
            return None
        for token, number in vocabulary.items():
            sizes[number] = len(token)
        for added in found["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        where = table if table.is_file() else tokenizer
        raise DataError(f"{where}: does not fit vocab_size {vocab_size} ({error}); repair it or remove it") from None
    return sizes
