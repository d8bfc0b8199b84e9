"""Windows with their marks: the tokens of training, where documents begin, and which targets count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.token_files import save_tokens
from tinytrain_dist.data.statistics.blocks import Documents
from tinytrain_dist.data.statistics.windows import consecutive_windows, drawn_windows, training_windows
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.data.window_sampling import EVAL_STREAM

LENGTH, CONTEXT = 90, 8
STARTS = [0, 3, 4, 20, 31, 33, 60, 75]
MASK = np.arange(LENGTH) % 5 != 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file in which each token ID is its position, with documents and a mask."""
    save_tokens(tmp_path / "t.npy", np.arange(LENGTH))
    np.save(tmp_path / "t.documents.npy", np.array(STARTS))
    np.save(tmp_path / "t.mask.npy", MASK)
    return tmp_path / "t.npy"


@pytest.mark.parametrize("shuffle_batch", [None, 3])
@pytest.mark.parametrize("loss_mask", [False, True])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_marks_are_those_of_training(
    path: Path, shuffle_batch: int | None, loss_mask: bool, document_mask: bool, packed: bool
) -> None:
    options: dict[str, Any] = {"loss_mask": loss_mask, "document_mask": document_mask, "packed": packed}
    dataset = TokenDataset([str(path)], CONTEXT, shuffle_batch=shuffle_batch, **options)
    documents = [Documents(source, None) for source in dataset.sources]
    for step in range(6):
        windows = training_windows(dataset, documents, 5, step, [2, 0])
        expected = dataset.training_windows(5, step, [2, 0])
        assert [window.slot for window in windows] == [2, 0]
        for row, window in enumerate(windows):
            used = len(window.tokens)
            assert window.tokens == expected.tokens[row, :used].tolist()
            assert used + window.padding == CONTEXT + 1
            assert window.place == f"t.npy:{window.tokens[0]}"
            assert [window.tokens[at] in STARTS for at in range(used)] == window.begins.tolist()
            counted = np.ones(CONTEXT, np.bool_) if expected.counted is None else expected.counted[row].numpy()
            assert window.counted.tolist() == [False, *counted[: used - 1].tolist()]
            assert not counted[used - 1 :].any()
            pieces = {0} if not packed else {at for at in range(used) if at in (0, *_jumps(window.tokens))}
            assert set(np.flatnonzero(window.continues)) == {at for at in pieces if not window.begins[at]}


def _jumps(tokens: list[int]) -> list[int]:
    return [at for at in range(1, len(tokens)) if tokens[at] != tokens[at - 1] + 1]


def test_drawn_windows_are_those_of_an_evaluation(path: Path) -> None:
    for packed in (False, True):
        dataset = TokenDataset([str(path)], CONTEXT, packed=packed)
        found = drawn_windows(dataset, Documents(dataset.sources[0], None), 20)
        expected = dataset.read(*dataset.draw(0, 0, range(20), EVAL_STREAM)).tokens.numpy()
        assert (found.windows.tokens == expected).all()
        assert found.in_source is None
        for row, used in enumerate(found.windows.used.tolist()):
            for at in range(used):
                assert found.position(row, at) == expected[row, at]
                is_start = expected[row, at] in STARTS or at == 0 or expected[row, at] != expected[row, at - 1] + 1
                assert found.windows.begins[row, at] == is_start


@pytest.mark.parametrize(("context_len", "windows"), [(8, 12), (89, 1), (88, 2), (200, 1)])
def test_consecutive_windows_are_the_whole_source(path: Path, context_len: int, windows: int) -> None:
    source = TokenSource(str(path))
    found = consecutive_windows(source, Documents(source, None), context_len, 1000)
    assert found.in_source == windows == len(found.pieces)
    targets = [token for row, used in zip(*found.windows[::2], strict=True) for token in row[1:used].tolist()]
    assert targets == list(range(1, LENGTH))
    assert set(found.windows.tokens[found.windows.begins].tolist()) == set(STARTS)


def test_some_of_many_windows(path: Path) -> None:
    source = TokenSource(str(path))
    found = consecutive_windows(source, Documents(source, None), CONTEXT, 4)
    assert found.in_source == 12
    assert found.windows.tokens[:, 0].tolist() == [0, 24, 56, 88]
    assert found.windows.used.tolist() == [9, 9, 9, 2]


def test_a_source_without_tokens_has_no_window(tmp_path: Path) -> None:
    source = TokenSource(str(save_tokens(tmp_path / "t.npy", [])))
    assert consecutive_windows(source, Documents(source, None), CONTEXT, 4).windows.tokens.shape == (0, CONTEXT + 1)
    one = TokenSource(str(save_tokens(tmp_path / "u.npy", [3])))
    assert consecutive_windows(one, Documents(one, None), CONTEXT, 4).windows.used.tolist() == [1]
