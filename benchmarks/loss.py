"""Measure the time and memory of output head and loss: this project's chunks, plain cross-entropy, and torch's own.

    python benchmarks/loss.py [--vocab-size 10000,50000,128000] [--tokens 1024] [--d-model 256] [--device cpu]

Methods:

* `plain`: all logits at once, then F.cross_entropy;
* `torch`: torch's linear_cross_entropy;
* `eager` and `compiled`: this project's chunks, without and with torch.compile;
* `compiled/128`: the same as `compiled`, in chunks of 128 tokens.

Each line is a new process with one thread. It has the fastest of some repetitions of forward and backward, and how much
the peak memory grew beyond inputs, weight and their gradients (on a GPU: of the allocator, otherwise of the process).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

METHODS = ["plain", "torch", "eager", "compiled", "compiled/128", "compiled/256", "compiled/512", "compiled/1024"]


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from tinytrain_dist.model.loss import chunk_loss_and_grad, head_loss_sum
    from tinytrain_dist.training.determinism import keep_freed_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)  # all methods get the same values, so their losses can be compared
    keep_freed_memory(torch.device(options.device))
    name, _, chunk = method.partition("/")
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    hidden = torch.randn(options.tokens, options.d_model, dtype=dtype, device=options.device, requires_grad=True)
    weight = torch.randn(int(options.vocab_size), options.d_model, device=options.device).mul_(0.02).requires_grad_()
    targets = torch.randint(0, int(options.vocab_size), (options.tokens,), device=options.device)
    chunk_loss: Any = torch.compile(chunk_loss_and_grad) if name == "compiled" else chunk_loss_and_grad
    linear_cross_entropy = getattr(F, "linear_cross_entropy", None)

    def loss() -> torch.Tensor:
        if name == "plain":
            return F.cross_entropy(F.linear(hidden, weight.to(dtype)).float(), targets, reduction="sum")
        if name == "torch":
            assert linear_cross_entropy is not None, "this version of torch has no linear_cross_entropy"
            chunking = torch.nn.LinearCrossEntropyOptions()
            found: torch.Tensor = linear_cross_entropy(
                hidden, weight.to(dtype), targets, reduction="sum", options=chunking
            )
            return found
        return head_loss_sum(hidden, weight, targets, int(chunk) if chunk else None, chunk_loss)

    def both() -> float:
        hidden.grad = weight.grad = None
        value = loss()
        value.backward()
        return float(value)

    hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    torch.compile(torch.sin)(torch.zeros(8)) if name == "compiled" else None  # the compiler's own memory must not count
    before = peak(options.device)
    value = both()
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        both()
        times.append(time.perf_counter() - start)
    return {"ms": 1000 * min(times), "mib": (peak(options.device) - before) / 2**20, "loss": value / options.tokens}


def peak(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", default="10000,50000,128000", help="vocabulary sizes, with commas")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in the batch (1024)")
    parser.add_argument("--d-model", type=int, default=256, help="width of the hidden states (256)")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=4, help="repetitions, of which the fastest counts (4)")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to measure, with commas (all)")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        print("RESULT " + json.dumps(measure(options.method, options)))
        return
    print(f"{options.tokens} tokens, d_model {options.d_model}, {options.precision}, {options.device}, one thread")
    for vocab_size in options.vocab_size.split(","):
        for method in options.methods.split(","):
            arguments = [sys.executable, __file__, *sys.argv[1:], "--method", method, "--vocab-size", vocab_size]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=env)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                print(f"{vocab_size:>7} {method:<14} failed: {(done.stderr.strip().splitlines() or [''])[-1][:90]}")
                continue
            found = json.loads(line.removeprefix("RESULT "))
            print(
                f"{vocab_size:>7} {method:<14}{found['ms']:>8.1f} ms{found['mib']:>8.0f} MiB   loss {found['loss']:.5f}"
            )


if __name__ == "__main__":
    main()
