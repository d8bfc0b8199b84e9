"""Owns the checks of token files, of the draw, and of reading ahead.

Must not know ranks: that any grouping of slots draws the same windows is what lets ranks draw on their own.
"""

import inspect
import json
import os
import pickle
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.data import token_dataset
from tinytrain_dist.data.batches import Prefetcher, get_batch, split_micro_batches
from tinytrain_dist.data.sampling import EVAL_STREAM, TRAIN_STREAM, window_starts
from tinytrain_dist.data.token_dataset import dataset_fingerprint, load_token_dataset, num_windows, read_windows
from tinytrain_dist.errors import DataError

WAIT = 60.0  # seconds until a hanging thread counts as one; nothing waits that long when it works


def save(path: Path, ids: object, dtype: str = "uint16") -> Path:
    np.save(path, np.asarray(ids, dtype=dtype))
    return path


def test_the_signatures_are_those_of_the_notes():
    for function, names in [
        (get_batch, ["data", "batch_size", "context_len", "device"]),
        (load_token_dataset, ["path", "mmap"]),
    ]:
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters)[len(names) :])


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", "uint8"])
def test_token_files_are_opened_as_they_are(tmp_path, mmap, dtype):
    # a raw file without meta.json beside it
    tokens = load_token_dataset(save(tmp_path / "t.npy", range(50), dtype), mmap, vocab_size=50)
    assert isinstance(tokens, np.memmap) is mmap
    assert tokens.dtype == dtype
    assert tokens.tolist() == list(range(50))


def test_a_memory_map_is_the_default_and_cannot_be_written(tmp_path):
    tokens = load_token_dataset(str(save(tmp_path / "t.npy", range(5))))
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"none\.npy: no such token file; make one with `tinytrain prepare`"):
        load_token_dataset(tmp_path / "none.npy")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("content", [b"", b"once upon a time", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_a_file_that_is_not_npy_is_a_sentence(tmp_path, mmap, content):
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.npy: not a readable \.npy file"):
        load_token_dataset(tmp_path / "t.npy", mmap)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_torn_file_is_a_sentence(tmp_path, mmap):
    path = save(tmp_path / "t.npy", range(1000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable"):
        load_token_dataset(path, mmap)


class Trap:
    """Something that would leave a file behind if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("mmap", [True, False])
def test_nothing_is_unpickled(tmp_path, mmap):
    sprung = tmp_path / "sprung"
    np.save(tmp_path / "t.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("t.npy", "p.npy"):
        with pytest.raises(DataError, match="not a readable"):
            load_token_dataset(tmp_path / name, mmap)
    assert not sprung.exists()
    pickle.loads((tmp_path / "p.npy").read_bytes())
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (np.zeros((2, 3), np.uint16), "2-D uint16"),
        (np.asfortranarray(np.zeros((2, 3), np.uint16)), "2-D uint16"),
        (np.zeros((), np.uint16), "0-D uint16"),
        (np.zeros(3, np.float32), "1-D float32"),
        (np.zeros(3, bool), "1-D bool"),
    ],
)
def test_other_arrays_are_named(tmp_path, ids, found):
    np.save(tmp_path / "t.npy", ids)
    with pytest.raises(DataError, match=rf"t\.npy: holds {found}, but a token file is a 1-D array of integers"):
        load_token_dataset(tmp_path / "t.npy")


def test_an_archive_of_arrays_is_named(tmp_path):
    np.savez(tmp_path / "t.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(DataError, match="holds several arrays"):
        load_token_dataset(tmp_path / "t.npz")


def test_an_array_that_is_not_in_order_is_refused(tmp_path, monkeypatch):
    # numpy writes every 1-D array in order, so this can only come from a loader that gives a view
    save(tmp_path / "t.npy", range(10))
    monkeypatch.setattr(np, "load", lambda *_, **__: np.arange(10, dtype=np.uint16)[::2])
    with pytest.raises(DataError, match="is not in C order"):
        load_token_dataset(tmp_path / "t.npy")


# --- ids in range --------------------------------------------------------------------------------------------------


def test_an_id_too_large_names_file_value_and_limit(tmp_path):
    path = save(tmp_path / "t.npy", [1, 2, 99, 3])
    assert len(load_token_dataset(path, vocab_size=100)) == 4
    with pytest.raises(DataError, match=r"t\.npy: holds token id 99, but vocab_size 99 allows 0 \.\. 98"):
        load_token_dataset(path, vocab_size=99)
    assert len(load_token_dataset(path)) == 4


def test_a_negative_id_is_found(tmp_path):
    with pytest.raises(DataError, match="holds token id -7"):
        load_token_dataset(save(tmp_path / "t.npy", [1, -7, 3], "int32"), vocab_size=10)


def test_the_largest_id_is_found_in_a_later_block(tmp_path):
    ids = np.zeros((1 << 24) + 5000, np.uint8)  # scanned in blocks of 2^24
    ids[1 << 24] = 9
    with pytest.raises(DataError, match="token id 9"):
        load_token_dataset(save(tmp_path / "t.npy", ids, "uint8"), vocab_size=9)


@pytest.fixture
def scans(monkeypatch):
    """How often the ids of a file were scanned."""
    count = []
    real = np.ndarray.min

    class Counting(np.memmap):
        def min(self, *args, **kwargs):
            count.append(1)
            return real(self, *args, **kwargs)

    load = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: load(*a, **k).view(Counting))
    return count


def test_the_scan_is_remembered_beside_the_file(tmp_path, scans):
    path = save(tmp_path / "t.npy", range(100))
    for _ in range(3):
        load_token_dataset(path, vocab_size=100)
    assert len(scans) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npy", "t.npy.range.json"]
    with pytest.raises(DataError, match="token id 99"):
        load_token_dataset(path, vocab_size=50)
    assert len(scans) == 1


def test_the_memory_of_a_scan_ends_when_the_file_changes(tmp_path, scans):
    path = save(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    times = path.stat()
    save(path, [*range(99), 500])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # even with the old date: the content is another
    with pytest.raises(DataError, match="token id 500"):
        load_token_dataset(path, vocab_size=100)
    assert len(scans) == 2


def test_a_later_date_alone_is_a_reason_to_scan_again(tmp_path, scans):
    # a change between the 64 blocks of the fingerprint of a large file shows in its date only
    path = save(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    os.utime(path, (1, 1))
    load_token_dataset(path, vocab_size=100)
    assert len(scans) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"key": 1}'])
def test_a_broken_memory_is_no_memory(tmp_path, text):
    path = save(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    cache = tmp_path / "t.npy.range.json"
    good = cache.read_text()
    cache.write_text(text)
    with pytest.raises(DataError, match="token id 99"):
        load_token_dataset(path, vocab_size=99)
    assert cache.read_text() == good


def test_a_memory_with_half_a_range_is_no_memory(tmp_path):
    path = save(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    cache = tmp_path / "t.npy.range.json"
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "range": [0]}))
    assert len(load_token_dataset(path, vocab_size=100)) == 100


def test_a_folder_that_cannot_be_written_is_enough(tmp_path, monkeypatch):
    path = save(tmp_path / "t.npy", range(100))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)  # tests may run as root, whom no mode keeps from writing
    assert len(load_token_dataset(path, vocab_size=100)) == 100
    with pytest.raises(DataError, match="token id 99"):
        load_token_dataset(path, vocab_size=99)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npy"]


def test_an_empty_file_opens_and_has_no_window(tmp_path):
    tokens = load_token_dataset(save(tmp_path / "t.npy", []), vocab_size=5)
    with pytest.raises(DataError, match="has 0 tokens, but context_len 4 needs at least 5; 5 more are needed"):
        num_windows(tokens, 4)


# --- fingerprint ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_says_name_length_type_and_content(tmp_path):
    tokens = load_token_dataset(save(tmp_path / "t.npy", range(100)))
    found = dataset_fingerprint(tmp_path / "t.npy", tokens)
    assert {k: found[k] for k in ("file", "tokens", "dtype")} == {"file": "t.npy", "tokens": 100, "dtype": "uint16"}
    assert dataset_fingerprint(tmp_path / "t.npy", tokens) == found
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("length", [1, 100, 4096, 5000])
def test_a_fingerprint_sees_each_change_of_a_small_file(length):
    ids = np.arange(length, dtype=np.uint16)
    digests = {dataset_fingerprint("t", ids)["sha256"]}
    for place in {0, length // 2, length - 1}:
        changed = ids.copy()
        changed[place] += 1
        digests.add(dataset_fingerprint("t", changed)["sha256"])
    assert len(digests) == 1 + len({0, length // 2, length - 1})


def test_a_fingerprint_of_a_large_file_looks_at_both_ends():
    ids = np.zeros(1_000_000, dtype=np.uint16)
    base = dataset_fingerprint("t", ids)["sha256"]
    for place in (0, 4095, 1_000_000 - 4096, 999_999):
        ids[place] = 1
        assert dataset_fingerprint("t", ids)["sha256"] != base
        ids[place] = 0


# --- the draw ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**64 - 1)


def draw(seed: int, step: int, slots: list[int], windows: int, stream: int = TRAIN_STREAM) -> list[int]:
    return window_starts(seed, step, slots, windows, stream).tolist()


@given(
    seed=seeds,
    step=st.integers(0, 2**40),
    windows=st.integers(1, 2**40),
    slots=st.lists(st.integers(0, 2**20), unique=True, max_size=12),
    data=st.data(),
)
def test_a_slots_draw_does_not_depend_on_the_others(seed, step, windows, slots, data):
    alone = {slot: draw(seed, step, [slot], windows)[0] for slot in slots}
    order = data.draw(st.permutations(slots))
    assert draw(seed, step, order, windows) == [alone[slot] for slot in order]
    cut = data.draw(st.integers(0, len(order)))
    assert draw(seed, step, order[:cut], windows) + draw(seed, step, order[cut:], windows) == [alone[s] for s in order]
    assert all(0 <= start < windows for start in alone.values())


@given(seed=seeds, step=st.integers(0, 2**40), first=st.integers(0, 1000), size=st.integers(0, 40))
def test_a_run_of_slots_is_cut_anywhere(seed, step, first, size):
    together = draw(seed, step, list(range(first, first + size)), 1000)
    assert together == [draw(seed, step, [slot], 1000)[0] for slot in range(first, first + size)]
    assert together == draw(seed, step, range(first, first + size), 1000)


def test_a_slot_may_be_asked_for_twice():
    assert draw(1, 2, [5, 5, 4, 5], 10**6) == [draw(1, 2, [s], 10**6)[0] for s in (5, 5, 4, 5)]


def test_the_draw_is_pinned():
    found = draw(seed=1, step=2, slots=[0, 1, 2, 3, 10], windows=1_000_000)
    assert found == GOLDEN_STARTS, (
        f"window_starts(1, 2, [0, 1, 2, 3, 10], 1_000_000) is {found}. Every run that is resumed now continues with "
        "other data than it would have seen. If numpy's Philox changed, that must be worked around; if the sampler was "
        "changed on purpose, say so in CHANGELOG.md, raise the checkpoint format, and put the new numbers here."
    )


GOLDEN_STARTS = [466_853, 483_027, 656_003, 391_089, 367_886]


def test_seeds_steps_and_streams_differ():
    slots, windows = range(64), 2**60
    draws = [
        draw(seed, step, slots, windows, stream)
        for seed in (0, 1, 2**32, 2**63, 2**64 - 1)
        for step in (0, 1, 2, 64, 2**32)
        for stream in (TRAIN_STREAM, EVAL_STREAM)
    ]
    everything = [start for one in draws for start in one]
    assert len(set(everything)) == len(everything)


def test_neighbouring_steps_and_slots_do_not_share_words():
    # with overlapping streams the draw of (step, slot) would come again somewhere near
    everything = [start for step in range(50) for start in draw(7, step, range(50), 2**60)]
    assert len(set(everything)) == 2500


def test_the_draw_is_uniform():
    windows, draws = 7, 70_000
    counts = np.bincount(window_starts(3, 0, range(draws), windows), minlength=windows)
    assert len(counts) == windows
    expected = draws / windows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 6 degrees of freedom: exceeded once in 1000 seeds, and this seed is fixed


def test_the_draw_is_uniform_where_a_remainder_would_show():
    # 2^64 is 8/3 of this: without passing words over, starts in the lower two thirds would come 3 times for every 2
    windows = 3 << 61
    starts = window_starts(3, 0, range(20_000), windows)
    below = (starts < windows // 2).mean()
    assert abs(below - 0.5) < 4 * 0.5 / 20_000**0.5
    assert starts.max() < windows


def test_every_window_of_a_tiny_file_is_drawn_the_last_too():
    starts = window_starts(0, 0, range(200), 5)
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("windows", [1, 2, 2**32, 2**63 - 1])
def test_any_number_of_windows(windows):
    starts = window_starts(5, 1, range(50), windows)
    assert starts.dtype == np.int64
    assert (starts >= 0).all()
    assert (starts < windows).all()


# --- windows and batches -------------------------------------------------------------------------------------------


def test_the_number_of_windows_and_what_is_missing():
    ids = np.arange(10, dtype=np.uint16)
    assert num_windows(ids, 4) == 6
    assert num_windows(ids, 9) == 1
    with pytest.raises(
        DataError, match="my file: has 10 tokens, but context_len 12 needs at least 13; 3 more are needed"
    ):
        num_windows(ids, 12, "my file")


@pytest.mark.parametrize(
    ("dtype", "large", "read"),
    [
        ("uint16", 65_535, torch.int32),
        ("uint32", 2**32 - 1, torch.int64),
        ("uint64", 2**40, torch.int64),
        ("int32", 2**31 - 1, torch.int32),
        ("int64", 2**40, torch.int64),
        (">u2", 65_535, torch.int32),
        (">i4", 2**31 - 1, torch.int32),
        ("uint8", 255, torch.uint8),
    ],
)
def test_ids_of_every_type_keep_their_value(dtype, large, read):
    ids = np.array([0, 1, large, 3, 4], dtype=dtype)
    rows = read_windows(ids, np.array([0, 2]), 2)
    assert rows.dtype == read
    assert rows.tolist() == [[0, 1, large], [large, 3, 4]]
    inputs, targets = get_batch(ids, 3, 4, "cpu")
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert inputs[0].tolist() == [0, 1, large, 3]
    assert targets[0].tolist() == [1, large, 3, 4]


def test_get_batch_gives_windows_and_the_same_one_token_later():
    inputs, targets = get_batch(np.arange(100, dtype=np.uint16), 8, 5, "cpu")
    assert inputs.shape == targets.shape == (8, 5)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.parametrize("how", [{"seed": 1}, {"rng": np.random.default_rng(0)}, {}])
def test_get_batch_draws_the_last_window(how):
    # 6 tokens, context 4: windows 0 and 1; the last token is a target of window 1 only
    _, targets = get_batch(np.arange(6, dtype=np.uint16), 200, 4, "cpu", **how)
    assert set(targets[:, -1].tolist()) == {4, 5}


@pytest.mark.parametrize("how", [{"seed": 1}, {"rng": np.random.default_rng(0)}, {}])
def test_context_len_plus_one_tokens_are_legal(how):
    inputs, targets = get_batch(np.arange(5, dtype=np.uint16), 3, 4, "cpu", **how)
    assert inputs.tolist() == [[0, 1, 2, 3]] * 3
    assert targets.tolist() == [[1, 2, 3, 4]] * 3


def test_fewer_tokens_say_how_many_are_missing():
    with pytest.raises(DataError, match="has 4 tokens, but context_len 4 needs at least 5; 1 more are needed"):
        get_batch(np.arange(4, dtype=np.uint16), 3, 4, "cpu")


def test_by_default_no_two_calls_share_a_batch():
    ids = np.arange(60_000, dtype=np.uint16)
    np.random.seed(0)  # what ranks that share a seed would do
    one, _ = get_batch(ids, 16, 4, "cpu")
    np.random.seed(0)
    two, _ = get_batch(ids, 16, 4, "cpu")
    assert not torch.equal(one, two)


def test_a_generator_makes_the_draw_repeatable():
    ids = np.arange(60_000, dtype=np.uint16)
    one, two, three = (get_batch(ids, 16, 4, "cpu", rng=np.random.default_rng(s))[0] for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_a_seed_makes_it_the_trainers_draw():
    ids = np.arange(60_000, dtype=np.uint16)
    inputs, _ = get_batch(ids, 4, 8, "cpu", seed=3, step=5)
    assert inputs[:, 0].tolist() == draw(3, 5, [0, 1, 2, 3], 60_000 - 8)
    part, _ = get_batch(ids, 2, 8, "cpu", seed=3, step=5, slots=[3, 1])
    assert torch.equal(part, inputs[[3, 1]])


def test_get_batch_from_a_memory_map(tmp_path):
    tokens = load_token_dataset(save(tmp_path / "t.npy", range(100)))
    inputs, targets = get_batch(tokens, 4, 8, torch.device("cpu"), seed=0)
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_micro_batches_cut_rows_into_inputs_and_targets(dtype):
    rows = torch.arange(6 * 5, dtype=dtype).view(6, 5)
    pieces = list(split_micro_batches(rows, 2, torch.device("cpu")))
    assert len(pieces) == 3
    for number, (inputs, targets) in enumerate(pieces):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == rows[2 * number : 2 * number + 2, :-1].tolist()
        assert targets.tolist() == rows[2 * number : 2 * number + 2, 1:].tolist()


# --- reading ahead -------------------------------------------------------------------------------------------------


def in_time(function, *args):
    """The result of a call that must not hang: made in a thread, so that a hang is a failure and not a hang."""
    answer: queue.Queue = queue.Queue()

    def call() -> None:
        try:
            answer.put((function(*args), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    result, error = answer.get(timeout=WAIT)
    if error is not None:
        raise error
    return result


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_from_the_first_step():
    prefetcher = Prefetcher(lambda step: torch.tensor(step), first_step=7)
    assert [in_time(prefetcher.get, step).item() for step in range(7, 20)] == list(range(7, 20))
    in_time(prefetcher.close)
    assert prefetch_threads() == []


def test_steps_out_of_order_are_our_own_mistake():
    prefetcher = Prefetcher(lambda step: torch.tensor(step), first_step=0)
    with pytest.raises(AssertionError, match="asked for step 1, have 0"):
        in_time(prefetcher.get, 1)
    in_time(prefetcher.close)


def test_it_reads_ahead_but_no_further_than_its_depth():
    made, full = [], threading.Event()

    def make(step: int) -> torch.Tensor:
        made.append(step)
        if step == 3:
            full.set()  # 0, 1, 2 are in the queue, 3 waits for room
        return torch.tensor(step)

    prefetcher = Prefetcher(make, first_step=0, depth=3)
    assert full.wait(WAIT)
    assert made == [0, 1, 2, 3]
    in_time(prefetcher.close)
    assert len(made) <= 5  # close makes room once


def test_an_error_in_make_reaches_the_caller_after_what_was_made_before():
    def make(step: int) -> torch.Tensor:
        if step == 2:
            raise DataError("the disk is gone")
        return torch.tensor(step)

    prefetcher = Prefetcher(make, first_step=0)
    assert [in_time(prefetcher.get, step).item() for step in (0, 1)] == [0, 1]
    with pytest.raises(DataError, match="the disk is gone"):
        in_time(prefetcher.get, 2)
    in_time(prefetcher.close)
    assert prefetch_threads() == []


def test_close_ends_the_thread_while_the_queue_is_full():
    reached = threading.Event()

    def make(step: int) -> torch.Tensor:
        if step == 2:
            reached.set()
        return torch.tensor(step)

    prefetcher = Prefetcher(make, first_step=0, depth=2)
    assert reached.wait(WAIT)
    in_time(prefetcher.close)
    assert prefetch_threads() == []


def test_close_waits_for_a_batch_in_the_making():
    begun, go_on, finished = threading.Event(), threading.Event(), threading.Event()

    def make(step: int) -> torch.Tensor:
        begun.set()
        go_on.wait(WAIT)
        finished.set()
        return torch.tensor(step)

    prefetcher = Prefetcher(make, first_step=0)
    assert begun.wait(WAIT)
    go_on.set()
    in_time(prefetcher.close)
    assert finished.is_set()
    assert prefetch_threads() == []


# --- large files ---------------------------------------------------------------------------------------------------


def mapped_mib() -> float:
    """Pages of files that count as this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) / 1024


def sparse(path: Path, tokens: int) -> Path:
    """A token file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        form = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(file, form)
        file.truncate(file.tell() + 2 * tokens)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by kind is Linux's to tell")
def test_drawing_from_a_large_file_maps_nothing_into_memory(tmp_path):
    source = token_dataset.TokenDataset([str(sparse(tmp_path / "t.npy", 4_000_000_000))], 64)
    before = mapped_mib()
    for step in range(25):
        assert not source.read(*source.draw(0, step, range(40))).any()
    assert mapped_mib() - before < 4  # mapped, 1000 windows of 8 GB count 64 MiB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by kind is Linux's to tell")
def test_a_scan_gives_back_what_it_mapped(tmp_path):
    path = save(tmp_path / "t.npy", np.zeros(20_000_000, np.uint16))
    before = mapped_mib()
    tokens = load_token_dataset(path, vocab_size=5)
    assert (tmp_path / "t.npy.range.json").exists()
    assert mapped_mib() - before < 10  # of 38 MiB
    assert not tokens[:5].any()


# --- bytes of a token ----------------------------------------------------------------------------------------------


def test_bytes_of_a_byte_level_tokenizer_add_up_to_those_of_the_text(tmp_path):
    tokenizer = pytest.importorskip("tinytrain_dist.data.preparation.tokenizer")
    text = "Grüße, 日本語 👩‍👧 and  plain\twords words words\r\n" * 3
    vocabulary = tokenizer.train_bpe([text], 300)
    (tmp_path / "tokenizer.json").write_text(vocabulary.text)
    sizes = token_dataset.bytes_per_token(tmp_path, 320)
    ids = tokenizer.Encoder(vocabulary, use_fast=False).encode(text + "🦆")
    assert len(set(ids.tolist())) > 10
    assert sizes[ids].sum() == len((text + "🦆").encode())
    assert sizes[vocabulary.eos_id] == 0
    assert sizes[vocabulary.size :].sum() == 0  # ids that pad the vocabulary stand for nothing
    with pytest.raises(DataError, match=r"tokenizer\.json: does not fit vocab_size 5 "):
        token_dataset.bytes_per_token(tmp_path, 5)


def test_an_added_token_that_is_text_counts_its_bytes(tmp_path):
    found = {
        "model": {"type": "BPE", "vocab": {"a": 0, "Ġa": 1}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 2, "content": "é!", "special": False}, {"id": 0, "content": "a", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    assert token_dataset.bytes_per_token(tmp_path, 4).tolist() == [0, 2, 3, 0]


@pytest.mark.parametrize(
    "found",
    [
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": None, "added_tokens": []},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "decoder": {"type": "Metaspace"}, "added_tokens": []},
    ],
)
def test_bytes_of_other_tokenizers_are_not_known_without_a_table(tmp_path, found):
    assert token_dataset.bytes_per_token(tmp_path, 3) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    assert token_dataset.bytes_per_token(tmp_path, 3) is None
    np.save(tmp_path / "token_bytes.npy", [0, 4, 1])
    assert token_dataset.bytes_per_token(tmp_path, 3).tolist() == [0, 4, 1]
    with pytest.raises(DataError, match=r"token_bytes\.npy: does not fit vocab_size 4 "):
        token_dataset.bytes_per_token(tmp_path, 4)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_broken_tokenizer_is_a_sentence(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json: does not fit vocab_size 3 "):
        token_dataset.bytes_per_token(tmp_path, 3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"Once upon a time", r"it begins with b'Once upo', which is not how such a file begins"),
        (b"", "it is empty"),
        (b"\x93NUMPY\1\0\xff\xff" + b"x" * 70_000, "its header has 65,535 bytes by its own account"),
        (b"\x93NUMPY\1\0\x88\x13" + b"[" * 5000, "its header is damaged"),
        (b"\x93NUMPY\7\7\1\0{", r"it has version 7\.7 of the format"),
    ],
)
def test_a_file_that_is_no_array_is_described_in_our_words(tmp_path, content, expected):
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.npy: not a readable \.npy file \({expected}") as caught:
        load_token_dataset(tmp_path / "t.npy")
    assert "allow_pickle" not in str(caught.value)


def test_values_that_the_header_does_not_count_are_refused(tmp_path):
    path = save(tmp_path / "t.npy", range(1000))
    path.write_bytes(path.read_bytes().replace(b"(1000,)", b"(100,) "))
    with pytest.raises(DataError, match="it has 2,000 bytes of values, but 200 by its header"):
        load_token_dataset(path)
