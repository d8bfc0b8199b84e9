"""Keep a bounded number of files open for reading, the least recently used closed first.

Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections import OrderedDict
from typing import NamedTuple

from tinytrain_dist.utils.regular_files import open_regular

MOST_OPEN_FILES = 128
Key = tuple[object, object]


def share_of_files(part: int, most: int) -> int:
    """Return at most how many files to open at a time: a part of what this process may open now, and at most `most`."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if allowed == resource.RLIM_INFINITY else max(1, min(most, allowed // part))


class FileStamp(NamedTuple):
    """What changes when a file is written: its size in bytes, and when it was last changed, in nanoseconds."""

    size: int
    modified: int
    changed: int  # ctime: also set when a tool restores the modification time

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Return the stamp in the status of a file."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class OpenFile:
    """A file that is open for reading until the last reference to this object is gone.

    Hold the object, and not only its descriptor, for as long as a read takes.
    """

    def __init__(self, path: str) -> None:
        """Open the file. Errors: OSError."""
        self._file = open_regular(path)
        self.descriptor = self._file.fileno()
        if hasattr(os, "posix_fadvise"):
            # Windows lie anywhere in the file; see `load_token_dataset`.
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def stamp(self) -> FileStamp:
        """Return the present stamp of the file."""
        return FileStamp.of(os.fstat(self.descriptor))

    def __del__(self) -> None:
        """Close the file. A thread that still reads it holds a reference."""
        with contextlib.suppress(AttributeError, OSError):
            self._file.close()


class OpenFiles:
    """The files that are open, by their owner and what the owner calls them."""

    def __init__(self, limit: int | None = None) -> None:
        """Keep at most `limit` files open (None: 128, or a quarter of what this process may open if that is less)."""
        self.limit = limit
        self._files: OrderedDict[Key, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> OpenFile | None:
        """Return the file with this key if it is open."""
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
            return file

    def keep(self, key: Key, file: OpenFile) -> None:
        """Keep a file open, and close those that were not used for longest."""
        closed = []
        limit = self.limit or share_of_files(4, MOST_OPEN_FILES)
        with self._lock:
            self._files[key] = file
            while len(self._files) > limit:
                closed.append(self._files.popitem(last=False))
        del closed  # outside the lock, because closing may wait for a file system

    def forget(self, owner: object) -> None:
        """Close the files of one owner."""
        with self._lock:
            closed = [self._files.pop(key) for key in list(self._files) if key[0] is owner]
        del closed


OPEN_FILES = OpenFiles()  # of this process, for all data sets together
