"""Packed windows of a dataset: which tokens, documents and targets they have, in random and in shuffled order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.errors import DataError

CONTEXT_LEN = 16
# Each token ID tells its position in the source: 100, 101, ... in the first shard and 500, 501, ... in the second.
FIRST_IDS, LENGTHS = (100, 500), (200, 90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (first_id, length) in enumerate(zip(FIRST_IDS, LENGTHS, strict=True)):
        np.save(tmp_path / f"{number}.npy", np.arange(first_id, first_id + length, dtype=np.uint16))
        starts = np.random.default_rng(number).choice(np.arange(1, length), 20, replace=False)
        np.save(tmp_path / f"{number}.documents.npy", np.sort(np.append(starts, 0)))
    return tmp_path


def document_of_token(folder: Path) -> dict[int, tuple[int, int]]:
    """Return the document of each token ID, as (shard, number)."""
    documents = {}
    for shard, (first_id, length) in enumerate(zip(FIRST_IDS, LENGTHS, strict=True)):
        starts = np.load(folder / f"{shard}.documents.npy")
        for position in range(length):
            documents[first_id + position] = (shard, int(np.searchsorted(starts, position, side="right")))
    return documents


def test_an_epoch_of_packed_windows_has_each_target_once_within_its_document(folder: Path) -> None:
    dataset = TokenDataset([str(folder)], CONTEXT_LEN, packed=True, document_mask=True, shuffle_batch=4)
    windows = dataset.training_windows(3, 0, range(dataset.windows_per_epoch))
    assert windows.counted is not None
    assert windows.documents is not None
    document_of = document_of_token(folder)
    seen = []
    for row, counted, documents in zip(windows.tokens, windows.counted, windows.documents, strict=True):
        for position in np.flatnonzero(counted.numpy()):
            token, target = int(row[position]), int(row[position + 1])
            assert target == token + 1
            assert document_of[token] == document_of[target]
            seen.append(target)
        of_number: dict[int, set[object]] = {}
        for token, number in zip(row[:-1].tolist(), documents.tolist(), strict=True):
            of_number.setdefault(number, set()).add(document_of.get(token, "padding"))
        assert all(len(found) == 1 for found in of_number.values()), "tokens of two documents have one number"
    firsts = {document: token for token, document in reversed(document_of.items())}
    assert sorted(seen) == sorted(set(document_of) - set(firsts.values()))
    assert dataset.epochs(1) == pytest.approx(4 / dataset.windows_per_epoch)


def test_epochs_have_other_orders_and_random_windows_are_packed_ones(folder: Path) -> None:
    shuffled = TokenDataset([str(folder)], CONTEXT_LEN, packed=True, shuffle_batch=1)
    count = shuffled.windows_per_epoch
    first, second = (shuffled.draw(3, epoch * count, range(count))[1].tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    in_random_order = TokenDataset([str(folder)], CONTEXT_LEN, packed=True)
    windows = in_random_order.training_windows(3, 0, range(64))
    assert windows.documents is None
    packed = {tuple(row) for row in shuffled.training_windows(3, 0, range(count)).tokens.tolist()}
    assert {tuple(row) for row in windows.tokens.tolist()} <= packed
    assert in_random_order.places(3, 0, [0])[0].split(":")[0] in ("0.npy", "1.npy")


def test_a_mask_counts_in_packed_windows_too(folder: Path) -> None:
    for number, length in enumerate(LENGTHS):
        np.save(folder / f"{number}.mask.npy", (np.arange(length) % 3 == 0).astype(np.uint8))
    dataset = TokenDataset([str(folder)], CONTEXT_LEN, packed=True, loss_mask=True, shuffle_batch=4)
    windows = dataset.training_windows(3, 0, range(dataset.windows_per_epoch))
    assert windows.counted is not None
    targets = windows.tokens[:, 1:][windows.counted].tolist()
    document_of = document_of_token(folder)
    firsts = {document: token for token, document in reversed(document_of.items())}.values()
    marked = [token for token in document_of if (token - FIRST_IDS[token >= FIRST_IDS[1]]) % 3 == 0]
    assert sorted(targets) == sorted(set(marked) - set(firsts))


def test_packing_needs_documents_with_targets(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.uint16))
    with pytest.raises(DataError, match=r"packing = best_fit find where documents begin"):
        TokenDataset([str(tmp_path / "a.npy")], CONTEXT_LEN, packed=True)
    np.save(tmp_path / "a.documents.npy", np.arange(40))
    with pytest.raises(DataError, match="no document of two tokens"):
        TokenDataset([str(tmp_path / "a.npy")], CONTEXT_LEN, packed=True)
