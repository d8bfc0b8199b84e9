"""Owns checkpoints: what of a run is saved, by whom, when one counts as valid, which is loaded and which are kept.

Must not know the loop. Rank 0 alone lists, creates, writes and deletes; everything else asks it. Tensors are whole on
disk, so that any number of ranks in any mode can read them; no rank holds more than its shards and one tensor.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tinytrain_dist import distributed
from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.distributed import DistributedContext
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.huggingface import check_fits, huggingface_config
from tinytrain_dist.optim import local
from tinytrain_dist.parallel import original_name, shard_range, unwrap
from tinytrain_dist.tensorfiles import (
    DTYPES,
    Manifest,
    Spec,
    TensorReader,
    commit,
    problems_in,
    read_manifest,
    write_bytes,
    write_json,
    write_tensors,
)

STATE = "trainer_state.json"
IDENTITY = (
    "vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff", "rope_theta",
    "rope_scaling_factor", "rope_original_context_len", "rope_low_freq_factor", "rope_high_freq_factor",
    "tie_embeddings", "qk_norm", "norm_eps", "context_len", "batch_size", "seed",
)  # fmt: skip
SHARD_BYTES = 2 * 1024**3


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by original name; a tensor with two names (tied weights) comes once.

    Errors: CheckpointError for module state that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: is {type(value).__name__}, but only tensors can be saved; make it a buffer")
        if id(value) not in seen:
            seen.add(id(value))
            found[original_name(name)] = value
    return found


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named PARAMETER.KEY, and the rest of it as plain values.

    Errors: CheckpointError for a parameter that is not the model's or a state that is neither tensor nor number.
    """
    names = {id(param): name for name, param in model_tensors(model).items()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        unknown = [param for param in group["params"] if id(param) not in names]
        if unknown:
            raise CheckpointError(f"the optimizer holds a parameter {list(unknown[0].shape)} that is not the model's")
        settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        groups.append({**settings, "params": [names[id(param)] for param in group["params"]]})
        for param in group["params"]:
            for key, value in optimizer.state.get(param, {}).items():
                name = f"{names[id(param)]}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                elif value is None or isinstance(value, int | float | str | bool):
                    values[name] = value
                else:
                    raise CheckpointError(f"{name}: is {type(value).__name__}; only tensors and numbers can be saved")
    return tensors, {"state": values, "param_groups": groups}


def _specs(tensors: dict[str, Tensor]) -> list[Spec]:
    return [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    extra_files: dict[str, bytes],
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write one complete checkpoint folder. A collective: every rank sends its shards, rank 0 writes.

    Errors: on every rank, CheckpointError if `path` exists, or rank 0's OSError; then nothing is left behind.
    """
    kinds = {"model": model_tensors(model)}
    if optimizer is not None:
        kinds["optimizer"], state["optimizer"] = optimizer_tensors(model, optimizer)
    if not distributed.is_main():
        for tensors in kinds.values():
            for tensor in tensors.values():
                distributed.gather_to_main(tensor.detach())
        distributed.raise_together(None)
        return
    aside = path.with_name(path.name + ".tmp")
    error: Exception | None = None
    fetched = 0
    order = [tensor for tensors in kinds.values() for tensor in tensors.values()]

    def fetch(spec: Spec) -> Tensor:
        nonlocal fetched
        whole = distributed.gather_to_main(order[fetched].detach())
        fetched += 1
        assert whole is not None
        return whole

    try:
        if path.exists():
            raise CheckpointError(f"{path}: exists already and is not replaced; give another path or delete it")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        manifest = Manifest()
        for kind, tensors in kinds.items():
            write_tensors(aside, kind, _specs(tensors), fetch, max_shard_bytes, manifest)
        for name, data in extra_files.items():
            write_bytes(aside, name, data, manifest)
        write_json(aside, STATE, state, manifest)
        commit(aside, path, manifest)
    except (OSError, CheckpointError) as caught:
        error = caught
        shutil.rmtree(aside, ignore_errors=True)
        for tensor in order[fetched:]:  # the others are sending: take it, or they wait for ever
            distributed.gather_to_main(tensor.detach())
    distributed.raise_together(error)


def read_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Fill model and optimizer from a folder, each rank its own rows, and return the saved state.

    Optimizer state must exist already (AdamW.materialize). Errors: CheckpointError naming what is missing, surplus, or
    of another shape or type, with both sides; nothing has been changed then.
    """
    manifest = read_manifest(path)
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    kinds = {"model": model_tensors(model)}
    if optimizer is not None:
        kinds["optimizer"] = optimizer_tensors(model, optimizer)[0]
    for kind, tensors in kinds.items():
        _check_same(path, kind, manifest.tensors.get(kind, {}), tensors)
    for kind, tensors in kinds.items():
        load_tensors(TensorReader(path, kind), tensors)
    return state


def _check_same(path: Path, kind: str, saved: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    problems = [f"{name}: is missing" for name in wanted if name not in saved]
    problems += [f"{name}: is in the checkpoint, but the {kind} has none" for name in saved if name not in wanted]
    for name in saved.keys() & wanted.keys():
        found = (saved[name]["shape"], saved[name]["dtype"])
        here = (list(wanted[name].shape), DTYPES[wanted[name].dtype])
        if found != here:
            problems.append(f"{name}: is {found[1]} {found[0]} in the checkpoint, but {here[1]} {here[0]} here")
    if problems:
        shown = "\n  ".join(sorted(problems)[:10]) + (
            f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        )
        raise CheckpointError(f"{path}: does not fit this {kind}; use the configuration it was made with:\n  {shown}")


@torch.no_grad()
def load_tensors(reader: TensorReader, tensors: dict[str, Tensor]) -> None:
    """Copy each tensor's rows of this rank from disk."""
    for name, tensor in tensors.items():
        mine = local(tensor)
        if mine.numel():
            start, stop = shard_range(tensor) if isinstance(tensor, DTensor) else (0, None)
            mine.copy_(reader.read(name, start, stop))


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out_path: str | Path) -> None:
    """Save any module and torch optimizer as a folder at `out_path`, complete or not at all.

    Needs no process group; with one it is a collective and rank 0 writes. An existing path is never replaced.
    Errors: CheckpointError if out_path exists, or for state that cannot be saved; OSError from the disk.
    """
    write_checkpoint(Path(out_path), model, optimizer, {"step": int(iteration)}, {})


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, src_path: str | Path) -> int:
    """Load what save_checkpoint (or a training run) wrote and return its iteration.

    Every byte is checked first. The optimizer's settings (learning rate, betas, ...) come back as well.
    Errors: CheckpointError for a damaged folder, or one that does not fit; model and optimizer are unchanged then.
    """
    path = Path(src_path)
    problems = problems_in(path)
    if problems:
        raise CheckpointError("\n".join(problems))
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    _check_same(path, "model", read_manifest(path).tensors.get("model", {}), model_tensors(model))
    _materialize_state(model, optimizer, path, state)
    read_checkpoint(path, model, optimizer)
    for group, saved in zip(optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
        for key, value in saved.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    return int(state["step"])


def _materialize_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, state: dict[str, Any]) -> None:
    """Give a torch optimizer, which makes its state lazily, the state tensors that the checkpoint has."""
    saved = read_manifest(path).tensors.get("optimizer", {})
    dtypes = {text: dtype for dtype, text in DTYPES.items()}
    names = {id(param): name for name, param in model_tensors(model).items()}
    groups = state.get("optimizer", {}).get("param_groups", [])
    ours = [[names.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]
    if [group["params"] for group in groups] != ours:
        raise CheckpointError(
            f"{path}: its optimizer has {[len(g['params']) for g in groups]} parameters in its groups, this one "
            f"{[len(group) for group in ours]}, or in another order; build it as when the checkpoint was saved"
        )
    for group in optimizer.param_groups:
        for param in group["params"]:
            prefix = names[id(param)] + "."
            slots: dict[str, Any] = {}
            for name in (name for name in saved if name.startswith(prefix) and "." not in name[len(prefix) :]):
                shape, dtype = saved[name]["shape"], dtypes[saved[name]["dtype"]]
                alike = list(param.shape) == shape and len(shape) > 0
                slots[name[len(prefix) :]] = (
                    torch.zeros_like(param, dtype=dtype) if alike else torch.zeros(shape, dtype=dtype)
                )
            for name, value in state["optimizer"]["state"].items():
                if name.startswith(prefix) and "." not in name[len(prefix) :]:
                    slots[name[len(prefix) :]] = value
            optimizer.state.pop(param, None)
            if slots:
                optimizer.state[param] = slots


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: their folder, and what every one of them says about the run."""

    config: TrainingConfig
    context: DistributedContext
    data: dict[str, Any]
    bits: dict[str, Any]  # what decides the last bit besides the settings that make it another run

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.config.checkpoints_dir / f"{self.config.ckpt_save_prefix}-{step:08d}"

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, report: dict[str, Any]) -> float:
        """Save the state after `step` and delete what retention gives up; returns seconds. A collective.

        `report` (losses and the like) is kept in trainer_state.json. A checkpoint of this step that is already there is
        left as it is: the run is a function of its configuration, so it holds the same.
        """
        started = time.monotonic()
        if self.context.broadcast_object(self.folder(step).exists()):
            return 0.0
        state = {
            "step": step,
            "tokens": step * self.config.batch_size * self.config.context_len,
            "config": self.config.resolved(),
            "data": self.data,
            "report": report,
            "bits": self.bits,
        }
        write_checkpoint(self.folder(step), model, optimizer, state, self._extra_files(), self.config.max_shard_bytes)
        if self.context.is_main:
            self._retain()
        return time.monotonic() - started

    def find(self) -> Path | None:
        """The checkpoint to resume from by the `resume` setting, every byte of it checked; None for a fresh start.

        A collective: rank 0 looks, the others are told. A damaged one is renamed to NAME.damaged and named.
        Errors: CheckpointError if a checkpoint that was asked for is missing or damaged, or if all are damaged.
        """
        error, found = None, None
        if self.context.is_main:
            try:
                found = self._newest_valid() if self.config.resume_from == "auto" else self._asked_for()
            except CheckpointError as caught:
                error = caught
        distributed.raise_together(error)
        path: Path | None = self.context.broadcast_object(found)
        return path

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], list[str]]:
        """Fill model and optimizer from `path`; the saved state, and the settings that differ, as sentences.

        Errors: CheckpointError if the settings or the data that make the run what it is are not the saved ones.
        """
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        saved, now = state.get("config", {}), self.config.resolved()
        differing = [key for key in now if key in saved and saved[key] != now[key]]
        refused = [f"{key}: {saved[key]} in the checkpoint, {now[key]} now" for key in differing if key in IDENTITY]
        if self.data and state.get("data") != self.data:
            refused.append(f"train_data: {state.get('data')} in the checkpoint, {self.data} now")
        if refused:
            raise CheckpointError(
                f"{path}: belongs to another run; start a new one (another target_dir), or set back:\n  "
                + "\n  ".join(refused)
            )
        drift = [
            f"{k}: {v} in the checkpoint, {self.bits[k]} now" for k, v in state["bits"].items() if self.bits[k] != v
        ]
        if drift and self.config.reproducible and not self.config.allow_drift:
            raise CheckpointError(
                f"{path}: going on here would not give the same bits; set back, or set allow_drift = true:\n  "
                + "\n  ".join(drift)
            )
        read_checkpoint(path, model, optimizer)
        return state, [f"{key}: {saved[key]} -> {now[key]}" for key in differing]

    def _asked_for(self) -> Path | None:
        if self.config.resume_from == "never":
            left = self._all()
            if left:
                raise CheckpointError(
                    f"{self.config.checkpoints_dir}: holds {len(left)} checkpoint(s), but resume = never starts anew; "
                    "set resume = auto, or another target_dir"
                )
            return None
        path = Path(self.config.resume_from)
        problems = problems_in(path)
        if problems:
            raise CheckpointError(f"resume = {path}: " + "; ".join(problems))
        return path

    def _all(self) -> list[Path]:
        pattern = re.compile(re.escape(self.config.ckpt_save_prefix) + r"-\d{8,}")
        folder = self.config.checkpoints_dir
        names = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
        return sorted(names, key=lambda path: int(path.name.rpartition("-")[2]))

    def _newest_valid(self) -> Path | None:
        candidates = self._all()
        for path in reversed(candidates):
            problems = problems_in(path)
            if not problems:
                return path
            _set_aside(path, problems)
        if candidates:
            raise CheckpointError(
                f"{self.config.checkpoints_dir}: none of {len(candidates)} checkpoint(s) is valid; restore one, or "
                "start anew with another target_dir"
            )
        return None

    def _retain(self) -> None:
        every = self.config.keep_every
        for path in self._all()[: -self.config.keep_last]:
            if every and int(path.name.rpartition("-")[2]) % every == 0:
                continue
            try:
                aside = path.with_name(path.name + ".tmp")  # never half a checkpoint under its own name
                path.rename(aside)
                shutil.rmtree(aside)
            except OSError as error:
                print(f"warning: {path} could not be deleted ({error}); it takes disk space", flush=True)

    def _extra_files(self) -> dict[str, bytes]:
        """config.json, and the tokenizer where the data has one, so that the folder is a Hugging Face model."""
        data = Path(self.config.train_data or "").parent
        meta = json.loads((data / "meta.json").read_text(encoding="utf-8")) if (data / "meta.json").is_file() else {}
        description = huggingface_config(self.config, meta.get("eos_id"))
        files = {"config.json": (json.dumps(description, indent=1) + "\n").encode()}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (data / name).is_file():
                files[name] = (data / name).read_bytes()
        return files


def _set_aside(path: Path, problems: list[str]) -> None:
    """Say loudly what is wrong with a checkpoint, and rename it so that it is neither tried again nor lost."""
    taken = sum(1 for other in path.parent.iterdir() if other.name.startswith(path.name + ".damaged"))
    aside = path.with_name(f"{path.name}.damaged" + (f"-{taken + 1}" if taken else ""))
    print(f"DAMAGED CHECKPOINT, set aside as {aside.name}: " + "; ".join(problems), flush=True)
    try:
        path.rename(aside)
    except OSError as error:
        print(f"warning: {path} could not be renamed ({error.strerror}); it is passed over", flush=True)


def init_from_folder(folder: Path, model: nn.Module, config: TrainingConfig) -> None:
    """Set the weights from a Hugging Face folder of safetensors, each rank its own rows.

    Errors: ConfigError for an architecture or sizes that are not the configuration's; CheckpointError for names or
    shapes that do not fit.
    """
    check_fits(config, folder)
    reader, wanted = TensorReader(folder, "model"), model_tensors(model)
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    surplus = [name for name in reader.files if name not in wanted and name not in ignored and "rotary" not in name]
    problems = [f"{name}: is missing" for name in wanted if name not in reader.files]
    problems += [f"{name}: is not a weight of this model" for name in surplus]
    for name in wanted.keys() & reader.files.keys():
        if reader.spec(name)[0] != tuple(wanted[name].shape):
            problems.append(f"{name}: is {list(reader.spec(name)[0])} there, {list(wanted[name].shape)} here")
    if problems:
        raise CheckpointError(f"init_from = {folder}: does not fit:\n  " + "\n  ".join(sorted(problems)[:10]))
    load_tensors(reader, wanted)
