"""The numbers of sources in several files and formats, against plain Python over all tokens."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.token_files import save_llm_c, save_megatron, save_tokens
from tinytrain_dist.data.document_hashes import DocumentTable, count_duplicates
from tinytrain_dist.data.statistics import blocks, corpus
from tinytrain_dist.data.statistics.blocks import Documents, read_blocks
from tinytrain_dist.data.statistics.corpus import TokenCounts, read_split
from tinytrain_dist.data.statistics.overlap import EvaluationWindows, NgramSearch
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import DataError

END = 1  # the token that ends a document


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test cross the ends of reads and blocks."""
    monkeypatch.setattr(blocks, "READ_TOKENS", 70)
    monkeypatch.setattr(blocks, "BLOCK_TOKENS", 16)


def documents_with_end(seed: int, count: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[*draw.integers(2, 5, draw.integers(0, 6)).tolist(), END] for _ in range(count)]


def write_shards(folder: Path, parts: list[list[list[int]]], recorded: bool) -> None:
    """Write each part as a file of another format and type, perhaps with document starts."""
    for number, part in enumerate(parts):
        ids = [token for document in part for token in document]
        path = folder / f"part-{number}.npy"
        if number == 1:
            path = save_llm_c(folder / "part-1.bin", ids)
        elif number == 2 and recorded:
            path = save_megatron(folder / "part-2", [np.array(document, np.uint16) for document in part])
        else:
            save_tokens(path, ids, ["uint16", "", "int64", "uint32"][number])
        if recorded and number != 2:
            starts = np.cumsum([0, *map(len, part)])[:-1]
            np.save(path.with_suffix("").with_suffix(".documents.npy"), starts)


@pytest.mark.parametrize("recorded", [True, False])
def test_all_numbers_are_those_of_plain_python(tmp_path: Path, recorded: bool) -> None:
    parts = [documents_with_end(number, count) for number, count in enumerate([30, 1, 40, 25])]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_shards(tmp_path / "a", parts, recorded)
    write_shards(tmp_path / "b", parts[:1], recorded)
    mask = np.random.default_rng(9).random(sum(map(len, parts[0]))) < 0.3
    np.save(tmp_path / "b" / "part-0.mask.npy", mask)
    sources = [TokenSource(str(tmp_path / name)) for name in "ab"]
    documents = [document for part in (*parts, parts[0]) for document in part]
    tokens = [token for document in documents for token in document]
    rows = np.array(tokens[:40] + [2] * 40).reshape(2, 40)
    search = NgramSearch(EvaluationWindows(rows, np.zeros((2, 40), np.bool_), np.array([40, 40])), 5)
    advanced: list[float] = []
    with DocumentTable(50) as table:
        found = read_split(
            sources, [Documents(each, END) for each in sources], TokenCounts(7), table, search, advanced.append
        )
        duplicates = count_duplicates(table)
        assert table.spilled
    assert sum(advanced) == found.tokens == len(tokens)
    assert found.counts.counts.tolist() == [Counter(tokens)[token] for token in range(7)]
    assert found.counts.most_frequent(2) == Counter(tokens).most_common(2)
    assert (found.counts.used, found.counts.unused(9)) == (4, [0, 5, 6])
    assert [source.documents_are for source in found.sources] == ["recorded" if recorded else "assumed"] * 2
    lengths = sorted(map(len, documents))
    assert found.lengths.documents == len(documents) == duplicates.documents
    assert found.lengths.percentiles([50, 99]) == np.percentile(lengths, [50, 99], method="inverted_cdf").tolist()
    distinct = Counter(map(tuple, documents))
    assert duplicates.repeats == len(documents) - len(distinct) > 40
    assert duplicates.repeated_tokens == sum((count - 1) * len(each) for each, count in distinct.items())
    first_positions = []
    for chosen in (sources[:1], sources[1:], sources[::-1]):
        with DocumentTable() as table:
            read_split(chosen, [Documents(each, END) for each in chosen], TokenCounts(7), table)
            first_positions.append(
                {tuple(row)[:2]: int(row["position"]) for rows in table.partitions() for row in rows}
            )
    of_first, of_second, together = first_positions
    assert together == {key: position + len(sources[1]) for key, position in of_first.items()} | of_second
    assert [source.counted_tokens for source in found.sources] == [None, mask.sum()]
    formats = ["llm.c uint16", *(["Megatron uint16"] if recorded else ["npy int64"]), "npy uint16", "npy uint32"]
    assert found.sources[0].formats == ", ".join(sorted(formats))
    ngrams = {tuple(each[at : at + 5]) for each in documents for at in range(len(each) - 4)}
    windows = [[tuple(row[at : at + 5]) for at in range(36)] for row in rows.tolist()]
    expected = [sum(ngram in ngrams for ngram in window) for window in windows]
    assert search.result(0, 2).found.tolist() == expected
    assert expected[0] > 0


def test_documents_that_are_not_known_are_not_guessed(tmp_path: Path) -> None:
    write_shards(tmp_path, [documents_with_end(0, 20)], recorded=False)
    source = TokenSource(str(tmp_path))
    with DocumentTable() as table:
        found = read_split([source], [Documents(source, None)], TokenCounts(None), table)
    assert not found.documents_known
    assert (found.lengths.documents, table.documents) == (0, 0)
    assert found.counts.counts.sum() == found.tokens


def test_empty_documents_and_files_of_no_or_one_token(tmp_path: Path) -> None:
    save_megatron(tmp_path / "m", [np.array(each, np.uint16) for each in ([], [3, 4], [], [], [3], [])])
    save_tokens(tmp_path / "none.npy", [])
    save_tokens(tmp_path / "one.npy", [7])
    for name, numbers in {"m.bin": (3, 2, 4), "none.npy": (0, 0, 0), "one.npy": (1, 1, 0)}.items():
        source = TokenSource(str(tmp_path / name))
        with DocumentTable() as table:
            found = read_split([source], [Documents(source, 5)], TokenCounts(10), table)
        assert (found.tokens, found.lengths.documents, found.sources[0].empty_documents) == numbers


def test_ids_outside_the_vocabulary_are_counted(tmp_path: Path) -> None:
    counts = TokenCounts(4)
    counts.add(np.array([3, 3, 0]), 0)
    counts.add(np.array([1, -2, 4, 1 << 40]), 3)
    assert counts.counts.tolist() == [1, 1, 0, 2]
    assert (counts.outside, counts.outside_example) == (3, (4, -2))
    assert counts.most_frequent(9) == [(3, 2), (0, 1), (1, 1)]


def test_ids_of_an_unknown_vocabulary_need_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST_COUNTED_IDS", 100)
    counts = TokenCounts(None)
    for tokens in ([5, 5], [60, 2], [99, 100, 4_000_000_000], []):
        counts.add(np.array(tokens, np.uint32), 0)
    assert (len(counts.counts), counts.outside, counts.used) == (100, 2, 4)
    assert counts.outside_example == (1, 100)


def test_a_document_begins_at_each_place_that_is_recorded_or_follows_an_end(tmp_path: Path) -> None:
    parts = [documents_with_end(number, 12) for number in range(2)]
    for name in ("recorded", "assumed"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, parts, recorded=name == "recorded")
        source = TokenSource(str(tmp_path / name))
        documents = Documents(source, END)
        assert documents.known
        assert documents.recorded == (name == "recorded")
        total = len(source)
        expected = np.cumsum([0, *(len(document) for part in parts for document in part)])[:-1]
        for first in range(0, total, 3):
            for length in (1, 4, 30):  # some of them continue with the first token of the source
                places = (expected - first) % total
                found = documents.starts(first, source.read(first, length))
                assert found.tolist() == sorted(places[places < length].tolist())


def test_blocks_are_the_whole_source_once(tmp_path: Path) -> None:
    write_shards(tmp_path, [documents_with_end(0, 60)], recorded=True)
    source = TokenSource(str(tmp_path))
    found = list(read_blocks(source, Documents(source, None), further=4))
    everything = source.read(0, len(source)).tolist()
    assert [token for block in found for token in block.own.tolist()] == everything
    starts = [block.position + start for block in found for start in block.own_starts.tolist()]
    assert starts == source.document_starts(0, len(source)).tolist()
    for block in found:
        end = min(block.position + block.size + 4, len(everything))
        assert block.tokens.tolist() == everything[block.position : end]
        assert [block.position + start for start in block.starts.tolist()] == [
            start for start in starts if block.position <= start < end
        ]


@pytest.mark.parametrize("change", ["append", "overwrite", "cut", "remove"])
def test_a_file_that_is_changed_while_it_is_read_is_an_error(tmp_path: Path, change: str) -> None:
    write_shards(tmp_path, [documents_with_end(0, 60)], recorded=True)
    path = tmp_path / "part-0.npy"
    source = TokenSource(str(path))
    blocks_of_file = read_blocks(source, Documents(source, None))
    next(blocks_of_file)
    data = path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        new = {"append": data + b"xx", "cut": data[:-100], "overwrite": data[:-2] + b"\x02\x00"}[change]
        with path.open("r+b") as file:  # the same file, also for a reader that has it open
            file.write(new)
            file.truncate(len(new))
        os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"part-0.npy: was (changed|removed) while it was read.*; start again"):
        list(blocks_of_file)


def test_thousands_of_shards(tmp_path: Path) -> None:
    for number in range(1500):
        save_tokens(tmp_path / f"s-{number:05}.npy", [2, 3, END] if number % 2 else [number % 5 + 2, END])
    source = TokenSource(str(tmp_path))
    with DocumentTable() as table:
        found = read_split([source], [Documents(source, END)], TokenCounts(7), table)
        assert count_duplicates(table).repeats == 1500 - 1 - 5
    assert (found.sources[0].files, found.lengths.documents, found.tokens) == (1500, 1500, 3750)
