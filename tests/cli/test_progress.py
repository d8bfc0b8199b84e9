"""Progress: a bar on a terminal, a bounded number of lines elsewhere, and nothing on stdout."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers.tools import Cli, newest
from tinytrain_dist.utils import progress
from tinytrain_dist.utils.progress import progress_bar, progress_lines, progress_text

COUNT = """
from tinytrain_dist.utils import progress
progress.LINE_SECONDS = progress.REFRESH_SECONDS = 0.0
with progress.progress_bar("pieces of work", 200) as advance:
    for _ in range(200):
        advance(1)
print("result")
"""


def test_a_terminal_gets_a_bar_and_stdout_only_the_result() -> None:
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", COUNT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(writer)
        shown = _read_terminal(reader)
        assert child.stdout is not None
        assert child.stdout.read() == b"result\n"
    assert "pieces of work" in shown
    assert "/200" in shown
    assert "about" not in shown, "lines are for files"
    assert child.returncode == 0


def _read_terminal(reader: int) -> str:
    """Return what is written to a pseudo-terminal until its other end is closed."""
    parts: list[bytes] = []
    with os.fdopen(reader, "rb", buffering=0) as file:
        while select.select([file], [], [], 120)[0]:
            try:
                part = file.read(4096)
            except OSError:  # Linux's end of file
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts).decode(errors="replace")


def test_elsewhere_lines_come_at_an_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar("windows", 10_000) as advance:
        for _ in range(10_000):
            now[0] += 0.01
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) in (9, 10), "100 seconds, a line every 10, none at the end"
    assert re.fullmatch(r"windows: 1,00\d of 10,000, about 90 s left", lines[0])
    with progress_bar("windows", 10, shown=False) as advance:
        now[0] += 1000
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_threads_may_share_a_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines: list[str] = []
    advance = progress_lines("bytes", 4001e6, lines.append, "bytes")
    threads = [threading.Thread(target=lambda: [advance(1e6) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines[-1].startswith("bytes: 4,000 of 4,001 MB") or len(lines) == 4000
    assert max(int(re.findall(r"([\d,]+) of", line)[0].replace(",", "")) for line in lines) == 4000


def test_nothing_done_yet_has_no_time_left() -> None:
    assert progress_text("loading", 0, 5e6, 3.0, "bytes") == "loading: 0 of 5 MB"


def test_the_rate_and_the_time_left_are_those_of_this_run() -> None:
    text = progress_text("encoding", 300e6, 500e6, 10.0, "bytes", before=200e6)
    assert text == "encoding: 300 of 500 MB, 10.0 MB/s, about 20 s left"


@pytest.mark.parametrize("verb", ["verify", "hash", "export", "ls"])
def test_verbs_show_their_progress(
    tinytrain: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    checkpoint = newest(run)
    export = [tmp_path / "out", "--no-check"]
    options = {"verify": [], "hash": ["--recompute"], "export": export, "ls": ["--full"]}[verb]
    code, out, err = tinytrain(verb, checkpoint, *options)
    assert code == 0
    what = {"hash": "hashing", "export": "exporting weights"}.get(verb, f"verifying {checkpoint.name}")
    assert re.search(rf"^{what}: \d+ of \d+ MB, [\d,.]+ MB/s, about \d+ s left$", err, re.MULTILINE)
    assert " MB/s, about" not in out


def test_prune_shows_its_progress(tinytrain: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    for step in (1, 2):
        (run / "checkpoints" / f"checkpoint-{step:08d}.damaged").mkdir()
    code, _, err = tinytrain("prune", run, "--keep-last", 10, "--set-aside")
    assert code == 0
    assert err.count("removing checkpoints: 1 of 2, about ") == 1
