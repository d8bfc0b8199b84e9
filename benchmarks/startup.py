"""Measure the time from the command to the end of the first step, by part, beside the Hugging Face Trainer.

    python benchmarks/startup.py [--ranks 1,2] [--rounds 3] [--systems torchrun-eager,eager,warm,cold,hf] [--json FILE]
    python benchmarks/startup.py --quick

Systems:

* `torchrun-eager`: `torchrun launch/train.py` without torch.compile;
* `eager`, `warm`, `cold`: `tinytrain train` without torch.compile, and with it when its cache is full or empty. The
  cache is a folder of this benchmark. A run that is not counted fills it for `warm`;
* `hf`: torchrun and the Hugging Face Trainer with LlamaForCausalLM of the same size, without torch.compile.

In each round every system has one turn. The table has these columns:

* total: seconds from the command to the end of the first step: median and range;
* relative to hf: total divided by that of `hf` in the same round, and the difference in seconds (medians);
* cpu: processor seconds of the whole command, on all processes, including its end. Other work on the machine changes
  them less than the total;
* the parts of the start on rank 0 (medians), which docs/dashboards.md describes. For `hf`, `join` is the process
  group with the arguments of the Trainer, and `load` is making the Trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

OURS = ("torchrun-eager", "eager", "warm", "cold")
SYSTEMS = (*OURS, "hf")
PARTS = ("launch", "imports", "join", "compiler", "open_data", "build", "load", "first_step")
BATCH = 4  # sequences of each rank
Options = argparse.Namespace


@dataclass(frozen=True)
class Turn:
    """What one start took: seconds until the first step ended, processor seconds, and the parts of the start."""

    total: float
    cpu: float
    parts: dict[str, float]


def config_text(options: Options, folder: Path, ranks: int, compiled: bool) -> str:
    """Return the configuration of a run of one step."""
    from compare import SIZES

    values = {
        **SIZES[options.size],
        "train_data": str(folder / "train.npy"),
        "batch_size": BATCH * ranks,
        "micro_batch_size": BATCH,
        "total_steps": 10**6,
        "stop_at_step": 1,
        "ckpt_every": 10**9,
        "device": options.device,
        "precision": "fp32",
        "compile": compiled,
    }
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def command_of(options: Options, system: str, ranks: int, folder: Path, run: Path) -> list[str]:
    """Return the command of one turn; ours writes metrics.jsonl into `run`, the Hugging Face Trainer a JSON file."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if system == "hf":
        worker = ["--worker", str(run), "--device", options.device, "--size", options.size]
        return [*torchrun, __file__, *worker, "--data", str(folder / "train.npy")]
    config = run.with_suffix(".toml")
    config.write_text(config_text(options, folder, ranks, compiled=system in ("warm", "cold")))
    settings = [str(config), "--target-dir", str(run)]
    if system == "torchrun-eager":
        return [*torchrun, str(ROOT / "launch" / "train.py"), *settings]
    return ["-m", "tinytrain_dist", "train", *settings, "--nproc", str(ranks)]


def take_turn(options: Options, system: str, ranks: int, folder: Path) -> Turn:
    """Start one system, wait for its end, and return what its start took."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    cache = folder / "cold" if system == "cold" else folder / "warm"
    shutil.rmtree(folder / "cold", ignore_errors=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": path}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, *command_of(options, system, ranks, folder, run)]
    before, launched = children_seconds(), time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    cpu = children_seconds() - before
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    record = read_first_step(run)
    shutil.rmtree(run.parent)
    return Turn(record["time"] - launched, cpu, record["start_seconds"])


def children_seconds() -> float:
    """Return the processor seconds of all children of this process that have ended, and of their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_first_step(run: Path) -> dict[str, Any]:
    """Return the record of the first step: `time` (seconds since 1970) and `start_seconds`."""
    if run.is_file():
        return dict(json.loads(run.read_text()))
    records = map(json.loads, (run / "logs" / "metrics.jsonl").read_text().splitlines())
    return next(dict(record) for record in records if record["kind"] == "first_step")


def run_hf(options: Options) -> None:
    """Train one step with the Hugging Face Trainer on this rank; rank 0 writes the seconds of each part."""
    import torch
    from compare import SIZES, hf_windows, llama
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tinytrain_dist.utils.processes import process_age

    age = process_age(os.getpid())
    parts = {"launch": process_age(os.getppid()) - age, "imports": age}
    since = time.monotonic()

    def end(part: str) -> None:
        nonlocal since
        now = time.monotonic()
        parts[part], since = now - since, now

    cpu = options.device == "cpu"
    arguments = TrainingArguments(
        output_dir=f"{options.worker}.hf", per_device_train_batch_size=BATCH, max_steps=1, use_cpu=cpu,
        save_strategy="no", report_to="none", disable_tqdm=True, max_grad_norm=1.0,
        ddp_backend="gloo" if cpu else None,
    )  # fmt: skip
    end("join")

    class FirstStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not cpu:
                torch.cuda.synchronize()
            end("first_step")
            if os.environ["RANK"] == "0":
                Path(options.worker).write_text(json.dumps({"time": time.time(), "start_seconds": parts}))

    data = hf_windows(options.data, SIZES[options.size]["context_len"])
    end("open_data")
    model = llama(argparse.Namespace(size=options.size, vocab_size=0))
    end("build")
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[FirstStep()])
    end("load")
    trainer.train()
    sys.stdout.flush()
    os._exit(0)  # some of its threads do not end


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(turns: dict[tuple[str, int], list[Turn]]) -> str:
    """Return the table in Markdown."""
    head = ["system", "ranks", "total", "relative to hf", "cpu", *(part.replace("_", " ") for part in PARTS)]
    rows = [head, ["---"] * 2 + ["--:"] * (len(head) - 2)]
    for (system, ranks), own in turns.items():
        totals, peers = [turn.total for turn in own], [turn.total for turn in turns.get(("hf", ranks), [])]
        relative = ""
        if peers:
            pairs = list(zip(totals, peers, strict=True))
            relative = f"{median([a / b for a, b in pairs]):.2f} ({median([a - b for a, b in pairs]):+.1f} s)"
        parts = [median([turn.parts.get(part, 0.0) for turn in own]) for part in PARTS]
        total = f"{median(totals):.1f} s ({min(totals):.1f} .. {max(totals):.1f})"
        cpu = f"{median([turn.cpu for turn in own]):.1f} s"
        rows.append([system, str(ranks), total, relative, cpu, *(f"{seconds:.1f}" for seconds in parts)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measure(options: Options, folder: Path) -> dict[tuple[str, int], list[Turn]]:
    """Let all systems take their turns."""
    import numpy as np
    from compare import SIZES

    vocab_size = SIZES[options.size]["vocab_size"]
    np.save(folder / "train.npy", np.random.default_rng(0).integers(0, vocab_size, 10**6, dtype=np.uint16))
    cases = [(system, int(ranks)) for ranks in options.ranks.split(",") for system in options.systems.split(",")]
    turns: dict[tuple[str, int], list[Turn]] = {case: [] for case in cases}
    for system, ranks in cases:
        if system == "warm":
            take_turn(options, system, ranks, folder)  # fills the cache
    for number in range(options.rounds):
        for system, ranks in cases:
            turns[system, ranks].append(take_turn(options, system, ranks, folder))
            seconds = turns[system, ranks][-1].total
            print(f"  round {number + 1}: {system}, {ranks} rank(s): {seconds:.1f} s", file=sys.stderr, flush=True)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="systems to measure, with commas")
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, with commas (1,2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", help="model size, as in compare.py (small)")
    parser.add_argument("--json", type=Path, help="also write all turns to this file")
    parser.add_argument("--quick", action="store_true", help="only try the benchmark: one eager start, a tiny model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_hf(options)
    if options.quick:
        options.systems, options.ranks, options.rounds, options.size = "eager", "1", 1, "tiny"
    if unknown := set(options.systems.split(",")) - set(SYSTEMS):
        parser.error(f"--systems: got {', '.join(sorted(unknown))}; expected names from {', '.join(SYSTEMS)}")
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(options, Path(folder))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, model {options.size}, {options.threads} thread(s) per process\n")
    print(table(turns))
    if options.json:
        cases = [
            {"system": system, "ranks": ranks, "turns": [vars(turn) for turn in own]}
            for (system, ranks), own in turns.items()
        ]
        options.json.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
