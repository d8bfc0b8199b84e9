"""Measure the time and memory of drawing windows, from a small token file (10 MB) and a large one (20 GB).

    python benchmarks/data.py [--large-gb 20] [--rows 64] [--context-len 1024] [--steps 200]      (about a minute)

Three methods take turns at each step:

* `TokenDataset.read`, which training uses: positioned reads;
* `read_windows` on the memory map of `load_token_dataset`, as in get_batch: the map is advised of random access;
* `read_windows` on a plain memory map, as np.load returns it.

The files are sparse, so they take no space on disk. A page that is drawn for the first time still passes through the
file system and its read-ahead.

    python benchmarks/data.py slow [--shards 10000] [--rows 32] [--step-seconds 0.5] [--steps 120]

measures a corpus of many shards on a file system that is slow by simulation: each read waits 100 ms, and one in 100
waits 5 s. A step is a wait of --step-seconds. It reports how long opening took the first and the second time, how long
steps waited for data, and open files and memory. `before` reads one window after the other, two batches ahead.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tinytrain_dist.data import parallel_reads, token_dataset, token_source
from tinytrain_dist.data.batches import Prefetcher
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.token_file import load_token_dataset, read_windows
from tinytrain_dist.data.window_sampling import window_starts


def _sparse(path: Path, tokens: int) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
        file.truncate(file.tell() + 2 * tokens)
    return path


def _memory() -> dict[str, float]:
    """Return the MB of this process in mapped files and in its own memory; 0 where there is no /proc."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {"RssFile": 0.0, "RssAnon": 0.0}
    return {name: int(text.split(f"{name}:")[1].split()[0]) * 1024 / 1e6 for name in ("RssFile", "RssAnon")}


def _ways(path: Path, context_len: int) -> dict[str, Callable[[int, range], Tensor]]:
    """Return, by the name of each method, a function from (step, sample slots) to the windows."""
    source = TokenDataset([str(path)], context_len)
    advised, plain = load_token_dataset(path), np.load(path, mmap_mode="r")

    def mapped(tokens: np.ndarray, seed: int) -> Callable[[int, range], Tensor]:
        # Each method has its own seed. Otherwise it would find pages in memory that another method has fetched.
        windows = len(tokens) - context_len
        return lambda step, slots: read_windows(tokens, window_starts(seed, step, slots, windows), context_len)

    return {
        "read (training)": lambda step, slots: source.read(*source.draw(0, step, slots)).tokens,
        "map, advised": mapped(advised, 1),
        "map, plain": mapped(plain, 2),
    }


def _measure_slow_reads(given: argparse.Namespace, folder: Path) -> None:
    """Print how steps wait for data from many shards on a slow file system."""
    shard = np.arange(4 * given.context_len, dtype=np.uint16)
    for number in range(given.shards):
        np.save(folder / f"shard-{number:05d}.npy", shard)
    time.sleep(2.5)  # shards that have only just been written are not trusted to stay the same
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        source = TokenDataset([f"{folder}/shard-*.npy"], given.context_len, vocab_size=1 << 16)
        seconds.append(time.perf_counter() - start)
    print(f"{given.shards:,} shards are opened in {seconds[0]:.2f} s, and the second time in {seconds[1]:.2f} s")

    plain, random = parallel_reads.read_at, np.random.default_rng(0)

    def slow_read(*args: Any) -> int:
        time.sleep(5.0 if random.random() < 0.01 else 0.1)
        return plain(*args)

    vars(token_source)["read_at"] = slow_read
    print("way          first batch   waits: all later steps   from step 20: median  largest   steps  files   RssAnon")
    for way, depth, threads, readers in (("before", 2, 1, 1), ("read ahead", 64, 8, parallel_reads.READERS)):
        vars(token_dataset)["READER_POOL"] = parallel_reads.ReaderPool(readers)
        steps = given.steps if way != "before" else max(25, given.steps // 4)
        batches = Prefetcher(
            lambda step: source.read(*source.draw(0, step, range(given.rows))), 0, depth, threads=threads
        )
        waits, most_files, before = [], 0, _memory()["RssAnon"]
        for step in range(steps):
            start = time.perf_counter()
            batches.get(step)
            waits.append(time.perf_counter() - start)
            time.sleep(given.step_seconds)
            most_files = max(most_files, len(os.listdir("/dev/fd")))
        batches.close()
        warm = waits[20:]
        print(
            f"{way:<12} {waits[0]:>9.2f} s {sum(waits[1:]):>22.1f} s {statistics.median(warm):>20.3f} {max(warm):>8.3f}"
            f" {steps:>7} {most_files:>6} {_memory()['RssAnon'] - before:>+7.1f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["local", "slow"], default="local", help="what to measure (local)")
    parser.add_argument("--large-gb", type=float, default=20.0, help="size of the large file in GB (20)")
    parser.add_argument("--rows", type=int, default=64, help="windows per step on one rank (64)")
    parser.add_argument("--shards", type=int, default=10_000, help="slow: number of shards (10000)")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="slow: time of a step (0.5)")
    parser.add_argument("--context-len", type=int, default=1024, help="tokens per window (1024)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each method (200)")
    given = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch"))
    print(f"machine  {platform.platform()}, {platform.machine()}, Python {platform.python_version()}, {packages}")
    print(f"a step   {given.rows} windows of {given.context_len + 1} token IDs of 2 bytes; {given.steps} steps each\n")
    if given.what == "slow":
        with tempfile.TemporaryDirectory() as place:
            _measure_slow_reads(given, Path(place))
        return
    print("file      method             ms/step: median  p90    largest   windows/s    MB/s   RssFile   RssAnon")
    with tempfile.TemporaryDirectory() as place:
        for name, size in (("small", 10e6), ("large", given.large_gb * 1e9)):
            path = _sparse(Path(place) / f"{name}.npy", int(size / 2))
            ways = _ways(path, given.context_len)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            grown = {way: {"RssFile": 0.0, "RssAnon": 0.0} for way in ways}
            for step in range(given.steps):
                for way, draw in ways.items():
                    before, start = _memory(), time.perf_counter()
                    draw(step, range(given.rows))
                    seconds[way].append(time.perf_counter() - start)
                    for kind, value in _memory().items():
                        grown[way][kind] += value - before[kind]
            for way, taken in seconds.items():
                median, rate = statistics.median(taken), given.rows / statistics.median(taken)
                p90 = statistics.quantiles(taken, n=10)[-1]
                print(
                    f"{size / 1e6:>6,.0f} MB {way:<18} {1e3 * median:>14.3f} {1e3 * p90:>6.2f} {1e3 * max(taken):>9.2f}"
                    f" {rate:>11,.0f} {rate * 2 * (given.context_len + 1) / 1e6:>7,.0f}"
                    f" {grown[way]['RssFile']:>+6.1f} MB {grown[way]['RssAnon']:>+5.1f} MB"
                )


if __name__ == "__main__":
    main()
