"""Define the options of `tinytrain prepare`, and check them.

Must not know how text is prepared.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from tinytrain_dist.data.preparation.selection import Condition, Selection, parse_condition, read_ids
from tinytrain_dist.data.preparation.special_tokens import SpelledTokens
from tinytrain_dist.errors import ConfigError

MIN_DOCUMENT_BYTES = 64
# No document may be longer: up to this length GPT-2's regex in tiktoken can split any run of white space, and
# tokenizers needs at most 240 MB of memory for a document.
MAX_DOCUMENT_BYTES = 1_000_000
_MIN_VOCAB_SIZE = 257  # all bytes and the end-of-document token
_WITHOUT_EFFECT_ON_BYTES = {"sources", "out", "workers", "overwrite"}


@dataclass(frozen=True)
class PrepareOptions:
    """Turn text into a tokenizer and token files for training.

    Args:
        sources: `stdlib` (the source code of Python's standard library), or files, folders and globs, here or at a URL
            (s3://, gs://, https://, ...). Files are text, JSON lines, Parquet or Arrow. In a folder, .txt, .md, .py,
            .jsonl, .parquet and .arrow files are read, text also if compressed as .gz, .bz2, .xz or .zst. Other text
            files must be given by name or by glob. A folder that `datasets` saved is read in the order of its rows.
            `<|endoftext|>` in a text ends a document.
        out: Folder to write. It appears complete or not at all.
        vocab_size: Number of IDs of the tokenizer to train (8192 if neither this nor tokenizer is given).
        tokenizer: A tokenizer.json, or a folder with one, to use instead of training a new one.
        eos_token: End-of-document token of that tokenizer (default: the one in tokenizer_config.json beside it, or
            `<|endoftext|>`). Not with chat, because the chat template writes it.
        special_tokens: What special tokens of that tokenizer that the text spells become: ordinary text (text), or
            their IDs (ids). With chat always IDs, because the chat template spells them.
        val_fraction: Fraction of the documents to hold out, chosen by a hash of their content (default: 0.01, or up
            to 0.1 in a small corpus, to hold out about 500 kB).
        format: What the files contain. auto: the content decides between text, JSON lines, Parquet and Arrow, and
            anything else is refused; text: text, whatever it looks like; jsonl: JSON lines.
        text_field: Field with the text in each JSON line, or column of a table. `a.b` is the field b in the field a.
        chat: The documents are conversations, {"messages": [{"role": ..., "content": ...}, ...]}, perhaps with `tools`,
            in JSON lines or in columns of a table. They are written with the chat template of the tokenizer, and a mask
            counts only what the assistant says (train with loss_mask = true). The field is `messages`, unless
            --text-field names another.
        filter: Keep only documents whose fields meet a condition, such as "language == en", "score >= 0.5",
            "source in wiki, books" or "text is not null". Given several times, all must hold.
        id_field: Field with the ID of a document, for --ids.
        ids: File with one ID on each line. Only documents with these IDs are kept.
        dedup: Remove documents that repeat an earlier one (exact: the same bytes, after filters and after long
            documents were cut; with chat, the same text as the chat template writes it). The first one stays. Needs 50
            MB of memory, and for each million documents 1 MB more, and 40 MB on disk during the first reading.
        split_by: What is one document in a file without separators: the whole file, or each line.
        errors: What to do about bytes that are not UTF-8: stop (strict), or write U+FFFD in their place (replace).
        max_document_bytes: Longer documents are cut into several, at line ends (default: 1/128 of the corpus, at
            least 4,096 and at most 1,000,000).
        sample_bytes: Bytes of text to train the tokenizer on. Documents are chosen by a hash of their content.
        shard_tokens: Write several token files, train-00000.npy and so on, of at most this many tokens each. If the
            command is interrupted, the same command continues after the last complete file.
        workers: Number of encoding processes (default: one for each CPU that this process may use, at most 16).
        overwrite: Replace an existing data set, and delete the unfinished work of another command.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    out: str
    vocab_size: int | None = None
    tokenizer: str | None = None
    eos_token: str | None = None
    special_tokens: SpelledTokens = "text"
    val_fraction: float | None = None
    format: Literal["auto", "text", "jsonl"] = "auto"
    text_field: str = "text"
    chat: bool = False
    filter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    id_field: str | None = None
    ids: str | None = None
    dedup: Literal["none", "exact"] = "none"
    split_by: Literal["file", "line"] = "file"
    errors: Literal["strict", "replace"] = "strict"
    max_document_bytes: int | None = None
    sample_bytes: int = 20_000_000
    shard_tokens: int | None = None
    workers: int | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise ConfigError with every option that is out of range or has no effect."""
        problems = [*self._problems_of_tokenizer(), *self._problems_of_sizes(), *self._problems_of_selection()]
        if problems:
            raise ConfigError(problems, "the settings of tinytrain prepare")

    def _problems_of_tokenizer(self) -> list[str]:
        problems = []
        if self.vocab_size is not None and self.tokenizer is not None:
            problems.append(
                f"vocab_size: {self.vocab_size} has no effect with tokenizer {self.tokenizer}; leave one of them out"
            )
        if self.vocab_size is not None and self.vocab_size < _MIN_VOCAB_SIZE:
            problems.append(
                f"vocab_size: {self.vocab_size} is below {_MIN_VOCAB_SIZE} (all bytes and the end-of-document token); "
                "set at least that"
            )
        if self.eos_token is not None and self.tokenizer is None:
            problems.append(f"eos_token: {self.eos_token} has no effect without tokenizer; leave it out")
        if self.special_tokens != "text" and self.tokenizer is None:
            problems.append(f"special_tokens: {self.special_tokens} has no effect without tokenizer; leave it out")
        if self.chat:
            problems += self._problems_of_chat()
        return problems

    def _problems_of_chat(self) -> list[str]:
        problems = []
        if self.tokenizer is None:
            problems.append("chat: needs the chat template of a tokenizer; set tokenizer to the folder of a chat model")
        given = {"eos_token": self.eos_token, "max_document_bytes": self.max_document_bytes}
        problems += [
            f"{name}: {value} has no effect with chat; leave it out"
            for name, value in given.items()
            if value is not None
        ]
        if self.format == "text" or self.split_by != "file":
            problems.append("chat: conversations are in JSON lines or tables; leave out format and split_by")
        return problems

    @property
    def document_field(self) -> str:
        """The field or column with the documents."""
        return "messages" if self.chat and self.text_field == "text" else self.text_field

    def _problems_of_sizes(self) -> list[str]:
        problems = []
        fraction, limit = self.val_fraction, self.max_document_bytes
        longest = limit or MAX_DOCUMENT_BYTES
        if fraction is not None and not 0 < fraction < 1:
            problems.append(f"val_fraction: {fraction} is not between 0 and 1; set 0.01, for example, for 1 %")
        if limit is not None and not MIN_DOCUMENT_BYTES <= limit <= MAX_DOCUMENT_BYTES:
            problems.append(
                f"max_document_bytes: {limit} is not between {MIN_DOCUMENT_BYTES} and {MAX_DOCUMENT_BYTES}; set a "
                "number in this range"
            )
        if self.sample_bytes < longest:
            problems.append(
                f"sample_bytes: {self.sample_bytes} is below {longest}, the size of the longest document; set at least "
                "that"
            )
        if self.shard_tokens is not None and self.shard_tokens < 1:
            problems.append(f"shard_tokens: {self.shard_tokens} is below 1; set the number of tokens of a file")
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers: {self.workers} is below 1; set the number of encoding processes")
        return problems

    def _problems_of_selection(self) -> list[str]:
        problems = []
        for text in self.filter:
            try:
                parse_condition(text)
            except ValueError as error:
                problems.append(f"filter: {error}")
        if (self.ids is None) != (self.id_field is None):
            given, missing = ("ids", "id_field") if self.id_field is None else ("id_field", "ids")
            problems.append(f"{given}: {getattr(self, given)} has no effect without {missing}; set both, or neither")
        return problems

    def selection(self) -> Selection:
        """Return which documents are kept. Errors: DataError if the file of IDs cannot be used."""
        conditions: tuple[Condition, ...] = tuple(map(parse_condition, self.filter))
        return Selection(conditions, self.id_field, frozenset() if self.ids is None else read_ids(self.ids))

    def of_bytes(self) -> dict[str, Any]:
        """Return the options that the bytes of the output depend on, besides the sources."""
        given = dataclasses.asdict(self)
        return {name: value for name, value in given.items() if name not in _WITHOUT_EFFECT_ON_BYTES}
