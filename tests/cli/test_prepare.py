"""Check `tinytrain prepare` as a command: what it prints, and Ctrl-C."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.prepared_text import write_stories
from tinytrain_dist.cli.prepare import main
from tinytrain_dist.data.preparation import token_writer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 120 stories."""
    return write_stories(tmp_path / "stories.txt")


@pytest.fixture(autouse=True)
def _restore_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, which the command replaces."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


def test_the_command_prints_what_it_wrote_and_the_next_command(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([corpus.name, "--out", "my data", "--vocab_size", "300", "--workers", "1"]) == 0
    meta, printed = json.loads((tmp_path / "my data" / "meta.json").read_text()), capsys.readouterr().out
    assert f"{meta['train_tokens']:,} tokens, {meta['train_documents']:,} documents" in printed
    assert f"{meta['val_tokens']:,} tokens, {meta['val_documents']:,} documents" in printed
    assert "--train-data 'my data/train.npy' --val-data 'my data/val.npy'" in printed
    assert meta["sources"][0]["path"] == "stories.txt"


def test_ctrl_c_prints_no_traceback_and_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_writer.TokenWriter, "append", interrupt)
    assert main([str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "300", "--workers", "1"]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stories.txt"]
