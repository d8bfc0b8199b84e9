"""Write token files: encode documents in several processes, append IDs to .npy files, replace a folder in one step.

Must not know where documents come from or how a tokenizer is made.
"""

from __future__ import annotations

import glob
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tinytrain_dist.data.preparation.tokenizer import Encoder, Vocabulary
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import fsync_folder
from tinytrain_dist.utils.stale_files import describe_leftovers, hold_folder, owner, remove_leftovers

_BATCH_BYTES = 1 << 20  # text that a worker encodes at once
_DATA_SET_FILES = {"train.npy", "val.npy", "tokenizer.json", "tokenizer_config.json", "meta.json"}


def document_hashes(document: bytes) -> tuple[int, int]:
    """Return two independent 64-bit hashes of a document.

    The first assigns it to train or val. The second decides whether the tokenizer is trained on it.
    """
    digest = hashlib.blake2b(document, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class Part(NamedTuple):
    """Several encoded documents: their token IDs, their number, and the bytes of their text."""

    ids: NDArray[Any]
    documents: int
    bytes: int


class BatchEncoder:
    """Encode documents to token IDs, separately for train and val. Each worker has one of these."""

    def __init__(self, vocabulary: Vocabulary, use_fast: bool, threshold: int, dtype: str) -> None:
        """Create an encoder. Documents whose hash is below `threshold` go to val. dtype: `<u2` or `<u4`."""
        self.encoder = Encoder(vocabulary, use_fast=use_fast)
        self.threshold = threshold
        self.dtype = dtype
        self.before, self.after = (np.array(ids, dtype) for ids in (vocabulary.before, vocabulary.after))

    def __call__(self, documents: list[bytes]) -> list[Part]:
        """Return the train part and the val part, each document between the tokens that belong around it."""
        train_documents: list[bytes] = []
        val_documents: list[bytes] = []
        for document in documents:
            is_val = document_hashes(document)[0] < self.threshold
            (val_documents if is_val else train_documents).append(document)
        return [self._encode(train_documents), self._encode(val_documents)]

    def _encode(self, documents: list[bytes]) -> Part:
        ids = [np.empty(0, self.dtype)]
        for document in documents:
            ids += [self.before, self.encoder.encode(document.decode()).astype(self.dtype), self.after]
        return Part(np.concatenate(ids), len(documents), sum(map(len, documents)))


_encoder_of_worker: BatchEncoder | None = None


def _end_with_parent() -> None:
    """End this process when its parent has ended. Otherwise it would wait forever for another batch."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(*settings: Any) -> None:
    """Prepare this process to encode batches. settings: arguments of BatchEncoder."""
    global _encoder_of_worker
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to the parent too, and it ends the workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder_of_worker = BatchEncoder(*settings)


def _encode_in_worker(documents: list[bytes]) -> list[Part]:
    assert _encoder_of_worker is not None
    return _encoder_of_worker(documents)


def in_batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the documents in lists of about a megabyte of text."""
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(batches: Iterable[list[bytes]], settings: tuple[Any, ...], workers: int) -> Iterator[list[Part]]:
    """Encode batches in `workers` processes (1: in this one); yield the results in the order of the batches.

    settings: arguments of BatchEncoder. Errors: DataError if a worker is killed.
    """
    if workers == 1:
        yield from map(BatchEncoder(*settings), batches)
        return
    # Not fork: the progress bar and the tokenizer have threads. A forked child could inherit a lock that one of them
    # holds, and nobody would release it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, settings) as pool:
        waiting: deque[Future[list[Part]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode_in_worker, batch))
                if len(waiting) > 2 * workers:  # limits the memory for batches and results
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {workers} encoding processes was killed, perhaps because memory ran out; "
                "run again with a smaller --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class TokenWriter:
    """A one-dimensional .npy file to which IDs are appended. `finish` completes its header."""

    def __init__(self, path: Path, dtype: str) -> None:
        """Create the file. dtype: `<u2` or `<u4`, in numpy's notation."""
        self.path = path
        self.dtype = dtype
        self.tokens = 0
        self.documents = 0
        self.bytes = 0
        self.file = path.open("wb")
        self.file.write(self._header())

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        fields = {"descr": self.dtype, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(buffer, fields)
        return buffer.getvalue()

    def append(self, part: Part) -> None:
        """Append the IDs of several documents."""
        self.file.write(part.ids.data)
        self.tokens += len(part.ids)
        self.documents += part.documents
        self.bytes += part.bytes

    def finish(self) -> str:
        """Write the final header, flush the file to disk, and return its SHA-256 digest."""
        self.file.seek(0)
        self.file.write(self._header())
        _sync(self.file)
        self.file.close()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # if the file is unfinished, another exception is already being raised
            self.file.close()


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


def _check_target(target: Path, old: Path, overwrite: bool) -> None:
    """Raise DataError if `target` must not be replaced. Before that, restore it if an earlier run was killed."""
    if old.exists() and not target.exists():
        old.rename(target)  # an earlier run was killed between the two renames of `new_folder`
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"--out {target} is a file; give a folder to write to")
    present = {entry.name for entry in target.iterdir()}
    if present and not overwrite:
        raise DataError(f"--out {target} already exists; pass --overwrite to replace it, or give another folder")
    # Training keeps facts about a token file beside it, as in train.npy.range.json.
    foreign = [name for name in present - _DATA_SET_FILES if not name.startswith(("train.npy.", "val.npy."))]
    if foreign:
        raise DataError(
            f"--out {target} contains {min(foreign)!r}, which tinytrain prepare did not write and which would be "
            "deleted with the folder; move it away, or give another folder"
        )


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `target` that replaces it if the block succeeds, and is deleted otherwise.

    An existing `target` is renamed first and deleted last, so that a complete data set is on disk at any time.
    Errors: DataError if `target` must not be replaced, or if the disk is full or fails.
    """
    old = target.with_name(f".{target.name}.old")
    new = target.with_name(f".{target.name}.new-{owner()}")
    held = None
    try:
        _remove_leftovers(target, old)
        _check_target(target, old, overwrite)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        held = hold_folder(new)
        try:
            yield new
            fsync_folder(new)
            if overwrite and target.exists() and any(target.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            new.rename(target)
            fsync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"--out {target} cannot be written: {reason}; no incomplete files were left there"
            f"{_describe_free_space(target)}. Free some space, or give another folder"
        ) from error
    finally:
        if held is not None:
            os.close(held)


def _remove_leftovers(target: Path, old: Path) -> None:
    """Remove and name what killed processes have left beside `target`; name what only a user can judge."""
    removed = remove_leftovers(target.parent)
    if old.exists() and target.exists():  # a process was killed after the new data set had taken the place of the old
        shutil.rmtree(old, ignore_errors=True)
        removed.append(old)
    if removed:
        print(describe_leftovers(removed), file=sys.stderr)
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.new-*")):
        print(
            f"{path}: left alone; another `tinytrain prepare` is writing it, or has died on another host or with an "
            "older version; delete it if none runs",
            file=sys.stderr,
        )


def _describe_free_space(target: Path) -> str:
    existing_parent = next((parent for parent in target.parents if parent.exists()), None)
    if existing_parent is None:
        return ""
    return f" ({shutil.disk_usage(existing_parent).free / 1e6:,.0f} MB are free now)"
