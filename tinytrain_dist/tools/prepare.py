"""Owns `tinytrain prepare`: text becomes a tokenizer and token files, the same bytes for any number of workers.

Must not know models, training or how a token file is sampled.
"""

import hashlib
import heapq
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tinytrain_dist.errors import ConfigError, DataError
from tinytrain_dist.tools.corpus import Meter, Reading, Source, find_sources, open_source, read_documents
from tinytrain_dist.tools.tokenfiles import (
    TokenFile,
    document_hashes,
    encode_all,
    in_batches,
    new_folder,
    write_file,
)
from tinytrain_dist.tools.tokenizer import Vocabulary, load_vocabulary, train_bpe, why_not_fast

_DEFAULT_VOCAB_SIZE = 8192
_SMALLEST_VOCAB_SIZE = 257  # every byte and the end of a document
# Below 1,000,000 tiktoken's regex stands any run of white space; far above it, memory is no longer bounded.
_SHORTEST_LIMIT, _LONGEST_LIMIT = 4096, 1_000_000
_VAL_BYTES = 500_000
_PROOF_BYTES, _PROOF_PIECE_BYTES = 1_000_000, 20_000
_WINDOW_TOKENS = 1025  # a common context_len and the token after it


def _say(message: str) -> None:
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
        """What was kept, by hash."""
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
    """A function that is told the bytes done so far; a bar on a terminal, else a line every five seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%")
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(what, total=total_bytes)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            _say(f"{what}: {done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB")

    yield line


@dataclass
class Corpus:
    """All documents of all sources, in order, as often as asked for."""

    sources: list[Source]
    reading: Reading
    total_bytes: int
    records: list[dict[str, Any]] = field(default_factory=list)

    def documents(self, what: str) -> Iterator[bytes]:
        """Read everything once; afterwards `records` says what each source was. `what` names the progress bar."""
        self.records, done = [], 0
        with _progress(what, self.total_bytes) as report:
            for source in self.sources:
                listing, size = hashlib.sha256(), 0
                reading = replace(self.reading, errors="replace") if source.tolerant else self.reading
                for path in source.files:
                    with open_source(path) as file:
                        meter = Meter(file)
                        for document in read_documents(path, meter, reading):
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


def _check_settings(
    vocab_size: int | None, tokenizer: str | None, eos_token: str | None, val_fraction: float | None,
    sample_bytes: int, max_document_bytes: int | None, workers: int | None,
) -> None:  # fmt: skip
    problems = []
    if vocab_size is not None and tokenizer is not None:
        problems.append(f"vocab_size: {vocab_size} has no effect with tokenizer {tokenizer}; leave one of them out")
    if vocab_size is not None and vocab_size < _SMALLEST_VOCAB_SIZE:
        problems.append(
            f"vocab_size: {vocab_size} is below {_SMALLEST_VOCAB_SIZE}, every byte and the end-of-document token; "
            "set at least that"
        )
    if eos_token is not None and tokenizer is None:
        problems.append(f"eos_token: {eos_token!r} has no effect without tokenizer; leave it out")
    if val_fraction is not None and not 0 < val_fraction < 1:
        problems.append(f"val_fraction: {val_fraction} is not between 0 and 1; 0.01 holds out one document in 100")
    if max_document_bytes is not None and not 64 <= max_document_bytes <= 16_000_000:
        problems.append(f"max_document_bytes: {max_document_bytes} is not between 64 and 16,000,000; set it so")
    if sample_bytes < max(_LONGEST_LIMIT, max_document_bytes or 0):
        least = max(_LONGEST_LIMIT, max_document_bytes or 0)
        problems.append(f"sample_bytes: {sample_bytes} is below {least}, the longest document; set at least that")
    if workers is not None and workers < 1:
        problems.append(f"workers: {workers} is below 1; set the number of encoding processes")
    if problems:
        raise ConfigError(problems, "the settings of tinytrain prepare")


def prepare(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: str,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    eos_token: str | None = None,
    val_fraction: float | None = None,
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
            .jsonl, each also as .gz .xz .zst; other plain text when named. `<|endoftext|>` in a file ends a document.
        out: Folder to write; it appears complete or not at all.
        vocab_size: Ids of the tokenizer to train (8192 if neither this nor tokenizer is given).
        tokenizer: A tokenizer.json, or a folder with one, to use instead of training.
        eos_token: End-of-document token of that tokenizer, where it is not `<|endoftext|>`.
        val_fraction: Share of documents held out, by a hash of their content (default: 0.01, and up to 0.1 in a
            small corpus, to hold out about 500 kB).
        text_field: Field of a .jsonl line that holds the text.
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
    _check_settings(vocab_size, tokenizer, eos_token, val_fraction, sample_bytes, max_document_bytes, workers)
    target = Path(os.path.realpath(os.path.expanduser(out)))
    with new_folder(target, overwrite) as folder:
        found = find_sources(sources, _say)
        total_bytes = sum(os.path.getsize(path) for source in found for path in source.files)
        limit = max_document_bytes or min(max(total_bytes // 128, _SHORTEST_LIMIT), _LONGEST_LIMIT)
        reading = Reading(text_field, split_by, errors, limit)
        corpus = Corpus(found, reading, total_bytes)
        scan = _scan(corpus, sample_bytes)
        fraction = val_fraction or min(max(_VAL_BYTES / total_bytes, 0.01), 0.1)
        threshold = _threshold(scan, fraction)
        vocabulary = _vocabulary(scan, threshold, vocab_size, tokenizer, eos_token)
        workers = workers or min(len(os.sched_getaffinity(0)), 16)
        meta = _write(folder, corpus, scan, vocabulary, threshold, workers)
    return meta


def _threshold(scan: Scan, fraction: float) -> int:
    """The hash below which documents are validation: as `fraction` says, but never none and never all."""
    if scan.smallest == scan.largest:
        raise DataError(
            f"all of the text is one document of {scan.bytes // scan.documents:,} bytes, and train and val need one "
            "each; give more text, or set --max-document-bytes below half of that to cut it"
        )
    return min(max(int(fraction * (1 << 64)), scan.smallest + 1), scan.largest)


def _vocabulary(
    scan: Scan, threshold: int, vocab_size: int | None, tokenizer: str | None, eos_token: str | None
) -> Vocabulary:
    if tokenizer is not None:
        return load_vocabulary(tokenizer, eos_token)
    asked = vocab_size or _DEFAULT_VOCAB_SIZE
    documents = scan.sample.documents()
    documents = [d for d in documents if document_hashes(d)[0] >= threshold] or documents
    _say(f"training a tokenizer on {sum(map(len, documents)) / 1e6:,.1f} MB of text")
    vocabulary = train_bpe((document.decode() for document in documents), asked)
    if vocabulary.size < asked:
        _say(
            f"the tokenizer has {vocabulary.size:,} ids, not the {asked:,} of --vocab-size: no other pair of tokens "
            "occurs twice in the text; going on with these"
        )
    return vocabulary


def _write(
    folder: Path, corpus: Corpus, scan: Scan, vocabulary: Vocabulary, threshold: int, workers: int
) -> dict[str, Any]:
    """Encode everything into `folder`; gives the contents of meta.json."""
    digests, records = {}, corpus.records
    reason = why_not_fast(vocabulary, _proof_texts(scan))
    if reason:
        _say(
            f"encoding with tokenizers, several times slower than tiktoken, which cannot take this tokenizer: {reason}"
        )
    dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
    files = {name: TokenFile(folder / f"{name}.npy", dtype) for name in ("train", "val")}
    batches = in_batches(corpus.documents("encoding"))
    for encoded in encode_all(batches, (vocabulary, reason is None, threshold, dtype), workers):
        for side, file in enumerate(files.values()):
            file.append(encoded.ids[side], encoded.documents[side], encoded.bytes[side])
    digests = {file.path.name: file.close() for file in files.values()}
    digests["tokenizer.json"] = write_file(folder / "tokenizer.json", vocabulary.text)
    if corpus.records != records:
        raise DataError("a source changed while it was read (it is read twice); run again when nothing writes to it")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": vocabulary.eos_token}
    write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    meta: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "dtype": "uint16" if dtype == "<u2" else "uint32",
        "eos_id": vocabulary.eos_id,
    }
    for what in ("tokens", "documents", "bytes"):
        meta |= {f"{name}_{what}": getattr(file, what) for name, file in files.items()}
    meta |= {
        "max_document_bytes": corpus.reading.max_document_bytes,
        "sources": records,
        "digests": digests,
        "tokenizer": {"kind": vocabulary.kind, "regex": vocabulary.regex, "eos_token": vocabulary.eos_token},
        "tinytrain_dist": _version(),
    }
    write_file(folder / "meta.json", json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    return meta


def _proof_texts(scan: Scan) -> Iterator[str]:
    size = 0
    for document in scan.sample.documents():
        if size >= _PROOF_BYTES:
            return
        size += min(len(document), _PROOF_PIECE_BYTES)
        yield document[:_PROOF_PIECE_BYTES].decode(errors="ignore")


def _version() -> str:
    try:
        return importlib.metadata.version("tinytrain_dist")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def main(args: list[str]) -> int:
    """Run the verb and say what came out; DataError and ConfigError are the caller's to print."""
    start = time.monotonic()
    meta = tyro.cli(prepare, prog="tinytrain prepare", args=args)
    seconds = time.monotonic() - start
    text_bytes = meta["train_bytes"] + meta["val_bytes"]
    print(f"{text_bytes / 1e6:,.1f} MB of text in {seconds:,.1f} s")
    for name in ("train", "val"):
        print(f"{name}: {meta[f'{name}_tokens']:,} tokens of {meta[f'{name}_documents']:,} documents")
    return 0
