"""Turn text into a tokenizer and token files, with the same bytes for any number of workers.

Must not know models, training, or how token files are sampled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from tinytrain_dist import __version__
from tinytrain_dist.data.preparation.corpus import Corpus, recognise
from tinytrain_dist.data.preparation.encoding import encode_all, in_batches
from tinytrain_dist.data.preparation.output_folder import new_folder
from tinytrain_dist.data.preparation.sample import Scan, document_hashes, scan_documents, training_texts
from tinytrain_dist.data.preparation.sources import Source, find_sources
from tinytrain_dist.data.preparation.special_tokens import SpelledTokens, count_spelled
from tinytrain_dist.data.preparation.text_documents import Reading
from tinytrain_dist.data.preparation.token_writer import TokenWriter, write_file
from tinytrain_dist.data.preparation.tokenizer import Vocabulary, load_vocabulary, train_bpe, why_not_fast
from tinytrain_dist.errors import ConfigError, DataError
from tinytrain_dist.utils.json_files import to_json

_DEFAULT_VOCAB_SIZE = 8192
_MIN_DOCUMENT_BYTES = 64
_MIN_VOCAB_SIZE = 257  # all bytes and the end-of-document token
# Bounds of the default for max_document_bytes. No document may be longer than the upper one: up to this length GPT-2's
# regex in tiktoken can split any run of white space, and tokenizers needs at most 240 MB of memory for a document.
_MIN_DEFAULT_DOCUMENT_BYTES, _MAX_DOCUMENT_BYTES = 4096, 1_000_000
# A small corpus gives this much text to validation by default.
_VAL_BYTES = 500_000
# Text on which tiktoken must agree with tokenizers: in all, and at most from one document.
_COMPARED_BYTES, _COMPARED_DOCUMENT_BYTES = 1_000_000, 20_000
# `prepare` warns about a file with fewer tokens than this: a common context_len and the token after it.
_MIN_TOKENS = 1025


def say(message: str) -> None:
    """Print a message to stderr."""
    print(message, file=sys.stderr, flush=True)


def _check_settings(given: dict[str, Any]) -> None:
    """Raise ConfigError with every setting that is out of range or has no effect. given: arguments of `prepare`."""
    vocab_size, tokenizer, eos_token = given["vocab_size"], given["tokenizer"], given["eos_token"]
    fraction, limit = given["val_fraction"], given["max_document_bytes"]
    sample_bytes, workers, special_tokens = given["sample_bytes"], given["workers"], given["special_tokens"]
    longest = limit or _MAX_DOCUMENT_BYTES
    problems = []
    if vocab_size is not None and tokenizer is not None:
        problems.append(f"vocab_size: {vocab_size} has no effect with tokenizer {tokenizer}; leave one of them out")
    if vocab_size is not None and vocab_size < _MIN_VOCAB_SIZE:
        problems.append(
            f"vocab_size: {vocab_size} is below {_MIN_VOCAB_SIZE} (all bytes and the end-of-document token); set at "
            "least that"
        )
    if eos_token is not None and tokenizer is None:
        problems.append(f"eos_token: {eos_token} has no effect without tokenizer; leave it out")
    if special_tokens != "text" and tokenizer is None:
        problems.append(f"special_tokens: {special_tokens} has no effect without tokenizer; leave it out")
    if fraction is not None and not 0 < fraction < 1:
        problems.append(f"val_fraction: {fraction} is not between 0 and 1; set 0.01, for example, for 1 %")
    if limit is not None and not _MIN_DOCUMENT_BYTES <= limit <= _MAX_DOCUMENT_BYTES:
        problems.append(
            f"max_document_bytes: {limit} is not between {_MIN_DOCUMENT_BYTES} and {_MAX_DOCUMENT_BYTES}; set a number "
            "in this range"
        )
    if sample_bytes < longest:
        problems.append(
            f"sample_bytes: {sample_bytes} is below {longest}, the size of the longest document; set at least that"
        )
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
        sources: `stdlib` (the source code of Python's standard library), or files, folders and globs. In a folder,
            .txt, .md, .py and .jsonl files are read, also if compressed as .gz, .bz2, .xz or .zst. Other text files
            must be given by name or by glob. `<|endoftext|>` in a file ends a document.
        out: Folder to write. It appears complete or not at all.
        vocab_size: Number of IDs of the tokenizer to train (8192 if neither this nor tokenizer is given).
        tokenizer: A tokenizer.json, or a folder with one, to use instead of training a new one.
        eos_token: End-of-document token of that tokenizer (default: the one in tokenizer_config.json beside it, or
            `<|endoftext|>`).
        special_tokens: What special tokens of that tokenizer that the text spells become: ordinary text (text), or
            their IDs (ids).
        val_fraction: Fraction of the documents to hold out, chosen by a hash of their content (default: 0.01, or up
            to 0.1 in a small corpus, to hold out about 500 kB).
        format: What the files contain. auto: the content decides between text and JSON lines, and anything else is
            refused; text: text, whatever it looks like; jsonl: JSON lines.
        text_field: Field with the text in each JSON line.
        split_by: What is one document in a file without separators: the whole file, or each line.
        errors: What to do about bytes that are not UTF-8: stop (strict), or write U+FFFD in their place (replace).
        max_document_bytes: Longer documents are cut into several, at line ends (default: 1/128 of the corpus, at
            least 4,096 and at most 1,000,000).
        sample_bytes: Bytes of text to train the tokenizer on. Documents are chosen by a hash of their content.
        workers: Number of encoding processes (default: one for each CPU that this process may use, at most 16).
        overwrite: Replace an existing data set.

    Returns the contents of meta.json. Raises DataError for text, tokenizers or folders that cannot be used, and
    ConfigError for settings that are out of range or have no effect.
    """
    _check_settings(locals())
    target = Path(os.path.realpath(os.path.expanduser(out)))
    with new_folder(target, overwrite) as folder:
        found = find_sources((sources,) if isinstance(sources, str) else sources, say)
        corpus = _corpus(found, Reading(text_field, split_by, errors, max_document_bytes or 0, format))
        scan = scan_documents(corpus, sample_bytes)
        threshold = _threshold(scan, val_fraction or _default_val_fraction(scan))
        if tokenizer is None:
            vocabulary = _train(scan, threshold, vocab_size or _DEFAULT_VOCAB_SIZE)
        else:
            vocabulary = _load(scan, tokenizer, eos_token, special_tokens)
        return _write(folder, corpus, scan, vocabulary, threshold, workers or _default_workers())


def _corpus(sources: list[Source], reading: Reading) -> Corpus:
    """Look at every file, and choose the longest document where the settings leave it open (0)."""
    formats = recognise(sources, reading, say)
    total_bytes = sum(os.path.getsize(path) for source in sources for path in source.files)
    limit = reading.max_document_bytes or min(max(total_bytes // 128, _MIN_DEFAULT_DOCUMENT_BYTES), _MAX_DOCUMENT_BYTES)
    return Corpus(sources, replace(reading, max_document_bytes=limit), formats, total_bytes)


def _default_workers() -> int:
    usable_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable_cpus, 16)  # the single process that reads cannot keep more of them busy


def _default_val_fraction(scan: Scan) -> float:
    """Return 0.01, or more in a small corpus, so that validation gets about _VAL_BYTES; at most 0.1."""
    return min(max(_VAL_BYTES / scan.bytes, 0.01), 0.1)


def _threshold(scan: Scan, fraction: float) -> int:
    """Return the hash below which documents go to val: about `fraction` of them, but not none and not all."""
    if scan.min_split_key == scan.max_split_key:
        size = scan.bytes // scan.documents
        half = size // 2 - 1
        cut = f", or set --max-document-bytes {half} to cut it" if half >= _MIN_DOCUMENT_BYTES else ""
        raise DataError(
            f"all of the text is one document of {size:,} bytes, but train and val need one each; give more text{cut}"
        )
    return min(max(int(fraction * (1 << 64)), scan.min_split_key + 1), scan.max_split_key)


def _train(scan: Scan, threshold: int, vocab_size: int) -> Vocabulary:
    """Train a tokenizer on the documents of the sample that go to train, or on all if none does."""
    sample = scan.sample.documents()
    train_documents = [document for document in sample if document_hashes(document)[0] >= threshold]
    texts = list(training_texts(train_documents or sample))
    say(f"training a tokenizer on {sum(map(len, texts)) / 1e6:,.2f} MB of the text")
    vocabulary = train_bpe((text.decode() for text in texts), vocab_size)
    if vocabulary.size < vocab_size:
        say(
            f"the tokenizer has {vocabulary.size:,} IDs, fewer than the {vocab_size:,} of --vocab-size, because no "
            "other pair of tokens occurs twice in the text; continuing with these"
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


def _write(
    folder: Path, corpus: Corpus, scan: Scan, vocabulary: Vocabulary, threshold: int, workers: int
) -> dict[str, Any]:
    """Encode all documents, write the files of the data set to `folder`, and return the contents of meta.json."""
    records_of_scan = corpus.records
    reason = why_not_fast(vocabulary, _comparison_texts(scan))
    if reason:
        say(
            "encoding with tokenizers: tiktoken, which is several times faster, cannot be used for this tokenizer "
            f"({reason})"
        )
    dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
    with TokenWriter(folder / "train.npy", dtype) as train, TokenWriter(folder / "val.npy", dtype) as val:
        batches = in_batches(corpus.documents("encoding"))
        for parts in encode_all(batches, (vocabulary, reason is None, threshold, dtype), workers):
            train.append(parts[0])
            val.append(parts[1])
        digests = {"train.npy": train.finish(), "val.npy": val.finish()}
    if corpus.records != records_of_scan:
        raise DataError("a source changed between its first and second reading; run again when nothing writes to it")
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
        "sources": corpus.records,
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
        if file.tokens < _MIN_TOKENS:
            say(
                f"{name}.npy has only {file.tokens:,} tokens: context_len must be smaller than that; give more text or "
                "another --val-fraction"
            )
    return meta


def _comparison_texts(scan: Scan) -> Iterator[str]:
    """Yield the beginnings of sampled documents, about a megabyte in all."""
    size = 0
    for document in scan.sample.documents():
        if size < _COMPARED_BYTES:
            beginning = document[:_COMPARED_DOCUMENT_BYTES]
            size += len(beginning)
            yield beginning.decode(errors="ignore")
