"""Check output in shards: what is in them, and that an interrupted run continues to the same bytes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.killed_prepare import kill_after
from tests.helpers.prepared_text import STORIES, content, run_prepare, story
from tinytrain_dist.data.preparation import encoding, planning, token_writer
from tinytrain_dist.data.preparation.encoding import Part
from tinytrain_dist.data.preparation.output_folder import WorkFolder
from tinytrain_dist.data.preparation.token_writer import TokenWriter
from tinytrain_dist.errors import DataError

SHARD = 700  # tokens


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 500)  # several commits


def joined(folder: Path, side: str) -> tuple[list[int], list[int]]:
    """The tokens of all shards, and the positions in them at which documents begin."""
    ids: list[int] = []
    starts: list[int] = []
    for path in sorted(folder.glob(f"{side}-?????.npy")):
        documents = np.load(path.with_suffix(".documents.npy"))
        assert documents[0] == 0, "a document is never cut at the end of a shard"
        starts += (documents + len(ids)).tolist()
        ids += np.load(path).tolist()
    return ids, starts


def test_shards_hold_the_tokens_of_the_single_files(corpus: Path, tmp_path: Path) -> None:
    run_prepare(corpus, tmp_path / "one", val_fraction=0.3)
    meta = run_prepare(corpus, tmp_path / "many", val_fraction=0.3, shard_tokens=SHARD)
    for side in ("train", "val"):
        ids, starts = joined(tmp_path / "many", side)
        assert ids == np.load(tmp_path / "one" / f"{side}.npy").tolist()
        assert starts == np.load(tmp_path / "one" / f"{side}.documents.npy").tolist()
        assert meta[f"{side}_tokens"] == len(ids)
        assert meta[f"{side}_shards"] == len(list((tmp_path / "many").glob(f"{side}-?????.npy"))) > 2
    names = set(content(tmp_path / "many"))
    assert set(meta["digests"]) == names - {"meta.json", "tokenizer_config.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one", "stories.txt"]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=8),
    shard=st.integers(1, 20),
    stop=st.integers(0, 8),
)
def test_shards_are_full_whole_and_the_same_after_an_interruption(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], shard: int, stop: int
) -> None:
    parts = [Part(np.arange(sum(lengths), dtype="<u2"), np.array(lengths, np.int64), 0) for lengths in sizes]

    def write(interrupted: bool) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("work") / "data"
        folder.mkdir()
        writer = TokenWriter(folder, "train", "<u2", shard)
        for number, part in enumerate(parts):
            if interrupted and number == stop:
                state = writer.commit()
                for lost in parts[number:]:
                    writer.append(lost)  # written, but not committed
                writer.__exit__()
                writer = TokenWriter(folder, "train", "<u2", shard, json.loads(json.dumps(state)))
            writer.append(part)
        assert set(writer.finish()) == set(content(folder)) if any(map(sum, sizes)) else True
        return content(folder)

    files = write(False)
    documents = [length for lengths in sizes for length in lengths]
    names = sorted(name for name in files if "documents" not in name)
    assert files == {name: data for name, data in write(True).items() if name in files}
    expected: list[list[int]] = []
    for length in documents:  # greedily, one after the other
        if not expected or sum(expected[-1]) + length > shard:
            expected.append([])
        expected[-1].append(length)
    assert [len(files[name]) - 128 for name in names] == [2 * sum(lengths) for lengths in expected]


@pytest.mark.multiprocess
def test_a_killed_run_continues_after_its_last_commit_to_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.tables import write_arrow, write_parquet

    sources = (corpus, write_parquet(tmp_path / "a.parquet"), write_arrow(tmp_path / "b.arrow", stream=True))
    options = {"shard_tokens": SHARD, "val_fraction": 0.3, "max_document_bytes": 5000}
    names = tuple(map(str, sources))
    run_prepare(names, tmp_path / "whole", **options)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    for commits in (4, 14, 14):  # in the text, in a row group, and in the stream of batches
        kill_after(commits, out, names, **options)
    assert not out.exists()
    assert partial.is_dir()
    monkeypatch.setattr(planning, "scan_documents", lambda *_: pytest.fail("the first reading was repeated"))
    encoded: list[int] = []
    encode = encoding.BatchEncoder.__call__
    monkeypatch.setattr(
        encoding.BatchEncoder, "__call__", lambda self, batch: encoded.append(len(batch)) or encode(self, batch)
    )
    capsys.readouterr()
    run_prepare(names, out, **options)
    assert f"resuming the work in {partial} after " in capsys.readouterr().err
    assert content(out) == content(tmp_path / "whole")
    assert 0 < sum(encoded) < STORIES, "most documents were encoded before"
    assert not partial.exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), SystemExit(143)]
)
def test_a_run_that_fails_keeps_what_it_committed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    options = {"shard_tokens": SHARD, "val_fraction": 0.3}
    run_prepare(corpus, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        _fail_in_commit(patch, 3, error)
        expected = DataError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught:
            run_prepare(corpus, tmp_path / "out", **options)
    if isinstance(error, OSError):
        assert "No space left on device; the work so far is kept in" in str(caught.value)
        assert "MB are free now" in str(caught.value)
    if isinstance(error, KeyboardInterrupt):
        assert "run the same command again to continue it" in caught.value.args[0]
    assert not (tmp_path / "out").exists()
    run_prepare(corpus, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def _fail_in_commit(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    commit, count = TokenWriter.commit, [0]

    def fail(self: TokenWriter) -> dict[str, int]:
        count[0] += 1
        if count[0] > number:
            raise error
        return commit(self)

    patch.setattr(token_writer.TokenWriter, "commit", fail)


def test_work_of_another_command_is_refused_or_deleted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(out: Path, **options: Any) -> None:
        with monkeypatch.context() as patch:
            _fail_in_commit(patch, 3, OSError(errno.EIO, "error"))
            with pytest.raises(DataError):
                run_prepare(corpus, out, shard_tokens=SHARD, **options)

    out = tmp_path / "out"
    interrupt(out)
    with pytest.raises(DataError, match=r"unfinished work of a tinytrain prepare with text_field = 'text' and not 'b'"):
        run_prepare(corpus, out, shard_tokens=SHARD, text_field="b")
    with corpus.open("a") as file:
        file.write(f"<|endoftext|>{story(999)}")
    with pytest.raises(DataError, match=r"with other files, or with other content in .*stories\.txt; repeat that comm"):
        run_prepare(corpus, out, shard_tokens=SHARD)
    assert (tmp_path / ".out.partial" / "plan.json").exists()
    run_prepare(corpus, out, shard_tokens=SHARD, overwrite=True)
    run_prepare(corpus, tmp_path / "whole", shard_tokens=SHARD)
    assert content(out) == content(tmp_path / "whole")
    interrupt(out, overwrite=True)  # the old data set stays until the new one is complete
    assert content(out) == content(tmp_path / "whole")
    run_prepare(corpus, out, shard_tokens=SHARD, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.txt", "whole"]


def test_two_processes_cannot_continue_the_same_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = WorkFolder.commit

    def start_another(self: WorkFolder, progress: dict[str, Any]) -> None:
        monkeypatch.setattr(WorkFolder, "commit", commit)
        with pytest.raises(DataError, match="another tinytrain prepare is writing it; wait for it, or stop it"):
            run_prepare(corpus, tmp_path / "out", shard_tokens=SHARD)
        commit(self, progress)

    monkeypatch.setattr(WorkFolder, "commit", start_another)
    run_prepare(corpus, tmp_path / "out", shard_tokens=SHARD)
    assert (tmp_path / "out" / "meta.json").exists()


def test_a_failure_before_the_first_commit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        run_prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=SHARD)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
