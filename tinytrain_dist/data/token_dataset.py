"""Draw windows from several sources as one dataset, and read them.

Must not know ranks, models or devices: a rank asks for sample slots and gets their windows.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinytrain_dist.data.mixture import SamplePhase
from tinytrain_dist.data.npy_files import missing_tokens
from tinytrain_dist.data.packed_windows import PackedWindows
from tinytrain_dist.data.parallel_reads import READER_POOL
from tinytrain_dist.data.random_windows import RandomWindows, StepPhase
from tinytrain_dist.data.shuffled_windows import ChosenWindows, ShuffledWindows
from tinytrain_dist.data.side_files import side_path
from tinytrain_dist.data.side_fingerprints import documents_fingerprint, mask_fingerprint
from tinytrain_dist.data.stream_windows import StreamWindows
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.data.training_windows import Windows, separate_documents
from tinytrain_dist.data.window_sampling import TRAIN_STREAM
from tinytrain_dist.errors import DataError

# A window that is read from memory or a local disk takes less, and handing it to another thread takes 0.03 ms.
_SLOW_READ_SECONDS = 1e-3


class TokenDataset:
    """Several sources of tokens as one source of windows.

    `draw` says which source and window each sample slot draws, and `read` reads the token IDs of these windows.
    """

    def __init__(
        self,
        entries: Sequence[str],
        context_len: int,
        *,
        vocab_size: int | None = None,
        weights: Sequence[float] | None = None,
        token_dtype: str | None = None,
        phases: Sequence[StepPhase] = (),
        shuffle_batch: int | Callable[[int], int] | None = None,
        loss_mask: bool = False,
        document_mask: bool = False,
        packed: bool = False,
    ) -> None:
        """Open and check the sources.

        entries: files, folders and globs; each is one source. vocab_size: check that every token ID lies in
        0 .. vocab_size - 1 (None: not checked). weights: how often each source is drawn from (None: in proportion to
        its windows, so all are equally likely). token_dtype: the type of token IDs in files without a header.
        phases: weights that change, in place of `weights`. shuffle_batch: sample slots of a step, if every token is to
        be a target once per epoch (None: windows are random); or a function that returns those of the first n steps.
        loss_mask: read which targets count; every token file needs a mask file. document_mask: separate documents;
        every token file needs a file that tells where they begin. packed: pack whole documents into windows, for which
        every token file needs that file too.
        Errors: DataError naming the file that is missing, malformed, or shorter than context_len + 1.
        """
        self.context_len = context_len
        self.sources = [TokenSource(entry, vocab_size=vocab_size, token_dtype=token_dtype) for entry in entries]
        phases = phases or ([(0, weights)] if weights else [])
        self._samples_before = shuffle_batch if callable(shuffle_batch) else partial(operator.mul, shuffle_batch or 0)
        self._loss_mask, self._document_mask = loss_mask, document_mask
        self.fingerprints: list[dict[str, Any]] = [
            source.fingerprint | open_side_files(source, loss_mask, document_mask or packed) for source in self.sources
        ]
        self._packed = packed
        self._readers: list[StreamWindows | PackedWindows] = [
            PackedWindows(source, context_len, loss_mask) if packed else StreamWindows(source, context_len)
            for source in self.sources
        ]
        self._shuffled = self._shuffle(phases) if shuffle_batch is not None else None
        # number of windows of each source; of shuffled ones in an epoch
        self.windows = self._shuffled.windows if self._shuffled else [len(reader) for reader in self._readers]
        self._random = RandomWindows(self.windows, phases)
        # Probability that two sample slots of a step draw the same window.
        self.collision_probability = self._random.collision_probability
        self._dtype = np.result_type(*{source.dtype for source in self.sources})
        self._seconds_per_read = 0.0  # of a window, in the recent past
        self._shared_folder = shared_folder([path for source in self.sources for path in source.paths])

    def _shuffle(self, phases: Sequence[StepPhase]) -> ShuffledWindows:
        """Return the order of the windows, which cross the ends of shards. Errors: DataError for too few tokens."""
        in_samples = [SamplePhase(self._samples_before(first_step), weights) for first_step, weights in phases]
        if self._packed:  # a ring of windows in place of one of tokens
            return ShuffledWindows([len(reader) for reader in self._readers], 1, in_samples)
        for source in self.sources:
            if problem := missing_tokens(len(source), self.context_len):
                raise DataError(f"{source.entry}: {problem}")
        return ShuffledWindows([len(source) for source in self.sources], self.context_len, in_samples)

    @property
    def window_bytes(self) -> int:
        """Bytes of the tensors of one window, with the token after it."""
        some_count = bool(self._loss_mask or self._document_mask or self._packed)
        marks = self.context_len * (some_count + 4 * self._document_mask)
        return (self.context_len + 1) * self._dtype.itemsize + marks

    def draw(
        self, seed: int, step: int, slots: Sequence[int], stream: int = TRAIN_STREAM
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the source of each slot's window and the position of its first token there, int64 [len(slots)].

        The draw is a pure function of (seed, step, slot, stream). Packed windows have their number as their position.
        """
        if self._shuffled is not None:
            return self._choose(seed, step, slots)[:2]
        sources, numbers = self._random.choose(seed, step, slots, stream)
        positions = np.empty_like(numbers)
        for source, reader in enumerate(self._readers):
            in_source = sources == source
            positions[in_source] = reader.positions(numbers[in_source])
        return sources, positions

    def _choose(self, seed: int, step: int, slots: Sequence[int]) -> ChosenWindows:
        """Return the shuffled windows of these slots."""
        assert self._shuffled is not None
        return self._shuffled.choose(seed, self._samples_before(step) + np.asarray(slots, np.int64))

    def training_windows(self, seed: int, step: int, slots: Sequence[int]) -> Windows:
        """Return the windows of these sample slots, the targets that count, and the sources. Errors: as `read`."""
        if self._shuffled is None:
            sources, positions = self.draw(seed, step, slots)
            windows = self.read(sources, positions)
        else:
            sources, positions, targets = self._choose(seed, step, slots)
            windows = self.read(sources, positions)
            if (targets < self._shuffled.context_len).any():  # the end of an epoch
                counted = torch.from_numpy(np.arange(self.context_len) < targets[:, None])
                windows = replace(windows, counted=counted if windows.counted is None else windows.counted & counted)
        return replace(windows, sources=torch.from_numpy(sources)) if len(self.sources) > 1 else windows

    def epochs(self, step: int) -> float | None:
        """Return how many epochs are over after `step` steps; None for random windows."""
        return None if self._shuffled is None else self._shuffled.epochs(self._samples_before(step))

    def epochs_of_sources(self, step: int) -> list[float]:
        """Return how often each source was gone through in `step` steps; [] for random windows."""
        return [] if self._shuffled is None else self._shuffled.epochs_of_sources(self._samples_before(step))

    @property
    def windows_per_epoch(self) -> int:
        """The number of windows in an epoch of all sources, if windows are shuffled."""
        return sum(self.windows)

    def read(self, sources: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Windows:
        """Read the windows that `draw` chose, with the token after each: [len(positions), context_len + 1] tokens.

        The tensor has a type that holds the token IDs of all sources. May be called from several threads at once.
        Errors: DataError if a file has changed since the run began; OSError if it cannot be read.
        """
        rows = np.zeros((len(positions), self.context_len + 1), self._dtype)
        counted = np.zeros((len(positions), self.context_len), np.bool_) if self._loss_mask or self._packed else None
        begins = np.zeros(rows.shape, np.bool_) if self._document_mask or self._packed else None

        def read_row(index: int) -> None:
            since = time.perf_counter()
            reader = self._readers[sources[index]]
            reader.read_into(
                int(positions[index]),
                rows[index],
                None if begins is None else begins[index],
                None if counted is None else counted[index],
            )
            self._seconds_per_read += 0.1 * (time.perf_counter() - since - self._seconds_per_read)

        done = 0
        while done < len(rows) and self._seconds_per_read < _SLOW_READ_SECONDS:
            read_row(done)
            done += 1
        READER_POOL.map(read_row, range(done, len(rows)))
        mask = None if counted is None else torch.from_numpy(counted)
        if begins is None:
            return Windows(torch.from_numpy(rows), mask)
        windows = separate_documents(torch.from_numpy(rows), torch.from_numpy(begins), mask)
        return windows if self._document_mask else replace(windows, documents=None)

    def pieces(self, source: int, position: int) -> list[tuple[int, int]]:
        """Return the first token in the source, and the length, of each piece of a window that `draw` chose."""
        return self._readers[source].pieces(position)

    def places(self, seed: int, step: int, slots: Sequence[int]) -> list[str]:
        """Return where each slot's training window begins, as FILE:TOKEN for messages."""
        places = []
        for number, position in zip(*(part.tolist() for part in self.draw(seed, step, slots)), strict=True):
            source = self.sources[number]
            shard, token = source.locate(self._readers[number].first_token(position))
            path = os.path.abspath(source.shards[shard].path)
            places.append(f"{os.path.relpath(path, self._shared_folder)}:{token}")
        return places


def open_side_files(source: TokenSource, loss_mask: bool, documents: bool) -> dict[str, str]:
    """Open the files beside the token files that the settings need, and return what identifies them.

    Errors: DataError if there are none, or if one does not fit.
    """
    fingerprint, path = {}, source.paths[0]
    if loss_mask:
        if not source.open_masks():
            raise DataError(
                f"{path}: has no mask file ({side_path(path, '.mask.npy')}), but loss_mask = true needs one for every "
                "token file of train_data and val_data; make it, or set loss_mask = false"
            )
        fingerprint["mask"] = mask_fingerprint(source.paths)
    if documents:
        if not source.open_documents():
            raise DataError(
                f"{path}: has no {side_path(path, '.documents.npy')}, in which document_mask = true and packing = "
                "best_fit find where documents begin; run `tinytrain prepare` again, which writes it"
            )
        fingerprint["documents"] = documents_fingerprint(source.paths)
    return fingerprint


def shared_folder(paths: Sequence[str]) -> str:
    """Return the deepest folder that holds all these files; "" for none."""
    folders = {os.path.dirname(path) for path in paths}
    return os.path.commonpath([os.path.abspath(folder) for folder in folders]) if folders else ""


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the part of each path that tells the files apart: train.npy, or a/train.npy and b/train.npy."""
    paths = [os.path.normpath(path) for path in paths]  # the name of corpus/ is corpus, as without the slash
    folder = shared_folder(paths)
    return [os.path.relpath(os.path.abspath(path), folder) for path in paths]
