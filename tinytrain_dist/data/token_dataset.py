"""Draw windows from several token files as one dataset, and read them.

Must not know ranks, models or devices: a rank asks for sample slots and gets their windows.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tinytrain_dist.data.token_file import (
    dataset_fingerprint,
    load_token_dataset,
    num_windows,
    torch_compatible_dtype,
)
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.data.window_sampling import TRAIN_STREAM, slot_random_words, uniform_integers
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.regular_files import open_regular

_FILE_WORD_BITS = 63  # of the random word that chooses a file: a cumulative share of 1 still fits a uint64


class _OpenFile(NamedTuple):
    """A token file that is open for reading."""

    descriptor: int
    offset: int  # of the first token ID, in bytes
    dtype: np.dtype[Any]


class TokenDataset:
    """Several token files as one source of windows.

    `draw` says which file and window each sample slot draws, and `read` reads the token IDs of these windows.

    Files are read and not memory-mapped, for three reasons:

    * A page that was mapped once counts as memory of the process until the process ends: 64 kB for each window drawn.
    * A file that is cut short would kill the process with SIGBUS.
    * Other threads of the process wait while a page is fetched.
    """

    def __init__(
        self,
        paths: Sequence[str],
        context_len: int,
        *,
        vocab_size: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Open and check the files; they stay open as long as the dataset exists.

        vocab_size: check that every token ID lies in 0 .. vocab_size - 1 (None: not checked).
        weights: how often each file is drawn from (None: in proportion to its windows, so all are equally likely).
        Errors: DataError naming the file that is missing, malformed, or shorter than context_len + 1.
        """
        self.names = short_names(paths)
        self.context_len = context_len
        self.fingerprints: list[dict[str, Any]] = []  # of each file
        self.windows: list[int] = []  # number of windows of each file
        self._files: list[_OpenFile] = []
        for path in paths:
            self._open(path, vocab_size)
        self._dtype = np.result_type(*(torch_compatible_dtype(file.dtype) for file in self._files))
        # Fractions, because the bounds below decide which file a slot draws: no rounding may move them.
        weight_of_file = [Fraction(weight) for weight in weights or self.windows]
        total_weight = sum(weight_of_file)
        # Probability that two sample slots draw the same window.
        self.collision_probability = float(
            sum(
                (weight / total_weight) ** 2 / windows
                for weight, windows in zip(weight_of_file, self.windows, strict=True)
            )
        )
        # Slots whose file word (below 2^63) is less than the first bound draw from the first file, those below the
        # second bound from the second file, and so on; the last file needs no bound.
        self._bounds = [
            int(cumulative_weight / total_weight * (1 << _FILE_WORD_BITS))
            for cumulative_weight in itertools.accumulate(weight_of_file[:-1])
        ]

    def _open(self, path: str, vocab_size: int | None) -> None:
        tokens = load_token_dataset(path, vocab_size=vocab_size)
        self.windows.append(num_windows(tokens, self.context_len, path))
        self.fingerprints.append(dataset_fingerprint(path, tokens))
        with open_regular(path) as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead, as in load_token_dataset
        self._files.append(_OpenFile(descriptor, tokens.offset, tokens.dtype))  # type: ignore[attr-defined]

    def draw(
        self, seed: int, step: int, slots: Sequence[int], stream: int = TRAIN_STREAM
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the file and the first token of each slot's window, both int64 [len(slots)].

        The draw is a pure function of (seed, step, slot, stream). The last random word of a slot chooses the file, and
        the others choose the window, which is uniform within its file. With one file the windows are those of
        `window_starts`, for which all four words are used.
        """
        words = slot_random_words(seed, step, slots, stream)
        file_words = words[:, -1] >> np.uint64(64 - _FILE_WORD_BITS)
        files = np.searchsorted(np.array(self._bounds, np.uint64), file_words, side="right")
        window_words = words[:, :-1] if self._bounds else words
        starts = np.empty(len(words), dtype=np.int64)
        for file, windows in enumerate(self.windows):
            in_file = files == file
            starts[in_file] = uniform_integers(window_words[in_file], windows)
        return files, starts

    def read(self, files: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> Windows:
        """Read the windows that `draw` chose, with the token after each.

        The tokens have a type that holds the token IDs of all files.
        Errors: DataError if a file has become shorter; OSError if it cannot be read.
        """
        rows = np.empty((len(starts), self.context_len + 1), self._dtype)
        for row, file_index, start in zip(rows, files.tolist(), starts.tolist(), strict=True):
            file = self._files[file_index]
            ids = np.empty(len(row), file.dtype)
            position = file.offset + start * file.dtype.itemsize
            if os.preadv(file.descriptor, [ids], position) != ids.nbytes:  # type: ignore[list-item]
                name = self.names[file_index]
                raise DataError(f"{name}: has become shorter since the run began; restore it and resume")
            row[:] = ids  # widens the IDs
        return Windows(torch.from_numpy(rows))

    def places(self, seed: int, step: int, slots: Sequence[int]) -> list[str]:
        """Return where each slot's training window begins, as FILE:TOKEN for messages."""
        files, starts = self.draw(seed, step, slots)
        return [f"{self.names[file]}:{start}" for file, start in zip(files.tolist(), starts.tolist(), strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the part of each path that tells the files apart: train.npy, or a/train.npy and b/train.npy."""
    absolute = [os.path.abspath(path) for path in paths]
    shared_folder = os.path.commonpath([os.path.dirname(path) for path in absolute]) if absolute else ""
    return [os.path.relpath(path, shared_folder) for path in absolute]
