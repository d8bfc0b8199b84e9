"""Record what must not change when code is moved or renamed: digests of fixed runs, file formats, public names.

    .venv/bin/python benchmarks/digests.py --out before.json                       # in the old checkout
    .venv/bin/python benchmarks/digests.py --out after.json --resume-from OLD_WORK # in the new one
    diff before.json after.json

OLD_WORK is the folder runs/digests of the old checkout. Bits depend on the CPU and on the version of torch. Compare two
files only if the same machine made both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BASE = {
    "num-layers": 2,
    "d-model": 64,
    "num-heads": 4,
    "context-len": 32,
    "batch-size": 8,
    "micro-batch-size": 2,
    "total-steps": 6,
    "eval-every": 3,
    "eval-steps": 2,
    "ckpt-every": 3,
    "log-every": 1,
    "keep-last": 5,
    "device": "cpu",
    "compile": "false",
}
FSDP2, DDP2 = {"parallel": "fsdp"}, {"parallel": "ddp"}
HSDP4 = {"parallel": "hsdp", "dp-replicate": 2, "dp-shard": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16_compiled": {"precision": "bf16", "compile": "true"},
    "tied": {"tie-embeddings": "true"},
    "gqa_qk_norm": {"num-kv-heads": 2, "qk-norm": "true"},
    "chunked_loss": {"loss-chunk-tokens": 24},
    "micro_1": {"micro-batch-size": 1},
    "wsd_mixture": {"schedule": "wsd", "decay-iters": 3, "mixture": True},
    "recompute": {"activation-checkpointing": "selective"},
}
# name -> (ranks, settings); reproducible unless said otherwise
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{name}/none": (1, settings) for name, settings in VARIANTS.items()},
    **{f"{name}/ddp_2": (2, {**VARIANTS[name], **DDP2}) for name in ("fp32", "bf16", "gqa_qk_norm", "micro_1")},
    **{f"{name}/fsdp_2": (2, {**VARIANTS[name], **FSDP2}) for name in ("fp32", "bf16", "tied", "chunked_loss")},
    "bf16_compiled/fsdp_2": (2, {**VARIANTS["bf16_compiled"], **FSDP2}),
    "fp32/hsdp_2x2": (4, HSDP4),
    "native/none": (1, {"reproducible": "false"}),
    "native/ddp_2": (2, {"reproducible": "false", **DDP2}),
    "native/fsdp_2": (2, {"reproducible": "false", **FSDP2}),
}


def make_data(folder: Path) -> None:
    """Write two training files and one evaluation file of random token IDs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    for name, count in (("train.npy", 20_000), ("more.npy", 9_000), ("val.npy", 3_000)):
        np.save(folder / name, rng.integers(0, 256, size=count).astype(np.uint16))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 257}))


def train(run: Path, data: Path, ranks: int, settings: dict[str, Any]) -> None:
    """Run one case to its end. Errors: SystemExit with the output if it fails."""
    values: dict[str, Any] = {**BASE, "reproducible": "true", **settings, "target-dir": run}
    mixture = values.pop("mixture", False)
    files = [data / "train.npy", data / "more.npy"] if mixture else [data / "train.npy"]
    words = [f"--{name}={value}" for name, value in values.items()]
    words += ["--train-data", *map(str, files), "--val-data", str(data / "val.npy")]
    words += ["--train-weights", "0.7", "0.3"] if mixture else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "launch/train.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{run.name} ended with exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def digests(run: Path) -> dict[str, str]:
    """Return the digests that `tinytrain hash` prints for the newest checkpoint, by kind."""
    tinytrain = Path(sys.executable).with_name("tinytrain")
    printed = subprocess.run([tinytrain, "hash", run], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line.split()[0]: line.split()[1] for line in printed.splitlines()}


def keys_of(value: Any, depth: int = 2) -> Any:
    """Replace the values of nested dictionaries by their types, down to `depth`."""
    if isinstance(value, dict) and depth:
        return {key: keys_of(inner, depth - 1) for key, inner in sorted(value.items())}
    return type(value).__name__


def formats(run: Path) -> dict[str, Any]:
    """Return the names of the files that a run leaves on disk, and the keys in them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    records: dict[str, set[str]] = {}
    for line in (run / "logs" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["kind"], set()).update(record)
    tags: dict[str, list[str]] = {}
    for folder in (run / "logs", run / "logs" / "by_tokens"):
        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        for kind, names in accumulator.Tags().items():
            tags[f"{folder.name}/{kind}"] = sorted(names) if isinstance(names, list) else [str(names)]
    return {
        "run": sorted(str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name),
        "manifest": {"keys": sorted(manifest), "format": manifest["format"], "files": keys_of(manifest["files"])},
        "tensors": {kind: sorted(tensors) for kind, tensors in manifest["tensors"].items()},
        "trainer_state": keys_of(json.loads((checkpoint / "trainer_state.json").read_text())),
        "config.json": keys_of(json.loads((checkpoint / "config.json").read_text())),
        "environment": sorted(json.loads((run / "environment.json").read_text())),
        "state": sorted(json.loads((run / "state.json").read_text())),
        "config.toml": (run / "config.toml").read_text().replace(str(run), "RUN").replace(str(run.parent), "WORK"),
        "metrics": {kind: sorted(keys) for kind, keys in records.items()},
        "tensorboard": tags,
    }


def main() -> None:
    """Run all cases one after the other; each takes about ten seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/digests"),
        help="folder for the runs; it is deleted first (runs/digests)",
    )
    parser.add_argument(
        "--resume-from", type=Path, help="the --work folder of the old checkout; its unfinished run is resumed as well"
    )
    options = parser.parse_args()
    work = options.work.resolve()
    data = work / "data"
    if work.exists() and any(work.iterdir()) and not (data / "train.npy").is_file():
        parser.error(f"--work: {work} has files that this program did not write and would delete; name another folder")
    shutil.rmtree(work, ignore_errors=True)
    make_data(data)
    found: dict[str, Any] = {"runs": {}}
    for name, (ranks, settings) in CASES.items():
        run = work / name.replace("/", "-")
        train(run, data, ranks, settings)
        found["runs"][name] = digests(run)
        print(name, *(digest[:16] for digest in found["runs"][name].values()), flush=True)
    # A run that stops half-way. A later version can resume it; a copy is resumed here, on another layout.
    train(work / "half", data, 2, {**DDP2, "stop-at-step": 3})
    for name, source in (("resumed", work), ("resumed_from_older", options.resume_from)):
        if source is not None:
            shutil.copytree(source / "half", work / name)
            train(work / name, source / "data", 2, FSDP2)
            found["runs"][name] = digests(work / name)
            same = found["runs"][name] == found["runs"]["fp32/none"]
            print(name, "the same as fp32/none" if same else "DIFFERS from fp32/none", flush=True)
    found["formats"] = {name: formats(work / name) for name in ("fp32-ddp_2", "wsd_mixture-none")}
    import tinytrain_dist

    found["public"] = sorted(tinytrain_dist.__all__)
    options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
