"""Collect everything that `tinytrain data` shows of token files. Must not know how it is shown."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tinytrain_dist.cli.data_views.place import Place, Vocabulary, check_eos_id
from tinytrain_dist.data.bytes_per_token import bytes_per_token
from tinytrain_dist.data.document_hashes import DocumentTable, count_duplicates, count_shared
from tinytrain_dist.data.statistics.blocks import Documents
from tinytrain_dist.data.statistics.corpus import MOST_COUNTED_IDS, SplitStatistics, TokenCounts, read_split
from tinytrain_dist.data.statistics.overlap import NgramSearch, WindowOverlap
from tinytrain_dist.data.statistics.token_texts import TokenTexts
from tinytrain_dist.data.statistics.windows import (
    SourceWindows,
    consecutive_windows,
    drawn_windows,
    joined_windows,
    place_name,
)
from tinytrain_dist.data.token_dataset import short_names
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.utils.progress import progress_bar

MOST_SEARCHED_TOKENS = 1 << 23  # of all evaluation windows together; see NgramSearch for the memory that they need
TEXT_TOKENS = 60  # of a document or passage that is shown


@dataclass
class Repeated:
    """A document that occurs several times in the training data."""

    copies: int
    tokens: int
    place: str  # of the first copy
    text: str  # its beginning


@dataclass
class Overlap:
    """What an evaluation file has in common with the training data."""

    windows: int  # that were compared
    windows_of_file: int | None  # if they are some of the windows that follow each other; None: they were drawn
    found: WindowOverlap
    passage_place: str = ""  # of the longest common passage
    passage_text: str = ""
    documents: int | None = None  # of the file that occur as a whole; None: documents are not known
    document_tokens: int = 0

    @property
    def with_ngrams(self) -> int:
        """Number of windows in which some n-gram was found."""
        return int((self.found.found > 0).sum())

    @property
    def mostly_found(self) -> int:
        """Number of windows of which at least half of the n-grams were found."""
        has_some = self.found.ngrams > 0
        return int((2 * self.found.found[has_some] >= self.found.ngrams[has_some]).sum())


@dataclass
class Findings:
    """The numbers of one place."""

    place: Place
    vocabulary: Vocabulary
    ngram: int
    train: SplitStatistics
    evaluation: dict[str, SplitStatistics] = field(default_factory=dict)  # by short name
    overlaps: dict[str, Overlap] = field(default_factory=dict)
    repeated: list[Repeated] = field(default_factory=list)


def collect(place: Place, vocabulary: Vocabulary, ngram: int, all_windows: bool, progress: bool = True) -> Findings:
    """Read all token files once, and compute what is shown. Errors: DataError; UsageError for an unused --eos-id."""
    dtype = place.config.token_dtype
    train = [TokenSource(entry, token_dtype=dtype) for entry in place.train]
    evaluation = {
        name: TokenSource(entry, token_dtype=dtype)
        for name, entry in zip(short_names(place.evaluation), place.evaluation, strict=True)
    }
    documents = vocabulary.documents_of(train)
    of_evaluation = dict(zip(evaluation, vocabulary.documents_of(list(evaluation.values())), strict=True))
    check_eos_id(vocabulary, (*documents, *of_evaluation.values()))
    windows = _evaluation_windows(place, evaluation, of_evaluation, all_windows)
    search = NgramSearch(joined_windows(list(windows.values())), ngram) if windows else None
    total = sum(map(len, (*train, *evaluation.values())))
    with ExitStack() as stack, progress_bar("tokens", total, shown=progress) as advance:
        table = stack.enter_context(DocumentTable())
        findings = Findings(
            place,
            vocabulary,
            ngram,
            read_split(train, documents, TokenCounts(vocabulary.size), table, search, advance),
        )
        if findings.train.documents_known:
            findings.train.duplicates = count_duplicates(table)
            findings.repeated = _repeated(findings, train)
        first = 0
        for name, source in evaluation.items():
            own = stack.enter_context(DocumentTable())
            counts = TokenCounts(vocabulary.size)
            split = read_split([source], [of_evaluation[name]], counts, own, None, advance)
            if split.documents_known:
                split.duplicates = count_duplicates(own)
            findings.evaluation[name] = split
            assert search is not None, "there is an evaluation file"
            overlap = _overlap(windows[name], search, first, vocabulary.texts, source)
            first += overlap.windows
            if split.documents_known and findings.train.documents_known:
                overlap.documents, overlap.document_tokens = count_shared(table, own)
            findings.overlaps[name] = overlap
    _count_bytes(findings, [Path(source.paths[0]).parent for source in (*train, *evaluation.values())])
    return findings


def _evaluation_windows(
    place: Place, sources: dict[str, TokenSource], documents: dict[str, Documents], all_windows: bool
) -> dict[str, SourceWindows]:
    """Return the windows of each evaluation file that are compared.

    They are those that an evaluation of the run draws. Without a run, or with all_windows, they follow each other.
    """
    config = place.config
    most = max(1, MOST_SEARCHED_TOKENS // (config.context_len + 1) // max(1, len(sources)))
    if place.is_run and not all_windows:
        count = min(most, config.eval_steps * config.batch_size)
        return {
            name: drawn_windows(dataset, documents[name], count) for name, dataset in place.evaluation_data().items()
        }
    width = min(config.context_len, max([1, *map(len, sources.values())]))  # no window is longer than its file
    return {name: consecutive_windows(source, documents[name], width, most) for name, source in sources.items()}


def _repeated(findings: Findings, sources: list[TokenSource]) -> list[Repeated]:
    """Return the documents of the training data with the most copies, with their texts."""
    assert findings.train.duplicates is not None
    texts = findings.vocabulary.texts
    shown = []
    for document in findings.train.duplicates.most_copies:
        number, position = locate(sources, document.position)
        ids = sources[number].read(position, min(TEXT_TOKENS, document.length)).tolist()
        shown.append(Repeated(document.copies, document.length, place_name(sources, number, position), texts.text(ids)))
    return shown


def locate(sources: list[TokenSource], position: int) -> tuple[int, int]:
    """Return the number of the source that holds a position of all sources together, and the position there."""
    for number, source in enumerate(sources):
        if position < len(source):
            return number, position
        position -= len(source)
    raise AssertionError("the position lies behind all sources")


def _overlap(
    windows: SourceWindows, search: NgramSearch, first: int, texts: TokenTexts, source: TokenSource
) -> Overlap:
    """Return what was found of the windows of one file. first: the number of its first window in the search."""
    count = len(windows.pieces)
    found = search.result(first, first + count)
    overlap = Overlap(count, windows.in_source, found)
    window, token, length = found.longest
    if length:
        ids = windows.windows.tokens[window, token : token + min(length, TEXT_TOKENS)].tolist()
        overlap.passage_place = place_name([source], 0, windows.position(window, token))
        overlap.passage_text = texts.text(ids)
    return overlap


def _count_bytes(findings: Findings, folders: list[Path]) -> None:
    """Fill in the bytes of text, if the bytes of each token are known. Errors: DataError."""
    size = findings.vocabulary.size
    if size is None or size > MOST_COUNTED_IDS:
        return
    tables = (bytes_per_token(folder, size) for folder in dict.fromkeys(folders))
    table = next((table for table in tables if table is not None), None)
    if table is None:
        return
    for split in (findings.train, *findings.evaluation.values()):
        split.bytes = int((split.counts.counts * table[: len(split.counts.counts)]).sum())
