"""Measure a step with AdamW and with Muon by turns, and Newton-Schulz in float32 and in bf16.

    python benchmarks/optimizers.py [--d-model 512] [--num-layers 4] [--batch-size 4] [--rounds 10] [--device cpu]
    torchrun --nproc_per_node 2 benchmarks/optimizers.py --parallel fsdp

The steps alternate, so that other work on the machine slows both down alike. Printed are the medians on rank 0 of whole
steps and of their updates (clipping and optimizer), and their ratios. Batches are random token IDs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OPTIMIZERS = ("adamw", "muon")
Clock = Callable[[], float]


def clock_of(device: Any) -> Clock:
    """Return a clock that waits for the device."""
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def measure_steps(options: argparse.Namespace) -> None:
    """Print the medians of steps and updates, with each optimizer."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed, shutdown
    from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
    from tinytrain_dist.training.memory_estimate import EmptyBatches, empty_windows
    from tinytrain_dist.training.train_step import build_train_step

    context = init_distributed(options.device)
    now = clock_of(context.device)
    settings = {"vocab_size": options.vocab_size, "d_model": options.d_model, "num_layers": options.num_layers}
    settings |= {"num_heads": options.d_model // 64, "batch_size": options.batch_size, "parallel": options.parallel}
    settings |= {"context_len": options.context_len, "precision": options.precision, "compile": False}
    steps: dict[str, Any] = {}
    updates: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    totals: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        config = TrainingConfig(**{**settings, "optimizer": name})
        meshed = context.with_mesh(choose_parallel_dims(config, context.world_size, context.local_world_size))
        steps[name] = build_train_step(config, meshed)
        steps[name].optimizer.clip_and_step = timed(steps[name].optimizer.clip_and_step, updates[name], now)
    batches = EmptyBatches(empty_windows(config, len(steps["muon"].slots)))
    batches.windows.tokens.random_(0, options.vocab_size)
    for step in range(options.rounds + 2):
        for name in OPTIMIZERS:
            context.barrier()
            timed(steps[name].run, totals[name], now)(step, batches)
    if context.is_main:
        assert meshed.parallel_dims is not None
        weights = sum(param.numel() for param in steps["muon"].model.parameters())
        tokens = options.batch_size * options.context_len
        mode, ranks = meshed.parallel_dims.mode, context.world_size
        print(f"{weights:,} weights, {tokens} tokens in a step, {mode} on {ranks} rank(s)")
        for what, seconds in (("step", totals), ("update", updates)):
            adamw, muon = (1000 * statistics.median(seconds[name][2:]) for name in OPTIMIZERS)
            print(f"{what:<8} adamw {adamw:8.2f} ms   muon {muon:8.2f} ms   ratio {muon / adamw:.3f}")
    shutdown()


def timed(function: Callable[..., Any], seconds: list[float], now: Clock) -> Callable[..., Any]:
    """Return the function, which then also appends how long each call took."""

    def call(*args: Any) -> Any:
        start = now()
        result = function(*args)
        seconds.append(now() - start)
        return result

    return call


def measure_types(options: argparse.Namespace) -> None:
    """Print the medians of Newton-Schulz in both types, by turns."""
    import torch

    from tinytrain_dist.optim.costs import newton_schulz_flops
    from tinytrain_dist.optim.newton_schulz import orthogonalize

    device = torch.device(options.device)
    now = clock_of(device)
    for rows, columns in ((options.d_model, options.d_model), (4 * options.d_model, options.d_model)):
        seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for _ in range(options.rounds + 1):
            for dtype, measured in seconds.items():
                timed(orthogonalize, measured, now)(torch.randn(rows, columns, dtype=dtype, device=device), 5)
        flops = newton_schulz_flops(rows, columns, 5)
        text = ", ".join(
            f"{str(dtype).removeprefix('torch.')} {1000 * statistics.median(measured[1:]):.2f} ms "
            f"({flops / statistics.median(measured[1:]) / 1e9:.0f} GFLOP/s)"
            for dtype, measured in seconds.items()
        )
        print(f"Newton-Schulz, 5 steps, {rows} x {columns}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=512, help="width of the model, a multiple of 64 (512)")
    parser.add_argument("--num-layers", type=int, default=4, help="blocks (4)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="vocabulary (8192)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences in a step, on all ranks (4)")
    parser.add_argument("--context-len", type=int, default=256, help="tokens in a sequence (256)")
    parser.add_argument("--parallel", default="auto", help="data-parallel mode (auto)")
    parser.add_argument("--precision", default="fp32", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=10, help="steps with each optimizer; 2 more are not counted (10)")
    options = parser.parse_args()
    measure_steps(options)
    if options.parallel == "auto":
        measure_types(options)


if __name__ == "__main__":
    main()
