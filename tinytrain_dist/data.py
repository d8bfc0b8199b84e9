"""Owns token files: opening and checking them, which windows a step draws, and reading them ahead of time.

Must not know ranks, models or devices beyond where a batch is put; a rank asks for slots and gets their windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinytrain_dist.errors import DataError
from tinytrain_dist.files import write_atomically

Tokens = npt.NDArray[Any]
TRAIN_STREAM, EVAL_STREAM = 0, 1


def load_token_dataset(path: str | Path, mmap: bool = True, *, vocab_size: int | None = None) -> Tokens:
    """Open a token file (.npy, 1-D integers, C order), memory-mapped by default.

    vocab_size: check that every id lies in 0 .. vocab_size - 1 (one scan of the file, remembered beside it).
    Errors: DataError naming the file, what was found and what is allowed.
    """
    path = Path(path)
    try:
        tokens = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such token file; make one with `tinytrain prepare` or correct the path") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error}); make it again with `tinytrain prepare`") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        found = f"{tokens.ndim}-D {tokens.dtype}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise DataError(
            f"{path}: holds {found}, but a token file is a 1-D array of integers; save ids.astype('uint16')"
        )
    if not tokens.flags.c_contiguous:
        raise DataError(f"{path}: is not in C order; save np.ascontiguousarray(ids)")
    if vocab_size is not None:
        smallest, largest = _id_range(path, tokens)
        if smallest < 0 or largest >= vocab_size:
            bad = smallest if smallest < 0 else largest
            raise DataError(f"{path}: holds token id {bad}, but vocab_size {vocab_size} allows 0 .. {vocab_size - 1}")
    return tokens


def fingerprint(path: str | Path, tokens: Tokens) -> dict[str, Any]:
    """What identifies a token file cheaply: length, type and a sha256 over 64 blocks of 4,096 ids spread over it."""
    digest = hashlib.sha256()
    for start in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(np.int64):
        digest.update(np.ascontiguousarray(tokens[start : start + 4096]).tobytes())
    return {"file": Path(path).name, "tokens": len(tokens), "dtype": str(tokens.dtype), "sha256": digest.hexdigest()}


def _id_range(path: Path, tokens: Tokens) -> tuple[int, int]:
    """Smallest and largest id; scanned once and cached in FILE.range.json under the file's fingerprint."""
    if not len(tokens):
        return 0, -1
    cache, key = path.with_name(path.name + ".range.json"), {**fingerprint(path, tokens), "mtime": path.stat().st_mtime}
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["key"] == key:
            return known["range"][0], known["range"][1]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass  # no usable cache: scan
    blocks = [tokens[start : start + (1 << 24)] for start in range(0, len(tokens), 1 << 24)]
    found = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
    with contextlib.suppress(OSError):  # a read-only data folder costs a scan per start, nothing else
        write_atomically(cache, {"key": key, "range": found})
    return found


def num_windows(tokens: Tokens, context_len: int, name: str = "the token file") -> int:
    """How many windows of context_len ids with their next ids there are: n - context_len.

    Errors: DataError saying how many tokens are missing if there is none.
    """
    windows = len(tokens) - context_len
    if windows < 1:
        raise DataError(
            f"{name}: has {len(tokens)} tokens, but context_len {context_len} needs at least {context_len + 1}; "
            f"{1 - windows} more are needed, or a smaller context_len"
        )
    return windows


def window_starts(seed: int, step: int, slots: Sequence[int], windows: int, stream: int = TRAIN_STREAM) -> Tokens:
    """First token of the window of each slot, uniform over 0 .. windows - 1, int64.

    A pure function of (seed, step, slot): Philox with the seed as key and (slot, step) as counter gives every slot its
    own block of four words, so nobody's draws depend on who draws the others. Words in the last incomplete multiple of
    `windows` are passed over, which makes the draw exactly uniform (all four would fail once in 10^38).
    """
    limit = (1 << 64) // windows * windows - 1
    starts = np.empty(len(slots), dtype=np.int64)
    runs = np.split(np.arange(len(slots)), np.flatnonzero(np.diff(np.asarray(slots)) != 1) + 1) if len(slots) else []
    for run in runs:  # neighbouring slots are neighbouring counters: one generator gives them all
        bits = np.random.Philox(key=seed + (stream << 64), counter=[int(slots[run[0]]), step, 0, 0])
        words = bits.random_raw(4 * len(run)).reshape(-1, 4)
        chosen = np.argmax(words <= np.uint64(limit), axis=1)
        starts[run] = words[np.arange(len(run)), chosen] % np.uint64(windows)
    return starts


def read_windows(tokens: Tokens, starts: Tokens, context_len: int) -> Tensor:
    """The windows that begin at `starts`, with the token after each: [len(starts), context_len + 1], CPU."""
    rows = tokens[starts[:, None] + np.arange(context_len + 1)]
    # torch has no kernels for wide unsigned types and none for a foreign byte order
    known = {"u2": np.int32, "u4": np.int64, "u8": np.int64}.get(rows.dtype.str[1:], rows.dtype.newbyteorder("="))
    return torch.from_numpy(rows.astype(known, copy=False))


def get_batch(
    data: Tokens,
    batch_size: int,
    context_len: int,
    device: torch.device | str,
    *,
    rng: np.random.Generator | None = None,
    seed: int | None = None,
    step: int = 0,
    slots: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Random windows of `data` and the same windows one token later: two int64 tensors [batch_size, context_len].

    Every window can be drawn, also the one that ends with the last token. By default each call of each process draws
    from fresh entropy, so ranks never share a batch by accident. `rng` makes the draw repeatable; `seed` (with `step`,
    and `slots` of the global batch, default 0 .. batch_size - 1) makes it the trainer's own draw.
    Errors: DataError if there are fewer than context_len + 1 tokens.
    """
    windows = num_windows(data, context_len, "get_batch: data")
    if seed is not None:
        starts = window_starts(seed, step, range(batch_size) if slots is None else slots, windows)
    else:
        starts = (rng or np.random.default_rng()).integers(0, windows, size=batch_size)
    rows = read_windows(data, starts, context_len).long()
    if torch.device(device).type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Prefetcher:
    """Runs `make(step)` for step, step + 1, ... in one thread, at most `depth` ahead, and hands the results out."""

    def __init__(self, make: Callable[[int], Tensor], first_step: int, depth: int = 2) -> None:
        """`make` must be a pure function of the step: what is thrown away by `close` is made again after a resume."""
        self._ready: queue.Queue[tuple[int, Tensor | BaseException]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first_step), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Tensor], step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Tensor | BaseException = make(step)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put((step, item), timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def get(self, step: int) -> Tensor:
        """The batch of `step`; steps must be asked for in order. Errors: whatever `make` raised."""
        ready, item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put((ready, item))  # the thread has ended: whoever asks again gets the same answer
            raise item
        assert ready == step, f"asked for step {step}, have {ready}"
        return item

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()


def micro_batches(rows: Tensor, micro_batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut [n, context_len + 1] rows into (ids, targets) of micro_batch_size rows each, int64 on the device."""
    rows = rows.to(device, non_blocking=True)  # 32-bit ids over the bus, widened there
    for piece in rows.split(micro_batch_size):
        wide = piece.long()
        yield wide[:, :-1], wide[:, 1:]
