"""Measure the time and memory of drawing windows, from a small token file (10 MB) and a large one (20 GB).

    python benchmarks/data.py [--large-gb 20] [--rows 64] [--context-len 1024] [--steps 200]      (about a minute)

Three methods take turns at each step:

* `TokenDataset.read`, which training uses: positioned reads;
* `read_windows` on the memory map of `load_token_dataset`, as in get_batch: the map is advised of random access;
* `read_windows` on a plain memory map, as np.load returns it.

The files are sparse, so they take no space on disk. A page that is drawn for the first time still passes through the
file system and its read-ahead.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import Tensor

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large-gb", type=float, default=20.0, help="size of the large file in GB (20)")
    parser.add_argument("--rows", type=int, default=64, help="windows per step on one rank (64)")
    parser.add_argument("--context-len", type=int, default=1024, help="tokens per window (1024)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each method (200)")
    given = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch"))
    print(f"machine  {platform.platform()}, {platform.machine()}, Python {platform.python_version()}, {packages}")
    print(f"a step   {given.rows} windows of {given.context_len + 1} token IDs of 2 bytes; {given.steps} steps each\n")
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
