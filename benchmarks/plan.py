"""Compare the memory that `tinytrain plan` predicts with what a step takes, on CPUs or GPUs.

    python benchmarks/plan.py [--device cpu|cuda] [--layers N] [--width D] [--context T]

Each case runs three real steps on 1, 2 or 4 processes. Measured are all bytes that a process holds from malloc, or on a
GPU max_memory_allocated. Cases that need more GPUs than there are do not run. Cases and method are the same as in
tests/training/test_memory_estimate.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.helpers.memory import CASES, MODEL, measure  # noqa: E402
from tests.helpers.ranks import run_ranks  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    parser.add_argument("--layers", type=int, default=MODEL["num_layers"], help="num_layers of the model (%(default)s)")
    parser.add_argument("--width", type=int, default=MODEL["d_model"], help="d_model of the model (%(default)s)")
    parser.add_argument(
        "--context", type=int, default=MODEL["context_len"], help="context_len of the model (%(default)s)"
    )
    options = parser.parse_args()
    sizes = {"num_layers": options.layers, "d_model": options.width, "context_len": options.context}
    most = 4
    if options.device == "cuda":
        import torch

        most = torch.cuda.device_count()  # counts without starting CUDA in this process
    print(f"{'case':<28}{'measured':>12}{'predicted':>12}{'ratio':>8}  predicted peak")
    for name, (ranks, settings) in CASES.items():
        if ranks > most:
            print(f"{name:<28}  not run: it needs {ranks} GPUs, and there are {most}")
            continue
        settings = {**MODEL, **sizes, **settings, "device": options.device}
        measured, predicted, moment = run_ranks(ranks, measure, settings)[0]
        ratio = predicted / measured
        print(f"{name:<28}{measured / 2**20:>8.2f} MiB{predicted / 2**20:>8.2f} MiB{ratio:>8.3f}  {moment}", flush=True)


if __name__ == "__main__":
    main()
