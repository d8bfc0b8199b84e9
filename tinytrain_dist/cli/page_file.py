"""Write an HTML page to a path that a user gave, and replace nothing but an earlier page of the same kind.

Must not know what is on the page.
"""

from __future__ import annotations

from pathlib import Path

from tinytrain_dist.cli.arguments import UsageError
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.regular_files import NotAFileError, open_regular

MARK_BYTES = 1000  # the mark of a page is in its first bytes


def check_page_path(path: Path, option: str, verb: str, mark: str, kind: str) -> None:
    """Check that there is no file at `path` but an earlier page.

    option: the name of the option that gave the path. mark: what only such pages have in their first lines. kind: such
    a page in words. Errors: TinytrainError.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--{option}: {path} is not the name of a page; it must end in .html", verb)
    try:
        with open_regular(path) as file:
            start = file.read(MARK_BYTES)
    except FileNotFoundError:
        return
    except NotAFileError as error:
        raise TinytrainError(f"{option}: {error}; give another path with --{option}") from None
    except OSError as error:
        raise _not_writable(path, option, error) from None
    if mark.encode() not in start:
        raise TinytrainError(
            f"{option}: {path} exists and is not {kind} (it has no {mark}), so it is not replaced; give another path "
            f"with --{option}, or delete it"
        )


def write_page(path: Path, option: str, page: str) -> None:
    """Write a page; make its folder if there is none. Errors: TinytrainError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise _not_writable(path, option, error) from None


def _not_writable(path: Path, option: str, error: OSError) -> TinytrainError:
    return TinytrainError(f"{option}: {path} cannot be written ({error.strerror}); give another path with --{option}")
