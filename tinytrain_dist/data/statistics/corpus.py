"""Compute the statistics of the sources of one split (training or evaluation) in one reading.

Memory does not grow with the tokens: counts of at most 2^24 token IDs (128 MB), a histogram of lengths, and what
`DocumentTable` and `NgramSearch` state. Must not know how the numbers are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.document_hashes import DocumentHasher, DocumentTable, Duplicates, HashedDocuments
from tinytrain_dist.data.statistics.blocks import Documents, read_blocks
from tinytrain_dist.data.statistics.lengths import LengthHistogram
from tinytrain_dist.data.statistics.overlap import NgramSearch
from tinytrain_dist.data.token_source import TokenSource

MOST_COUNTED_IDS = 1 << 24


class TokenCounts:
    """How often each token ID occurs."""

    def __init__(self, vocab_size: int | None) -> None:
        """Begin without tokens. vocab_size: IDs from it on are counted together (None: those from 2^24 on)."""
        self.limit = MOST_COUNTED_IDS if vocab_size is None else min(vocab_size, MOST_COUNTED_IDS)
        self.vocab_size = vocab_size
        self.counts = np.zeros(0 if vocab_size is None else self.limit, np.int64)
        self.outside = 0  # tokens whose ID is negative, or not below the limit
        self.outside_example: tuple[int, int] | None = None  # position and ID of the first of them

    def add(self, tokens: npt.NDArray[np.integer], position: int) -> None:
        """Count tokens. position: of the first of them."""
        if not len(tokens):
            return
        if int(tokens.max()) >= self.limit or int(tokens.min()) < 0:
            outside = (tokens >= self.limit) | (tokens < 0)
            if self.outside_example is None:
                first = int(np.argmax(outside))
                self.outside_example = position + first, int(tokens[first])
            self.outside += int(np.count_nonzero(outside))
            tokens = tokens[~outside]
        counts = np.bincount(tokens.astype(np.int64, copy=False))
        if len(counts) > len(self.counts):
            counts, self.counts = self.counts, counts.astype(np.int64)
        self.counts[: len(counts)] += counts

    @property
    def used(self) -> int:
        """Number of different IDs that occur."""
        return int(np.count_nonzero(self.counts))

    def most_frequent(self, number: int) -> list[tuple[int, int]]:
        """Return the most frequent IDs with their counts, the most frequent first."""
        number = min(number, len(self.counts))
        top = np.argpartition(-self.counts, number - 1)[:number] if number else np.empty(0, np.int64)
        found = sorted(((int(self.counts[token]), int(token)) for token in top), key=lambda each: (-each[0], each[1]))
        return [(token, count) for count, token in found if count]

    def unused(self, number: int) -> list[int]:
        """Return the first IDs of the vocabulary that never occur."""
        return [int(token) for token in np.flatnonzero(self.counts == 0)[:number]]


@dataclass
class SourceStatistics:
    """The numbers of one source."""

    entry: str
    files: int
    formats: str  # with the types of the IDs
    tokens: int
    documents_are: str  # "recorded", "assumed" (after each end-of-text token) or "unknown"
    lengths: LengthHistogram = field(default_factory=LengthHistogram)
    empty_documents: int = 0  # documents without tokens, which only an index of Megatron can have
    counted_tokens: int | None = None  # that count in the loss, by mask files; None: there are none


@dataclass
class SplitStatistics:
    """The numbers of all sources of a split."""

    sources: list[SourceStatistics]
    counts: TokenCounts
    duplicates: Duplicates | None = None  # None: some documents are unknown
    bytes: int | None = None  # of text that the tokens stand for; None: not known

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(source.tokens for source in self.sources)

    @property
    def documents_known(self) -> bool:
        """Whether the documents of all sources can be told apart."""
        return all(source.documents_are != "unknown" for source in self.sources)

    @property
    def lengths(self) -> LengthHistogram:
        """The lengths of all documents, without empty ones."""
        total = LengthHistogram()
        for source in self.sources:
            total.add_all(source.lengths)
        return total


def read_split(
    sources: Sequence[TokenSource],
    documents: Sequence[Documents],
    counts: TokenCounts,
    table: DocumentTable,
    search: NgramSearch | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> SplitStatistics:
    """Read all sources once: count tokens, hash documents into `table`, and search n-grams.

    Positions in `table` and `counts` count from the first token of the first source. advance: called with numbers of
    tokens. Errors: DataError.
    """
    found, base = [], 0
    for source, of_source in zip(sources, documents, strict=True):
        statistics = describe_source(source, of_source)
        masked = source.open_masks()
        statistics.counted_tokens = 0 if masked else None
        hasher = DocumentHasher()
        for block in read_blocks(source, of_source, search.length - 1 if search else 0):
            counts.add(block.own, base + block.position)
            if of_source.known:
                _add_documents(hasher.add(base + block.position, block.own, block.own_starts), statistics, table)
            if search:
                search.add(block.tokens, block.size, block.starts)
            if statistics.counted_tokens is not None:
                statistics.counted_tokens += int(source.read_mask(block.position, block.size).sum())
            advance(block.size)
        _add_documents(hasher.finish(), statistics, table)
        if of_source.recorded:
            statistics.empty_documents = max(0, source.recorded_documents() - statistics.lengths.documents)
        found.append(statistics)
        base += len(source)
    return SplitStatistics(found, counts)


def describe_source(source: TokenSource, documents: Documents) -> SourceStatistics:
    """Return what is known of a source before it is read."""
    formats = sorted({f"{row['format']} {np.dtype(str(row['dtype'])).name}" for row in _distinct_layouts(source)})
    kind = "recorded" if documents.recorded else "assumed" if documents.known else "unknown"
    return SourceStatistics(source.entry, len(source.paths), ", ".join(formats), len(source), kind)


def _distinct_layouts(source: TokenSource) -> npt.NDArray[np.void]:
    layouts: npt.NDArray[np.void] = np.unique(source.shards.table[["format", "dtype"]])
    return layouts


def _add_documents(found: HashedDocuments, statistics: SourceStatistics, table: DocumentTable) -> None:
    statistics.lengths.add(found.lengths)
    table.add(found)
