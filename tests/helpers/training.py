"""Make tiny real runs for tests: token files, settings, a Trainer on some ranks. Must not know what is compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.ranks import run_ranks
from tinytrain_dist.checkpoint.safetensors_io import DTYPE_OF_NAME

# 53 ids: divisible by no world size. Width 16, two heads of 2 and one key head: k_proj has 2 rows, fewer than 4 ranks.
TINY: dict[str, Any] = {
    "device": "cpu",
    "total_steps": 6,
    "log_every": 1,
    "eval_every": 3,
    "eval_steps": 1,
    "ckpt_every": 3,
    "batch_size": 8,
    "micro_batch_size": 1,
    "context_len": 12,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 2,
    "d_model": 16,
    "d_ff": 24,
    "lr_max": 0.01,
    "lr_min": 0.001,
    "warmup_iters": 2,
    "grad_clip_norm": 0.75,
    "parallel": "auto",
}
VOCABULARY = 53


def write_tokens(folder: Path, count: int = 4000, vocab_size: int = VOCABULARY) -> dict[str, str]:
    """Write train and val files in which each token ID mostly determines the next: something to learn."""
    rng = np.random.default_rng(7)
    follow = rng.permutation(vocab_size)
    settings = {}
    for name in ("train", "val"):
        ids = [0]
        for _ in range(count - 1):
            ids.append(int(follow[ids[-1]]) if rng.random() < 0.8 else int(rng.integers(vocab_size)))
        np.save(folder / f"{name}.npy", np.array(ids, dtype=np.uint16))
        settings[f"{name}_data"] = str(folder / f"{name}.npy")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_id": 0}))
    return settings


def settings_for(folder: Path, run: str, **overrides: Any) -> dict[str, Any]:
    """Return the settings of a run named `run`; make the token files on first use."""
    data = {"train_data": str(folder / "train.npy"), "val_data": str(folder / "val.npy")}
    if not (folder / "val.npy").exists():
        data = write_tokens(folder)
    return {**TINY, **data, "target_dir": str(folder / run), **overrides}


def config_file(folder: Path, **overrides: Any) -> str:
    """Write a TOML file with the settings of a run named `run`, with one replica per rank."""
    settings = settings_for(folder, "run", **{"parallel": "ddp", **overrides})
    path = folder / "run.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(path)


def fit(settings: dict[str, Any], prepare: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """On a rank: build a run, train, and return how it ended. `prepare` may change the trainer first."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    context = init_distributed("cpu")
    trainer = Trainer.build(TrainingConfig(**settings), context)
    if prepare is not None:
        prepare(trainer)
    return {"state": trainer.fit(), "step": trainer.step, "skipped": trainer.metrics.skipped}


def fit_all(runs: list[dict[str, Any]]) -> None:
    """On a rank: train runs with these settings one after the other, which saves starts of processes."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    context = init_distributed("cpu")
    for settings in runs:
        Trainer.build(TrainingConfig(**settings), context).fit()


class Run:
    """The files that a finished run left on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "logs" / "metrics.jsonl").read_text()
        self.records = [json.loads(line) for line in text.splitlines()]

    def values(self, kind: str, name: str) -> list[float]:
        return [record[name] for record in self.records if record["kind"] == kind]

    @property
    def checkpoint(self) -> Path:
        return max((self.folder / "checkpoints").glob("checkpoint-????????"))

    def digests(self) -> dict[str, str]:
        """Return the BLAKE3 digest of each tensor of the last checkpoint, weights and optimizer state."""
        manifest = json.loads((self.checkpoint / "manifest.json").read_text())
        return {name: t["blake3"] for kind in manifest["tensors"].values() for name, t in kind.items()}

    def weights(self) -> dict[str, Any]:
        from tinytrain_dist.checkpoint.safetensors_io import TensorReader

        reader = TensorReader(self.checkpoint, "model")
        return {name: reader.read(name) for name in reader.files}


def in_older_format(checkpoint: Path, number: int) -> None:
    """Replace the manifest of a checkpoint by one in format 1 or 2, with sha256 digests."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text()) | {"format": number}
    del body["sha256"]

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    for name, entry in body["files"].items():
        data = (checkpoint / name).read_bytes()
        at = entry.get("header_bytes", 0)
        digests = [data[:at]]
        for tensor in entry.get("tensors", []):
            noted = body["tensors"][entry["kind"]][tensor]
            size = math.prod(noted["shape"]) * DTYPE_OF_NAME[noted["dtype"]].itemsize
            del noted["blake3"]
            noted["sha256"] = digest(data[at : at + size])
            digests.append(bytes.fromhex(noted["sha256"]))
            at += size
        if number == 2 and len(digests) > 1:
            del entry["blake3_of_digests"]
            entry["sha256_of_digests"] = digest(b"".join(digests))
        else:
            body["files"][name] = {"bytes": len(data), "sha256": digest(data)}
    path.write_text(json.dumps({**body, "sha256": digest(json.dumps(body, sort_keys=True).encode())}))


def train(folder: Path, run: str, world_size: int, **overrides: Any) -> Run:
    """Train a run on `world_size` ranks and return its files."""
    run_ranks(world_size, fit, settings_for(folder, run, **overrides))
    return Run(folder / run)
