"""Train, load and run byte-level BPE tokenizers, and check that two encoders agree.

Must not know where text comes from or where token IDs go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tinytrain_dist.data.preparation.special_tokens import (
    SEPARATOR_TOKEN,
    SpecialTokens,
    SpelledTokens,
    encode_as_in_training,
    read_settings,
    settle,
    token_text,
)
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.regular_files import check_regular

EOS_TOKEN = SEPARATOR_TOKEN
# The pattern that splits text into words: GPT-4's (cl100k) with three changes.
# * There is no branch for contractions. The first branch covers them ("don't" -> "don", "'t"), and GPT-4's would split
#   names in code ("'self" -> "'s", "elf").
# * Combining marks count as letters, because some scripts write vowels as marks.
# * There is no look-ahead \s+(?!\S). Without it tiktoken is a quarter faster and can encode a million spaces in a row.
#   The space before an indented word then belongs to the indentation, which costs no tokens in code.
SPLIT_REGEX = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
# The pattern that the ByteLevel pre-tokenizer uses by default (GPT-2's).
_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Pairs of tokens that occur only once in the sample get no ID.
_MIN_PAIR_COUNT = 2
# Text on which encoders may differ: case, marks, digits, all kinds of white space, rare Unicode planes.
_DIFFICULT_TEXT = (
    "I'll don't WE'VE 'self x's 1234567 3.14 a\u0301\u0bcd \u0e01\u0e33 ½² \u3000\u00a0\u2003x\u200b\u0085 \r\n\r\n \n"
    "\t\t  end  \n  {}[]=>!= — “q” 日本語テキスト مرحبا हिन्दी \U0001f469\u200d\U0001f467 \U0001d54f"
    " \x00\x1c\x7f \u017f İ\ufeff  "
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as it is stored.

    text: content of tokenizer.json. size: one more than the largest ID. kind: description for meta.json.
    regex: pattern that splits text into words, if the tokenizer is byte-level.
    """

    text: str
    size: int
    eos_token: str
    eos_id: int
    kind: str
    regex: str | None
    special: SpecialTokens | None = None  # of a tokenizer that was not trained here
    spelled: SpelledTokens = "text"  # what special tokens that a text spells become

    @property
    def before(self) -> tuple[int, ...]:
        """IDs before each document."""
        return self.special.before if self.special else ()

    @property
    def after(self) -> tuple[int, ...]:
        """IDs after each document."""
        return self.special.after if self.special else (self.eos_id,)

    @property
    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        return self.special.config if self.special else own


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's map from printable characters to the bytes that they represent in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Train a byte-level BPE with at most `vocab_size` IDs: 0 for `<|endoftext|>`, then the 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_REGEX), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_PAIR_COUNT,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(byte_of_character()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _describe(tokenizer.to_str(pretty=False), EOS_TOKEN)


def load_vocabulary(place: str, eos_token: str | None, spelled: SpelledTokens = "text") -> Vocabulary:
    """Read a tokenizer.json, given its path or its folder.

    eos_token: its end-of-document token (None: the one in tokenizer_config.json beside it, or `<|endoftext|>`).
    spelled: what special tokens that a text spells become.
    Errors: DataError if the file cannot be used or has no such token.
    """
    path = Path(place).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        check_regular(file)
        text, settings = file.read_bytes().decode(), read_settings(file)
        found = _describe(text, eos_token or token_text(settings.get("eos_token")) or EOS_TOKEN)
        text, special = settle(text, settings, found.eos_token, spelled)
        return replace(found, text=text, special=special, spelled=spelled)
    except DataError:
        raise
    except BaseException as error:  # tokenizers raises a plain Exception for a file that it cannot read, and may panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"--tokenizer {place}: {file} cannot be used ({error}); give a tokenizer.json saved by tokenizers or "
            "transformers, or a folder with one"
        ) from error


def _describe(text: str, eos_token: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json. Errors: DataError if it lacks `eos_token`."""
    tokenizer = Tokenizer.from_str(text)
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise DataError(f"the tokenizer has no token {eos_token!r} to end documents; set --eos-token to the one it has")
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    data = json.loads(tokenizer.to_str())
    regex = _split_regex(data["pre_tokenizer"])
    model_type = data["model"]["type"]
    kind = f"byte-level {model_type}" if regex else model_type
    return Vocabulary(text, size, eos_token, eos_id, kind, regex)


def _split_regex(pre_tokenizer: Any) -> str | None:
    """Return the regex of a byte-level pre-tokenizer in one of the two usual forms, or None for all others."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2_REGEX
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return regex
    return None


class Encoder:
    """Encode text to IDs with `tokenizers`, or with `tiktoken`, which is faster, if `use_fast` is set.

    Set `use_fast` only if `why_not_fast` returned None.
    """

    def __init__(self, vocabulary: Vocabulary, *, use_fast: bool) -> None:
        """Create an encoder. Errors: ValueError if `use_fast` is set and tiktoken cannot represent the vocabulary."""
        self.slow = Tokenizer.from_str(vocabulary.text)
        encode_as_in_training(self.slow, vocabulary.spelled)
        self.fast = _tiktoken(self.slow, vocabulary) if use_fast else None

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the IDs of `text`, without the tokens around it."""
        if self.fast is None:
            return self.encode_slow(text)
        try:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            # A panic in Rust is not an Exception. GPT-2's regex causes one on a million spaces in a row.
            if type(error).__name__ != "PanicException":
                raise
            return self.encode_slow(text)

    def encode_slow(self, text: str) -> NDArray[np.uint32]:
        """Return the IDs of `text` from `tokenizers`, which are correct by definition."""
        return np.array(self.slow.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)


def _tiktoken(tokenizer: Tokenizer, vocabulary: Vocabulary) -> tiktoken.Encoding:
    """Return a tokenizer as a tiktoken encoding. Errors: ValueError that says why this is impossible."""
    data = json.loads(tokenizer.to_str())
    model, added_tokens = data["model"], data["added_tokens"]
    if vocabulary.spelled == "ids":
        raise ValueError("special tokens in the text become IDs")
    if vocabulary.regex is None or model["type"] != "BPE":
        raise ValueError("it is not a byte-level BPE with one split regex")
    if data["normalizer"] or model["dropout"] or not all(token["special"] for token in added_tokens):
        raise ValueError("it normalizes text, drops merges at random, or has added tokens that are not special")
    special_tokens = {token["content"] for token in added_tokens}
    words = [word for word in model["vocab"] if word not in special_tokens]
    byte_of = byte_of_character()
    try:
        ranks = {bytes(byte_of[character] for character in word): model["vocab"][word] for word in words}
    except KeyError as error:
        raise ValueError(f"its vocabulary contains the character {error}, which represents no byte") from error
    merged_ids = [model["vocab"][left + right] for left, right in model["merges"]]
    bytes_with_id = sum(len(word) == 1 for word in ranks)
    if bytes_with_id < 256 or merged_ids != sorted(merged_ids):
        raise ValueError("some byte has no ID, or its merges are not in the order of their IDs")
    # Without any special token, tiktoken looks for an empty one at each character, which takes as long as encoding. One
    # that is not allowed changes no result: it is encoded as ordinary text.
    # measured (AMD, 2026-11-28, 4 MB of code): 0.15 s with it, 0.33 s without, 0.19 s by encode_ordinary into a list
    special = {SEPARATOR_TOKEN: vocabulary.size}
    return tiktoken.Encoding("prepare", pat_str=vocabulary.regex, mergeable_ranks=ranks, special_tokens=special)


def why_not_fast(vocabulary: Vocabulary, sample: Iterable[str]) -> str | None:
    """Return None if tiktoken gives the same IDs as `tokenizers` on difficult text and on a sample, else a reason."""
    try:
        encoder = Encoder(vocabulary, use_fast=True)
    except ValueError as error:
        return str(error)
    for text in (_DIFFICULT_TEXT, *sample):
        if not np.array_equal(encoder.encode(text), encoder.encode_slow(text)):
            return f"its IDs differ on {text[:40]!r}..."
    return None
