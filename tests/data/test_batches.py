"""Check batches: random windows, micro-batches, and reading ahead in a thread."""

from __future__ import annotations

import inspect
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.threads import TIMEOUT_SECONDS, call_in_time
from tests.helpers.token_files import save_tokens
from tinytrain_dist.data.batches import Prefetcher, get_batch, read_ahead_depth, split_micro_batches
from tinytrain_dist.data.token_file import load_token_dataset
from tinytrain_dist.data.training_windows import Windows, separate_documents
from tinytrain_dist.data.window_sampling import window_starts
from tinytrain_dist.errors import DataError

# --- columns ---


def test_columns_of_windows_have_their_targets_and_all_documents() -> None:
    begins = torch.tensor([[True, False, True, False, False, False, True]])
    windows = separate_documents(torch.arange(10, 17)[None], begins)
    parts = [windows.take_columns(slice(start, start + 3)) for start in (0, 3)]
    assert [part.tokens.tolist() for part in parts] == [[[10, 11, 12, 13]], [[13, 14, 15, 16]]]
    assert [part.num_counted for part in parts] == [2, 2]
    assert sum(part.num_counted for part in parts) == windows.num_counted
    for part in parts:
        assert part.documents is windows.documents
        assert len(part) == 1
    assert windows.take_columns(slice(0, 6)) is windows
    unmasked = Windows(windows.tokens)
    assert unmasked.take_columns(slice(3, 6)).num_counted == 3


# --- random windows ------------------------------------------------------------------------------------------------

every_way_to_draw = pytest.mark.parametrize(
    "how", [{"seed": 1}, {"rng": np.random.default_rng(0)}, {}], ids=["seed", "rng", "fresh entropy"]
)


def test_the_signature_stays_as_documented() -> None:
    parameters = list(inspect.signature(get_batch).parameters.values())
    assert [parameter.name for parameter in parameters[:4]] == ["data", "batch_size", "context_len", "device"]
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters[:4])
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[4:])


def test_targets_are_the_same_windows_one_token_later() -> None:
    ids, targets = get_batch(np.arange(100, dtype=np.uint16), 8, 5, "cpu")
    assert ids.shape == targets.shape == (8, 5)
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert ids.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        ("uint16", 65_535),
        ("uint32", 2**32 - 1),
        ("uint64", 2**40),
        ("int32", 2**31 - 1),
        ("int64", 2**40),
        (">u2", 65_535),
        (">i4", 2**31 - 1),
        ("uint8", 255),
    ],
)
def test_batches_keep_the_values_of_every_type(dtype: str, largest: int) -> None:
    ids, targets = get_batch(np.array([0, 1, largest, 3, 4], dtype=dtype), 3, 4, "cpu")
    assert (ids.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert ids[0].tolist() == [0, 1, largest, 3]
    assert targets[0].tolist() == [1, largest, 3, 4]


@every_way_to_draw
def test_the_last_window_can_be_drawn(how: dict[str, Any]) -> None:
    # 6 tokens have windows 0 and 1 of context_len 4; the last token is a target of window 1 only.
    _, targets = get_batch(np.arange(6, dtype=np.uint16), 200, 4, "cpu", **how)
    assert set(targets[:, -1].tolist()) == {4, 5}


@every_way_to_draw
def test_context_len_plus_one_tokens_are_enough(how: dict[str, Any]) -> None:
    ids, targets = get_batch(np.arange(5, dtype=np.uint16), 3, 4, "cpu", **how)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert targets.tolist() == [[1, 2, 3, 4]] * 3


def test_fewer_tokens_are_an_error_that_counts_the_missing() -> None:
    with pytest.raises(DataError, match="has 4 tokens, but context_len 4 needs at least 5; 1 more are needed"):
        get_batch(np.arange(4, dtype=np.uint16), 3, 4, "cpu")


def test_by_default_two_calls_draw_different_batches_even_if_numpy_is_seeded() -> None:
    tokens = np.arange(60_000, dtype=np.uint16)
    batches = []
    for _ in range(2):
        np.random.seed(0)  # as on ranks that set the same seed
        batches.append(get_batch(tokens, 16, 4, "cpu")[0])
    assert not torch.equal(*batches)


def test_a_generator_makes_the_draw_repeatable() -> None:
    tokens = np.arange(60_000, dtype=np.uint16)
    first, again, other = (get_batch(tokens, 16, 4, "cpu", rng=np.random.default_rng(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_draws_what_the_trainer_draws() -> None:
    tokens = np.arange(60_000, dtype=np.uint16)
    ids, _ = get_batch(tokens, 4, 8, "cpu", seed=3, step=5)
    assert ids[:, 0].tolist() == window_starts(3, 5, [0, 1, 2, 3], 60_000 - 8).tolist()
    part, _ = get_batch(tokens, 2, 8, "cpu", seed=3, step=5, slots=[3, 1])
    assert torch.equal(part, ids[[3, 1]])


def test_batches_come_from_a_memory_map(tmp_path: Path) -> None:
    tokens = load_token_dataset(save_tokens(tmp_path / "t.npy", range(100)))
    ids, targets = get_batch(tokens, 4, 8, torch.device("cpu"), seed=0)
    assert torch.equal(targets, ids + 1)


# --- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_cut_into_micro_batches_of_ids_and_targets(dtype: torch.dtype) -> None:
    rows = torch.arange(6 * 5, dtype=dtype).view(6, 5)
    micro_batches = list(split_micro_batches(Windows(rows), 2, torch.device("cpu")))
    assert len(micro_batches) == 3
    for number, (ids, targets) in enumerate(micro_batches):
        assert ids.dtype == targets.dtype == torch.int64
        assert ids.tolist() == rows[2 * number : 2 * number + 2, :-1].tolist()
        assert targets.tolist() == rows[2 * number : 2 * number + 2, 1:].tolist()


def test_targets_that_do_not_count_are_marked_and_documents_follow() -> None:
    tokens = torch.arange(2 * 6, dtype=torch.int32).view(2, 6)
    begins = torch.zeros(2, 6, dtype=torch.bool)
    begins[0, 0] = begins[0, 2] = begins[1, 1] = begins[1, 5] = True
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[0, 4] = False
    windows = separate_documents(tokens, begins, counted)
    assert windows.num_counted == 6
    assert Windows(tokens).num_counted == 10
    (first, second) = split_micro_batches(windows, 1, torch.device("cpu"))
    assert [part.tolist() for part in first] == [[[0, 1, 2, 3, 4]], [[1, -100, 3, 4, -100]], [[0, 0, 1, 1, 1]]]
    assert [part.tolist() for part in second] == [[[6, 7, 8, 9, 10]], [[-100, 8, 9, 10, -100]], [[0, 1, 1, 1, 1]]]
    without_documents = list(split_micro_batches(Windows(tokens, counted), 2, torch.device("cpu")))
    assert [len(parts) for parts in without_documents] == [2]


# --- reading ahead -------------------------------------------------------------------------------------------------


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_from_the_first_step() -> None:
    prefetcher = Prefetcher(torch.tensor, first_step=7)
    assert [call_in_time(prefetcher.get, step).item() for step in range(7, 20)] == list(range(7, 20))
    call_in_time(prefetcher.close)
    assert prefetch_threads() == []


def test_a_step_out_of_order_fails_an_assertion() -> None:
    prefetcher = Prefetcher(torch.tensor, first_step=0)
    with pytest.raises(AssertionError, match="asked for step 1, have 0"):
        call_in_time(prefetcher.get, 1)
    call_in_time(prefetcher.close)


def test_the_threads_read_ahead_but_no_further_than_the_depth() -> None:
    made: queue.SimpleQueue[int] = queue.SimpleQueue()

    def make_batch(step: int) -> Tensor:
        made.put(step)
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0, depth=3, last_step=6)
    assert sorted(made.get(timeout=TIMEOUT_SECONDS) for _ in range(3)) == [0, 1, 2]
    for step in range(3):
        assert made.empty()  # each further batch needs room, which the next line makes
        assert call_in_time(prefetcher.get, step).item() == step
        assert made.get(timeout=TIMEOUT_SECONDS) == step + 3
    assert [call_in_time(prefetcher.get, step).item() for step in (3, 4, 5)] == [3, 4, 5]
    call_in_time(prefetcher.close)
    assert made.empty()  # 6 is the last step


def test_batches_of_later_steps_are_made_while_a_read_stalls() -> None:
    goes_on, made = threading.Event(), queue.SimpleQueue[int]()

    def make_batch(step: int) -> Tensor:
        if step == 1:
            goes_on.wait(TIMEOUT_SECONDS)
        made.put(step)
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0, depth=40, last_step=40)
    others = sorted(made.get(timeout=TIMEOUT_SECONDS) for _ in range(39))
    assert others == [0, *range(2, 40)]
    assert call_in_time(prefetcher.get, 0).item() == 0
    goes_on.set()
    assert [call_in_time(prefetcher.get, step).item() for step in range(1, 40)] == list(range(1, 40))
    call_in_time(prefetcher.close)


def test_close_does_not_wait_for_a_read_that_stalls() -> None:
    stalled, goes_on = threading.Event(), threading.Event()

    def make_batch(step: int) -> Tensor:
        stalled.set()
        goes_on.wait()
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0, depth=2)
    assert stalled.wait(TIMEOUT_SECONDS)
    try:
        call_in_time(prefetcher.close)  # the read goes on only after this
    finally:
        goes_on.set()
    for thread in prefetch_threads():
        thread.join(TIMEOUT_SECONDS)
    assert prefetch_threads() == []


def test_an_error_of_a_later_step_waits_for_its_step() -> None:
    failed = threading.Event()

    def make_batch(step: int) -> Tensor:
        if step == 1:
            failed.set()
            raise DataError("the disk is gone")
        failed.wait(TIMEOUT_SECONDS)
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0, depth=2)
    assert call_in_time(prefetcher.get, 0).item() == 0
    with pytest.raises(DataError, match="the disk is gone"):
        call_in_time(prefetcher.get, 1)
    call_in_time(prefetcher.close)


def test_the_depth_is_bounded_in_batches_and_in_memory() -> None:
    assert [read_ahead_depth(size) for size in (0, 1, 2**20, 2**24, 2**40)] == [64, 64, 64, 16, 2]


def test_an_error_is_raised_after_the_batches_made_before_it_and_by_every_later_call() -> None:
    def make_batch(step: int) -> Tensor:
        if step == 2:
            raise DataError("the disk is gone")
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0)
    assert [call_in_time(prefetcher.get, step).item() for step in (0, 1)] == [0, 1]
    for step in (2, 3):  # a later call raises the error too, because the thread has ended
        with pytest.raises(DataError, match="the disk is gone"):
            call_in_time(prefetcher.get, step)
    call_in_time(prefetcher.close)
    assert prefetch_threads() == []


def test_close_ends_the_thread_while_the_queue_is_full() -> None:
    queue_is_full = threading.Event()

    def make_batch(step: int) -> Tensor:
        if step == 1:
            queue_is_full.set()
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0, depth=2)
    assert queue_is_full.wait(TIMEOUT_SECONDS)
    call_in_time(prefetcher.close)
    assert prefetch_threads() == []


def test_close_waits_for_a_batch_that_is_being_made() -> None:
    begun, may_finish, finished = threading.Event(), threading.Event(), threading.Event()

    def make_batch(step: int) -> Tensor:
        begun.set()
        may_finish.wait(TIMEOUT_SECONDS)
        finished.set()
        return torch.tensor(step)

    prefetcher = Prefetcher(make_batch, first_step=0)
    assert begun.wait(TIMEOUT_SECONDS)
    may_finish.set()
    call_in_time(prefetcher.close)
    assert finished.is_set()
    assert prefetch_threads() == []
