"""Stages that train: end to end, profile, stall of a save, scaling over GPUs. They use the systems of compare.py."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import numpy as np

from gpu_stages.context import Stage, synchronize
from gpu_stages.plan import Case

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
KINDS = {  # what a kernel does, by parts of its name; the first that matches
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "communication": ("nccl",),
    "optimizer and norms": ("multi_tensor", "adam", "foreach"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "compiled by inductor": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}


def options_for(stage: Stage, case: Case) -> argparse.Namespace:
    return argparse.Namespace(
        system=case.system, size=case.size, precision=case.precision, batch=case.batch, accumulation=case.accumulation,
        steps=case.steps, ranks=case.ranks, device=stage.device, threads=1, cold=False, vocab_size=0,
    )  # fmt: skip


def make_data(folder: Path, vocab_size: int) -> None:
    np.save(folder / "train.npy", np.random.default_rng(0).integers(0, vocab_size, 10**6, dtype=np.uint16))


def end_to_end(stage: Stage, case: Case) -> None:
    """Train one system for some steps, in this process, or with several ranks by torchrun."""
    options = options_for(stage, case)
    make_data(stage.folder, compare.sizes(options)["vocab_size"])
    if case.ranks > 1:
        ranks = compare.turn(options, case.system, case.precision, str(stage.folder))
    else:
        ranks = [compare.RUNNERS[case.system](options, str(stage.folder))]
    seconds = statistics.median(ranks[0]["steps"])
    tokens = case.batch * case.accumulation * case.ranks * compare.sizes(options)["context_len"]
    stage.put("tokens/s", round(tokens / seconds))
    stage.put("tokens/s per GPU", round(tokens / seconds / case.ranks))
    stage.put("tokens per step", tokens)
    stage.put("ms per step", round(1000 * seconds, 2))
    stage.put("ms processor time per step", round(1000 * statistics.median(ranks[0]["cpu"]), 2))
    stage.put("FLOP per token", compare.flops_per_token(options))
    stage.put("peak GiB", round(max(rank["peak"] for rank in ranks) / 2**30, 2))
    stage.put("seconds to the end of the first step", round(ranks[0]["first"], 1))
    if "by_events" in ranks[0]:
        stage.put("ms of single steps", [round(1000 * step, 1) for step in ranks[0]["by_events"]])


class Drive:
    """Run the steps of a Trainer one by one, with what its loop does between two steps."""

    def __init__(self, trainer: Any) -> None:
        from tinytrain_dist.data.batches import Prefetcher
        from tinytrain_dist.training.determinism import collect_garbage

        self.trainer = trainer
        trainer._agree_to_begin()
        trainer.batches = Prefetcher(trainer._read_rows, trainer.step)
        collect_garbage(first=True)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.trainer.metrics.take(self.trainer.run_step())
            self.trainer.saver.collect(self.trainer.step)


# ---------------------------------------------------------------- profile


def profile(stage: Stage, case: Case) -> None:
    """Trace two steps of ours: the largest kernels, the idle time of the GPU, the number of kernels."""
    import torch

    options = options_for(stage, case)
    make_data(stage.folder, compare.sizes(options)["vocab_size"])
    drive = Drive(compare.build_ours(options, str(stage.folder), stop_at_step=None))
    drive.steps(5)
    synchronize(stage.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if stage.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        drive.steps(2)
        synchronize(stage.device)
    path = stage.folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    with open(path, "rb") as plain, gzip.open(stage.folder / "trace.json.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    path.unlink()
    summarize_trace(stage, events, GPU_WORK if stage.device == "cuda" else ("cpu_op",), steps=2)


def summarize_trace(stage: Stage, events: list[dict[str, Any]], categories: tuple[str, ...], steps: int) -> None:
    """Record what the events of these categories sum up to."""
    work = [event for event in events if event.get("cat") in categories and "dur" in event]
    if not work:
        stage.note("the trace has no kernels; CUPTI may be missing or not permitted")
        return
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for event in work:
        name = event["name"]
        times[name] += event["dur"]
        counts[name] += 1
        lower = name.lower()
        kinds[next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "others")] += event[
            "dur"
        ]
    span = max(event["ts"] + event["dur"] for event in work) - min(event["ts"] for event in work)
    busy = sum(end - start for start, end in _union(sorted((e["ts"], e["ts"] + e["dur"]) for e in work)))
    stage.put("ms per step", round(span / steps / 1000, 2))
    stage.put("share of time idle", round(1 - busy / span, 4))
    stage.put("kernels per step", round(len(work) / steps))
    stage.put("ms per step by kind", {kind: round(us / steps / 1000, 2) for kind, us in kinds.most_common()})
    largest = [
        {"kernel": name[:160], "ms per step": round(us / steps / 1000, 3), "share": round(us / span, 4),
         "calls per step": counts[name] / steps}
        for name, us in times.most_common(10)
    ]  # fmt: skip
    stage.put("largest", largest)


def _union(intervals: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the union of sorted intervals, as intervals that do not overlap."""
    current: tuple[float, float] | None = None
    for start, end in intervals:
        if current is not None and start <= current[1]:
            current = (current[0], max(current[1], end))
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current


# ---------------------------------------------------------------- save


def save(stage: Stage, case: Case) -> None:
    """Measure how much longer some steps take if a save begins before the first of them, and the bare copy."""
    options = options_for(stage, case)
    make_data(stage.folder, compare.sizes(options)["vocab_size"])
    trainer = compare.build_ours(options, str(stage.folder), stop_at_step=None, keep_last=1)
    drive, saver = Drive(trainer), trainer.saver

    def window(with_save: bool) -> tuple[float, float]:
        """Return the seconds of some steps, and those of the call that begins the save."""
        synchronize(stage.device)
        start = time.perf_counter()
        if with_save:
            trainer.save()
        begun = time.perf_counter()
        drive.steps(case.steps)
        synchronize(stage.device)
        return time.perf_counter() - start, begun - start

    drive.steps(4)
    first, first_call = window(True)
    stage.put("first save: seconds of the call, buffers included", round(first_call, 3))
    saver.collect(trainer.step, wait=True)
    stage.put("first save: seconds until it was written", round(saver.saving_seconds, 2))
    drive.steps(2)
    plain = min(window(False)[0] for _ in range(2))
    with_save, call = window(True)
    stage.put("steps in a window", case.steps)
    stage.put("ms of the window", round(1000 * plain, 2))
    stage.put("ms of the window with a save", round(1000 * with_save, 2))
    stage.put("ms of the call", round(1000 * call, 2))
    saver.collect(trainer.step, wait=True)
    buffers = trainer.checkpoints.buffers
    copies = []
    for _ in range(3):
        synchronize(stage.device)
        start = time.perf_counter()
        buffers.copy()
        synchronize(stage.device)
        copies.append(time.perf_counter() - start)
    stage.put("bytes", sum(shard.rows_to_save.nbytes for shard in trainer.checkpoints.all_shards))
    stage.put("ms of the bare copy", round(1000 * min(copies), 2))
    stage.put("ms of the stall beyond the copy", round(1000 * (with_save - plain - min(copies)), 2))
    del first
    shutil.rmtree(Path(trainer.config.target_dir), ignore_errors=True)


def leave() -> None:
    """End this process at once: some systems leave threads that do not end."""
    os._exit(0)
