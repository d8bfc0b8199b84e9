"""Find and read files by URL, through fsspec: in ranges, ahead, and again after an interruption.

A read that fails is repeated from its first byte that is missing, after a check that the file is still the same.
Nothing here repeats what a URL says besides its path, because the rest may be a password or a signature. Must not know
what files contain.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tinytrain_dist.data.preparation.remote_errors import error_of, may_pass, shown
from tinytrain_dist.errors import DataError

Result = TypeVar("Result")

# Seconds between the tries of a read. The first contact with a server is tried less often, because then a wrong
# address is likely.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
FIRST_RETRY_SECONDS = (0.5, 1.0)
# A file is read in ranges that grow, so that a look at its beginning costs little.
_MIN_RANGE_BYTES, _FIRST_RANGE_BYTES, _MAX_RANGE_BYTES = 1 << 16, 1 << 18, 8 << 20
_EXTRA_OF_PROTOCOL = {"s3": "tinytrain_dist[s3]", "s3a": "tinytrain_dist[s3]", "gs": "gcsfs", "gcs": "gcsfs"}
_EXTRA_OF_PROTOCOL |= {"http": "tinytrain_dist[s3]", "https": "tinytrain_dist[s3]", "abfs": "adlfs", "az": "adlfs"}
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_PROTOCOLS_WITH_BUCKETS = ("s3", "s3a", "gs", "gcs")


@dataclass(frozen=True)
class RemoteFacts:
    """What a server says about a file. size: None if it does not say. tag: changes when the content does."""

    size: int | None
    tag: str
    has_ranges: bool


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it. Errors: DataError."""
    protocol = url.partition("://")[0].lower()
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise _missing_library_error(url, "tinytrain_dist[s3]") from error
    try:
        system, path = url_to_fs(url, **_options(protocol, conf))
    except ImportError as error:
        raise _missing_library_error(url, _EXTRA_OF_PROTOCOL.get(protocol)) from error
    except ValueError as error:
        raise DataError(f"{shown(url)}: the protocol {protocol!r} is not known; check the URL") from error
    except OSError as error:  # some file systems, such as that of ftp, connect at once
        raise error_of(url, error) from error
    if not path and protocol in _PROTOCOLS_WITH_BUCKETS:
        raise DataError(f"{shown(url)}: names no bucket; give {protocol}://BUCKET/PATH")
    if hasattr(system, "retries"):  # s3fs repeats five times, on top of botocore and of `with_retries`
        system.retries = 1
    return system, path


def _options(protocol: str, configured: dict[str, Any]) -> dict[str, Any]:
    """Return options that leave repeating a failed read to `with_retries`: botocore would repeat it five times more."""
    if protocol not in ("s3", "s3a") or "config_kwargs" in configured.get("s3", {}):
        return {}
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}}}


def _missing_library_error(url: str, package: str | None) -> DataError:
    remedy = f"pip install '{package}'" if package else "install the package of fsspec for this protocol"
    return DataError(f"{shown(url)}: needs a library that is not installed; {remedy}")


def find_remote(url: str, wanted: Callable[[str], bool]) -> list[str] | None:
    """Return the URLs of the files that a URL names: one, those of a folder that are wanted, or those of a glob.

    Returns None if it names a folder or a glob without such files. Errors: DataError if there is nothing, or no access.
    """
    system, path = file_system(url)
    is_web = url.lower().startswith(("http://", "https://"))
    if "*" in path or (not is_web and re.search(r"[?\[]", path)):
        found = with_retries(url, lambda: system.glob(path), FIRST_RETRY_SECONDS)
        if not found and url.lower().startswith(tuple(f"{name}://" for name in _PROTOCOLS_WITH_BUCKETS)):
            _check_bucket(url, system, path)
        return [system.unstrip_protocol(match) for match in sorted(found)] or None
    if is_web:
        return _find_on_web_server(url, system, path, wanted)
    if with_retries(url, lambda: system.info(path)["type"], FIRST_RETRY_SECONDS) == "file":
        return [url]
    below = with_retries(url, lambda: system.find(path), FIRST_RETRY_SECONDS)
    names = [name for name in sorted(below) if not re.search(r"/[.][^/]*", name[len(path) :]) and wanted(name)]
    return [system.unstrip_protocol(name) for name in names] or None


def _find_on_web_server(url: str, system: Any, path: str, wanted: Callable[[str], bool]) -> list[str] | None:
    """Return the URL itself, or those of the wanted files of a folder that the server lists on a page."""
    info = with_retries(url, lambda: dict(system.info(path)), FIRST_RETRY_SECONDS)
    place = str(info.get("url") or url)  # with the slash to which servers redirect
    if "?" in url or not place.endswith("/") or info.get("mimetype") not in _PAGE_TYPES:
        return [url]
    # Not `find`, which would also follow links out of the folder, such as that to the folder above.
    found = with_retries(url, lambda: system.glob(f"{path.rstrip('/')}/*"), FIRST_RETRY_SECONDS)
    return [name for name in sorted(found) if not os.path.basename(name).startswith(".") and wanted(name)] or None


def _check_bucket(url: str, system: Any, path: str) -> None:
    """Check that the bucket of a glob exists, because a glob in a missing one is only empty. Errors: DataError."""
    bucket = path.partition("/")[0]
    try:
        system.info(bucket)
    except FileNotFoundError:
        raise DataError(f"{shown(url)}: there is no bucket {bucket!r}; check the URL") from None
    except Exception:  # it may be forbidden to ask about the bucket
        return


def read_small_file(url: str) -> bytes | None:
    """Return the content of a small file, or None if there is none. Errors: DataError."""
    system, path = file_system(url)

    def read() -> bytes | None:
        try:
            return bytes(system.cat_file(path))
        except FileNotFoundError:
            return None

    return with_retries(url, read, FIRST_RETRY_SECONDS)


def remote_facts(url: str) -> RemoteFacts:
    """Ask the server about a file. Errors: DataError."""
    system, path = file_system(url)

    def ask() -> dict[str, Any]:
        system.invalidate_cache()  # the listing of a folder may be old
        return dict(system.info(path))

    info = with_retries(url, ask, FIRST_RETRY_SECONDS)
    tags = [info.get(name) for name in ("ETag", "etag", "generation", "md5", "blob_id", "LastModified", "mtime")]
    size = info.get("size")
    is_web = url.lower().startswith(("http://", "https://"))
    has_ranges = size is not None and (not is_web or bool(info.get("partial")))
    return RemoteFacts(size, str(next((tag for tag in tags if tag), "")), has_ranges)


def with_retries(
    url: str,
    work: Callable[[], Result],
    waits: tuple[float, ...] | None = None,
    given_up: threading.Event | None = None,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Return what `work` returns, and repeat it after errors that may pass. Errors: DataError.

    waits: seconds before each repetition. given_up: ends the waiting. check: called before each repetition.
    """
    waits = RETRY_SECONDS if waits is None else waits
    given_up = given_up or threading.Event()
    for wait in (*waits, None):
        try:
            return work()
        except DataError:
            raise
        except Exception as error:
            if wait is None or given_up.is_set() or not may_pass(error):
                raise error_of(url, error, len(waits) + 1 if wait is None else 1) from error
        given_up.wait(wait)
        check()
    raise AssertionError


class RemoteFile(io.RawIOBase):
    """A file on a server that is read like one on disk, with at most two ranges of 8 MB in memory.

    Where the server gives no ranges, a read that is not the next one begins again at the start of the file.
    """

    def __init__(self, url: str) -> None:
        """Open a file. Errors: DataError."""
        self.url = url
        self.facts = remote_facts(url)
        self._system, self._path = file_system(url)
        self._position = 0
        self._range: tuple[int, bytes] = (0, b"")  # offset and content
        self._range_bytes = _FIRST_RANGE_BYTES
        self._ahead: tuple[int, int, Future[bytes]] | None = None  # offset, size, content
        self._reader: ThreadPoolExecutor | None = None
        self._given_up = threading.Event()
        self._stream: Any = None  # where the server gives no ranges
        self._stream_position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte to be read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the offset of the next byte to be read. Errors: DataError where the end is not known."""
        if whence == os.SEEK_END and self.facts.size is None:
            raise DataError(f"{shown(self.url)}: the server does not say the size of the file; download it first")
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.facts.size or 0}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes; fewer only at the end of the file. Errors: DataError."""
        parts, missing = [], size if size >= 0 else None
        while missing is None or missing > 0:
            part = self._next_part(missing)
            if not part:
                break
            parts.append(part)
            self._position += len(part)
            missing = None if missing is None else missing - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readall(self) -> bytes:
        """Return all that is left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, and return how many bytes were read."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """End the reading ahead."""
        self._given_up.set()
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)
        self._close_stream()
        super().close()

    def _next_part(self, most: int | None) -> bytes:
        """Return some bytes from the position on; none at the end."""
        start, content = self._range
        if not start <= self._position < start + len(content):
            size = self.facts.size
            if size is not None and self._position >= size:
                return b""
            follows = self._position == start + len(content)
            self._range = start, content = self._position, self._load(follows)
        begin = self._position - start
        return content[begin : len(content) if most is None else begin + most]

    def _load(self, follows: bool) -> bytes:
        """Return a range that begins at the position. follows: it begins where the last one ended."""
        ahead, self._ahead = self._ahead, None
        offset = self._position
        self._range_bytes = min(2 * self._range_bytes, _MAX_RANGE_BYTES) if follows else _FIRST_RANGE_BYTES
        size = self._range_bytes
        if ahead is not None and ahead[0] == offset:
            content = ahead[2].result()
        elif ahead is not None:
            ahead[2].cancel()
            content = self._fetch(offset, size)
        else:
            content = self._fetch(offset, size)
        end = offset + len(content)
        if follows and self.facts.size is not None and end < self.facts.size:
            self._reader = self._reader or ThreadPoolExecutor(1, "remote-file")
            self._ahead = (end, size, self._reader.submit(self._fetch, end, size))
        return content

    def _fetch(self, start: int, size: int) -> bytes:
        """Return a range of the file, of at most `size` bytes. Errors: DataError.

        After a failure it requests a smaller range, which can succeed over connections that break after few bytes.
        """
        get = self._range_of_server if self.facts.has_ranges else self._range_of_stream

        def get_or_ask_for_less() -> bytes:
            nonlocal size
            end = start + size if self.facts.size is None else min(start + size, self.facts.size)
            try:
                return get(start, end)
            except Exception:
                size = max(size // 2, _MIN_RANGE_BYTES)
                self._range_bytes = size
                raise

        return with_retries(self.url, get_or_ask_for_less, given_up=self._given_up, check=self._check_unchanged)

    def _range_of_server(self, start: int, end: int) -> bytes:
        content = bytes(self._system.cat_file(self._path, start=start, end=end))
        if len(content) != end - start:
            raise ConnectionError(f"the server gave {len(content)} of {end - start} bytes")
        return content

    def _range_of_stream(self, start: int, end: int) -> bytes:
        try:
            if self._stream is None or self._stream_position > start:
                self._close_stream()
                self._stream, self._stream_position = self._system.open(self._path, "rb", block_size=0), 0
            for size in _pieces(start - self._stream_position):  # after an interruption: what was read before
                self._read_stream(size)
            content = b"".join([self._read_stream(size) for size in _pieces(end - start)])
            if self.facts.size is not None and len(content) != end - start:
                raise ConnectionError(f"the server gave {len(content)} of {end - start} bytes")
        except Exception:
            self._close_stream()
            raise
        return content

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):
                stream.close()

    def _read_stream(self, size: int) -> bytes:
        parts = []
        while size and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
            self._stream_position += len(part)
        return b"".join(parts)

    def _check_unchanged(self) -> None:
        """Compare the file with what it was when it was opened. Errors: DataError."""
        now = remote_facts(self.url)
        if (now.size, now.tag) != (self.facts.size, self.facts.tag):
            raise DataError(
                f"{shown(self.url)}: changed while it was read (before: {_words(self.facts)}; now: {_words(now)}); "
                "run again when nothing writes to it"
            )


def _words(facts: RemoteFacts) -> str:
    return f"{facts.size if facts.size is not None else 'unknown number of'} bytes, tag {facts.tag or 'unknown'}"


def _pieces(size: int) -> Iterator[int]:
    """Yield sizes of at most a megabyte that add up to `size`."""
    for start in range(0, size, 1 << 20):
        yield min(1 << 20, size - start)
