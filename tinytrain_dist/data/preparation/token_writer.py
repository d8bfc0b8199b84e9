"""Write token files: documents encoded by several processes, growing .npy files, a folder that appears complete.

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
from tinytrain_dist.utils.leftovers import describe_leftovers, hold_folder, owner, remove_leftovers

_BATCH_BYTES = 1 << 20  # text per task of a worker
_FILES = {"train.npy", "val.npy", "tokenizer.json", "tokenizer_config.json", "meta.json"}


def document_hashes(document: bytes) -> tuple[int, int]:
    """Two independent 64-bit hashes: one sends a document to train or val, one draws the tokenizer's sample."""
    digest = hashlib.blake2b(document, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class Part(NamedTuple):
    """What some documents became: token ids, how many documents they were, and how many bytes of text."""

    ids: NDArray[Any]
    documents: int
    bytes: int


class BatchEncoder:
    """Documents to token ids, train and val apart: what a worker does."""

    def __init__(self, vocabulary: Vocabulary, use_fast: bool, threshold: int, dtype: str) -> None:
        """Documents whose hash is below `threshold` are for validation; `dtype` is `<u2` or `<u4`."""
        self.encoder = Encoder(vocabulary, use_fast=use_fast)
        self.threshold, self.dtype = threshold, dtype
        self.before, self.after = (np.array(ids, dtype) for ids in (vocabulary.before, vocabulary.after))

    def __call__(self, documents: list[bytes]) -> list[Part]:
        """Return the train part and the val part, each document between the tokens that belong around it."""
        parts = []
        is_val = [document_hashes(document)[0] < self.threshold for document in documents]
        for side in (False, True):
            chosen = [document for document, val in zip(documents, is_val, strict=True) if val == side]
            ids = [np.empty(0, self.dtype)]
            for document in chosen:
                ids += [self.before, self.encoder.encode(document.decode()).astype(self.dtype), self.after]
            parts.append(Part(np.concatenate(ids), len(chosen), sum(map(len, chosen))))
        return parts


_worker: BatchEncoder | None = None


def _end_with_parent() -> None:
    # Or a worker would wait for ever for the next batch of a parent that was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(*settings: Any) -> None:
    global _worker
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to the parent too, and it ends the workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = BatchEncoder(*settings)


def _work(documents: list[bytes]) -> list[Part]:
    assert _worker is not None
    return _worker(documents)


def in_batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Documents in lists of about a megabyte."""
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
    """Encode in this process or in `workers` others; results come in the order of the batches."""
    if workers == 1:
        yield from map(BatchEncoder(*settings), batches)
        return
    # Not fork: the progress bar and the tokenizer have threads, whose locks a forked child would inherit held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, settings) as pool:
        waiting: deque[Future[list[Part]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > 2 * workers:  # what bounds memory: no more batches than this are alive
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {workers} encoding processes was ended from outside, perhaps for want of memory; "
                "run again with a smaller --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class TokenWriter:
    """A .npy file of one dimension that grows; `finish` completes its header."""

    def __init__(self, path: Path, dtype: str) -> None:
        """Create `path`; `dtype` as numpy writes it, `<u2` or `<u4`."""
        self.path, self.dtype, self.tokens, self.documents, self.bytes = path, dtype, 0, 0, 0
        self.file = path.open("wb")
        self.file.write(self._header())

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        form = {"descr": self.dtype, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(buffer, form)
        return buffer.getvalue()

    def append(self, part: Part) -> None:
        """Add the ids of some documents."""
        self.file.write(part.ids.data)
        self.tokens += len(part.ids)
        self.documents += part.documents
        self.bytes += part.bytes

    def finish(self) -> str:
        """Write the final header, make the file durable, give its sha256."""
        self.file.seek(0)
        self.file.write(self._header())
        _sync(self.file)
        self.file.close()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of an unfinished file: another exception is already on its way
            self.file.close()


def write_file(path: Path, text: str) -> str:
    """Write a small file durably; gives its sha256."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        _sync(file)
    return hashlib.sha256(data).hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_target(target: Path, old: Path, overwrite: bool) -> None:
    if old.exists() and not target.exists():
        old.rename(target)  # an earlier run died between the two renames of a swap
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"--out {target} is a file; name a folder that is to be written")
    present = {entry.name for entry in target.iterdir()}
    if present and not overwrite:
        raise DataError(f"--out {target} exists already; pass --overwrite to replace it, or name another folder")
    # Readers keep what they know of a token file beside it, as train.npy.range.json.
    if strange := sorted(n for n in present - _FILES if not n.startswith(("train.npy.", "val.npy."))):
        raise DataError(
            f"--out {target} holds {strange[0]!r}, which no tinytrain prepare wrote; replacing the folder would "
            "delete it: move it away, or name another folder"
        )


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its place when the block ends well, and is deleted otherwise.

    An old `target` is renamed aside before and deleted after, so that at every instant one complete data set is
    on disk. DataError if `target` is in the way, or if the disk is full or refuses.
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
            f"--out {target} cannot be written: {reason}; nothing half-written was left there{_free(target)}. "
            "Make room or name another folder"
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


def _free(target: Path) -> str:
    place = next((parent for parent in target.parents if parent.exists()), None)
    return f" ({shutil.disk_usage(place).free / 1e6:,.0f} MB are free now)" if place else ""
