"""Print the numbers of token files as text, or as JSON. Must not know how they were computed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tinytrain_dist.cli.data_views.findings import Findings, Overlap
from tinytrain_dist.cli.data_views.place import Vocabulary
from tinytrain_dist.cli.tables import new_table, print_table
from tinytrain_dist.data.statistics.corpus import SplitStatistics
from tinytrain_dist.utils.text import printable

PERCENTS = (1, 10, 50, 90, 99)
FREQUENT, UNUSED = 10, 8  # IDs that are named
EMPTY = "no tokens"
HUGE_ID = 1 << 20  # four times the largest vocabularies


def splits(findings: Findings) -> Iterator[tuple[str, SplitStatistics]]:
    """Yield the training data and each evaluation file with its name."""
    yield "train" if findings.evaluation else "all", findings.train
    yield from findings.evaluation.items()


def share(part: float, whole: float) -> str:
    """Return a share in percent; "-" of nothing."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def token_name(findings: Findings, token: int) -> str:
    """Return the text of a token in quotes, or its number if it has no text."""
    texts = findings.vocabulary.texts
    return f"'{printable(texts.text([token]))}'" if texts.known else f"id {token}"


def assumption(vocabulary: Vocabulary) -> str:
    """Return a sentence about documents that are assumed."""
    return (
        f"No file records where documents begin, so one is assumed to begin after each token {vocabulary.eos_id} "
        f"({vocabulary.eos_from})."
    )


def notes(findings: Findings) -> list[str]:
    """Return sentences about what was assumed or is not known."""
    vocabulary = findings.vocabulary
    found = [f"{vocabulary.note}."] if vocabulary.note else []
    kinds = {source.documents_are for _, split in splits(findings) for source in split.sources}
    if "assumed" in kinds:
        found.append(assumption(vocabulary))
    if "unknown" in kinds:
        found.append(
            "No file records where documents begin, and no token is known to end them, so lengths and duplicates are "
            "not computed; --eos-id N names the token that ends a document."
        )
    if vocabulary.size is None:
        found.append(
            "The size of the vocabulary is not known, so unused ids are not counted; --vocab-size N states it."
        )
    for name, split in splits(findings):
        if split.counts.outside and split.counts.outside_example is not None:
            position, token = split.counts.outside_example
            outside = (
                f"{name} has {split.counts.outside:,} token(s) outside 0 .. {split.counts.limit - 1}, the first is id "
                f"{token} (token {position:,})"
            )
            found.append(
                f"{outside}, and this verb counts no larger ids."
                if token >= 0 and (vocabulary.size is None or split.counts.limit < vocabulary.size)
                else f"WARNING: {outside}, so training would refuse it; correct vocab_size or token_dtype, or make the "
                "file again."
            )
        if doubt := _doubt_of_type(split, vocabulary.size):
            found.append(f"{name}: {doubt}")
        if empty := sum(source.empty_documents for source in split.sources):
            found.append(f"{name} has {empty:,} empty document(s), which the other numbers leave out.")
    return found


def _doubt_of_type(split: SplitStatistics, vocab_size: int | None) -> str:
    """Return why the stated type of files without a header is probably wrong; "" if nothing speaks against it.

    vocab_size: if it is known, ids beyond it are reported in any case.
    """
    half = sum(source.tokens for source in split.sources) / 2
    formats = " ".join(source.formats for source in split.sources)
    counts = split.counts.counts
    if "headerless uint16" in formats and len(counts) and counts[0] >= half > 0:
        return "WARNING: every second token is id 0, as if larger numbers were read as uint16; check token_dtype."
    huge = int(counts[HUGE_ID:].sum()) + split.counts.outside
    if vocab_size is None and re.search(r"headerless u?int32", formats) and huge > half:
        return (
            f"WARNING: most ids are above {HUGE_ID:,}, more than a vocabulary has, as if several numbers were read as "
            "one; check token_dtype."
        )
    return ""


def print_findings(findings: Findings) -> None:
    """Print all numbers."""
    vocabulary = findings.vocabulary
    size = (
        "the size of the vocabulary is not known"
        if vocabulary.size is None
        else f"{vocabulary.size:,} ids in the vocabulary"
    )
    size_from = f" ({vocabulary.size_from})" if vocabulary.size_from and vocabulary.size is not None else ""
    print(f"{printable(findings.place.name)}: {size}{size_from}")
    for note in notes(findings):
        print(printable(note))
    _print_sources(findings)
    _print_lengths(findings)
    for label, lines in _lines(findings):
        for number, line in enumerate(lines):
            print(f"{'' if number else label:<15} {printable(line)}")


def _print_sources(findings: Findings) -> None:
    table = new_table("<", "tokens", "documents", "bytes per token", "count in the loss", "files", "format<")
    for name, split in splits(findings):
        per_token = "not known" if split.bytes is None or not split.tokens else f"{split.bytes / split.tokens:.3f}"
        for number, source in enumerate(split.sources):
            documents = "not known" if source.documents_are == "unknown" else f"{source.lengths.documents:,}"
            counted = "" if source.counted_tokens is None else share(source.counted_tokens, source.tokens)
            label = name if len(split.sources) == 1 else f"{name} {source.entry}"
            table.add_row(
                printable(label), f"{source.tokens:,}", documents, "" if number else per_token, counted,
                f"{source.files:,}", source.formats,
            )  # fmt: skip
    print_table(table)


def _print_lengths(findings: Findings) -> None:
    known = [(name, split.lengths) for name, split in splits(findings) if split.documents_known]
    if not any(lengths.documents for _, lengths in known):
        return
    table = new_table("tokens of documents<", "least", *(f"{percent} %" for percent in PERCENTS), "most", "mean")
    for name, lengths in known:
        values = [lengths.least, *lengths.percentiles(PERCENTS), lengths.greatest]
        table.add_row(printable(name), *(f"{value:,}" for value in values), f"{lengths.mean:,.1f}")
    print_table(table)


def _lines(findings: Findings) -> Iterator[tuple[str, list[str]]]:
    """Yield the other numbers as lines under a label."""
    yield (
        "duplicates",
        [line for name, split in splits(findings) for line in _duplicate_lines(name, split)]
        + [f"{each.copies:,} times, {each.tokens:,} tokens, {each.place}: '{each.text}'" for each in findings.repeated],
    )
    counts = findings.train.counts
    if findings.vocabulary.size is not None:
        unused = findings.vocabulary.size - counts.used
        names = ", ".join(token_name(findings, token) for token in counts.unused(UNUSED)) if unused else ""
        more = ", ..." if unused > UNUSED else ""
        line = f"{unused:,} of {findings.vocabulary.size:,} ({share(unused, findings.vocabulary.size)})"
        yield "ids never used", [f"{line}: {names}{more}" if names else line]
    special = special_counts(findings)
    named = [f"{name} (id {token}): {count:,}" for token, name, count in special]
    known = findings.vocabulary.texts.size > 0
    yield "special tokens", named or ["none occurs" if known else "not known, because there is no tokenizer"]
    frequent = counts.most_frequent(FREQUENT)
    yield (
        "most frequent",
        [
            ", ".join(
                f"{token_name(findings, token)} {share(count, findings.train.tokens)}" for token, count in frequent
            )
            or EMPTY
        ],
    )
    if findings.overlaps:
        yield (
            "overlap",
            [line for name, each in findings.overlaps.items() for line in overlap_lines(findings, name, each)],
        )


def special_counts(findings: Findings) -> list[tuple[int, str, int]]:
    """Return the special tokens that occur in the training data: ID, name, count."""
    counts = findings.train.counts.counts
    special = findings.vocabulary.texts.special
    return [
        (token, special[token], int(counts[token]))
        for token in sorted(special)
        if 0 <= token < len(counts) and counts[token]
    ]


def _duplicate_lines(name: str, split: SplitStatistics) -> list[str]:
    found = split.duplicates
    if found is None:
        return [f"{name}: not known, because documents are not"]
    tokens = f"{found.repeated_tokens:,} tokens, {share(found.repeated_tokens, split.tokens)}"
    return [
        f"{name}: {found.repeats:,} of {found.documents:,} documents repeat another one exactly "
        f"({share(found.repeats, found.documents)}; {tokens})"
    ]


def overlap_lines(findings: Findings, name: str, overlap: Overlap) -> list[str]:
    """Return sentences about what an evaluation file has in common with the training data."""
    what = f"{findings.ngram}-gram"
    windows = f"{overlap.windows:,} windows of {findings.place.config.context_len} tokens"
    if overlap.windows_of_file is None:
        windows += ", as an evaluation draws them,"
    elif overlap.windows < overlap.windows_of_file:
        windows += f", in equal distances among {overlap.windows_of_file:,},"
    lines = [
        f"{name}: {overlap.with_ngrams:,} of {windows} contain a {what} of the training data "
        f"({share(overlap.with_ngrams, overlap.windows)}), {overlap.mostly_found:,} of them at least half of theirs"
    ]
    total, found = int(overlap.found.ngrams.sum()), int(overlap.found.found.sum())
    lines.append(f"{name}: {found:,} of {total:,} {what}s occur in the training data ({share(found, total)})")
    if overlap.documents is not None:
        of_file = findings.evaluation[name].lengths.documents
        lines.append(
            f"{name}: {overlap.documents:,} of {of_file:,} documents are exact copies of a training document "
            f"({share(overlap.documents, of_file)})"
        )
    if overlap.passage_place:
        length = overlap.found.longest[2]
        lines.append(f"longest common passage: {length:,} tokens at {overlap.passage_place}: '{overlap.passage_text}'")
    return lines


def as_values(findings: Findings) -> dict[str, Any]:
    """Return everything as values for JSON."""
    vocabulary = findings.vocabulary
    return {
        "place": findings.place.name,
        "vocabulary": {
            "size": vocabulary.size,
            "unused": None if vocabulary.size is None else vocabulary.size - findings.train.counts.used,
            "eos_id": vocabulary.eos_id,
            "most_frequent": [
                {"id": token, "count": count, "text": vocabulary.texts.text([token])}
                for token, count in findings.train.counts.most_frequent(FREQUENT)
            ],
            "special": [{"id": token, "text": name, "count": count} for token, name, count in special_counts(findings)],
        },
        "train": _split_values(findings.train),
        "most_copies": [vars(each) for each in findings.repeated],
        "evaluation": {
            name: _split_values(split) | {"overlap": _overlap_values(findings, name)}
            for name, split in findings.evaluation.items()
        },
        "notes": notes(findings),
    }


def _split_values(split: SplitStatistics) -> dict[str, Any]:
    lengths = split.lengths
    percentiles = zip(PERCENTS, lengths.percentiles(PERCENTS), strict=True)
    found = split.duplicates
    return {
        "tokens": split.tokens,
        "bytes": split.bytes,
        "bytes_per_token": None if split.bytes is None or not split.tokens else split.bytes / split.tokens,
        "tokens_outside_vocabulary": split.counts.outside,
        "documents": lengths.documents if split.documents_known else None,
        "document_tokens": None
        if not split.documents_known
        else {
            "least": lengths.least,
            "most": lengths.greatest,
            "mean": lengths.mean,
            "percentiles": {str(percent): value for percent, value in percentiles},
        },
        "duplicates": None if found is None else {"documents": found.repeats, "tokens": found.repeated_tokens},
        "sources": [
            {
                "entry": source.entry,
                "files": source.files,
                "format": source.formats,
                "tokens": source.tokens,
                "documents": source.documents_are,
                "empty_documents": source.empty_documents,
                "counted_tokens": source.counted_tokens,
            }
            for source in split.sources
        ],
    }


def _overlap_values(findings: Findings, name: str) -> dict[str, Any]:
    overlap = findings.overlaps[name]
    return {
        "ngram": findings.ngram,
        "windows": overlap.windows,
        "windows_in_file": overlap.windows_of_file,
        "windows_with_ngrams": overlap.with_ngrams,
        "windows_at_least_half": overlap.mostly_found,
        "ngrams": int(overlap.found.ngrams.sum()),
        "ngrams_found": int(overlap.found.found.sum()),
        "documents_in_train": overlap.documents,
        "longest_passage": {
            "tokens": overlap.found.longest[2],
            "place": overlap.passage_place,
            "text": overlap.passage_text,
        },
    }
