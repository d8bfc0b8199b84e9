"""Encode documents in several processes.

Must not know where documents come from, where token IDs go, or how a tokenizer is made.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinytrain_dist.data.preparation.chat import BadChatError, ChatEncoder
from tinytrain_dist.data.preparation.conversations import Conversation
from tinytrain_dist.data.preparation.sample import document_hashes
from tinytrain_dist.data.preparation.tokenizer import Encoder, Vocabulary
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import parse_json

_BATCH_BYTES = 1 << 20  # text that a worker encodes at once


class Part(NamedTuple):
    """Several encoded documents: their token IDs, the number of tokens of each, and the bytes of their text.

    counted: uint8, which tokens count as targets, if the documents are conversations.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    bytes: int
    counted: NDArray[np.uint8] | None = None


class _TextEncoder:
    """Encode texts, each between the tokens that belong around it."""

    def __init__(self, vocabulary: Vocabulary, use_fast: bool, dtype: str) -> None:
        self.encoder = Encoder(vocabulary, use_fast=use_fast)
        self.dtype = dtype
        self.before, self.after = (np.array(ids, dtype) for ids in (vocabulary.before, vocabulary.after))

    def __call__(self, documents: list[bytes]) -> Part:
        ids = [np.empty(0, self.dtype)]
        lengths = np.zeros(len(documents), np.int64)
        for number, document in enumerate(documents):
            tokens = self.encoder.encode(document.decode()).astype(self.dtype)
            ids += [self.before, tokens, self.after]
            lengths[number] = len(self.before) + len(tokens) + len(self.after)
        return Part(np.concatenate(ids), lengths, sum(map(len, documents)))


class ChatTokenizer(NamedTuple):
    """The tokenizer whose chat template writes conversations; the arguments of ChatEncoder."""

    folder: str
    tokenizer_class: Any = None


class _ConversationEncoder:
    """Encode conversations with a chat template. Errors: DataError that names the file and the row."""

    def __init__(self, chat: ChatTokenizer, dtype: str) -> None:
        self.encoder = ChatEncoder(chat.folder, chat.tokenizer_class)
        self.dtype = dtype

    def __call__(self, documents: list[bytes]) -> Part:
        chats = []
        for document in documents:
            try:
                chats.append(self.encoder.encode(parse_json(document)))
            except BadChatError as error:
                where = document.where if isinstance(document, Conversation) else "a conversation"
                raise DataError(f"{where}: {error}") from None
        return Part(
            np.concatenate([np.empty(0, self.dtype), *(chat.ids.astype(self.dtype) for chat in chats)]),
            np.array([len(chat.ids) for chat in chats], np.int64),
            sum(map(len, documents)),
            np.concatenate([np.empty(0, np.uint8), *(chat.counted for chat in chats)]),
        )


class BatchEncoder:
    """Encode documents to token IDs, separately for train and val. Each worker has one of these."""

    def __init__(
        self, vocabulary: Vocabulary, use_fast: bool, threshold: int, dtype: str, chat: ChatTokenizer | None = None
    ) -> None:
        """Create an encoder. Documents whose hash is below `threshold` go to val. dtype: `<u2` or `<u4`.

        chat: the tokenizer whose chat template writes the documents, if they are conversations.
        """
        self.threshold = threshold
        self.encode = _TextEncoder(vocabulary, use_fast, dtype) if chat is None else _ConversationEncoder(chat, dtype)

    def __call__(self, documents: list[bytes]) -> list[Part]:
        """Return the train part and the val part."""
        train_documents: list[bytes] = []
        val_documents: list[bytes] = []
        for document in documents:
            is_val = document_hashes(document)[0] < self.threshold
            (val_documents if is_val else train_documents).append(document)
        return [self.encode(train_documents), self.encode(val_documents)]


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
