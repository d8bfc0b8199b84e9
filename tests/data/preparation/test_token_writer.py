"""Check how token files are written: by any number of processes, and into a folder that appears complete."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from tests.helpers.prepared_text import content, run_prepare
from tinytrain_dist.data.preparation import encoding, token_writer
from tinytrain_dist.data.preparation import prepare as preparation
from tinytrain_dist.errors import DataError

# --- worker processes ------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_any_number_of_workers_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 500)  # many more batches than workers
    one, two, three = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for workers, out in ((1, one), (2, two), (3, three)):
        run_prepare(corpus, out, workers=workers)
    assert content(one) == content(two) == content(three)


@pytest.mark.multiprocess
def test_worker_processes_that_end_before_their_work_are_an_error() -> None:
    # The settings name no vocabulary, so each worker process ends at its start.
    with pytest.raises(DataError, match=r"one of 2 encoding processes was killed.*--workers"):
        list(encoding.encode_all([[b"a"]] * 3, ("no vocabulary", True, 0, "<u2"), 2))


# --- the output folder -----------------------------------------------------------------------------------------------


def test_existing_output_is_refused_then_replaced_with_overwrite(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder holds nothing to lose
    run_prepare(corpus, out)
    before = content(out)
    with pytest.raises(DataError, match=r"already exists; pass --overwrite"):
        run_prepare(corpus, out, vocab_size=300)
    assert content(out) == before
    (out / "train.npy.range.json").write_text("{}")
    assert run_prepare(corpus, out, vocab_size=300, overwrite=True)["vocab_size"] == 300
    tokens = ["train.documents.npy", "train.npy", "val.documents.npy", "val.npy"]
    assert sorted(content(out)) == ["meta.json", "tokenizer.json", "tokenizer_config.json", *tokens]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.txt"]


def test_overwrite_never_deletes_what_prepare_did_not_write(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains 'stories\.txt', which tinytrain prepare did not write"):
        run_prepare(corpus, tmp_path, overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        run_prepare(corpus, corpus, overwrite=True)
    assert corpus.stat().st_size > 0


def test_the_output_folder_appears_only_when_it_is_complete(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, bool]] = []  # name of a file, and whether the folder had appeared
    write = token_writer.write_file

    def record_and_write(path: Path, text: str) -> str:
        written.append((path.name, (tmp_path / "out").exists()))
        return write(path, text)

    monkeypatch.setattr(preparation, "write_file", record_and_write)
    run_prepare(corpus, tmp_path / "out")
    assert written == [("tokenizer.json", False), ("tokenizer_config.json", False), ("meta.json", False)]


def test_a_failure_between_the_two_renames_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, old = tmp_path / "out", tmp_path / ".out.old"
    run_prepare(corpus, out)
    before = content(out)
    rename = Path.rename

    def fail_for_new_folder(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            assert content(old) == before
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new_folder)
    with pytest.raises(DataError, match="Input/output error"):
        run_prepare(corpus, out, vocab_size=300, overwrite=True)
    assert content(out) == before
    monkeypatch.undo()
    out.rename(old)  # as after a power cut between the two renames
    with pytest.raises(DataError, match="already exists"):
        run_prepare(corpus, out)
    assert content(out) == before


def test_a_full_disk_is_an_error_and_nothing_is_left(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_want_of_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_writer, "_sync", fail_for_want_of_space)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device; .* \([\d,]+ MB are free now\)"):
        run_prepare(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["stories.txt"]


def test_a_refused_write_leaves_the_old_data_set(corpus: Path, tmp_path: Path) -> None:
    run_prepare(corpus, tmp_path / "out")
    before, limits = content(tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written: File too large"):
            run_prepare(corpus, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.txt"]
