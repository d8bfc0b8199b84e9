"""Find out how many bytes of text each token ID stands for, from which evaluation computes bits per byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinytrain_dist.errors import DataError


def bytes_per_token(folder: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """Return how many bytes of text each token ID stands for: int64 [vocab_size]; None where that is not known.

    The sizes come from one of two files in `folder`:

    * token_bytes.npy, a table [vocab_size] that users can put there for a tokenizer of any kind.
    * tokenizer.json, if it is a byte-level BPE: there each character of a token stands for one byte.

    Special tokens, such as the end of a document, are no text and count 0. IDs that only pad the vocabulary count 0.
    Errors: DataError if one of the files exists and cannot be used.
    """
    table_path = folder / "token_bytes.npy"
    tokenizer_path = folder / "tokenizer.json"
    used_path = table_path if table_path.is_file() else tokenizer_path
    try:
        if used_path == table_path:
            sizes = np.zeros(vocab_size, dtype=np.int64)
            sizes[:] = np.load(table_path, allow_pickle=False)
            return sizes
        return _sizes_of_byte_level_bpe(tokenizer_path, vocab_size) if tokenizer_path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{used_path}: does not fit vocab_size {vocab_size} ({error}); repair it or remove it"
        ) from None


def _sizes_of_byte_level_bpe(tokenizer_path: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """Return the bytes of each token ID, int64 [vocab_size]; None if the tokenizer is of another kind."""
    tokenizer = json.loads(tokenizer_path.read_bytes())
    model, decoder = tokenizer["model"], tokenizer["decoder"]
    vocabulary = model["vocab"]
    if model["type"] != "BPE" or not decoder or decoder["type"] != "ByteLevel":
        return None
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token, token_id in vocabulary.items():
        sizes[token_id] = len(token)
    for added in tokenizer["added_tokens"]:
        sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return sizes
