"""Measure everything about this trainer on a machine with one or more GPUs, with one command and without a network.

    python benchmarks/gpu.py --out DIR                      # all stages, in less than nine minutes
    python benchmarks/gpu.py --out DIR --resume             # those that are not done yet
    python benchmarks/gpu.py --out DIR --stages loss,attention
    python benchmarks/gpu.py --out DIR --stages end_to_end:1b
    python benchmarks/gpu.py --out DIR --dry-run            # all stages on a CPU, at tiny sizes

`--list` prints all stages. Each stage runs in a process of its own with a time limit, so that a crash costs only that
stage. What a stage has measured before it fails is kept. A stage that would not fit into --budget is skipped, and the
report says so. Each stage updates DIR/report.json and DIR/report.md; DIR/results has a file per stage,
DIR/logs the output of each.

Needs no more than the package's own dependencies. The tests need pytest and hypothesis; the systems that it is compared
with need transformers and accelerate. What is missing is skipped, and the report says so. The package need not be
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_stages.plan import Entry, entries  # noqa: E402
from gpu_stages.report import markdown, speeds  # noqa: E402

SAFETY = 2.0  # a stage is ended after this many times its expected seconds
DRY_SECONDS = 120.0  # limit of each stage of a dry run


def file_name(stage: str) -> str:
    return stage.replace(":", "-")


def run_stage(entry: Entry, options: argparse.Namespace, remaining: float) -> dict[str, Any]:
    """Run a stage in a new process and return its result."""
    out = Path(options.out)
    name = file_name(entry.name)
    numbers = out / "work" / f"{name}.json"
    numbers.parent.mkdir(parents=True, exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    numbers.unlink(missing_ok=True)
    log = out / "logs" / f"{name}.log"
    command = [sys.executable, __file__, "--worker", entry.name, "--out", str(out), "--device", options.device]
    command += ["--dry-run"] if options.dry_run else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "LAUNCHED_AT": str(time.time()), "PYTHONUNBUFFERED": "1"}
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env |= {"HF_HUB_OFFLINE": "1"}
    limit = min(remaining, DRY_SECONDS if options.dry_run else SAFETY * entry.seconds)
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
        status, error = "done", ""
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            status, error, code = "timeout", f"ended after {limit:.0f} s", 0
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the stage has started
            process.wait()
    tail = log.read_text(errors="replace")[-2500:]
    if code:
        status, error = "failed", f"exit code {code}\n{tail}"
    found = json.loads(numbers.read_text()) if numbers.exists() else {"values": {}, "notes": []}
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "error": error, **found}


def work(options: argparse.Namespace) -> None:
    """Be the process of one stage."""
    from gpu_stages.context import Stage
    from gpu_stages.training import leave

    entry = next(e for e in entries(options.dry_run, count_gpus(options)) if e.name == options.worker)
    out = Path(options.out).resolve()
    folder = out / "work" / file_name(entry.name)
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stage(entry.name, options.device, options.dry_run, folder, out / "work" / f"{folder.name}.json")
    module, _, function = entry.function.partition(".")
    run = getattr(importlib.import_module(f"gpu_stages.{module}"), function)
    run(stage, entry.case) if entry.case else run(stage)
    sys.stdout.flush()
    sys.stderr.flush()
    leave()


def count_gpus(options: argparse.Namespace) -> int:
    """Return the number of GPUs, without importing torch."""
    if options.device == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    devices = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return len(devices) or int(shutil.which("nvidia-smi") is not None)


def selected(options: argparse.Namespace) -> list[Entry]:
    """Return the stages that --stages names, in their order. Errors: SystemExit for an unknown name."""
    every = entries(options.dry_run, count_gpus(options))
    wanted = [name for name in options.stages.split(",") if name]
    for name in wanted:
        if not any(entry.name == name or entry.name.startswith(f"{name}:") for entry in every):
            groups = ", ".join(dict.fromkeys(entry.group for entry in every))
            raise SystemExit(f"--stages: {name!r} is no stage; expected names from {groups}, or one that --list prints")
    if not wanted:
        return every
    return [e for e in every if any(e.name == name or e.name.startswith(f"{name}:") for name in wanted)]


def write_reports(out: Path, results: dict[str, dict[str, Any]]) -> str:
    text = markdown(results)
    (out / "report.md").write_text(text)
    body = {"stages": results, "training": speeds(results)}
    (out / "report.json").write_text(json.dumps(body, indent=1))
    return text


def run_all(options: argparse.Namespace) -> int:
    """Run the selected stages; return the number of those that failed."""
    start = time.monotonic()
    out = Path(options.out)
    (out / "results").mkdir(parents=True, exist_ok=True)
    stages = selected(options)
    results: dict[str, dict[str, Any]] = {}
    for entry in entries(options.dry_run, count_gpus(options)):  # reports also have what earlier calls measured
        path = out / "results" / f"{file_name(entry.name)}.json"
        if path.exists():
            results[entry.name] = json.loads(path.read_text())
    for entry in stages:
        path = out / "results" / f"{file_name(entry.name)}.json"
        if options.resume and results.get(entry.name, {}).get("status") == "done":
            continue
        remaining = options.budget - (time.monotonic() - start)
        expected = 0 if options.dry_run else entry.seconds
        if entry.unavailable:
            result = skipped(entry.unavailable)
        elif remaining < max(expected, 1):
            result = skipped(f"needs about {entry.seconds:.0f} s, and {remaining:.0f} s of the budget are left")
        else:
            result = run_stage(entry, options, remaining)
        kept = results.get(entry.name, {})
        if result["status"] == "skipped" and kept.get("values"):
            result = kept  # of an earlier call
        results[entry.name] = result
        path.write_text(json.dumps(result, indent=1))
        write_reports(out, results)
        passed = time.monotonic() - start
        print(f"{passed:6.0f} s  {entry.name}: {result['status']} {result['seconds']:.0f} s", flush=True)
    print("\n" + write_reports(out, results))
    return sum(results[entry.name]["status"] in ("failed", "timeout") for entry in stages)


def skipped(why: str) -> dict[str, Any]:
    return {"status": "skipped", "seconds": 0.0, "error": "", "values": {}, "notes": [f"skipped: {why}"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu", help="folder of results, logs and reports (runs/gpu)")
    parser.add_argument("--stages", default="", help="names of stages or of groups, with commas (all)")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for all stages together (530)")
    parser.add_argument("--resume", action="store_true", help="skip stages that are done in --out already")
    parser.add_argument("--dry-run", action="store_true", help="all stages at tiny sizes on a CPU")
    parser.add_argument("--device", default="", choices=["", "cpu", "cuda"], help="cuda, or cpu in a dry run")
    parser.add_argument("--list", action="store_true", help="print the stages and the seconds that each takes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.dry_run else "cuda")
    if options.list:
        for entry in entries(options.dry_run, count_gpus(options)):
            print(f"{entry.seconds:4.0f} s  {entry.name}" + (f" ({entry.unavailable})" if entry.unavailable else ""))
        return
    if options.worker:
        work(options)
        return
    if options.device == "cuda" and not count_gpus(options):
        sys.exit("--device: cuda needs a GPU, and this machine has none; --dry-run tries all stages on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM; --resume continues"))
    sys.exit(1 if run_all(options) else 0)


if __name__ == "__main__":
    main()
