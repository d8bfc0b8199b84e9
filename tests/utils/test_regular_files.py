"""Check that only regular files are opened, because opening or reading others may never end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tinytrain_dist.utils import regular_files
from tinytrain_dist.utils.regular_files import NotAFileError


def make(path: Path, kind: str) -> Path:
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is at most 107 bytes long
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a socket", "a device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "x", kind)
    for read in (regular_files.read_text, regular_files.open_regular, regular_files.check_regular):
        with pytest.raises(NotAFileError, match=f"x is {kind}, not a regular file$"):
            read(path)


def test_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xc3\xa9\xff")
    (tmp_path / "link").symlink_to("x")
    assert regular_files.read_text(tmp_path / "link", errors="replace") == "é\ufffd"
    with regular_files.open_regular(tmp_path / "link") as file:
        assert file.read() == b"\xc3\xa9\xff"
    with pytest.raises(FileNotFoundError):
        regular_files.read_text(tmp_path / "none")
