"""Open and check one token file, fingerprint it, and read windows of it.

A token file is a .npy file with a 1-D array of integers. Must not know ranks, models, devices or other files.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap as memory_map
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinytrain_dist.data.npy_files import check_npy_file, missing_tokens
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.regular_files import NotAFileError, check_regular

Tokens = npt.NDArray[Any]  # 1-D, of any integer type

FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_TOKENS = 4096
_SCAN_BLOCK_TOKENS = 1 << 24


def load_token_dataset(path: str | Path, mmap: bool = True, *, vocab_size: int | None = None) -> Tokens:
    """Open a token file (.npy, 1-D integers, C order), memory-mapped by default.

    vocab_size: check that every token ID lies in 0 .. vocab_size - 1. That takes one scan of the file, whose result is
    kept beside it in FILE.range.json.
    Errors: DataError naming the file, what it holds and what is allowed.
    """
    path = Path(path)
    tokens = _open_array(path, mmap)
    if vocab_size is not None:
        smallest, largest = _id_range(path, tokens)
        if smallest < 0 or largest >= vocab_size:
            wrong_id = smallest if smallest < 0 else largest
            raise DataError(
                f"{path}: holds token id {wrong_id}, but vocab_size {vocab_size} allows 0 .. {vocab_size - 1}"
            )
    if isinstance(tokens, np.memmap) and hasattr(memory_map, "MADV_RANDOM"):
        mapping: Any = vars(tokens)["_mmap"]  # np.memmap has no public name for it
        # Give back the pages that the scan above has mapped.
        mapping.madvise(memory_map.MADV_DONTNEED)
        # Windows lie anywhere in the file, and reading ahead would fetch 128 kB for each of them.
        # measured (2-core x86 VM, 2026-11-23), 8 windows of a file of 20 GB: with reading ahead 90 ms, without 0.06 ms
        mapping.madvise(memory_map.MADV_RANDOM)
    return tokens


def _open_array(path: Path, mmap: bool) -> Tokens:
    """Open a .npy file and check that it holds a 1-D array of integers in C order."""
    try:
        check_regular(path)
        check_npy_file(path)
        array: Tokens = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such token file; make one with `tinytrain prepare` or correct the path") from None
    except NotAFileError as error:
        raise DataError(f"{error}; give a token file made by `tinytrain prepare`") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error}); make it again with `tinytrain prepare`") from None
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(
            f"{path}: holds {array.ndim}-D {array.dtype}, but a token file is a 1-D array of integers; "
            "save ids.astype('uint16')"
        )
    if not array.flags.c_contiguous:
        raise DataError(f"{path}: is not in C order; save np.ascontiguousarray(ids)")
    return array


def dataset_fingerprint(path: str | Path, tokens: Tokens) -> dict[str, Any]:
    """Return what identifies a token file and is cheap to compute: its name, length, type and a sha256.

    The sha256 covers 64 blocks of 4,096 token IDs, spread evenly from the first to the last.
    """
    digest = hashlib.sha256()
    last_start = max(0, len(tokens) - FINGERPRINT_BLOCK_TOKENS)
    for start in np.linspace(0, last_start, FINGERPRINT_BLOCKS).astype(np.int64):
        block = tokens[start : start + FINGERPRINT_BLOCK_TOKENS]
        digest.update(np.ascontiguousarray(block).tobytes())
    return {"file": Path(path).name, "tokens": len(tokens), "dtype": str(tokens.dtype), "sha256": digest.hexdigest()}


def _id_range(path: Path, tokens: Tokens) -> tuple[int, int]:
    """Return the smallest and the largest token ID, (0, -1) for an empty file.

    The file is scanned once. FILE.range.json keeps the result with the file's fingerprint and modification time, and
    is ignored when they differ or when it cannot be read.
    """
    if not len(tokens):
        return 0, -1
    cache_path = path.with_name(path.name + ".range.json")
    key = {**dataset_fingerprint(path, tokens), "mtime": path.stat().st_mtime}
    try:
        cached = read_json_dict(cache_path)
        match cached.get("range"):
            case [int(smallest), int(largest)] if cached.get("key") == key:
                return smallest, largest
    except (OSError, ValueError):
        pass  # no usable cache: scan
    blocks = [tokens[start : start + _SCAN_BLOCK_TOKENS] for start in range(0, len(tokens), _SCAN_BLOCK_TOKENS)]
    id_range = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
    with contextlib.suppress(OSError):  # in a read-only data folder each start scans again; nothing else is lost
        write_atomically(cache_path, {"key": key, "range": id_range})
    return id_range


def num_windows(tokens: Tokens, context_len: int, name: str = "the token file") -> int:
    """Return how many windows of context_len tokens, with the token after each, there are: n - context_len.

    name: what the error message calls the file.
    Errors: DataError saying how many tokens are missing, if there is no window.
    """
    if problem := missing_tokens(len(tokens), context_len):
        raise DataError(f"{name}: {problem}")
    return len(tokens) - context_len


def torch_compatible_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which torch can hold the values of `dtype`.

    torch has no kernels for unsigned types of more than 8 bits, and no types of a foreign byte order.
    """
    wider_signed = {"u2": np.int32, "u4": np.int64, "u8": np.int64}
    return np.dtype(wider_signed.get(dtype.str[1:], dtype.newbyteorder("=")))


def read_windows(tokens: Tokens, starts: npt.NDArray[np.integer[Any]], context_len: int) -> Tensor:
    """Read the windows that begin at `starts` [n], with the token after each: [n, context_len + 1] on the CPU.

    The tensor has the type that `torch_compatible_dtype` returns for the type of the file.
    """
    rows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context_len + 1)[starts]
    return torch.from_numpy(rows.astype(torch_compatible_dtype(rows.dtype), copy=False))
