"""Decide everything about a data set before text is encoded: the split, the longest document and the tokenizer.

Must not know token files.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.data.preparation.chat import BadChatError, ChatEncoder
from tinytrain_dist.data.preparation.conversations import Conversation
from tinytrain_dist.data.preparation.corpus import Corpus, FileDigest
from tinytrain_dist.data.preparation.duplicates import Duplicates
from tinytrain_dist.data.preparation.options import MIN_DOCUMENT_BYTES, PrepareOptions
from tinytrain_dist.data.preparation.sample import Scan, document_hashes, scan_documents, training_texts
from tinytrain_dist.data.preparation.selection import Selection
from tinytrain_dist.data.preparation.special_tokens import SpecialTokens, SpelledTokens, count_spelled
from tinytrain_dist.data.preparation.tokenizer import Vocabulary, load_vocabulary, train_bpe, why_not_fast
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import parse_json

_DEFAULT_VOCAB_SIZE = 8192
# A small corpus gives this much text to validation by default.
_VAL_BYTES = 500_000
_DUPLICATES_FILE = "duplicates.bin"
# Text on which tiktoken must agree with tokenizers: in all, and at most from one document.
_COMPARED_BYTES, _COMPARED_DOCUMENT_BYTES = 1_000_000, 20_000


def say(message: str) -> None:
    """Print a message to stderr."""
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """What the first reading of a corpus decides.

    threshold: documents whose hash is below it go to val. use_fast: tiktoken encodes. digests: of the files.
    duplicates: documents that are removed, if they were looked for. tokenizer_class: loads the tokenizer faster, if it
    is known; it is not saved.
    """

    threshold: int
    vocabulary: Vocabulary
    use_fast: bool
    digests: list[FileDigest]
    duplicates: Duplicates | None = None
    tokenizer_class: Any = None

    def save(self, folder: Path) -> dict[str, Any]:
        """Return the plan as JSON values, after writing what is large to a file in `folder`. Errors: OSError."""
        value = dataclasses.asdict(dataclasses.replace(self, duplicates=None, tokenizer_class=None))
        del value["tokenizer_class"]
        if self.duplicates is not None:
            value["duplicates"] = self.duplicates.save(folder / _DUPLICATES_FILE)
        return value

    @classmethod
    def load(cls, folder: Path, value: dict[str, Any]) -> Plan:
        """Return the plan that `save` wrote. Errors: DataError if the file in `folder` is missing or damaged."""
        fields = dict(value["vocabulary"])
        if fields["special"] is not None:
            special = fields["special"]
            fields["special"] = SpecialTokens(
                tuple(special["before"]), tuple(special["after"]), special["config"], tuple(special["notes"])
            )
        digests = [FileDigest(**digest) for digest in value["digests"]]
        duplicates = value["duplicates"] and Duplicates.load(folder / _DUPLICATES_FILE, value["duplicates"])
        return cls(value["threshold"], Vocabulary(**fields), value["use_fast"], digests, duplicates)


def make_plan(corpus: Corpus, given: PrepareOptions, folder: Path) -> Plan:
    """Read all documents once, and decide. folder: for temporary files.

    Errors: DataError for text or a tokenizer that cannot be used; OSError from the disk.
    """
    hashes = folder / "hashes" if given.dedup == "exact" else None
    if given.chat:
        assert given.tokenizer is not None
        encoder = ChatEncoder(given.tokenizer)
        scan = scan_documents(corpus, given.sample_bytes, hashes, _Rendering(encoder))
    else:
        scan = scan_documents(corpus, given.sample_bytes, hashes)
    _report_selection(corpus.reading.selection, given)
    _report_duplicates(scan)
    threshold = _threshold(scan, given.val_fraction or _default_val_fraction(scan))
    if given.tokenizer is None:
        vocabulary = _train(scan, threshold, given.vocab_size or _DEFAULT_VOCAB_SIZE)
    elif given.chat:
        vocabulary = _load_for_chat(given.tokenizer, encoder.template)
        return Plan(threshold, vocabulary, False, corpus.digests, scan.duplicates, encoder.simple_class())
    else:
        vocabulary = _load(scan, given.tokenizer, given.eos_token, given.special_tokens)
    reason = why_not_fast(vocabulary, _comparison_texts(scan))
    if reason:
        say(
            "encoding with tokenizers: tiktoken, which is several times faster, cannot be used for this tokenizer "
            f"({reason})"
        )
    return Plan(threshold, vocabulary, reason is None, corpus.digests, scan.duplicates)


class _Rendering:
    """Return the text of a conversation as the chat template writes it. Errors: DataError that names the place."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder

    def __call__(self, document: bytes) -> bytes:
        try:
            return self.encoder.render(parse_json(document)).encode()
        except BadChatError as error:
            where = document.where if isinstance(document, Conversation) else "a conversation"
            raise DataError(f"{where}: {error}") from None


def _report_duplicates(scan: Scan) -> None:
    if scan.duplicates is not None:
        removed, documents = scan.duplicates, scan.documents + scan.duplicates.documents
        say(
            f"--dedup exact: {removed.documents:,} of {documents:,} documents, with {removed.bytes:,} bytes, repeat an "
            "earlier one and are removed"
        )


def _report_selection(selection: Selection, given: PrepareOptions) -> None:
    if selection:
        tally = selection.tally
        say(f"{selection.options}: {tally.kept:,} of {tally.records:,} documents (JSON lines or rows) are kept")
    for problem in selection.unknown_fields():
        say(f"WARNING: {problem}")
    missing = selection.ids - selection.found
    if missing:
        say(
            f"--ids {given.ids}: {len(missing):,} of {len(selection.ids):,} IDs belong to no document that is kept, "
            f"such as {min(missing)!r}"
        )


def _default_val_fraction(scan: Scan) -> float:
    """Return 0.01, or more in a small corpus, so that validation gets about _VAL_BYTES; at most 0.1."""
    return min(max(_VAL_BYTES / scan.bytes, 0.01), 0.1)


def _threshold(scan: Scan, fraction: float) -> int:
    """Return the hash below which documents go to val: about `fraction` of them, but not none and not all."""
    if scan.min_split_key == scan.max_split_key:
        size = scan.bytes // scan.documents
        half = size // 2 - 1
        cut = f", or set --max-document-bytes {half} to cut it" if half >= MIN_DOCUMENT_BYTES else ""
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


def _load_for_chat(tokenizer: str, template: str) -> Vocabulary:
    """Load a tokenizer whose chat template writes the documents. Its special tokens in a text are tokens."""
    vocabulary = load_vocabulary(tokenizer, None, "ids")
    assert vocabulary.special is not None
    special = dataclasses.replace(
        vocabulary.special, before=(), after=(), config=vocabulary.special.config | {"chat_template": template}
    )
    return dataclasses.replace(vocabulary, special=special)


def _comparison_texts(scan: Scan) -> Iterator[str]:
    """Yield the beginnings of sampled documents, about a megabyte in all."""
    size = 0
    for document in scan.sample.documents():
        if size < _COMPARED_BYTES:
            beginning = document[:_COMPARED_DOCUMENT_BYTES]
            size += len(beginning)
            yield beginning.decode(errors="ignore")
