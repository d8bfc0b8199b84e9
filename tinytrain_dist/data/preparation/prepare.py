"""Prepare a corpus: text becomes a tokenizer and token files, the same bytes for any number of workers.

Must not know models, training or how a token file is sampled.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tinytrain_dist import __version__
from tinytrain_dist.data.preparation.content import Format
from tinytrain_dist.data.preparation.corpus import (
    SEPARATOR,
    Meter,
    Reading,
    Source,
    cut,
    find_sources,
    open_source,
    read_documents,
    recognise,
)
from tinytrain_dist.data.preparation.special_tokens import SpelledTokens, count_spelled
from tinytrain_dist.data.preparation.token_writer import (
    TokenWriter,
    document_hashes,
    encode_all,
    in_batches,
    new_folder,
    write_file,
)
from tinytrain_dist.data.preparation.tokenizer import Vocabulary, load_vocabulary, train_bpe, why_not_fast
from tinytrain_dist.errors import ConfigError, DataError
from tinytrain_dist.utils.json_files import to_json

_DEFAULT_VOCAB_SIZE = 8192
_SMALLEST_VOCAB_SIZE = 257  # every byte and the end of a document
# Up to here GPT-2's regex survives any run of white space in tiktoken, and tokenizers needs 240 MB for a document.
_SHORTEST_LIMIT, _LONGEST_LIMIT = 4096, 1_000_000
_VAL_BYTES = 500_000
_PROOF_BYTES, _PROOF_PIECE_BYTES = 1_000_000, 20_000
# In one piece, a document of 1 MB takes 100 MB to split into words.
_TRAINING_PIECE_BYTES, _TRAINING_WORD_BYTES = 16_000, 1_500_000
_LETTERS = re.compile(rb"[A-Za-z\x80-\xff]+")
_SMALL_TOKENS = 1025  # a common context_len and the token after it


def say(message: str) -> None:
    """Print a line for people on stderr."""
    print(message, file=sys.stderr, flush=True)


class Sample:
    """The different documents with the smallest hashes that fit into `max_bytes`, in whatever order they come."""

    def __init__(self, max_bytes: int) -> None:
        """Hold at most `max_bytes` of text."""
        self.max_bytes, self.bytes, self.ceiling = max_bytes, 0, 1 << 64
        self.heap: list[tuple[int, bytes]] = []
        self.keys: set[int] = set()

    def add(self, key: int, document: bytes) -> None:
        """Consider a document; `key` is its hash."""
        # A document above one that was refused must not come in later, or the order would matter.
        if key >= self.ceiling or key in self.keys:
            return
        heapq.heappush(self.heap, (-key, document))
        self.keys.add(key)
        self.bytes += len(document)
        while self.bytes > self.max_bytes:
            negative_key, dropped = heapq.heappop(self.heap)
            self.ceiling = -negative_key
            self.keys.remove(self.ceiling)
            self.bytes -= len(dropped)

    def documents(self) -> list[bytes]:
        """Return the documents that were kept, in the order of their hashes."""
        return [document for _, document in sorted(self.heap, reverse=True)]


@dataclass
class Scan:
    """What the first reading of all sources found."""

    sample: Sample
    documents: int = 0
    bytes: int = 0
    smallest: int = 1 << 64
    largest: int = -1


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done so far: a bar on a terminal, else a line every five seconds."""
    console, shown, spoken = Console(stderr=True), 0, time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total_bytes)

        def report(done: int) -> None:
            nonlocal shown, spoken
            if done - shown < 1_000_000:  # the bar's lock costs as much as reading a document
                return
            shown = done
            bar.update(task, completed=done)
            if bar.disable and time.monotonic() - spoken > 5:
                spoken = time.monotonic()
                say(f"{what}: {done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB")

        yield report


@dataclass
class Corpus:
    """All documents of all sources, in order, as often as asked for."""

    sources: list[Source]
    reading: Reading
    formats: dict[str, Format]  # of each file
    total_bytes: int
    records: list[dict[str, Any]] = field(default_factory=list)

    def documents(self, what: str) -> Iterator[bytes]:
        """Read everything once; afterwards `records` says what each source was. `what` names the progress bar."""
        self.records, done = [], 0
        with _progress(what, self.total_bytes) as report:
            for source in self.sources:
                listing, size = hashlib.sha256(), 0
                reading = replace(self.reading, errors="replace", format="text") if source.tolerant else self.reading
                for path in source.files:
                    with open_source(path) as file:
                        meter = Meter(file)
                        for document in read_documents(path, meter, reading, self.formats[path]):
                            yield document
                            report(done + meter.bytes)
                    done, size = done + meter.bytes, size + meter.bytes
                    name = os.path.relpath(path, source.root) if source.root else path
                    listing.update(f"{meter.sha256.hexdigest()}  {name}\n".encode(errors="surrogateescape"))
                # Of one file its own digest; of several that of the list which sha256sum would print.
                digest = meter.sha256 if len(source.files) == 1 else listing
                self.records.append(
                    {
                        "path": source.name,
                        "files": len(source.files),
                        "bytes": size,
                        "sha256": digest.hexdigest(),
                    }
                )


def _scan(corpus: Corpus, sample_bytes: int) -> Scan:
    scan = Scan(Sample(sample_bytes))
    for document in corpus.documents("reading"):
        split_key, sample_key = document_hashes(document)
        scan.documents += 1
        scan.bytes += len(document)
        scan.smallest, scan.largest = min(scan.smallest, split_key), max(scan.largest, split_key)
        scan.sample.add(sample_key, document)
    if scan.documents == 0:
        files = sum(len(source.files) for source in corpus.sources)
        raise DataError(
            f"no text: {files} files with {corpus.total_bytes:,} bytes hold only white space; name files with text"
        )
    return scan


def _check_settings(given: dict[str, Any]) -> None:
    """ConfigError with every setting that is out of range or would have no effect."""
    vocab_size, fraction, limit = given["vocab_size"], given["val_fraction"], given["max_document_bytes"]
    longest = limit or _LONGEST_LIMIT
    checks = {
        f"vocab_size: {vocab_size} has no effect with tokenizer {given['tokenizer']}; leave one of them out": (
            vocab_size is not None and given["tokenizer"] is not None
        ),
        f"vocab_size: {vocab_size} is below {_SMALLEST_VOCAB_SIZE}, all bytes and the end of a document; set more": (
            vocab_size is not None and vocab_size < _SMALLEST_VOCAB_SIZE
        ),
        f"eos_token: {given['eos_token']} has no effect without tokenizer; leave it out": (
            given["eos_token"] is not None and given["tokenizer"] is None
        ),
        f"special_tokens: {given['special_tokens']} has no effect without tokenizer; leave it out": (
            given["special_tokens"] != "text" and given["tokenizer"] is None
        ),
        f"val_fraction: {fraction} is not between 0 and 1; 0.01 holds out one document in 100": (
            fraction is not None and not 0 < fraction < 1
        ),
        f"max_document_bytes: {limit} is not between 64 and {_LONGEST_LIMIT}; set it so": (
            limit is not None and not 64 <= limit <= _LONGEST_LIMIT
        ),
        f"sample_bytes: {given['sample_bytes']} is below {longest}, the longest document; set at least that": (
            given["sample_bytes"] < longest
        ),
        f"workers: {given['workers']} is below 1; set how many processes encode": (
            given["workers"] is not None and given["workers"] < 1
        ),
    }
    if problems := [problem for problem, wrong in checks.items() if wrong]:
        raise ConfigError(problems, "the settings of tinytrain prepare")


def prepare(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: str,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    eos_token: str | None = None,
    special_tokens: SpelledTokens = "text",
    val_fraction: float | None = None,
    format: Literal["auto", "text", "jsonl"] = "auto",
    text_field: str = "text",
    split_by: Literal["file", "line"] = "file",
    errors: Literal["strict", "replace"] = "strict",
    max_document_bytes: int | None = None,
    sample_bytes: int = 20_000_000,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turn text into a tokenizer and token files for training.

    Args:
        sources: `stdlib` (the source of Python's standard library), or files, folders and globs: .txt .md .py
            .jsonl, each also as .gz .bz2 .xz .zst; other plain text when named. `<|endoftext|>` in a file ends a
            document.
        out: Folder to write; it appears complete or not at all.
        vocab_size: Ids of the tokenizer to train (8192 if neither this nor tokenizer is given).
        tokenizer: A tokenizer.json, or a folder with one, to use instead of training.
        eos_token: End-of-document token of that tokenizer, where it is not `<|endoftext|>`.
        special_tokens: What special tokens of that tokenizer that the text spells become: ordinary text, or their ids.
        val_fraction: Share of documents held out, by a hash of their content (default: 0.01, and up to 0.1 in a
            small corpus, to hold out about 500 kB).
        format: What the files are. auto: the content decides between text and JSON lines, and anything else is
            refused; text: text, whatever it looks like; jsonl: JSON lines.
        text_field: Field of a JSON line that holds the text.
        split_by: A file without separators is one document, or each of its lines is.
        errors: What to do about bytes that are not UTF-8: stop, or put U+FFFD.
        max_document_bytes: Longer documents become several, cut at line ends (default: a 128th of the corpus,
            from 4,096 to 1,000,000).
        sample_bytes: Text on which the tokenizer is trained: documents drawn by a hash of their content.
        workers: Encoding processes (default: one for each CPU this process may use, at most 16).
        overwrite: Replace a data set that is already there.

    Returns the contents of meta.json. Raises DataError for text, tokenizers or folders that cannot be used, and
    ConfigError for settings that cannot.
    """
    _check_settings(locals())
    target = Path(os.path.realpath(os.path.expanduser(out)))
    with new_folder(target, overwrite) as folder:
        found = find_sources((sources,) if isinstance(sources, str) else sources, say)
        corpus = _corpus(found, Reading(text_field, split_by, errors, max_document_bytes or 0, format))
        scan = _scan(corpus, sample_bytes)
        threshold = _threshold(scan, val_fraction or min(max(_VAL_BYTES / scan.bytes, 0.01), 0.1))
        if tokenizer is None:
            vocabulary = _train(scan, threshold, vocab_size or _DEFAULT_VOCAB_SIZE)
        else:
            vocabulary = _load(scan, tokenizer, eos_token, special_tokens)
        return _write(folder, corpus, scan, vocabulary, threshold, workers or _default_workers())


def _corpus(sources: list[Source], reading: Reading) -> Corpus:
    """Look at every file, and choose the longest document where the settings leave it open (0)."""
    formats = recognise(sources, reading, say)
    total_bytes = sum(os.path.getsize(path) for source in sources for path in source.files)
    limit = reading.max_document_bytes or min(max(total_bytes // 128, _SHORTEST_LIMIT), _LONGEST_LIMIT)
    return Corpus(sources, replace(reading, max_document_bytes=limit), formats, total_bytes)


def _default_workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)  # more than that the one process that reads cannot feed


def _threshold(scan: Scan, fraction: float) -> int:
    """Return the hash below which documents are validation: as `fraction` says, but never none and never all."""
    if scan.smallest == scan.largest:
        raise DataError(
            f"all of the text is one document of {scan.bytes // scan.documents:,} bytes, and train and val need one "
            "each; give more text, or set --max-document-bytes below half of that to cut it"
        )
    return min(max(int(fraction * (1 << 64)), scan.smallest + 1), scan.largest)


def _train(scan: Scan, threshold: int, vocab_size: int) -> Vocabulary:
    documents = scan.sample.documents()
    documents = [document for document in documents if document_hashes(document)[0] >= threshold] or documents
    texts = list(_training_texts(documents))
    say(f"training a tokenizer on {sum(map(len, texts)) / 1e6:,.2f} MB of the text")
    vocabulary = train_bpe((text.decode() for text in texts), vocab_size)
    if vocabulary.size < vocab_size:
        say(
            f"the tokenizer has {vocabulary.size:,} ids and not the {vocab_size:,} of --vocab-size: no further pair of "
            "tokens occurs twice in the text; continuing with these"
        )
    return vocabulary


def _load(scan: Scan, tokenizer: str, eos_token: str | None, spelled: SpelledTokens) -> Vocabulary:
    """Load a tokenizer, and report what is done with its special tokens."""
    vocabulary = load_vocabulary(tokenizer, eos_token, spelled)
    assert vocabulary.special is not None
    say("\n".join(vocabulary.special.notes))
    counts = count_spelled(vocabulary.text, (document.decode() for document in scan.sample.documents()))
    if counts and spelled == "text":
        token, documents = counts.most_common(1)[0]
        say(
            f"WARNING: at least {documents:,} documents spell special tokens, such as {token!r}, and have them as "
            "ordinary text; if they are meant as tokens, pass --special-tokens ids"
        )
    return vocabulary


def _training_texts(documents: list[bytes]) -> Iterator[bytes]:
    """Pieces of the documents until they hold as many different words as training has memory for.

    Training takes about 110 bytes for each byte of a new word. That is nothing in English or code, whose words come
    again, and gigabytes in 20 MB of Chinese, where whole clauses count as words.
    """
    words: set[bytes] = set()
    size = 0
    for document in documents:
        for _, piece, _ in cut([document], SEPARATOR, _TRAINING_PIECE_BYTES):
            new = set(_LETTERS.findall(piece)) - words
            words |= new
            size += sum(map(len, new))
            if size > _TRAINING_WORD_BYTES:
                return
            yield piece


def _write(
    folder: Path, corpus: Corpus, scan: Scan, vocabulary: Vocabulary, threshold: int, workers: int
) -> dict[str, Any]:
    """Encode everything into `folder`; gives the contents of meta.json."""
    records = corpus.records
    reason = why_not_fast(vocabulary, _proof_texts(scan))
    if reason:
        say(f"encoding with tokenizers: tiktoken, which is several times faster, cannot take this one ({reason})")
    dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
    with TokenWriter(folder / "train.npy", dtype) as train, TokenWriter(folder / "val.npy", dtype) as val:
        batches = in_batches(corpus.documents("encoding"))
        for parts in encode_all(batches, (vocabulary, reason is None, threshold, dtype), workers):
            train.append(parts[0])
            val.append(parts[1])
        digests = {"train.npy": train.finish(), "val.npy": val.finish()}
    if corpus.records != records:
        raise DataError("a source changed while it was read, which happens twice; run again when nothing writes to it")
    digests["tokenizer.json"] = write_file(folder / "tokenizer.json", vocabulary.text)
    write_file(folder / "tokenizer_config.json", to_json(vocabulary.config, indent=2) + "\n")
    files = {"train": train, "val": val}
    meta = {
        "vocab_size": vocabulary.size,
        "dtype": np.dtype(dtype).name,
        "eos_id": vocabulary.eos_id,
        "bos_id": next(iter(vocabulary.before), None),
        **{f"{name}_tokens": file.tokens for name, file in files.items()},
        **{f"{name}_documents": file.documents for name, file in files.items()},
        **{f"{name}_bytes": file.bytes for name, file in files.items()},
        "max_document_bytes": corpus.reading.max_document_bytes,
        "sources": records,
        "digests": digests,
        "tokenizer": {
            "kind": vocabulary.kind,
            "regex": vocabulary.regex,
            "eos_token": vocabulary.eos_token,
            "ids_before_document": list(vocabulary.before),
            "ids_after_document": list(vocabulary.after),
            "special_tokens": vocabulary.spelled,
        },
        "tinytrain_dist": __version__,
    }
    write_file(folder / "meta.json", to_json(meta, indent=2) + "\n")
    for name, file in files.items():
        if file.tokens < _SMALL_TOKENS:
            say(
                f"{name}.npy has only {file.tokens:,} tokens: context_len must be smaller than that; give more text or "
                "another --val-fraction"
            )
    return meta


def _proof_texts(scan: Scan) -> Iterator[str]:
    """Yield the starts of sampled documents, a megabyte in all."""
    size = 0
    for document in scan.sample.documents():
        if size < _PROOF_BYTES:
            size += len(document[:_PROOF_PIECE_BYTES])
            yield document[:_PROOF_PIECE_BYTES].decode(errors="ignore")
