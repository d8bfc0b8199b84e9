"""Read a source once, in blocks, with the positions at which its documents begin.

Must not know what is computed from the blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.open_files import FileStamp
from tinytrain_dist.data.token_file import Tokens
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.permissions import permission_problem

READ_TOKENS = 1 << 21  # in one read, because a slow file system answers few requests
# Arrays of 8 bytes for so many tokens stay in the caches of a core.
# measured (2-core x86 VM, 2026-11-28), hashing documents, tokens/s: 2^17 417 M, 2^20 216 M
BLOCK_TOKENS = 1 << 17


class Documents:
    """Where the documents of a source begin.

    That is recorded in files beside the tokens or in Megatron's index. Otherwise a document is assumed to begin after
    each end-of-text token. The first token of every file begins a document.
    """

    def __init__(self, source: TokenSource, eos_id: int | None) -> None:
        """Open what is recorded. eos_id: the end-of-text token (None: not known). Errors: DataError."""
        self.source = source
        self.recorded = source.open_documents()
        self.eos_id = None if self.recorded else eos_id

    @property
    def known(self) -> bool:
        """Whether documents can be told apart."""
        return self.recorded or self.eos_id is not None

    def starts(self, position: int, tokens: Tokens) -> npt.NDArray[np.int64]:
        """Return at which of these tokens, read from a position of the source, documents begin: ascending."""
        if self.recorded:
            return self.source.document_starts(position, len(tokens))
        # Modulo, because a window may continue with the first token of the source.
        files = (self.source.shard_starts[:-1] - position) % max(1, len(self.source))
        files = files[files < len(tokens)]
        if self.eos_id is None:
            return np.unique(files)
        after_end = np.flatnonzero(tokens[:-1] == self.eos_id) + 1
        first = [0] if len(tokens) and int(self.source.read(position - 1, 1)[0]) == self.eos_id else []
        return np.unique(np.concatenate([files, after_end, np.array(first, np.int64)])).astype(np.int64)


class Block(NamedTuple):
    """Some tokens of a source."""

    position: int  # of the first token in the source
    tokens: Tokens  # of this block, and then some of the next one
    size: int  # tokens of this block
    starts: npt.NDArray[np.int64]  # at which of all these tokens documents begin

    @property
    def own(self) -> Tokens:
        """The tokens of this block."""
        return self.tokens[: self.size]

    @property
    def own_starts(self) -> npt.NDArray[np.int64]:
        """At which of its own tokens documents begin."""
        return self.starts[: int(np.searchsorted(self.starts, self.size))]


def read_blocks(source: TokenSource, documents: Documents, further: int = 0) -> Iterator[Block]:
    """Yield the whole source in blocks. further: tokens of the next block that each one has at its end.

    Errors: DataError if a file cannot be read, or was changed meanwhile.
    """
    total = len(source)
    try:
        for first in range(0, total, READ_TOKENS):
            tokens = source.read(first, min(READ_TOKENS + further, total - first))
            starts = documents.starts(first, tokens)
            own = min(READ_TOKENS, total - first)
            for at in range(0, own, BLOCK_TOKENS):
                size = min(BLOCK_TOKENS, own - at)
                end = min(len(tokens), at + size + further)
                low, high = np.searchsorted(starts, [at, end])
                yield Block(first + at, tokens[at:end], size, starts[low:high] - at)
    except DataError:
        check_unchanged(source)  # its message says more, if that is the cause
        raise
    except OSError as error:
        problem = f"{source.entry}: cannot be read ({error}); restore the file, or correct the path"
        raise DataError(permission_problem(error) or problem) from None
    check_unchanged(source)


def check_unchanged(source: TokenSource) -> None:
    """Check that no file of a source was written since it was opened. Errors: DataError."""
    for number, path in enumerate(source.paths):
        try:
            now = FileStamp.of(os.stat(path))
        except OSError as error:
            raise DataError(f"{path}: was removed while it was read ({error.strerror}); start again") from None
        opened = source.shards[number].stamp
        if (now.size, now.modified) != (opened.size, opened.modified):
            raise DataError(f"{path}: was changed while it was read; start again when it is complete")
