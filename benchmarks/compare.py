"""Compare this trainer with its alternatives: the same model sizes, data and batch, one after the other.

    python benchmarks/compare.py [--precision bf16] [--rounds 3] [--steps 10] [--systems ours,hf,loop,compiled]
    python benchmarks/compare.py --device cuda --size 1b --ranks 1 --precision bf16

Systems:

* `ours` (DDP with default settings), `ours-eager`, `ours-fsdp`, `ours-hsdp`, `ours-reproducible`;
* `hf` and `hf-compiled`: the Hugging Face Trainer with LlamaForCausalLM, without and with torch.compile;
* `loop` and `compiled`: a minimal hand-written loop around LlamaForCausalLM, without and with torch.compile. With
  several ranks it uses DDP.

In each round every system has one turn. In each turn torchrun starts new processes. The table has these columns:

* tokens/s: the median step of each turn after warm-up; of these the median and the range over all turns. On a GPU it
  is the mean of the steps: the processes wait for the GPU only before the first and after the last measured step;
* ratio: how many times as fast the first system is, in the same round (median and range);
* of ceiling: the share of the speed of matrix products alone, measured in each round on the same processes (on a GPU
  this is MFU);
* cpu/step: processor time of a step on rank 0. Other work on the machine changes it less than it changes wall time;
* peak: peak memory of the process that used most;
* first step: seconds from the launch to the end of the first step, in the first turn and in the fastest one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 2, "d_model": 64, "num_heads": 2, "d_ff": 128, "vocab_size": 512, "context_len": 64},
    "small": {"num_layers": 6, "d_model": 256, "num_heads": 8, "d_ff": 704, "vocab_size": 10_000, "context_len": 256},
    "124m": {
        "num_layers": 12,
        "d_model": 768,
        "num_heads": 12,
        "d_ff": 2048,
        "vocab_size": 50_304,
        "context_len": 1024,
    },
    "350m": {
        "num_layers": 24,
        "d_model": 1024,
        "num_heads": 16,
        "d_ff": 2816,
        "vocab_size": 50_304,
        "context_len": 1024,
    },
    "1b": {"num_layers": 16, "d_model": 2048, "num_heads": 16, "d_ff": 8192, "vocab_size": 50_304, "context_len": 2048},
}
WARM_UP = 3
Options = argparse.Namespace


class Clock:
    """Record when the steps of this process ended.

    On a GPU the process waits for it after the first step, after the warm-up and after the last step, and not between:
    a wait after each step would stop the process from working ahead. The times of single steps are of CUDA events.
    """

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.last = device, steps + WARM_UP + 1
        self.ends, self.cpu = [0.0], [0.0]
        self.events: list[Any] = []

    def tick(self) -> None:
        count = len(self.ends)  # of steps that have ended, this one included
        if self.device == "cuda":
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
            if count in (1, WARM_UP + 1, self.last):
                torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if count == 1:
            self.first = time.time() - float(os.environ["LAUNCHED_AT"])

    def result(self) -> dict[str, Any]:
        import torch

        steps = np.diff(self.ends)[1 + WARM_UP :].tolist()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found: dict[str, Any] = {}
        if self.device == "cuda":
            torch.cuda.synchronize()
            steps = [sum(steps) / len(steps)]
            peak = torch.cuda.max_memory_allocated()
            pairs = itertools.pairwise(self.events[WARM_UP : self.last])
            found = {"by_events": [start.elapsed_time(end) / 1000 for start, end in pairs]}
        cpu = np.diff(self.cpu)[1 + WARM_UP :].tolist()
        return {"steps": steps, "cpu": cpu, "peak": peak, "first": self.first, **found}


def build_ours(options: Options, folder: str, **overrides: Any) -> Any:
    """Return this project's Trainer for the system in `options`. It never evaluates and saves only on request."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    kind = options.system.partition("-")[2]
    uncompiled = {"compile": False} if kind == "eager" or options.size == "tiny" else {}
    other: dict[str, Any] = {"stop_at_step": options.steps + WARM_UP + 1, **uncompiled, **sizes(options), **overrides}
    if kind == "hsdp":
        other |= {"dp_replicate": 2, "dp_shard": options.ranks // 2}
    config = TrainingConfig(
        target_dir=f"{folder}/run-{os.environ['LAUNCHED_AT']}", train_data=f"{folder}/train.npy", device=options.device,
        total_steps=10**6, ckpt_every=10**9, eval_every=10**9, resume="never",
        batch_size=options.batch * options.accumulation * options.ranks, micro_batch_size=options.batch,
        precision=options.precision, reproducible=kind == "reproducible",
        parallel="none" if options.ranks == 1 else kind if kind in ("fsdp", "hsdp") else "ddp", **other,
    )  # fmt: skip
    return Trainer.build(config, init_distributed(options.device))


def run_ours(options: Options, folder: str) -> dict[str, Any]:
    clock = Clock(options.device, options.steps)
    trainer = build_ours(options, folder)
    plain = trainer.run_step

    def timed() -> Any:
        result = plain()
        clock.tick()
        return result

    trainer.run_step = timed
    trainer.save = lambda: None
    trainer.saver.saved_step = trainer.config.last_step  # nothing is to be saved here
    trainer.fit()
    return clock.result()


def llama(options: Options) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = sizes(options)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size["vocab_size"], hidden_size=size["d_model"], intermediate_size=size["d_ff"],
            num_hidden_layers=size["num_layers"], num_attention_heads=size["num_heads"],
            max_position_embeddings=size["context_len"], tie_word_embeddings=False, use_cache=False,
        )
    )  # fmt: skip


def hf_windows(path: str, length: int) -> Any:
    """Return successive windows of `length` tokens of a token file, in the form that the Hugging Face Trainer takes."""
    import torch

    tokens = np.load(path, mmap_mode="r")

    class Windows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(tokens) // length

        def __getitem__(self, i: int) -> dict[str, Any]:
            ids = torch.from_numpy(tokens[i * length : (i + 1) * length].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    return Windows()


def run_hf(options: Options, folder: str) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    windows = hf_windows(f"{folder}/train.npy", sizes(options)["context_len"])
    clock = Clock(options.device, options.steps)

    class Ends(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    arguments = TrainingArguments(
        output_dir=f"{folder}/hf", per_device_train_batch_size=options.batch, max_steps=options.steps + WARM_UP + 1,
        gradient_accumulation_steps=options.accumulation, bf16=options.precision != "fp32",
        torch_compile=options.system == "hf-compiled", use_cpu=options.device == "cpu", logging_steps=10,
        save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3, weight_decay=0.1,
        max_grad_norm=1.0, adam_beta2=0.95, ddp_backend="gloo" if options.device == "cpu" else None,
    )  # fmt: skip
    Trainer(model=llama(options), args=arguments, train_dataset=windows, callbacks=[Ends()]).train()
    return clock.result()


def run_loop(options: Options, folder: str) -> dict[str, Any]:
    """Train with a loop as in a tutorial: autocast, fused AdamW, clipping, a mapped token file; DDP if needed."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    clock, length = Clock(options.device, options.steps), sizes(options)["context_len"]
    if options.ranks > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    tokens = np.load(f"{folder}/train.npy", mmap_mode="r")
    rng = np.random.default_rng(int(os.environ.get("RANK", "0")))
    model = llama(options).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if options.ranks > 1 else model
    step: Any = torch.compile(wrapped) if options.system == "compiled" else wrapped
    for _ in range(options.steps + WARM_UP + 1):
        for micro_step in range(options.accumulation):
            if options.ranks > 1:
                wrapped.require_backward_grad_sync = micro_step == options.accumulation - 1
            starts = rng.integers(0, len(tokens) - length, options.batch)
            rows = torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))
            rows = rows.pin_memory() if options.device == "cuda" else rows
            ids = rows.to(options.device, non_blocking=True)
            with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision != "fp32"):
                loss = step(input_ids=ids, labels=ids).loss
            (loss / options.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
    return clock.result()


def run_ceiling(options: Options, folder: str) -> dict[str, Any]:
    """Run matrix products alone, on all processes at once; return the FLOP/s of this process for the fastest shape."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    from tinytrain_dist.model.matmul import matmul_dtype

    size = sizes(options)
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    dtype = matmul_dtype(torch.empty(0, dtype=dtype, device=options.device))  # on a CPU without bf16 it is float32
    tokens, best = options.batch * size["context_len"], 0.0
    for rows, inner, width in (
        (tokens, size["d_model"], size["d_ff"]),
        (tokens, size["d_ff"], size["d_model"]),
        (tokens, size["d_model"], size["vocab_size"]),
        (2048, 2048, 2048),
    ):
        a = torch.randn(rows, inner, dtype=dtype, device=options.device)
        b = torch.randn(width, inner, dtype=dtype, device=options.device)
        flops = 2 * rows * inner * width
        count = max(3, int(2e10 // flops)) * (200 if options.device == "cuda" else 1)
        dist.barrier()
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(count):
                torch.nn.functional.linear(a, b)
            if options.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, flops * count / (time.perf_counter() - start))
    return {"flops": best}


RUNNERS = {"hf": run_hf, "hf-compiled": run_hf, "loop": run_loop, "compiled": run_loop, "ceiling": run_ceiling}
RUNNERS |= dict.fromkeys(("ours", "ours-eager", "ours-fsdp", "ours-hsdp", "ours-reproducible"), run_ours)


def sizes(options: Options) -> dict[str, int]:
    return SIZES[options.size] | ({"vocab_size": options.vocab_size} if options.vocab_size else {})


def flops_per_token(options: Options) -> float:
    """Return 6 per matrix weight, and 6 x layers x width x context for causal attention (forward and backward)."""
    s = sizes(options)
    layer = 4 * s["d_model"] ** 2 + 3 * s["d_model"] * s["d_ff"]
    matrices = s["num_layers"] * layer + s["vocab_size"] * s["d_model"]
    return 6.0 * matrices + 6.0 * s["num_layers"] * s["d_model"] * s["context_len"]


def turn(options: Options, system: str, precision: str, folder: str) -> list[dict[str, Any]]:
    """Start `system` on all ranks and return the result of each."""
    out = Path(folder) / "results"
    out.mkdir(exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    arguments = ["--worker", folder, "--system", system, "--precision", precision, "--size", options.size]
    arguments += ["--device", options.device, "--ranks", str(options.ranks), "--steps", str(options.steps)]
    arguments += ["--accumulation", str(options.accumulation)]
    arguments += ["--batch", str(options.batch), "--vocab-size", str(options.vocab_size)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}", __file__]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "LAUNCHED_AT": str(time.time())}
    if options.cold:
        env["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor-{system}"
    log = Path(folder) / "log"
    with open(log, "w") as file:
        subprocess.run([sys.executable, *launch, *arguments], stdout=file, stderr=file, check=False, env=env)
    found = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
    if len(found) != options.ranks:
        raise SystemExit(f"{system} failed:\n{log.read_text()[-6000:]}")
    return found


def compare(options: Options, precision: str, folder: str) -> None:
    systems = options.systems.split(",")
    found: dict[str, list[list[dict[str, Any]]]] = {system: [] for system in systems}
    ceilings = []
    for _ in range(options.rounds):
        ceilings.append(sum(rank["flops"] for rank in turn(options, "ceiling", precision, folder)))
        for system in systems:
            found[system].append(turn(options, system, precision, folder))
            seconds, cpu = (1000 * statistics.median(found[system][-1][0][name]) for name in ("steps", "cpu"))
            line = f"  {precision} {system}: {seconds:.0f} ms per step, {cpu:.0f} ms processor time"
            print(line, file=sys.stderr, flush=True)
    ceiling = max(ceilings)
    tokens = options.batch * options.accumulation * options.ranks * sizes(options)["context_len"]
    print(
        f"\n{precision}: matmul ceiling {ceiling / 1e9:.0f} GFLOP/s ({min(ceilings) / 1e9:.0f} .. {ceiling / 1e9:.0f})"
    )
    print(
        f"{'system':<18}{'tokens/s':>9}{'range':>16}{'ratio':>7}{'range':>14}"
        f"{'of ceiling':>12}{'cpu/step':>11}{'peak':>10}{'first step':>12}"
    )
    speeds = {s: [tokens / statistics.median(ranks[0]["steps"]) for ranks in turns] for s, turns in found.items()}
    for system in systems:
        mine, turns = speeds[system], found[system]
        ratios = [a / b for a, b in zip(speeds[systems[0]], mine, strict=True)]
        peak = max(rank["peak"] for ranks in turns for rank in ranks) / 2**20
        cpu = 1000 * min(statistics.median(ranks[0]["cpu"]) for ranks in turns)
        first = [ranks[0]["first"] for ranks in turns]
        speed = statistics.median(mine)
        print(
            f"{system:<18}{speed:>9,.0f}{min(mine):>8,.0f}{max(mine):>8,.0f}{statistics.median(ratios):>7.2f}"
            f"{min(ratios):>7.2f}{max(ratios):>7.2f}{speed * flops_per_token(options) / ceiling:>11.0%} "
            f"{cpu:>7,.0f} ms{peak:>6.0f} MiB{first[0]:>6.1f}, {min(first):.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="ours,hf,loop,compiled", help="systems to compare, with commas")
    parser.add_argument("--precision", default="bf16,fp32", help="bf16, fp32 or fp8, several with commas (bf16,fp32)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system (3)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps in each turn (10)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per process (4)")
    parser.add_argument("--accumulation", type=int, default=1, help="passes of --batch sequences per step (1)")
    parser.add_argument("--ranks", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(SIZES), help="model size (small)")
    parser.add_argument("--vocab-size", type=int, default=0, help="another vocabulary size (0: that of the model)")
    parser.add_argument(
        "--cold", action="store_true", help="the first turn of a system starts without a cache of compiled code"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--system", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = RUNNERS[options.system](options, options.worker)
        Path(options.worker, "results", os.environ["RANK"]).write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)  # some systems leave threads that do not end
    systems = [name for name in RUNNERS if name != "ceiling"]
    if unknown := set(options.systems.split(",")) - set(systems):
        parser.error(f"--systems: got {', '.join(sorted(unknown))}; expected names from {', '.join(systems)}")
    import torch

    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    ranks = f"{options.ranks} ranks, {options.threads} thread(s) each"
    print(f"{device}, {os.cpu_count()} cores, torch {torch.__version__}, {ranks}")
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = sizes(options)["vocab_size"]
        np.save(f"{folder}/train.npy", np.random.default_rng(0).integers(0, vocab_size, 10**7, dtype=np.uint16))
        for precision in options.precision.split(","):
            compare(options, precision, folder)


if __name__ == "__main__":
    main()
