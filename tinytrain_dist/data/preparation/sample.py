"""Read all documents once: count them, and choose those that a tokenizer is trained on.

Must not know tokenizers, token files or processes.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinytrain_dist.data.preparation.corpus import Corpus
from tinytrain_dist.data.preparation.duplicates import DuplicateFinder, Duplicates
from tinytrain_dist.data.preparation.text_documents import SEPARATOR, cut
from tinytrain_dist.errors import DataError

# The trainer gets documents in pieces, because it needs 100 MB to split 1 MB into words.
_TRAINING_PIECE_BYTES = 16_000
# The text for training ends when its distinct words have this many bytes; see _training_texts.
_TRAINING_WORD_BYTES = 1_500_000
_WORD = re.compile(rb"[A-Za-z\x80-\xff]+")


def document_hashes(document: bytes) -> tuple[int, int]:
    """Return two independent 64-bit hashes of a document.

    The first assigns it to train or val. The second decides whether the tokenizer is trained on it.
    """
    digest = hashlib.blake2b(document, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class Sample:
    """The distinct documents with the smallest hashes that fit into `max_bytes` together.

    The sample does not depend on the order in which documents are added.
    """

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes` of text."""
        self.max_bytes = max_bytes
        self.bytes = 0
        self.smallest_dropped = 1 << 64  # a hash; larger than every hash until a document is dropped
        self.heap: list[tuple[int, bytes]] = []  # (-hash, document), so that the largest hash is popped first
        self.keys: set[int] = set()

    def add(self, key: int, document: bytes) -> None:
        """Add a document unless its hash is too large. key: the hash."""
        # After a document was dropped, none with a larger hash may be added, or the order would matter.
        if key >= self.smallest_dropped or key in self.keys:
            return
        heapq.heappush(self.heap, (-key, document))
        self.keys.add(key)
        self.bytes += len(document)
        while self.bytes > self.max_bytes:
            negative_key, dropped = heapq.heappop(self.heap)
            self.smallest_dropped = -negative_key
            self.keys.remove(self.smallest_dropped)
            self.bytes -= len(dropped)

    def documents(self) -> list[bytes]:
        """Return the documents of the sample, in the order of their hashes."""
        return [document for _, document in sorted(self.heap, reverse=True)]


@dataclass
class Scan:
    """The result of the first pass over all sources, about the documents that stay.

    min_split_key, max_split_key: smallest and largest of the hashes that assign documents to train or val.
    duplicates: the documents that are removed because they repeat an earlier one; None if they are not looked for.
    """

    sample: Sample
    documents: int = 0
    bytes: int = 0
    min_split_key: int = 1 << 64
    max_split_key: int = -1
    duplicates: Duplicates | None = None


def scan_documents(
    corpus: Corpus,
    sample_bytes: int,
    hashes_folder: Path | None = None,
    compared_text: Callable[[bytes], bytes] | None = None,
) -> Scan:
    """Read all documents once, and keep a sample of at most `sample_bytes`.

    hashes_folder: look for duplicates, and keep hashes in this new folder (None: keep all documents).
    compared_text: returns what decides whether a document is a duplicate (None: its own bytes).
    Errors: DataError if there are no documents.
    """
    scan = Scan(Sample(sample_bytes))
    finder = None if hashes_folder is None else DuplicateFinder(hashes_folder)
    for document in corpus.documents("reading"):
        hashes = split_key, sample_key = document_hashes(document)
        scan.documents += 1
        scan.bytes += len(document)
        scan.min_split_key = min(scan.min_split_key, split_key)
        scan.max_split_key = max(scan.max_split_key, split_key)
        scan.sample.add(sample_key, document)
        if finder is not None:
            compared = hashes if compared_text is None else document_hashes(compared_text(document))
            finder.add(compared, split_key, len(document))
    if scan.documents == 0:
        files = sum(len(source.files) for source in corpus.sources)
        selection = corpus.reading.selection
        if kept := selection.tally.kept:
            raise DataError(
                f"no text: the {kept:,} documents that {selection.options} kept contain only white space; change the "
                "selection, or give files with text"
            )
        if selection:
            remedy = "; ".join(selection.unknown_fields()) or "relax them"
            raise DataError(f"no text: --filter and --ids keep no document of {files} files; {remedy}")
        raise DataError(
            f"no text: {files} files with {corpus.total_bytes:,} bytes contain only white space; give files with text"
        )
    if finder is not None:
        scan.duplicates, scan.min_split_key, scan.max_split_key = finder.finish()
        scan.documents -= scan.duplicates.documents
        scan.bytes -= scan.duplicates.bytes
    return scan


def training_texts(documents: list[bytes]) -> Iterator[bytes]:
    """Yield pieces of the documents, until their distinct words reach a limit that bounds the memory of the training.

    Training needs about 110 bytes of memory for each byte of a distinct word. This is little for English or code,
    where words recur. It would be gigabytes for 20 MB of Chinese, where a whole clause counts as one word.
    """
    words: set[bytes] = set()
    word_bytes = 0
    for document in documents:
        for _, piece, _ in cut([document], SEPARATOR, _TRAINING_PIECE_BYTES):
            new_words = set(_WORD.findall(piece)) - words
            words |= new_words
            word_bytes += sum(map(len, new_words))
            if word_bytes > _TRAINING_WORD_BYTES:
                return
            yield piece
