"""Detect the format of a token file, and where in it the token IDs lie.

Formats:

* .npy with numpy's header;
* Megatron: X.bin, described by X.idx (see `megatron_index.py`);
* llm.c and modded-nanogpt: .bin with a header of 256 int32;
* headerless: token IDs and nothing else, as in nanoGPT's .bin and OLMo's .npy. Their type must be stated.

Must not know torch, so that a login node can check files quickly.
"""

from __future__ import annotations

import codecs
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinytrain_dist.data.megatron_index import is_megatron_index, read_megatron_index
from tinytrain_dist.data.npy_files import check_npy_file
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.permissions import permission_problem
from tinytrain_dist.utils.regular_files import NotAFileError, check_regular

STATED_TYPES = ("uint16", "uint32", "int32")  # values of token_dtype
LLM_C_HEADER_BYTES = 1024
LLM_C_TYPES = {20240520: "<u2", 20240801: "<u4"}  # by the first int32 of the file
LLM_C_VERSIONS = {20240520: (1,), 20240801: (1, 7)}  # the second int32; llm.c writes 7 for Llama 3
_GUESSED_TOKENS = 4096  # read to say which types a headerless file cannot have
# How files begin that `tinytrain prepare` reads, besides text.
_MARKS_OF_TEXT = {
    b"\x1f\x8b": "a compressed file",
    b"BZh": "a compressed file",
    b"\xfd7zXZ\0": "a compressed file",
    b"\x28\xb5\x2f\xfd": "a compressed file",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
}
_REMEDY = "make it again with `tinytrain prepare`"


class Layout(NamedTuple):
    """Where the token IDs of a file lie."""

    format: str  # "npy", "Megatron", "llm.c" or "headerless"
    dtype: np.dtype[Any]
    offset: int  # of the first token ID, in bytes
    tokens: int


def find_layout(path: Path, token_dtype: str | None = None, vocab_size: int | None = None) -> Layout:
    """Return the layout of a token file, from its first bytes, its size and its index alone.

    token_dtype: the type of token IDs in a file without a header. vocab_size: helps to name the type if it is not set.
    Errors: DataError naming the file, what it holds and what to do.
    """
    try:
        check_regular(path)
        layout = _read_layout(path, token_dtype, vocab_size)
    except FileNotFoundError as error:
        if error.filename is not None and Path(error.filename) != path:
            raise DataError(f"{path}: cannot be read ({error}); restore it") from None
        raise DataError(f"{path}: no such token file; make one with `tinytrain prepare` or correct the path") from None
    except NotAFileError as error:
        raise DataError(f"{error}; give a token file made by `tinytrain prepare`") from None
    except OSError as error:
        problem = f"{path}: cannot be read ({error}); restore it, or correct the path"
        raise DataError(permission_problem(error) or problem) from None
    return layout


def check_stated_type(files: Sequence[tuple[str | Path, Layout]], token_dtype: str | None) -> None:
    """Check that token_dtype does not contradict the headers of all files of a source.

    files: path and layout of each. If one has no header, token_dtype is meant for it. Errors: DataError.
    """
    if token_dtype is None or any(layout.format == "headerless" for _, layout in files):
        return
    for path, layout in files:
        if token_dtype != layout.dtype.name:
            raise DataError(
                f"{path}: holds {layout.dtype.name} by its {layout.format} header, but token_dtype is {token_dtype}; "
                "leave token_dtype out, which is only for files without a header"
            )


def _read_layout(path: Path, token_dtype: str | None, vocab_size: int | None) -> Layout:
    with open(path, "rb") as file:
        head = file.read(LLM_C_HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        return _npy_layout(path)
    if is_megatron_index(head):
        raise DataError(f"{path}: is a Megatron index and holds no tokens; give the .bin file beside it")
    index_path = path.with_suffix(".idx")
    if path.suffix == ".bin" and index_path.exists():
        index = read_megatron_index(index_path, size)
        return Layout("Megatron", index.dtype, 0, index.tokens)
    if magic := _llm_c_magic(head):
        return _llm_c_layout(path, head, size, magic)
    if token_dtype is None:
        raise DataError(_headerless_problem(path, size, vocab_size))
    dtype = np.dtype(token_dtype).newbyteorder("<")
    if size % dtype.itemsize:
        if size % 2:
            raise DataError(
                f"{path}: has {size:,} bytes, an odd number, so it was perhaps cut short: token IDs have 2 or 4 bytes; "
                "make or copy it again"
            )
        raise DataError(
            f"{path}: has {size:,} bytes, which is no multiple of the {dtype.itemsize} of token_dtype {token_dtype}; "
            "set token_dtype to uint16 if that is the type, or make the file again"
        )
    return Layout("headerless", dtype, 0, size // dtype.itemsize)


def _npy_layout(path: Path) -> Layout:
    try:
        header = check_npy_file(path)
    except ValueError as error:
        raise DataError(f"{path}: not a readable .npy file ({error}); {_REMEDY}") from None
    if len(header.shape) != 1 or header.dtype.kind not in "ui":
        raise DataError(
            f"{path}: holds {len(header.shape)}-D {header.dtype}, but a token file is a 1-D array of integers; "
            "save ids.astype('uint16')"
        )
    return Layout("npy", header.dtype, header.offset, header.shape[0])


def _llm_c_magic(head: bytes) -> int:
    """Return the magic number of an llm.c header, or 0 if the bytes do not begin with one."""
    if len(head) < LLM_C_HEADER_BYTES:
        return 0
    magic = int(np.frombuffer(head, "<i4", 1)[0])
    # The numbers behind the count are 0 in every such file. Token IDs do not look like this.
    return magic if magic in LLM_C_TYPES and not any(head[12:]) else 0


def _llm_c_layout(path: Path, head: bytes, size: int, magic: int) -> Layout:
    version = int(np.frombuffer(head, "<i4", 2)[1])
    if version not in LLM_C_VERSIONS[magic]:
        known = " and ".join(map(str, LLM_C_VERSIONS[magic]))
        raise DataError(
            f"{path}: its llm.c header has version {version}, but only {known} of {magic} is known here; write the "
            "file again with llm.c's own scripts"
        )
    dtype, tokens = np.dtype(LLM_C_TYPES[magic]), int(np.frombuffer(head, "<u4", 3)[2])
    found = size - LLM_C_HEADER_BYTES
    if found != tokens * dtype.itemsize:
        raise DataError(
            f"{path}: has {found:,} bytes of tokens, but its llm.c header says {tokens:,} tokens of {dtype.itemsize} "
            "bytes; copy or make it again"
        )
    return Layout("llm.c", dtype, LLM_C_HEADER_BYTES, tokens)


def _headerless_problem(path: Path, size: int, vocab_size: int | None) -> str:
    """Return why a file without a header cannot be used unless token_dtype is set."""
    possible = _possible_types(path, size, vocab_size)
    if size and path.suffix not in (".npy", ".npz"):
        if path.suffix != ".bin" and (kind := _kind_of_text(path)):
            return (
                f"{path}: is {kind} and holds no token IDs; make token files of it with `tinytrain prepare "
                f"{shlex.quote(str(path))} --out FOLDER`, and give that folder"
            )
        return (
            f"{path}: has no header that names the type of its token IDs; if it holds token IDs and nothing else, set "
            f"token_dtype to their type ({possible}){_index_hint(path)}"
        )
    try:
        check_npy_file(path)
    except ValueError as error:
        refused = f"{path}: not a readable .npy file ({error}); {_REMEDY}"
    if not size or path.suffix == ".npz":
        return refused
    return f"{refused}, or, if it holds token IDs and nothing else, set token_dtype to their type ({possible})"


def _index_hint(path: Path) -> str:
    """Return what else to do with a file that may be Megatron's; "" for others."""
    index = path.with_suffix(".idx")
    return f"; if Megatron has written it, restore {index.name} beside it" if path.suffix == ".bin" else ""


def _kind_of_text(path: Path) -> str:
    """Return what a file that `tinytrain prepare` may read is, by its first bytes; "" for anything else."""
    with open(path, "rb") as file:
        head = file.read(_GUESSED_TOKENS)
    if kind := next((name for mark, name in _MARKS_OF_TEXT.items() if head.startswith(mark)), ""):
        return kind
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return ""
    return "text" if text and all(letter >= " " or letter in "\t\n\r\f" for letter in text) else ""


def _possible_types(path: Path, size: int, vocab_size: int | None) -> str:
    """Return which values of token_dtype the size and the first token IDs allow, and why not the others."""
    with open(path, "rb") as file:
        head = file.read(4 * _GUESSED_TOKENS)
    possible, of_other_size, reasons = [], [], []
    for name in STATED_TYPES:
        dtype = np.dtype(name).newbyteorder("<")
        ids = np.frombuffer(head, dtype, len(head) // dtype.itemsize)
        if size % dtype.itemsize:
            of_other_size.append(name)
        elif vocab_size is not None and len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            reasons.append(f"not {name}, which gives the id {wrong}, outside vocab_size {vocab_size}")
        else:
            possible.append(name)
    if size % 2:
        return f"none is possible, because the size of {size:,} bytes is odd, so the file was perhaps cut short"
    if of_other_size:
        multiple = f"because the size of {size:,} bytes is no multiple of 4"
        reasons.append(f"not {' or '.join(of_other_size)}, {multiple}")
    return "; ".join([f"possible: {', '.join(possible)}" if possible else "none is possible", *reasons])
