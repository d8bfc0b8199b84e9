"""Check several token files as one dataset: which file and window a slot draws, reading them, and short names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.token_files import mapped_mib, needs_linux_memory_figures, save_sparse_tokens, save_tokens
from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.data.token_dataset import TokenDataset, short_names
from tinytrain_dist.data.token_file import read_windows
from tinytrain_dist.data.window_sampling import window_starts
from tinytrain_dist.errors import DataError

CONTEXT_LEN = 7
FIRST_IDS = [1000, 2000, 3000]  # of the three files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of 20, 50 and 100 windows; each token ID tells its file and its position in the file."""
    folder = tmp_path_factory.mktemp("files")
    lengths_and_types = [(27, "uint16"), (57, "uint32"), (107, "int64")]
    return [
        str(save_tokens(folder / f"{number}.npy", range(first_id, first_id + length), dtype))
        for number, (first_id, (length, dtype)) in enumerate(zip(FIRST_IDS, lengths_and_types, strict=True))
    ]


# --- the draw ------------------------------------------------------------------------------------------------------

PINNED_STARTS_OF_ONE_FILE = [[13, 7, 3, 9, 6], [3, 27, 3, 39, 36], [53, 27, 3, 89, 86]]
PINNED_FILES = [0, 2, 2, 1, 1, 1, 0, 1]
PINNED_STARTS = [13, 27, 3, 39, 33, 29, 12, 33]


def test_the_draw_from_one_file_is_that_of_window_starts_and_pinned(files: list[str]) -> None:
    slots = [0, 1, 2, 3, 10]
    starts_of_each = []
    for path in files:
        dataset = TokenDataset([path], CONTEXT_LEN)
        drawn_files, starts = dataset.draw(1, 2, slots)
        assert not drawn_files.any()
        assert starts.tolist() == window_starts(1, 2, slots, dataset.windows[0]).tolist()
        starts_of_each.append(starts.tolist())
    assert starts_of_each == PINNED_STARTS_OF_ONE_FILE, (
        "a run on one file, when resumed, would continue with other windows"
    )


def test_the_draw_from_several_files_is_pinned(files: list[str]) -> None:
    drawn_files, starts = TokenDataset(files, CONTEXT_LEN, weights=[0.2, 0.5, 0.3]).draw(1, 2, range(8))
    assert [drawn_files.tolist(), starts.tolist()] == [PINNED_FILES, PINNED_STARTS], (
        "a run on several files, when resumed, would continue with other windows: say so in CHANGELOG.md"
    )


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
    slots=st.lists(st.integers(0, 2**20), unique=True, min_size=1, max_size=12),
    weights=st.none() | st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
)
def test_file_and_window_of_a_slot_do_not_depend_on_other_slots(
    files: list[str], seed: int, step: int, slots: list[int], weights: list[float] | None
) -> None:
    dataset = TokenDataset(files, CONTEXT_LEN, weights=weights)
    alone = [tuple(int(part[0]) for part in dataset.draw(seed, step, [slot])) for slot in slots]
    together = zip(*(part.tolist() for part in dataset.draw(seed, step, slots)), strict=True)
    assert list(together) == alone
    assert all(0 <= start < dataset.windows[file] for file, start in alone)


def chi_square(counts: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    return float(((np.asarray(counts) - np.asarray(expected)) ** 2 / np.asarray(expected)).sum())


@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 0.1], [7.0, 2.0, 1.0], [1.0, 0.0, 3.0]])
def test_files_are_drawn_by_weight_and_the_windows_of_a_file_equally_often(
    files: list[str], weights: list[float] | None
) -> None:
    dataset, draws = TokenDataset(files, CONTEXT_LEN, weights=weights), 60_000
    drawn_files, starts = dataset.draw(3, 0, range(draws))
    shares = np.array(weights or dataset.windows) / sum(weights or dataset.windows)
    counts = np.bincount(drawn_files, minlength=3)
    assert (counts[shares == 0] == 0).all()
    used = shares > 0
    # 2 degrees of freedom: exceeded by one seed in 1,000, and this seed is fixed
    assert chi_square(counts[used], draws * shares[used]) < 13.8
    for file, windows in enumerate(dataset.windows):
        if shares[file]:
            counts_of_windows = np.bincount(starts[drawn_files == file], minlength=windows)
            assert len(counts_of_windows) == windows
            assert chi_square(counts_of_windows, counts[file] / windows) < windows + 4.5 * (2 * windows) ** 0.5


def test_the_window_does_not_depend_on_the_file(tmp_path: Path) -> None:
    paths = [str(save_tokens(tmp_path / f"{name}.npy", range(11))) for name in "ab"]
    drawn_files, starts = TokenDataset(paths, 1).draw(5, 0, range(40_000))
    table = np.histogram2d(drawn_files, starts, bins=(2, 10))[0]
    assert chi_square(table, np.full((2, 10), 2000)) < 43.8  # 19 degrees of freedom


# --- reading -------------------------------------------------------------------------------------------------------


def test_the_windows_that_are_drawn_are_read(files: list[str]) -> None:
    dataset = TokenDataset(files, CONTEXT_LEN)
    drawn_files, starts = dataset.draw(0, 0, range(50))
    assert set(drawn_files.tolist()) == {0, 1, 2}
    first_ids = (np.array(FIRST_IDS)[drawn_files] + starts)[:, None]
    assert dataset.read(drawn_files, starts).tokens.tolist() == (first_ids + np.arange(CONTEXT_LEN + 1)).tolist()


def test_one_file_is_read_as_read_windows_reads_it(files: list[str]) -> None:
    dataset = TokenDataset(files[:1], CONTEXT_LEN)
    drawn_files, starts = dataset.draw(0, 0, range(9))
    rows, expected = dataset.read(drawn_files, starts).tokens, read_windows(np.load(files[0]), starts, CONTEXT_LEN)
    assert rows.dtype == expected.dtype
    assert rows.equal(expected)


@needs_linux_memory_figures
def test_windows_of_a_large_file_leave_nothing_mapped_in_memory(tmp_path: Path) -> None:
    dataset = TokenDataset([str(save_sparse_tokens(tmp_path / "t.npy", 4_000_000_000))], 64)
    before = mapped_mib()
    for step in range(25):
        assert not dataset.read(*dataset.draw(0, step, range(40))).tokens.any()
    assert mapped_mib() - before < 4  # 1,000 windows of 8 GB would count 64 MiB if they were mapped


# --- errors and names ----------------------------------------------------------------------------------------------


def test_a_file_that_is_too_short_or_of_another_vocabulary_is_named(files: list[str], tmp_path: Path) -> None:
    short = str(save_tokens(tmp_path / "short.npy", range(CONTEXT_LEN)))
    with pytest.raises(DataError, match=r"short\.npy: has 7 tokens, but context_len 7 needs at least 8"):
        TokenDataset([files[0], short], CONTEXT_LEN)
    with pytest.raises(DataError, match=r"2\.npy: holds token id 3106, but vocab_size 3000"):
        TokenDataset(files, CONTEXT_LEN, vocab_size=3000)


def test_a_file_that_is_cut_short_during_training_is_named(tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", range(1000))
    dataset = TokenDataset([str(path)], CONTEXT_LEN)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"t\.npy: has become shorter since the run began"):
        dataset.read(np.array([0]), np.array([900]))


def test_places_name_file_and_token(files: list[str]) -> None:
    dataset = TokenDataset(files, CONTEXT_LEN)
    drawn_files, starts = dataset.draw(0, 4, [2, 9])
    assert dataset.places(0, 4, [2, 9]) == [
        f"{drawn_files[0]}.npy:{starts[0]}",
        f"{drawn_files[1]}.npy:{starts[1]}",
    ]


def test_short_names_are_what_tells_paths_apart() -> None:
    assert short_names([]) == []  # a run without val_data
    assert short_names(["x/train.npy"]) == ["train.npy"]
    assert short_names(["x/a/train.npy", "x/b/train.npy"]) == ["a/train.npy", "b/train.npy"]
    assert short_names(["/d/train.npy", "/d/b/train.npy"]) == ["train.npy", "b/train.npy"]
    assert short_names(["x/web/"]) == ["web"]
    assert short_names(["x/web/", "x/books"]) == ["web", "books"]


# --- shuffled windows and phases -----------------------------------------------------------------------------------


def test_shuffled_windows_cross_the_ends_of_shards_and_of_the_source(tmp_path: Path) -> None:
    """Every token of a source is a target once per epoch, after the token before it; also in shards below a window."""
    lengths, context_len = [20, 3, 40, 1], 9
    ends = np.cumsum(lengths)
    for number, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        np.save(tmp_path / f"{number}.npy", np.arange(end - length, end).astype("uint16"))
    dataset = TokenDataset([str(tmp_path)], context_len, shuffle_batch=4)
    assert dataset.windows == [8]  # 64 tokens in windows of 9, the last of 1
    for epoch in range(2):
        targets = []
        for step in (2 * epoch, 2 * epoch + 1):
            windows = dataset.training_windows(3, step, range(4))
            assert windows.sources is None
            ids = windows.tokens.numpy().astype(int)
            assert ((ids[:, 1:] - ids[:, :-1]) % 64 == 1).all()
            counted = np.ones((4, context_len), bool) if windows.counted is None else windows.counted.numpy()
            targets += ids[:, 1:][counted].tolist()
        assert sorted(targets) == list(range(64))
    assert dataset.epochs(2) == 1.0


def test_shuffled_windows_do_not_depend_on_how_slots_are_divided(files: list[str]) -> None:
    dataset = TokenDataset(files, CONTEXT_LEN, shuffle_batch=8)
    for step in range(12):
        whole = dataset.training_windows(1, step, range(8))
        assert whole.sources is not None
        for ranks in (2, 4):
            parts = [dataset.training_windows(1, step, range(rank, 8, ranks)) for rank in range(ranks)]
            for rank, part in enumerate(parts):
                assert part.sources is not None
                assert part.tokens.tolist() == whole.tokens[rank::ranks].tolist()
                assert part.sources.tolist() == whole.sources[rank::ranks].tolist()
                assert part.num_counted <= len(part) * CONTEXT_LEN
            assert sum(part.num_counted for part in parts) == whole.num_counted


def test_shuffled_windows_are_as_recorded(files: list[str]) -> None:
    sources, positions = TokenDataset(files, CONTEXT_LEN, shuffle_batch=8).draw(1, 2, range(8))
    assert sources.tolist() == [2, 1, 2, 2, 1, 2, 0, 2], "a run, when resumed, would continue with other windows"
    assert positions.tolist() == [19, 43, 33, 12, 1, 5, 15, 40]


def test_shuffled_windows_of_growing_batches_are_those_of_a_constant_batch(files: list[str]) -> None:
    """No window is left out or drawn twice where the size changes; weights change at the same step."""
    sizes = BatchSizes.of(8, ["0: 2", "3: 4", "5: 8"])
    phases = [(0, [1.0, 1.0, 1.0]), (4, [1.0, 2.0, 1.0])]
    growing = TokenDataset(files, CONTEXT_LEN, shuffle_batch=sizes.before, phases=phases)
    single = TokenDataset(files, CONTEXT_LEN, shuffle_batch=1, phases=[(0, phases[0][1]), (10, phases[1][1])])
    drawn = [growing.draw(1, step, range(sizes.at(step))) for step in range(9)]
    one_by_one = [single.draw(1, number, [0]) for number in range(sizes.before(9))]
    for part in (0, 1):
        assert np.concatenate([windows[part] for windows in drawn]).tolist() == [w[part][0] for w in one_by_one]
    assert [growing.epochs(step) for step in range(9)] == [single.epochs(sizes.before(step)) for step in range(9)]
    assert growing.epochs_of_sources(7) == single.epochs_of_sources(30)


def test_a_source_too_short_for_a_window_is_refused_with_shuffle(files: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.arange(CONTEXT_LEN, dtype=np.uint16))
    with pytest.raises(DataError, match=r"short\.npy"):
        TokenDataset([files[0], str(tmp_path / "short.npy")], CONTEXT_LEN, shuffle_batch=8)


def test_phases_of_random_windows_draw_as_fixed_weights_do(files: list[str]) -> None:
    first, second = [0.2, 0.5, 0.3], [0.0, 1.0, 9.0]
    phased = TokenDataset(files, CONTEXT_LEN, phases=[(0, first), (5, second)])
    for step in range(10):
        fixed = TokenDataset(files, CONTEXT_LEN, weights=first if step < 5 else second)
        for have, expected in zip(phased.draw(1, step, range(16)), fixed.draw(1, step, range(16)), strict=True):
            assert have.tolist() == expected.tolist()
