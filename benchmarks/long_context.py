"""Train with short windows, extend the context with context parallelism, and measure retrieval at every distance.

    python benchmarks/long_context.py [--context-len 4096] [--factor 4] [--out runs/retrieval]

A window holds facts, each a key and its value, at random places among filler. At its end, the keys come again in
another order, each followed by its value. Only these values count in the loss. Each key is in the window once before,
so the model has to find it, at whatever distance it is. Every window of training and of evaluation is new.

Several runs of the trainer, each from the weights of the one before and with scaled rotary positions:

* windows of --start-len tokens, then of 8 times as many, up to --context-len, on two data-parallel processes: to find
  one of 4,096 tokens is not learned from nothing in minutes;
* windows of --factor times --context-len tokens, with cp = 2.

Printed is the share of correct values by the distance to the key, in windows that no run has seen. Of the
run before the last, it is printed for its own windows, for long ones, and for long ones with scaled positions but
without more training.
The same command continues runs that were stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tinytrain_dist.model.transformer import TransformerLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROCESSES = 2
BUCKETS = 8
GROWTH = 8  # of windows from one run to the next
Settings = dict[str, Any]

# all runs; two layers are the fewest that find a key and read the token behind it (induction heads)
SETTINGS: Settings = {
    "num_layers": 2, "num_heads": 2, "d_model": 64, "d_ff": 128, "qk_norm": True,
    "sampling": "shuffle", "packing": "best_fit", "loss_mask": True, "device": "cpu",
    "optimizer": "muon", "schedule": "linear", "lr_min": 0.0, "warmup_iters": 10, "weight_decay": 0.0,
    "betas": [0.9, 0.95], "log_every": 10, "eval_steps": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Windows with facts and questions. IDs: fillers, then keys, then values."""

    facts: int  # in each window
    keys: int = 256
    values: int = 32
    fillers: int = 32

    @property
    def vocab_size(self) -> int:
        return self.fillers + self.keys + self.values

    def window(self, rng: np.random.Generator, context_len: int) -> npt.NDArray[np.int64]:
        """Return the context_len + 1 tokens of a window: facts among filler, and one question for each fact."""
        ids = rng.integers(0, self.fillers, context_len + 1)
        body = len(ids) - 2 * self.facts
        # each fact is a pair: choose places as if it were one token, then make room for the second
        places = np.sort(rng.choice(body - self.facts, self.facts, replace=False)) + np.arange(self.facts)
        keys = self.fillers + rng.choice(self.keys, self.facts, replace=False)
        values = self.fillers + self.keys + rng.integers(0, self.values, self.facts)
        ids[places], ids[places + 1] = keys, values
        order = rng.permutation(self.facts)
        ids[body::2], ids[body + 1 :: 2] = keys[order], values[order]
        return ids

    def answers(self, context_len: int) -> npt.NDArray[np.int64]:
        """Return the positions in a window of the values that are asked for: [facts]."""
        return np.arange(context_len + 2 - 2 * self.facts, context_len + 1, 2)

    def distances(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how far before each question of a window its key is: [facts]."""
        asked = self.answers(len(ids) - 1) - 1
        before = ids[: asked[0]]
        keys_at: npt.NDArray[np.int64] = np.array([np.flatnonzero(before == key)[0] for key in ids[asked]])
        return asked - keys_at


def write_windows(path: Path, task: Task, windows: int, context_len: int, seed: list[int]) -> None:
    """Write a token file whose documents are windows, with its mask and where documents begin."""
    rng = np.random.default_rng(seed)
    ids = np.stack([task.window(rng, context_len) for _ in range(windows)])
    counted = np.zeros(ids.shape, np.uint8)
    counted[:, task.answers(context_len)] = 1
    np.save(path, ids.astype(np.uint16).ravel())
    np.save(path.with_suffix(".mask.npy"), counted.ravel())
    np.save(path.with_suffix(".documents.npy"), np.arange(windows, dtype=np.int64) * ids.shape[1])


def train(options: argparse.Namespace, task: Task, name: str, settings: Settings) -> float:
    """Write the data of a run, train it as a user does, and return the seconds that it took."""
    folder = Path(options.out) / name
    (folder / "data").mkdir(parents=True, exist_ok=True)
    length, sequences = settings["context_len"], settings["total_steps"] * settings["batch_size"]
    for number, (file, windows) in enumerate((("train", sequences), ("val", options.windows))):
        write_windows(folder / "data" / f"{file}.npy", task, windows, length, [options.seed, length, number])
    settings = SETTINGS | settings | {
        "vocab_size": task.vocab_size, "seed": options.seed,
        "train_data": str(folder / "data" / "train.npy"), "val_data": str(folder / "data" / "val.npy"),
        "target_dir": str(folder / "run"), "eval_every": settings["total_steps"], "ckpt_every": settings["total_steps"],
    }  # fmt: skip
    config = folder / "config.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()), encoding="utf-8")
    start = time.monotonic()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tinytrain_dist", "train", str(config), "--nproc", str(PROCESSES)]
    if subprocess.run(command, check=False, env=env).returncode:
        sys.exit(f"the run {name} failed")
    return time.monotonic() - start


def correct_by_distance(
    model: TransformerLM, task: Task, path: Path, context_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the distance of each question in a file of windows, and whether the likeliest token is its value."""
    import torch

    at = task.answers(context_len)
    distances, correct = [], []
    for ids in np.load(path).astype(np.int64).reshape(-1, context_len + 1):
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, :-1]))[0, at - 1]
        distances.append(task.distances(ids))
        correct.append(logits.argmax(dim=-1).numpy() == ids[at])
    return np.concatenate(distances), np.concatenate(correct)


def rows(options: argparse.Namespace, task: Task) -> Iterator[tuple[str, list[float]]]:
    """Yield what was measured, and the share of correct answers in each bucket of distances (NaN: none is so far)."""
    import torch

    from tinytrain_dist.checkpoint.discovery import find_model
    from tinytrain_dist.checkpoint.load_model import load_model
    from tinytrain_dist.model.attention import RotaryEmbedding

    short, long = options.context_len, options.context_len * options.factor
    out = Path(options.out)
    base, extended = (
        load_model(find_model(out / str(length) / "run"), torch.device("cpu")) for length in (short, long)
    )
    own = base.model.rotary
    scaled = RotaryEmbedding.of_model(
        dataclasses.replace(base.model_config, context_len=long, **scaling(options, long))
    )
    edges = np.arange(1, BUCKETS) * long // BUCKETS
    for what, model, rotary, length in (
        (f"before, windows of {short:,}", base, own, short),
        (f"before, windows of {long:,}", base, own, long),
        (f"before, scaled positions, windows of {long:,}", base, scaled, long),
        (f"extended, windows of {long:,}", extended, extended.model.rotary, long),
    ):
        path = out / str(length) / "data" / "val.npy"
        model.model.rotary = rotary
        distances, correct = correct_by_distance(model, task, path, length)
        buckets = np.searchsorted(edges, distances, side="right")
        counts, sums = (np.bincount(buckets, weights, BUCKETS) for weights in (None, correct))
        yield what, [float(part / count) if count else float("nan") for part, count in zip(sums, counts, strict=True)]


def scaling(options: argparse.Namespace, context_len: int) -> Settings:
    """Return the settings of the rotary positions for a context; those of the first run are not scaled."""
    if context_len == options.start_len:
        return {}
    return {
        "rope_type": "yarn", "rope_original_context_len": options.start_len,
        "rope_scaling_factor": context_len / options.start_len,
    }  # fmt: skip


def runs(options: argparse.Namespace) -> dict[str, tuple[Task, Settings]]:
    """Return the task and the settings of each run, in order. Each is named after the length of its windows."""
    lengths = [options.start_len]
    while lengths[-1] < options.context_len:
        lengths.append(min(GROWTH * lengths[-1], options.context_len))
    lengths.append(options.context_len * options.factor)
    runs: dict[str, tuple[Task, Settings]] = {}
    for length in lengths:
        windows = max(options.batch_size, 4096 // length)
        settings = {
            "context_len": length, "batch_size": windows, "parallel": "ddp",
            "micro_batch_size": max(1, min(windows // PROCESSES, 4096 // length)),
            "total_steps": options.extension_steps if runs else options.total_steps,
            "lr_max": 0.003 if runs else 0.01, **scaling(options, length),
        }  # fmt: skip
        if length == lengths[-1]:
            settings |= {"cp": PROCESSES, "parallel": "fsdp"}
        if runs:
            settings["init_from"] = str(Path(options.out) / list(runs)[-1] / "run")
        runs[str(length)] = Task(min(options.facts, length // 8)), settings
    return runs


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-len", type=int, default=64, help="tokens in a window of the first run (64)")
    parser.add_argument("--context-len", type=int, default=4096, help="of the run before the last (4096)")
    parser.add_argument("--factor", type=int, default=4, help="how much longer those of the last run are (4)")
    parser.add_argument("--facts", type=int, default=128, help="facts in each window, at most 256 (128)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step, more if they are short (4)")
    parser.add_argument("--total-steps", type=int, default=300, help="steps of the first run (300)")
    parser.add_argument("--extension-steps", type=int, default=30, help="steps of each of the others (30)")
    parser.add_argument("--windows", type=int, default=16, help="windows that are evaluated (16)")
    parser.add_argument("--seed", type=int, default=0, help="of the windows and the weights (0)")
    parser.add_argument("--out", default="runs/retrieval", help="folder of data and runs (runs/retrieval)")
    options = parser.parse_args()
    if not 1 <= options.facts <= 256:
        parser.error(f"--facts: got {options.facts}; expected 1 to 256")
    if not 16 <= options.start_len <= options.context_len:
        parser.error(f"--start-len: got {options.start_len}; expected 16 to --context-len")
    return options


def main() -> None:
    """Train all runs, and print what they find."""
    options = parse()
    for name, (task, settings) in runs(options).items():
        print(f"windows of {name}: trained in {train(options, task, name, settings):.0f} s", flush=True)
    task, _ = runs(options)[str(options.context_len)]
    long = options.context_len * options.factor
    print(f"\n{task.facts} facts in a window; a guess finds {1 / task.values:.3f}\n")
    edges = [f"{number * long // BUCKETS:,} to {(number + 1) * long // BUCKETS:,}" for number in range(BUCKETS)]
    print(f"| distance | {' | '.join(edges)} |\n|{'---|' * (BUCKETS + 1)}")
    for what, shares in rows(options, task):
        shown = ["" if share != share else f"{share:.3f}" for share in shares]
        print(f"| {what} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
