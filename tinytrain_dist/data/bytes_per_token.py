"""Count the bytes of text that each token ID stands for; evaluation computes bits per byte from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.npy_files import check_npy_file
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.permissions import permission_problem


def bytes_per_token(folder: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """Return how many bytes of text each token ID stands for: int64 [vocab_size]; None where that is not known.

    The sizes come from one of two files in `folder`:

    * token_bytes.npy, a table [vocab_size] that users can put there for a tokenizer of any kind.
    * tokenizer.json, if it is a byte-level BPE: there each character of a token stands for one byte.

    Special tokens, such as the end of a document, are no text and count 0. IDs that only pad the vocabulary count 0.
    Errors: DataError if one of the files exists and cannot be used.
    """
    for name, read_sizes in (("token_bytes.npy", _sizes_in_table), ("tokenizer.json", _sizes_of_byte_level_bpe)):
        path = folder / name
        if path.is_file():
            try:
                return read_sizes(path, vocab_size)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
                problem = (
                    f"{path}: does not fit vocab_size {vocab_size} ({error}); correct vocab_size, or repair the "
                    "file or remove it"
                )
                raise DataError(permission_problem(error) or problem) from None
    return None


def _sizes_in_table(table_path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """Return the bytes of each token ID, int64 [vocab_size], from a .npy file."""
    check_npy_file(table_path)
    table = np.load(table_path, allow_pickle=False)
    if table.shape != (vocab_size,) or table.dtype.kind not in "ui":
        raise ValueError(f"it holds {table.dtype} {list(table.shape)}, not whole numbers [{vocab_size}]")
    return np.asarray(table, dtype=np.int64)


def _sizes_of_byte_level_bpe(tokenizer_path: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """Return the bytes of each token ID, int64 [vocab_size]; None if the tokenizer is of another kind."""
    tokenizer = read_json_dict(tokenizer_path)
    model, decoder = tokenizer["model"], tokenizer["decoder"]
    vocabulary = model["vocab"]
    if model["type"] != "BPE" or not decoder or decoder["type"] != "ByteLevel":
        return None
    ids = [*vocabulary.values(), *(added["id"] for added in tokenizer["added_tokens"])]
    if ids and max(ids) >= vocab_size:
        raise ValueError(f"it has {max(ids) + 1:,} ids")
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token, token_id in vocabulary.items():
        sizes[token_id] = len(token)
    for added in tokenizer["added_tokens"]:
        sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return sizes
