"""Several shards as one stream: reading across their ends, files beside them, the manifest, and open files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.threads import TIMEOUT_SECONDS, call_in_time
from tests.helpers.token_files import save_llm_c, save_tokens
from tinytrain_dist.data import open_files, parallel_reads, shard_manifest, token_source
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.token_file import dataset_fingerprint
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import DataError

LENGTHS = [7, 40, 0, 3, 25]
STREAM = np.arange(sum(LENGTHS))
ENDS = np.cumsum(LENGTHS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five shards of several formats and types; each token ID is its position in the source."""
    parts = np.split(STREAM, ENDS[:-1])
    for number, (part, dtype) in enumerate(zip(parts, ["uint16", "int32", "uint16", "int64", "uint16"], strict=True)):
        save_tokens(tmp_path / f"t-{number}.npy", part, dtype)
    (tmp_path / "t-4.npy").unlink()
    save_llm_c(tmp_path / "t-4.bin", parts[4])
    return tmp_path


# --- reading -------------------------------------------------------------------------------------------------------


def test_shards_of_any_format_are_one_ring(corpus: Path) -> None:
    source = TokenSource(str(corpus), vocab_size=75)
    assert (len(source), source.dtype) == (75, np.int64)
    for position, length in [(0, 75), (5, 45), (46, 2), (70, 20), (74, 160), (75, 3)]:
        assert source.read(position, length).tolist() == np.resize(np.roll(STREAM, -position), length).tolist()


def test_random_windows_lie_within_a_shard_and_all_of_them_are_drawn(corpus: Path) -> None:
    dataset = TokenDataset([f"{corpus}/t-*"], 4)
    assert dataset.windows == [3 + 36 + 21]
    sources, positions = dataset.draw(0, 0, range(3000))
    assert not sources.any()
    ends = [0, 7, 47, 47, 50, 75]
    allowed = {start for first, end in itertools.pairwise(ends) for start in range(first, end - 4)}
    assert set(positions.tolist()) == allowed
    windows = dataset.read(sources, positions)
    assert windows.tokens.tolist() == (positions[:, None] + np.arange(5)).tolist()
    assert windows.counted is windows.documents is None
    slots = [int(np.flatnonzero(positions == start)[0]) for start in (2, 7, 50)]
    assert [dataset.places(0, 0, [slot])[0] for slot in slots] == ["t-0.npy:2", "t-1.npy:0", "t-4.bin:0"]


def test_a_source_without_a_window_is_an_error(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"t-\*: the longest of its 5 files has 40 tokens, but context_len 40 needs"):
        TokenDataset([f"{corpus}/t-*"], 40)


def test_an_id_outside_the_vocabulary_names_the_shard(corpus: Path) -> None:
    for _ in range(2):  # also when the range comes from the manifest
        with pytest.raises(DataError, match=r"t-1\.npy: holds token id 46, but vocab_size 40"):
            TokenSource(f"{corpus}/t-*", vocab_size=40)


# --- fingerprint and manifest --------------------------------------------------------------------------------------


def test_a_single_file_keeps_the_fingerprint_of_older_checkpoints(corpus: Path) -> None:
    path = corpus / "t-1.npy"
    expected = dataset_fingerprint(path, np.load(path))
    assert TokenSource(str(path)).fingerprint == expected
    assert TokenSource(f"{corpus}/*-1.npy").fingerprint == expected


def test_several_shards_have_one_small_fingerprint_of_all_of_them(corpus: Path) -> None:
    fingerprint = TokenSource(str(corpus)).fingerprint
    assert fingerprint | {"sha256": ""} == {
        "file": "t-0.npy .. t-4.bin",
        "shards": 5,
        "tokens": 75,
        "dtype": "int32, int64, uint16",
        "sha256": "",
    }
    assert TokenSource(f"{corpus}/t-*").fingerprint == fingerprint
    (corpus / "t-1.npy").rename(corpus / "t-1b.npy")
    assert TokenSource(str(corpus)).fingerprint != fingerprint
    (corpus / "t-1b.npy").rename(corpus / "t-1.npy")
    assert TokenSource(str(corpus)).fingerprint == fingerprint


@pytest.fixture
def read_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each shard that is read at a start, as if 10 seconds after its last change."""
    names: list[str] = []
    plain = shard_manifest._read_shard

    def read(path: str, *rest: object) -> object:
        names.append(os.path.basename(path))
        row = plain(path, *rest)  # type: ignore[arg-type]
        return row[0], row[1] + 10**10, *row[2:]

    monkeypatch.setattr(shard_manifest, "_read_shard", read)
    return names


def test_shards_are_read_once_and_again_if_they_change(corpus: Path, read_shards: list[str]) -> None:
    first = TokenSource(str(corpus), vocab_size=75).fingerprint
    assert len(read_shards) == 5
    read_shards.clear()
    assert TokenSource(str(corpus), vocab_size=75).fingerprint == first
    assert read_shards == []
    path = corpus / "t-1.npy"
    status = path.stat()
    save_tokens(path, np.load(path)[::-1], "int32")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and modification time
    assert TokenSource(str(corpus), vocab_size=75).fingerprint != first
    assert read_shards == ["t-1.npy"]


def test_a_shard_that_changed_just_before_it_was_read_is_not_trusted(corpus: Path) -> None:
    TokenSource(str(corpus))
    (manifest,) = corpus.glob("shards-*.range.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"sha256": ["0"] * 5}))
    assert TokenSource(str(corpus)).fingerprint == TokenSource(f"{corpus}/t-*").fingerprint
    assert json.loads(manifest.read_text())["sha256"] == content["sha256"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "stamps": [1], "read_at": ["x"]}', "null", "{" * 9]
)
def test_a_damaged_manifest_is_ignored_and_written_again(corpus: Path, read_shards: list[str], text: str) -> None:
    first = TokenSource(str(corpus)).fingerprint
    (manifest,) = corpus.glob("shards-*.range.json")
    good = manifest.read_text()
    manifest.write_text(text)
    assert TokenSource(str(corpus)).fingerprint == first
    assert len(read_shards) == 10
    assert set(json.loads(manifest.read_text())) == set(json.loads(good))


def test_a_folder_that_cannot_be_written_has_its_manifest_in_the_cache_folder(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, read_shards: list[str]
) -> None:
    cache, plain = tmp_path_factory.mktemp("cache"), shard_manifest.write_atomically

    def refuse(path: Path, value: object) -> None:
        if path.parent == corpus:
            raise PermissionError(13, "Permission denied")
        plain(path, value)

    monkeypatch.setattr(shard_manifest, "write_atomically", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for _ in range(2):
        TokenSource(str(corpus))
    assert len(read_shards) == 5
    assert len(list((cache / "tinytrain_dist").glob("shards-*.range.json"))) == 1


# --- files that change during a run --------------------------------------------------------------------------------


def test_a_shard_that_changes_after_the_start_is_an_error_when_it_is_opened(corpus: Path) -> None:
    source = TokenSource(str(corpus))
    path = corpus / "t-1.npy"
    content = path.read_bytes()
    path.write_bytes(content)  # the same again: copied back
    assert source.read(10, 3).tolist() == [10, 11, 12]
    source = TokenSource(str(corpus))
    path.write_bytes(content[:-4] + b"\1\0\0\0")
    with pytest.raises(DataError, match=r"t-1\.npy: was changed since the run began"):
        source.read(10, 3)
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"t-1\.npy: has become shorter since the run began"):
        source.read(10, 3)
    path.unlink()
    with pytest.raises(DataError, match=r"t-1\.npy: was removed since the run began"):
        source.read(10, 3)


MANY_SHARDS = """
import os, resource, sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
for number in range(300):
    np.save(folder / f"t-{number:03d}.npy", np.full(9, number, np.uint16))
    np.save(folder / f"t-{number:03d}.mask.npy", np.full(9, number % 2, np.uint8))
from tinytrain_dist.data.token_dataset import TokenDataset
before = len(os.listdir("/dev/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
dataset = TokenDataset([str(folder)], 8)
assert dataset.sources[0].open_masks()
sources, positions = dataset.draw(0, 0, range(2000))
dataset._seconds_per_read = 1.0  # in several threads
assert dataset.read(sources, positions).tokens[:, 0].tolist() == (positions // 9).tolist()
assert [dataset.sources[0].read_mask(9 * n, 9).sum() for n in range(300)] == [9 * (n % 2) for n in range(300)]
assert len(os.listdir("/dev/fd")) < 64
del dataset
assert len(os.listdir("/dev/fd")) == before, "the files of a data set are closed with it"
"""


def test_300_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    code = [sys.executable, "-c", MANY_SHARDS, str(tmp_path)]
    done = subprocess.run(code, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr


# --- slow file systems ---------------------------------------------------------------------------------------------


def test_windows_of_a_step_are_read_at_the_same_time_where_reads_are_slow(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = TokenDataset([str(corpus)], 4)
    drawn = dataset.draw(0, 0, range(8))
    expected = dataset.read(*drawn).tokens
    together, plain = threading.Barrier(8), parallel_reads.read_at

    def read_at(*args: object) -> int:
        together.wait(TIMEOUT_SECONDS)  # each read waits until eight have begun
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(token_source, "read_at", read_at)
    dataset._seconds_per_read = 1.0
    assert call_in_time(dataset.read, *drawn).tokens.equal(expected)


def test_a_file_stays_open_while_a_read_of_it_waits(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plain = TokenSource(str(corpus)), parallel_reads.read_at

    def read_at(*args: object) -> int:
        monkeypatch.setattr(token_source, "read_at", plain)
        for number in range(300):  # meanwhile, others open so many files that this one is closed
            open_files.OPEN_FILES.keep((None, number), open_files.OpenFile(f"{corpus}/t-0.npy"))
        open_files.OPEN_FILES.forget(None)
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(token_source, "read_at", read_at)
    assert source.read(10, 30).tolist() == list(range(10, 40))


def test_the_first_error_of_parallel_reads_is_raised_after_all_have_ended() -> None:
    ended = []

    def read(number: int) -> int:
        ended.append(number)
        if number in (3, 5):
            raise OSError(5, f"read {number}")
        return number

    pool = parallel_reads.ReaderPool(4)
    with pytest.raises(OSError, match="read 3"):
        call_in_time(pool.map, read, range(9))
    assert sorted(ended) == list(range(9))
    assert call_in_time(pool.map, abs, range(-5, 0)) == [5, 4, 3, 2, 1]


# --- files beside shards -------------------------------------------------------------------------------------------


def test_masks_and_document_starts_are_read_across_shards(corpus: Path) -> None:
    counted, starts = STREAM % 3 == 0, []
    for path, first, length in zip(sorted(corpus.iterdir()), ENDS - LENGTHS, LENGTHS, strict=True):
        np.save(corpus / f"{path.stem}.mask.npy", counted[first : first + length].astype(np.uint8))
        documents = np.arange(0, length, 5)
        np.save(corpus / f"{path.stem}.documents.npy", documents)
        starts += (documents + first).tolist()
    source = TokenSource(str(corpus))
    assert source.open_masks()
    assert source.open_documents()
    for position, length in [(0, 75), (5, 45), (70, 20), (48, 0)]:
        around = (position + np.arange(length)) % 75
        assert source.read_mask(position, length).tolist() == counted[around].tolist()
        expected = [offset for offset, token in enumerate(around.tolist()) if token in starts]
        assert source.document_starts(position, length).tolist() == expected


def test_many_document_starts_are_found_by_pages(tmp_path: Path) -> None:
    starts = np.cumsum(np.random.default_rng(0).integers(1, 9, 20_000)) - 1
    starts -= starts[0]
    tokens = int(starts[-1]) + 5
    save_tokens(tmp_path / "t.npy", np.zeros(tokens))
    np.save(tmp_path / "t.documents.npy", starts)
    source = TokenSource(str(tmp_path / "t.npy"))
    assert source.open_documents()
    edges = [int(starts[number]) for number in (0, 4095, 4096, 4097, 8192, 19_999)]
    for first in [edge + shift for edge in edges for shift in (-1, 0, 1) if edge + shift >= 0]:
        for length in (1, 2, 40, 30_000):
            last = min(first + length, tokens)
            expected = starts[(starts >= first) & (starts < last)] - first
            assert source.document_starts(first, last - first).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("ending", "content", "expected"),
    [
        ("mask", np.ones(6, np.uint8), r"t\.mask\.npy: has 6 values, but .*t\.npy has 7 tokens"),
        ("mask", np.ones(7, np.float32), r"t\.mask\.npy: holds 1-D float32, but a mask is"),
        ("mask", np.zeros(7, np.uint8), r"t\.mask\.npy: no value is 1, so no token counts as a target; write a 1"),
        ("mask", np.zeros(7, bool), r"t\.mask\.npy: no value is 1"),
        ("mask", np.full(7, 255, np.uint8), r"t\.mask\.npy: has the value 255 at position 0, but a mask holds only"),
        ("mask", np.array([0, 0, 3, 1, 2, 1, 1], np.uint8).view(bool), r"has the value 3 at position 2"),
        ("documents", np.arange(7), "every token begins a document, so there is no document of two tokens"),
        ("documents", np.array([0.0, 3.0]), "holds 1-D float64, but document starts are"),
        ("documents", np.array([0, 2**63], np.uint64), r"less than 7 \(number 1 is -9223372036854775808\)"),
        ("documents", np.array([0, 3, 2]), r"ascending positions from 0 to less than 7 \(number 2 is 2\)"),
        ("documents", np.array([1, 3]), r"ascending positions from 0 to less than 7 \(number 0 is 1\)"),
        ("documents", np.array([0, 7]), r"ascending positions from 0 to less than 7 \(number 1 is 7\)"),
        ("documents", np.array([0, 3, 3]), r"ascending positions from 0 to less than 7 \(number 2 is 3\)"),
        ("documents", np.zeros((2, 2), np.int64), r"holds 2-D int64, but document starts are"),
        ("documents", np.zeros(0, np.int64), r"t\.documents\.npy: is empty, but .* has 7 tokens"),
    ],
)
def test_a_file_beside_a_shard_that_does_not_fit_is_refused(
    tmp_path: Path, ending: str, content: np.ndarray, expected: str
) -> None:
    source = TokenSource(str(save_tokens(tmp_path / "t.npy", range(7))))
    np.save(tmp_path / f"t.{ending}.npy", content)

    with pytest.raises(DataError, match=expected):
        source.open_masks() if ending == "mask" else source.open_documents()


def save_masks(corpus: Path, values: Callable[[int, int], np.ndarray]) -> TokenSource:
    """Save values(number, length) as the mask of each shard."""
    for number, length in enumerate(LENGTHS):
        np.save(corpus / f"t-{number}.mask.npy", values(number, length).astype(np.uint8))
    return TokenSource(str(corpus))


def test_some_mask_of_a_source_must_count_a_token(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save_masks(corpus, lambda number, length: np.full(length, number == len(LENGTHS) - 1)).open_masks()
    nothing = save_masks(corpus, lambda _, length: np.zeros(length))
    with pytest.raises(DataError, match=rf"^{corpus}, all {len(LENGTHS)} mask files: no value is 1, so no token"):
        nothing.open_masks()
    monkeypatch.setattr(token_source, "_MASK_CHECK_TOKENS", 20)
    assert nothing.open_masks(), "the rest of a large mask is not read at the start"


def test_a_wrong_value_in_a_mask_is_named_at_the_start_or_if_masks_are_large_when_its_window_is_read(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(number: int, length: int) -> np.ndarray:
        return np.where(np.arange(length) == length - 1, 7 if number == 3 else 1, 1)

    complaint = rf"t-3\.mask\.npy: has the value 7 at position {LENGTHS[3] - 1}, but a mask"
    source, end = save_masks(corpus, values), int(ENDS[3])
    with pytest.raises(DataError, match=complaint):
        source.open_masks()
    monkeypatch.setattr(token_source, "_CHECKED_MASK_TOKENS", 1)
    assert source.open_masks()
    assert source.read_mask(0, end - 1).all()
    with pytest.raises(DataError, match=complaint):
        source.read_mask(end - 4, 8)


def test_no_shard_or_all_of_them_have_files_beside_them(corpus: Path) -> None:
    source = TokenSource(str(corpus))
    assert not source.open_masks()
    assert not source.open_documents()
    np.save(corpus / "t-0.mask.npy", np.ones(7, bool))
    with pytest.raises(DataError, match=r"t-1\.npy: has no mask file \(.*t-1\.mask\.npy\), but other files"):
        TokenSource(str(corpus)).open_masks()
