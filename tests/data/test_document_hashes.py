"""Hashes of documents, and exact duplicates among them, against a dictionary of all documents."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tinytrain_dist.data import document_hashes
from tinytrain_dist.data.document_hashes import (
    DocumentHasher,
    DocumentTable,
    HashedDocuments,
    RepeatedDocument,
    count_duplicates,
    count_shared,
)
from tinytrain_dist.errors import DataError

Documents = list[tuple[int, ...]]


def random_documents(seed: int, count: int = 400) -> Documents:
    """Return documents of 1 to 4 tokens of 3 IDs, so that many of them are the same."""
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, 3, draw.integers(1, 5)).tolist()) for _ in range(count)]


def hash_all(documents: Documents, block: int, dtype: str = "uint16") -> HashedDocuments:
    """Hash documents that follow each other, in blocks of so many tokens."""
    tokens = np.array([token for document in documents for token in document], dtype)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    hasher, parts = DocumentHasher(), []
    for first in range(0, len(tokens), block):
        in_block = starts[(starts >= first) & (starts < first + block)] - first
        parts.append(hasher.add(first, tokens[first : first + block], in_block))
    parts.append(hasher.finish())
    return HashedDocuments(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@pytest.mark.parametrize("block", [1, 2, 7, 10_000])
def test_documents_have_the_same_hash_if_they_are_the_same(block: int) -> None:
    documents = random_documents(0)
    found = hash_all(documents, block)
    assert found.lengths.tolist() == list(map(len, documents))
    assert found.positions.tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()
    hashes = list(zip(found.high.tolist(), found.low.tolist(), strict=True))
    assert len(set(zip(hashes, documents, strict=True))) == len(set(hashes)) == len(set(documents)) > 50
    for words in (found.high, found.low):  # each of the two words alone tells so few documents apart
        assert len(set(words.tolist())) == len(set(documents))


def test_a_hash_does_not_depend_on_the_type_or_on_blocks() -> None:
    documents = [*random_documents(1), (65_535, 0, 65_535)]
    expected = hash_all(documents, 10_000)
    for dtype, block in itertools.product(["uint16", "int32", "uint32", "int64", ">u4"], [3, 10_000]):
        for part, other in zip(expected, hash_all(documents, block, dtype), strict=True):
            assert (part == other).all()


def test_order_and_zeros_matter() -> None:
    found = hash_all([(0,), (0, 0), (1, 0), (0, 1), (1,), (2, 1), (1, 2), (1 << 31, 1)], 100, "int64")
    assert len(set(zip(found.high.tolist(), found.low.tolist(), strict=True))) == 8


def table_of(documents: Documents, rows_in_memory: int, batch: int = 17) -> DocumentTable:
    found = hash_all(documents, 1000)
    table = DocumentTable(rows_in_memory)
    for first in range(0, len(documents), batch):
        table.add(HashedDocuments(*(part[first : first + batch] for part in found)))
    return table


@pytest.mark.parametrize(("rows_in_memory", "spills"), [(10**6, False), (40, True), (1, True)])
def test_duplicates_are_those_of_a_dictionary(rows_in_memory: int, spills: bool) -> None:
    documents, others = random_documents(2), random_documents(3, 90)
    counts = Counter(documents)
    positions = dict(
        zip(reversed(documents), reversed(np.cumsum([0, *map(len, documents)])[:-1].tolist()), strict=True)
    )
    repeated = [(count, positions[each], len(each)) for each, count in counts.items() if count > 1]
    most = sorted(repeated, key=lambda each: (-each[0], each[1]))[:5]
    with table_of(documents, rows_in_memory) as table, table_of(others, rows_in_memory) as other:
        for _ in range(2):  # the table can be read again
            found = count_duplicates(table)
            assert found.documents == len(documents)
            assert found.repeats == len(documents) - len(counts) > 100
            assert found.repeated_tokens == sum((count - 1) * length for count, _, length in repeated)
            assert found.most_copies == [RepeatedDocument(*each) for each in most]
        assert table.spilled == spills
        shared = [document for document in others if document in counts]
        assert count_shared(table, other) == (len(shared), sum(map(len, shared)))
        assert 0 < len(shared) < len(others)


def test_spilled_rows_are_removed_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_hashes.tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0

    def fail() -> None:
        with table_of(random_documents(4), 10):
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_temporary_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(document_hashes.tempfile, "tempdir", str(tmp_path / "file"))
    message = (
        r"file: cannot be written \(Not a directory\), and the hashes of 17 documents .* need up to 680 bytes .*TMPDIR"
    )
    with pytest.raises(DataError, match=message):
        table_of(random_documents(4), 10)


def test_many_copies_of_few_documents_need_no_disk() -> None:
    with table_of([(1,), (2, 2)] * 500, 100) as table:
        assert not table.spilled
        assert count_duplicates(table).most_copies == [RepeatedDocument(500, 0, 1), RepeatedDocument(500, 1, 2)]


def test_no_documents() -> None:
    with DocumentTable() as table:
        assert count_duplicates(table) == (0, 0, 0, [])
        assert count_shared(table, table) == (0, 0)
